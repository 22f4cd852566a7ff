"""Losses of unlearning: what the forget set is pushed to, and what holds the retain set. Each is one file.

The names of a loss's arguments say what it needs (`asks.QUANTITIES`); keyword-only arguments are its options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_transfer_ext.losses.unlearning.ce_u import ce_u
from hf_transfer_ext.losses.unlearning.dpo import dpo
from hf_transfer_ext.losses.unlearning.grad_ascent import grad_ascent
from hf_transfer_ext.losses.unlearning.idk import idk
from hf_transfer_ext.losses.unlearning.jensun import jensun
from hf_transfer_ext.losses.unlearning.me import me
from hf_transfer_ext.losses.unlearning.npo import npo
from hf_transfer_ext.losses.unlearning.retain_hidden import retain_hidden
from hf_transfer_ext.losses.unlearning.retain_jsd import retain_jsd
from hf_transfer_ext.losses.unlearning.retain_kl import retain_kl
from hf_transfer_ext.losses.unlearning.retain_nll import retain_nll
from hf_transfer_ext.losses.unlearning.rmu import rmu
from hf_transfer_ext.losses.unlearning.satimp import satimp
from hf_transfer_ext.losses.unlearning.simnpo import simnpo
from hf_transfer_ext.losses.unlearning.tnpo import tnpo
from hf_transfer_ext.losses.unlearning.undial import undial
from hf_transfer_ext.losses.unlearning.wga import wga
from hf_transfer_ext.registry import Registry

UNLEARNING_LOSSES: Registry[Callable] = Registry(
    "unlearning loss",
    [grad_ascent, npo, simnpo, dpo, idk, undial, ce_u, wga, satimp, tnpo, me, jensun, rmu],
)

RETAIN_LOSSES: Registry[Callable] = Registry("retain loss", [retain_nll, retain_kl, retain_jsd, retain_hidden])


@dataclass(frozen=True)
class Method:
    """A published combination of losses: `gamma * forget + alpha * retain`, with the weights of its authors."""

    forget: str
    retain: str | None = None
    gamma: float = 1.0
    alpha: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


#: Methods by the names they are published under. Any part can be set apart from them in the config.
METHODS: dict[str, Method] = {
    "grad_ascent": Method("grad_ascent"),
    "grad_diff": Method("grad_ascent", "retain_nll"),
    "kl_min": Method("grad_ascent", "retain_kl"),
    "npo": Method("npo", "retain_nll"),
    "npo_kl": Method("npo", "retain_kl"),
    "simnpo": Method("simnpo", "retain_nll", gamma=0.125),
    "idk": Method("idk", "retain_nll"),
    "idk_dpo": Method("dpo", "retain_nll"),
    "altpo": Method("dpo", "retain_nll"),
    "undial": Method("undial"),
    "ce_u": Method("ce_u"),
    "wga": Method("wga", "retain_nll"),
    "satimp": Method("satimp", "retain_nll", gamma=0.1),
    "tnpo": Method("tnpo", "retain_nll"),
    "me_gd": Method("me", "retain_nll"),
    "jensun": Method("jensun", "retain_jsd"),
    "rmu": Method("rmu", "retain_hidden"),
}
