"""Losses of unlearning: where the forget set is pushed, and what keeps the retain set in place. One file each.

The names of a loss's arguments say what it needs (`losses.needs.NEEDS`); keyword-only arguments are its options.
Published combinations of them are in `methods/`.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_transfer_ext.losses.needs import check_loss
from hf_transfer_ext.losses.unlearning.causal_whp import causal_whp
from hf_transfer_ext.losses.unlearning.ce_u import ce_u
from hf_transfer_ext.losses.unlearning.dmm import dmm
from hf_transfer_ext.losses.unlearning.dpo import dpo
from hf_transfer_ext.losses.unlearning.flat_logits import flat_logits
from hf_transfer_ext.losses.unlearning.grad_ascent import grad_ascent
from hf_transfer_ext.losses.unlearning.idk import idk
from hf_transfer_ext.losses.unlearning.jensun import jensun
from hf_transfer_ext.losses.unlearning.laf import laf
from hf_transfer_ext.losses.unlearning.llmu import llmu
from hf_transfer_ext.losses.unlearning.me import me
from hf_transfer_ext.losses.unlearning.npo import npo
from hf_transfer_ext.losses.unlearning.poisoned import poisoned
from hf_transfer_ext.losses.unlearning.retain_ap import retain_ap
from hf_transfer_ext.losses.unlearning.retain_dmm import retain_dmm
from hf_transfer_ext.losses.unlearning.retain_hidden import retain_hidden
from hf_transfer_ext.losses.unlearning.retain_jsd import retain_jsd
from hf_transfer_ext.losses.unlearning.retain_kl import retain_kl
from hf_transfer_ext.losses.unlearning.retain_laf import retain_laf
from hf_transfer_ext.losses.unlearning.retain_nll import retain_nll
from hf_transfer_ext.losses.unlearning.rmu import rmu
from hf_transfer_ext.losses.unlearning.satimp import satimp
from hf_transfer_ext.losses.unlearning.scar import scar
from hf_transfer_ext.losses.unlearning.simnpo import simnpo
from hf_transfer_ext.losses.unlearning.tnpo import tnpo
from hf_transfer_ext.losses.unlearning.undial import undial
from hf_transfer_ext.losses.unlearning.wga import wga
from hf_transfer_ext.losses.unlearning.whp import whp
from hf_transfer_ext.registry import Registry

UNLEARNING_LOSSES: Registry[Callable] = Registry(
    "unlearning loss",
    [
        grad_ascent, npo, simnpo, dpo, idk, poisoned, llmu, undial, ce_u, wga, satimp, tnpo, me, flat_logits, jensun,
        whp, causal_whp, dmm, rmu, laf, scar,
    ],
    check=check_loss,
)  # fmt: skip

RETAIN_LOSSES: Registry[Callable] = Registry(
    "retain loss",
    [retain_nll, retain_kl, retain_jsd, retain_hidden, retain_ap, retain_laf, retain_dmm],
    check=check_loss,
)
