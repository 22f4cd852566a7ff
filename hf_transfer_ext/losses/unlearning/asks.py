"""What an unlearning loss may ask for. The names of its arguments say what it needs; the trainer fetches no more."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

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


def check_options(loss: Callable, options: dict[str, Any]) -> None:
    """Refuse an option that the loss does not have, and name those it has."""
    known = options_of(loss)
    unknown = set(options) - set(known)
    if unknown:
        name = getattr(loss, "__name__", str(loss))
        raise ValueError(
            f"{name!r} has no option {', '.join(sorted(unknown))}. "
            f"Its options: {', '.join(f'{k} ({v})' for k, v in known.items()) or 'none'}."
        )
