"""Methods of on-policy distillation. One file each; a new one joins by its line in this list."""

from hf_transfer_ext.registry import Registry
from hf_transfer_ext.trainers.on_policy.gkd import gkd
from hf_transfer_ext.trainers.rollout_method import check_method

ON_POLICY_METHODS: Registry = Registry("method of on-policy distillation", [gkd], check=check_method)

__all__ = ["ON_POLICY_METHODS", *ON_POLICY_METHODS]
