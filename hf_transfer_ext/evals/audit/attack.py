"""Define attacks: functions of a model and the attacker's data, and how to interpret their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import update_wrapper
from inspect import signature
from typing import Any

from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.options import label_with

#: What an attacker must be able to do.
ACCESS = {
    "prompts": "ask the model",
    "weights": "read and change the weights",
    "fine-tuning": "train the model further",
}

YARDSTICKS = ("plain_question", "plain_generation", None)


class Attack:
    """A score for each forget example, and how to interpret it.

    A score is a share in [0, 1]: 0 if nothing of the answer is recovered, 1 if all of it is, NaN if an example cannot
    be scored.

    Args:
        function: `(subject, data, **options)` -> scores. It raises a `ValueError` if the attack does not apply. With a
            third argument `untrained`, it also gets the auditor's own model that never saw the forget set (the shadow
            model, else the retrained one; None if there is neither).
        access: What the attacker must be able to do, one of `ACCESS`.
        yardstick: Attack that measures how much the original knows: "plain_question" if the score is the probability
            of the answer, "plain_generation" if it is a share of its words; None for an attack with its own scale, for
            which the original is attacked in the same way.
        texts: Whether it also works on rows of plain text, without a question.
        needs_floor: Whether a model that never saw the data also gets such scores, so that a verdict needs a measured
            floor: a retrained model, or holdout rows.
        floor_attack: Attack on the retrained model that gives the floor, if it cannot be attacked in the same way;
            None for the attack itself.
        fit: `(original, data, plain scores of the original, options)` -> (options, note): removes options that do not
            work on the original either.
        second_reading: `(scores, scores of the original under the same attack)` -> a sentence on another
            interpretation of the score.
    """

    __name__: str

    def __init__(
        self,
        function: Callable[..., Values],
        *,
        access: str = "prompts",
        yardstick: str | None = "plain_question",
        texts: bool = False,
        needs_floor: bool = False,
        floor_attack: str | None = None,
        fit: Callable[..., tuple[dict[str, Any], str]] | None = None,
        second_reading: Callable[[Values, Values], str] | None = None,
    ) -> None:
        self.function, self.access, self.yardstick = function, access, yardstick
        self.texts, self.needs_floor, self.floor_attack = texts, needs_floor, floor_attack
        self.fit, self.second_reading = fit, second_reading
        self.takes_untrained = "untrained" in signature(function).parameters
        update_wrapper(self, function)
        check_attack(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Values:
        return self.function(*args, **kwargs)

    def label(self, options: Mapping[str, Any]) -> str:
        """`quantization(bits=4)`: the name with its options."""
        return label_with(self.__name__, options)


def attack(**declared: Any) -> Callable[[Callable[..., Values]], Attack]:
    """Decorator: `@attack(access="weights")` above a function of a subject and its data."""
    return lambda function: Attack(function, **declared)


def check_attack(attack: Any) -> None:
    """Refuse an attack that an audit cannot run; called by `ATTACKS.register`.

    Raises:
        ValueError: Not an `Attack`, an unknown access or yardstick, or a function with other arguments.
    """
    if not isinstance(attack, Attack):
        raise ValueError(
            f"Declare an attack with `@attack(access=...)` above a function of a subject and data; got {attack!r}."
        )
    if attack.access not in ACCESS:
        raise ValueError(f"The `access` of an attack must be one of {', '.join(ACCESS)}, got {attack.access!r}.")
    if attack.yardstick not in YARDSTICKS:
        known = ", ".join(map(str, YARDSTICKS))
        raise ValueError(f"The `yardstick` of {attack.__name__} must be one of {known}, got {attack.yardstick!r}.")
    parameters = list(signature(attack.function).parameters)
    if len(parameters) < 2:
        raise ValueError(
            f"The attack {attack.__name__} must take (subject, data), but it takes ({', '.join(parameters)})."
        )


def explanation_of(method: Any) -> str:
    """The first sentence of a method's docstring."""
    text = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
