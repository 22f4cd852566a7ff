"""The shape of a student: depth, width, heads and vocabulary, each as in the teacher if not specified."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

#: Field -> its name in error messages.
_MEANING = {
    "depth": "number of layers",
    "width": "hidden size",
    "heads": "number of attention heads",
    "vocabulary": "number of vocabulary entries",
}


@dataclass(frozen=True)
class StudentShape:
    """The size of a student; None means the same as the teacher.

    Args:
        depth: Number of layers.
        width: Hidden size.
        heads: Attention heads per layer.
        vocabulary: Number of vocabulary entries.

    Raises:
        ValueError: A number is less than 1.
    """

    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"`{field.name}` of a student must be at least 1, got {value}.")

    @staticmethod
    def of(model: Any) -> StudentShape:
        """The shape of a model."""
        text = model.config.get_text_config()
        return StudentShape(text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size)

    def like(self, teacher: Any) -> StudentShape:
        """This shape, with the teacher's values for unspecified fields."""
        theirs = StudentShape.of(teacher)
        return StudentShape(*(getattr(self, f.name) or getattr(theirs, f.name) for f in fields(self)))


def require_only(shape: StudentShape, teacher: Any, changes: str, init: str, advice: str) -> StudentShape:
    """The complete shape, after refusing one that an initialization cannot create.

    Args:
        changes: The only field in which the student may differ from the teacher.
        init: Name of the initialization.
        advice: How to get a student of the requested shape, for the error message.

    Raises:
        ValueError: A field other than `changes` differs from the teacher's.
    """
    whole, theirs = shape.like(teacher), StudentShape.of(teacher)
    for name, meaning in _MEANING.items():
        wanted, own = getattr(whole, name), getattr(theirs, name)
        if name != changes and wanted != own:
            raise ValueError(
                f"{init} can only change the {_MEANING[changes]}, but `{name}` is {wanted} and the "
                f"teacher's {meaning} is {own}. {advice}"
            )
    return whole
