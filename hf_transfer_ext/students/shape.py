"""The shape of a student: depth, width, heads and vocabulary, each the teacher's own where it is not said."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

#: Field -> what it is called in an error.
_MEANING = {
    "depth": "number of layers",
    "width": "hidden size",
    "heads": "number of attention heads",
    "vocabulary": "number of vocabulary entries",
}


@dataclass(frozen=True)
class StudentShape:
    """How large a student is; None stands for the teacher's own.

    Args:
        depth: Layers.
        width: Hidden size.
        heads: Attention heads of a layer.
        vocabulary: Entries of the vocabulary.

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
                raise ValueError(f"`{field.name}` of a student has to be at least 1, got {value}.")

    @staticmethod
    def of(model: Any) -> StudentShape:
        """The shape of a model."""
        text = model.config.get_text_config()
        return StudentShape(text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size)

    def like(self, teacher: Any) -> StudentShape:
        """This shape with the teacher's own numbers where it says nothing."""
        theirs = StudentShape.of(teacher)
        return StudentShape(*(getattr(self, f.name) or getattr(theirs, f.name) for f in fields(self)))


def require_only(shape: StudentShape, teacher: Any, changes: str, init: str, advice: str) -> StudentShape:
    """The whole shape, after refusing one that an initialization cannot make.

    Args:
        changes: The one field in which its students may differ from the teacher.
        init: The initialization's name.
        advice: What makes a student of the other shape, for the error.

    Raises:
        ValueError: Another field than `changes` differs from the teacher's.
    """
    whole, theirs = shape.like(teacher), StudentShape.of(teacher)
    for name, meaning in _MEANING.items():
        wanted, own = getattr(whole, name), getattr(theirs, name)
        if name != changes and wanted != own:
            raise ValueError(
                f"{init} makes students of another {_MEANING[changes]} only, but `{name}` is {wanted} and the "
                f"teacher's {meaning} is {own}. {advice}"
            )
    return whole
