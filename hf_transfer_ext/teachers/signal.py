"""What a teacher says about a batch, and what anything has to offer that is to teach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from hf_transfer_ext.losses.rows import TeacherRows
from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.tensors import IGNORE_INDEX, Labels, Mask


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's distribution at each token that counts.

    Args:
        rows: One row for each token, in the reading order of the batch.
        targets: `(batch, length - 1)`, the tokens that are predicted at the teacher's own positions and `IGNORE_INDEX`
            elsewhere. They take the place of the student's labels, for divergence and cross entropy alike. None where
            the teacher speaks about the labeled tokens, as a model that reads the student's own input does.
    """

    rows: TeacherRows
    targets: Labels | None = None

    @property
    def mask(self) -> Mask | None:
        """True where the teacher says something, or None for the student's labeled tokens."""
        return None if self.targets is None else self.targets != IGNORE_INDEX


@runtime_checkable
class Teacher(Protocol):
    """Anything that teaches. `DistillationTrainer(teacher=...)` takes one in place of a model."""

    @property
    def form(self) -> Form:
        """The form of its rows: the divergence has to accept it."""

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The teacher's view of a batch.

        Args:
            student: The wrapped student, for teachers that live on it.
            inputs: What the student is called with.
            mask: `(batch, length - 1)`, True where the student predicts a labeled token.
        """
