"""Edits that make a model forget without training. Each is one file."""

from __future__ import annotations

from hf_transfer_ext.edits.method import EditMethod
from hf_transfer_ext.edits.methods.acu import acu
from hf_transfer_ext.edits.methods.concept_ablation import concept_ablation
from hf_transfer_ext.edits.methods.magnitude_pruning import magnitude_pruning
from hf_transfer_ext.edits.methods.negation import negation
from hf_transfer_ext.edits.methods.shrink_and_perturb import shrink_and_perturb
from hf_transfer_ext.edits.methods.wanda import wanda
from hf_transfer_ext.registry import Registry, declared_as

EDITS: Registry[EditMethod] = Registry(
    "edit",
    [negation, concept_ablation, magnitude_pruning, wanda, shrink_and_perturb, acu],
    check=declared_as(EditMethod, "edit method", "`@edit_method(needs=...)` of `edits.method`"),
)
