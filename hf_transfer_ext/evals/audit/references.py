"""The models that a membership attacker may hold beside the one under attack, and what attacks do with them."""

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
        retrained: A model that never saw the forget set; None where there is none.
        shadow: A second such model, for attacks that are optimized against one; None where there is none.
        made: What attacks computed from these alone, kept for the next model under attack.
    """

    original: Subject
    retrained: Subject | None = None
    shadow: Subject | None = None
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> Subject | None:
        """The model without the forget set that an attack may be optimized against."""
        return self.shadow or self.retrained


def optimized_on_retrained(attack: Method) -> Method:
    """Decorator: the attack is optimized against `References.untrained`, whose own scores then are no floor for it."""
    attack.optimized_on_retrained = True  # type: ignore[attr-defined]
    return attack


def is_optimized_on_retrained(attack: Callable) -> bool:
    return getattr(attack, "optimized_on_retrained", False)
