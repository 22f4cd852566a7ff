"""Methods of on-policy distillation. One file each; a new one joins by its line in this list."""

from hf_transfer_ext.registry import Registry
from hf_transfer_ext.trainers.on_policy.distillm import distillm
from hf_transfer_ext.trainers.on_policy.distillm_2 import distillm_2
from hf_transfer_ext.trainers.on_policy.gkd import gkd
from hf_transfer_ext.trainers.on_policy.minillm import minillm
from hf_transfer_ext.trainers.on_policy.sampled_reverse_kl import sampled_reverse_kl
from hf_transfer_ext.trainers.rollout_method import check_method

ON_POLICY_METHODS: Registry = Registry(
    "method of on-policy distillation", [gkd, sampled_reverse_kl, distillm, distillm_2, minillm], check=check_method
)

__all__ = ["ON_POLICY_METHODS", *ON_POLICY_METHODS]
