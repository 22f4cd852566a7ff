"""Edits that make a model forget without training. Each is one file."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.edits.method import EditMethod
from hf_transfer_ext.edits.methods.acu import acu
from hf_transfer_ext.edits.methods.concept_ablation import concept_ablation
from hf_transfer_ext.edits.methods.magnitude_pruning import magnitude_pruning
from hf_transfer_ext.edits.methods.negation import negation
from hf_transfer_ext.edits.methods.wanda import wanda
from hf_transfer_ext.registry import Registry


def check(method: Any) -> None:
    """Refuse a plain function: what it needs, and in which ranges its options lie, has to be declared."""
    if not isinstance(method, EditMethod):
        raise ValueError(
            f"{getattr(method, '__name__', method)!r} is not an edit method. Declare what it needs with "
            "`@edit_method(needs=...)` of `edits.method`."
        )


EDITS: Registry[EditMethod] = Registry(
    "edit", [negation, concept_ablation, magnitude_pruning, wanda, acu], check=check
)
