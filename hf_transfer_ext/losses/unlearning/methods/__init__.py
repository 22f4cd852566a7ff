"""Published unlearning methods: one file each, named as the class and as `method` in a config."""

from __future__ import annotations

from hf_transfer_ext.losses.unlearning.methods.altpo import altpo
from hf_transfer_ext.losses.unlearning.methods.causal_whp import causal_whp
from hf_transfer_ext.losses.unlearning.methods.ce_u import ce_u
from hf_transfer_ext.losses.unlearning.methods.concept_poisoning import concept_poisoning
from hf_transfer_ext.losses.unlearning.methods.dmm import dmm
from hf_transfer_ext.losses.unlearning.methods.grad_ascent import grad_ascent
from hf_transfer_ext.losses.unlearning.methods.grad_diff import grad_diff
from hf_transfer_ext.losses.unlearning.methods.idk import idk
from hf_transfer_ext.losses.unlearning.methods.idk_ap import idk_ap
from hf_transfer_ext.losses.unlearning.methods.idk_dpo import idk_dpo
from hf_transfer_ext.losses.unlearning.methods.jensun import jensun
from hf_transfer_ext.losses.unlearning.methods.kl_min import kl_min
from hf_transfer_ext.losses.unlearning.methods.l1_sparse import l1_sparse
from hf_transfer_ext.losses.unlearning.methods.laf import laf
from hf_transfer_ext.losses.unlearning.methods.lat import lat
from hf_transfer_ext.losses.unlearning.methods.llmu import llmu
from hf_transfer_ext.losses.unlearning.methods.me_gd import me_gd
from hf_transfer_ext.losses.unlearning.methods.npo import npo
from hf_transfer_ext.losses.unlearning.methods.npo_kl import npo_kl
from hf_transfer_ext.losses.unlearning.methods.npo_sam import npo_sam
from hf_transfer_ext.losses.unlearning.methods.pdu import pdu
from hf_transfer_ext.losses.unlearning.methods.prune_first import prune_first
from hf_transfer_ext.losses.unlearning.methods.qaf import qaf
from hf_transfer_ext.losses.unlearning.methods.random_labels import random_labels
from hf_transfer_ext.losses.unlearning.methods.reasoned_idk import reasoned_idk
from hf_transfer_ext.losses.unlearning.methods.rmu import rmu
from hf_transfer_ext.losses.unlearning.methods.satimp import satimp
from hf_transfer_ext.losses.unlearning.methods.scar import scar
from hf_transfer_ext.losses.unlearning.methods.score_forgetting_distillation import score_forgetting_distillation
from hf_transfer_ext.losses.unlearning.methods.simnpo import simnpo
from hf_transfer_ext.losses.unlearning.methods.sure import sure
from hf_transfer_ext.losses.unlearning.methods.tar import tar
from hf_transfer_ext.losses.unlearning.methods.tnpo import tnpo
from hf_transfer_ext.losses.unlearning.methods.undial import undial
from hf_transfer_ext.losses.unlearning.methods.unstar import unstar
from hf_transfer_ext.losses.unlearning.methods.wga import wga
from hf_transfer_ext.losses.unlearning.methods.whp import whp
from hf_transfer_ext.losses.unlearning_method import Method, check_method
from hf_transfer_ext.registry import Registry

#: Found by the `method` of a config, which can set any part apart from it. Code outside the package adds its own with
#: `@METHODS.register` above a subclass of `Method`.
METHODS: Registry[type[Method]] = Registry(
    "unlearning method",
    [
        # Away from the answers.
        grad_ascent, grad_diff, kl_min, wga, satimp,
        npo, npo_kl, simnpo, tnpo, npo_sam, pdu,
        # Against rounding, relearning and attacks.
        qaf, lat, tar, sure, l1_sparse, prune_first,
        # Towards another answer.
        idk, idk_ap, idk_dpo, altpo, jensun, llmu, random_labels, concept_poisoning, reasoned_idk, unstar,
        # Towards other distributions or hidden states.
        undial, ce_u, me_gd, whp, causal_whp, score_forgetting_distillation, dmm, rmu, laf, scar,
    ],
    check=check_method,
)  # fmt: skip
