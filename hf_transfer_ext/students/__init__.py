"""Initialize students from teachers: depth cuts, learngene expansion, a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from hf_transfer_ext.registry import Registry
from hf_transfer_ext.students.inits.last_depth import last_depth
from hf_transfer_ext.students.inits.linear_expansion import auxiliary_model, linear_expansion
from hf_transfer_ext.students.inits.stage_sharing import stage_shared_model, stage_sharing
from hf_transfer_ext.students.inits.uniform_depth import uniform_depth
from hf_transfer_ext.students.shape import StudentShape

#: Functions that initialize a student from its teacher: `(teacher, shape: StudentShape, **options) -> new model`. They
#: raise `ValueError` for a shape that they cannot create.
STUDENT_INITS = Registry("student initialization", [uniform_depth, last_depth, linear_expansion, stage_sharing])

#: Initialization -> the model with shared layers that its paper distills and expands: `(teacher, **options) -> model`.
AUXILIARIES: dict[str, Callable[..., PreTrainedModel]] = {
    "linear_expansion": auxiliary_model,
    "stage_sharing": stage_shared_model,
}

__all__ = ["AUXILIARIES", "STUDENT_INITS", "StudentShape", *STUDENT_INITS]
