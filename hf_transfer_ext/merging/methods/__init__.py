"""Merge methods: one file per method, with the same name as the function and as `merge_method` in YAML.

A file is imported when its method is first looked up: most import torch, which takes longer than a small merge.
"""

from __future__ import annotations

from hf_transfer_ext.merging.method import MergeMethod, check_is_merge_method
from hf_transfer_ext.registry import Registry

#: Selected by `merge_method` in a configuration. Code outside the package adds its own with `@MERGE_METHODS.register`
#: above `@merge_method(...)`.
MERGE_METHODS: Registry[MergeMethod] = Registry(
    "merge method",
    [
        # Means of models, and stacks of their layers.
        "linear",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "passthrough",
        # Means that also use Fisher diagonals or Gram matrices of each model.
        "fisher",
        "regmean",
        # Sums of changes (task vectors) relative to a base model.
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
        "model_stock",
        "sce",
        "nearswap",
        "arcee_fusion",
        "ram",
        "ramplus_tl",
        # Whole matrices: each thread holds one tensor of all models in memory at a time.
        "tsv",
        "iso_c",
        "iso_cts",
        "knots",
        "wudi",
    ],
    package=__name__,
    check=check_is_merge_method,
)
