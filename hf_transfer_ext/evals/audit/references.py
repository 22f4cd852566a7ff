"""The reference models of a membership attacker, in addition to the attacked model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_transfer_ext.evals.audit.subject import Subject

Method = TypeVar("Method", bound=Callable)


@dataclass
class References:
    """A model that was trained on the rows, and models that were not.

    Args:
        original: The model before unlearning.
        retrained: A model that never saw the forget set; None if there is none.
        shadow: A second such model, for attacks that are optimized against one; None if there is none.
        made: Cache of what attacks computed from these models alone, for the next attacked model.
    """

    original: Subject
    retrained: Subject | None = None
    shadow: Subject | None = None
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> Subject | None:
        """The model without the forget set that attacks are optimized against."""
        return self.shadow or self.retrained


def optimized_on_retrained(attack: Method) -> Method:
    """Decorator: the attack is optimized against `References.untrained`, whose scores are then not a valid floor."""
    attack.optimized_on_retrained = True  # type: ignore[attr-defined]
    return attack


def is_optimized_on_retrained(attack: Callable) -> bool:
    return getattr(attack, "optimized_on_retrained", False)
