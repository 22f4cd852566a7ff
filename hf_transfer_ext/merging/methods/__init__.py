"""Merge methods: one file per method, with the same name as the function and as `merge_method` in YAML."""

from __future__ import annotations

from hf_transfer_ext.merging.method import MergeMethod, check_is_merge_method
from hf_transfer_ext.merging.methods.arcee_fusion import arcee_fusion
from hf_transfer_ext.merging.methods.breadcrumbs import breadcrumbs
from hf_transfer_ext.merging.methods.breadcrumbs_ties import breadcrumbs_ties
from hf_transfer_ext.merging.methods.dare_linear import dare_linear
from hf_transfer_ext.merging.methods.dare_ties import dare_ties
from hf_transfer_ext.merging.methods.della import della
from hf_transfer_ext.merging.methods.della_linear import della_linear
from hf_transfer_ext.merging.methods.fisher import fisher
from hf_transfer_ext.merging.methods.iso_c import iso_c
from hf_transfer_ext.merging.methods.iso_cts import iso_cts
from hf_transfer_ext.merging.methods.karcher import karcher
from hf_transfer_ext.merging.methods.knots import knots
from hf_transfer_ext.merging.methods.linear import linear
from hf_transfer_ext.merging.methods.model_stock import model_stock
from hf_transfer_ext.merging.methods.multislerp import multislerp
from hf_transfer_ext.merging.methods.nearswap import nearswap
from hf_transfer_ext.merging.methods.nuslerp import nuslerp
from hf_transfer_ext.merging.methods.passthrough import passthrough
from hf_transfer_ext.merging.methods.ram import ram
from hf_transfer_ext.merging.methods.ramplus_tl import ramplus_tl
from hf_transfer_ext.merging.methods.regmean import regmean
from hf_transfer_ext.merging.methods.sce import sce
from hf_transfer_ext.merging.methods.slerp import slerp
from hf_transfer_ext.merging.methods.task_arithmetic import task_arithmetic
from hf_transfer_ext.merging.methods.ties import ties
from hf_transfer_ext.merging.methods.tsv import tsv
from hf_transfer_ext.merging.methods.wudi import wudi
from hf_transfer_ext.registry import Registry

#: Selected by `merge_method` in a configuration. Code outside the package adds its own with `@MERGE_METHODS.register`
#: above `@merge_method(...)`.
MERGE_METHODS: Registry[MergeMethod] = Registry(
    "merge method",
    [
        # Means of models, and stacks of their layers.
        linear,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        passthrough,
        # Means that also use Fisher diagonals or Gram matrices of each model.
        fisher,
        regmean,
        # Sums of changes (task vectors) relative to a base model.
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        breadcrumbs,
        breadcrumbs_ties,
        della,
        della_linear,
        model_stock,
        sce,
        nearswap,
        arcee_fusion,
        ram,
        ramplus_tl,
        # Whole matrices: each thread holds one tensor of all models in memory at a time.
        tsv,
        iso_c,
        iso_cts,
        knots,
        wudi,
    ],
    check=check_is_merge_method,
)
