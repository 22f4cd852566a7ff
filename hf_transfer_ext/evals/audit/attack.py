"""What an attack is: a function of a model and what its attacker holds, and what its score is compared with."""

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
    """A score of each forget example, and how to read it.

    A score is a share in [0, 1]: 0 where nothing of the answer comes, 1 where all of it does; NaN where an example
    cannot be scored.

    Args:
        function: `(subject, data, **options)` -> scores. A `ValueError` it raises says why it does not apply.
        access: What the attacker needs, one of `ACCESS`.
        yardstick: Attack under which the original shows what there was to forget: "plain_question" where the score is
            the probability of the answer, "plain_generation" where it is a share of its words; None for an attack
            whose score has a scale of its own, so that the original is attacked in the same way.
        texts: Whether it works on rows of plain text as well, without a question.
        needs_floor: A model that never knew earns such scores too, so that nothing can be told without a measured
            floor: a retrained model, or holdout rows.
        floor_attack: The attack on the retrained model that gives the floor, where it cannot be attacked in the same
            way; None for the attack itself.
        fit: `(original, data, plain scores of the original, options)` -> (options, note): leaves out what the
            original itself cannot do.
        second_reading: `(scores, the original's under the same attack)` -> a sentence on what else the score says.
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
        update_wrapper(self, function)
        check_attack(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Values:
        return self.function(*args, **kwargs)

    def label(self, options: Mapping[str, Any]) -> str:
        """`quantization(bits=4)`: the name with the given options."""
        return label_with(self.__name__, options)


def attack(**declared: Any) -> Callable[[Callable[..., Values]], Attack]:
    """Decorator: `@attack(access="weights")` above a function of a subject and its data."""
    return lambda function: Attack(function, **declared)


def check_attack(attack: Any) -> None:
    """Refuse what an audit could not run; `ATTACKS.register` calls it.

    Raises:
        ValueError: Not an `Attack`, an unknown access or yardstick, or a function of other arguments.
    """
    if not isinstance(attack, Attack):
        raise ValueError(
            f"An attack is declared with `@attack(access=...)` above a function of a subject and data; got {attack!r}."
        )
    if attack.access not in ACCESS:
        raise ValueError(f"An attacker's `access` is one of {', '.join(ACCESS)}; got {attack.access!r}.")
    if attack.yardstick not in YARDSTICKS:
        known = ", ".join(map(str, YARDSTICKS))
        raise ValueError(f"The `yardstick` of {attack.__name__} must be one of {known}; got {attack.yardstick!r}.")
    parameters = list(signature(attack.function).parameters)
    if len(parameters) < 2:
        raise ValueError(
            f"The attack {attack.__name__} is called with (subject, data); it takes ({', '.join(parameters)})."
        )


def explanation_of(method: Any) -> str:
    """The first sentence of a method's docstring."""
    text = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
