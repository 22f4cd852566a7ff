"""Merge methods: one file each, named as the function and as `merge_method` in YAML."""

from __future__ import annotations

from hf_transfer_ext.merging.method import MergeMethod
from hf_transfer_ext.merging.methods.linear import linear
from hf_transfer_ext.merging.methods.passthrough import passthrough
from hf_transfer_ext.merging.methods.task_arithmetic import task_arithmetic
from hf_transfer_ext.registry import Registry

#: Found by the `merge_method` of a configuration. Code outside the package adds its own with `@MERGE_METHODS.register`
#: above `@merge_method(...)`.
MERGE_METHODS: Registry[MergeMethod] = Registry("merge method", [linear, task_arithmetic, passthrough])
