"""Token divergences between a student and a teacher. One file each; a new one joins by its line in this list."""

from hf_transfer_ext.losses.distillation.adaptive_kl import adaptive_kl
from hf_transfer_ext.losses.distillation.forward_kl import forward_kl
from hf_transfer_ext.losses.distillation.generalized_jsd import generalized_jsd
from hf_transfer_ext.losses.distillation.reverse_kl import reverse_kl
from hf_transfer_ext.losses.distillation.skew_kl import skew_kl
from hf_transfer_ext.losses.distillation.skew_reverse_kl import skew_reverse_kl
from hf_transfer_ext.losses.distillation.total_variation import total_variation
from hf_transfer_ext.losses.slopes import check_signature
from hf_transfer_ext.registry import Registry

DISTILLATION_LOSSES = Registry(
    "distillation loss",
    [forward_kl, reverse_kl, generalized_jsd, skew_kl, skew_reverse_kl, total_variation, adaptive_kl],
    check=check_signature,
)

__all__ = ["DISTILLATION_LOSSES", *DISTILLATION_LOSSES]
