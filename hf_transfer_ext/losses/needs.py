"""What an unlearning loss may ask for. The names of its arguments say what it needs; the trainer fetches no more."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.registry import unknown_name

Tokens = Float[Tensor, " tokens"]
TokenIds = Int[Tensor, " tokens"]
TokenRows = Float[Tensor, "tokens vocab"]
HiddenRows = Float[Tensor, "tokens hidden"]
Sequences = Float[Tensor, " sequences"]

#: Argument -> what it holds. Tokens are the answers' tokens alone, of all sequences of a batch one after the other.
QUANTITIES = {
    "log_probs": "log-probability of each token, in nats",
    "reference_log_probs": "the same under the reference",
    "logits": "logits at each token, over the vocabulary",
    "reference_logits": "the same of the reference",
    "targets": "id of each token",
    "refusal_targets": "id of the refusal's token for each token, the refusal repeated as often as needed",
    "hidden": "hidden state of one layer at each token",
    "reference_hidden": "the same of the reference",
    "control": "a fixed random direction as long as a hidden state",
    "nll": "negative log-likelihood of each answer, the sum over its tokens, in nats",
    "reference_nll": "the same under the reference",
    "lengths": "number of tokens of each answer",
    "alternative_nll": "`nll` of an alternative answer to the same question",
    "alternative_lengths": "number of tokens of each alternative answer",
    "reference_alternative_nll": "the same under the reference",
}

Over = Literal["tokens", "later tokens", "sequences"]
Loss = TypeVar("Loss", bound=Callable)


def averaged_over(what: str) -> Callable[[Loss], Loss]:
    """Decorator: the loss is one value for each of these, and the trainer takes their mean over a whole step.

    Args:
        what: "tokens"; "later tokens" (without each answer's first, whose value must be 0); or "sequences".
    """

    def mark(loss: Loss) -> Loss:
        loss.over = what  # type: ignore[attr-defined]
        return loss

    return mark


def over(loss: Callable) -> str:
    return loss.over  # type: ignore[attr-defined]


def asked_quantities(loss: Callable) -> set[str]:
    """The quantities among a loss's arguments."""
    return {name for name in inspect.signature(loss).parameters if name in QUANTITIES}


def options_of(loss: Callable) -> dict[str, Any]:
    """A loss's own options with their defaults."""
    parameters = inspect.signature(loss).parameters
    return {name: p.default for name, p in parameters.items() if name not in QUANTITIES}


def require_at_least(name: str, value: float, lowest: float, *, strictly: bool = False) -> None:
    """Refuse an option out of its range; the losses check their own."""
    if value < lowest or (strictly and value == lowest):
        raise ValueError(f"`{name}` must be {'>' if strictly else '>='} {lowest:g}, got {value}.")


def check_options(loss: Callable, options: dict[str, Any]) -> None:
    """Refuse an option that the loss does not have, and a value that is out of its range."""
    known = options_of(loss)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {loss.__name__}", option, known or ["(it has none)"]))
    shapes = {"logits": (1, 2), "reference_logits": (1, 2), "hidden": (1, 2), "reference_hidden": (1, 2)}
    asked: dict[str, Tensor] = {name: torch.ones(shapes.get(name, (1,))) for name in asked_quantities(loss)}
    for name in asked:
        if name.endswith("targets"):
            asked[name] = torch.ones(1, dtype=torch.long)
        elif name == "control":
            asked[name] = torch.ones(2)
    loss(**asked, **options)
