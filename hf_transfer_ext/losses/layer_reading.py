"""What a loss inside the network reads of a layer of each model, and whether it needs a projection.

A loss states it with `@reads(...)`; the trainer captures that, and nothing else:

- "states": `loss(student, teacher, projection, **options)`, the hidden states `(tokens, width)` at the positions that
  count. The projection, `(teacher_width, width)` or None for equal widths, is trained along.
- "features": as "states", but what the heads read, whatever the layer map; with `directions`,
  `(tokens, teacher_width)`, as a fourth argument: the row of the teacher's head for the labeled token.
- "logits": `loss(student, teacher, **options)`, logits of an auxiliary head on what the student's head reads, which is
  trained along, and the teacher's, `(tokens, top)`, for the teacher's likeliest tokens.
- "sequences": `loss(student, teacher, mask, **options)`, the hidden states of whole texts `(texts, length, width)`.
- "relations": the same for queries, keys and values of all heads, side by side: called for each, and summed.
- "scores": the same for attention scores before their softmax, `(texts, heads, length, length)`.
- "attention": `loss(student_scores, teacher_scores, student_values, teacher_values, mask, **options)`, these scores
  and the values of all attention heads, side by side.
- "messages": `loss(student, teacher, task, at_tokens, **options)`, both models cut at one pair of layers, with
  networks that are trained along (`losses.hidden.talking_models.Speaker`).

Each returns one value for each token. In language models those at the positions that predict a labeled token count, in
encoders those of all tokens but padding, in vision-language models those of all tokens that both models read. What is
read at the heads ("features", "logits") always counts where a labeled token is predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

from hf_transfer_ext.registry import keyword_options, unknown_name

Reading = Literal["states", "features", "logits", "sequences", "relations", "scores", "attention", "messages"]
Loss = TypeVar("Loss", bound=Callable[..., Any])

READINGS: tuple[Reading, ...] = get_args(Reading)
#: Readings that are taken at the heads, whatever the layer map.
AT_HEADS: tuple[Reading, ...] = ("features", "logits")
#: Readings of hidden states between layers, which embeddings have as well.
OF_STATES: tuple[Reading, ...] = ("states", "sequences")
#: Readings of the attention in a layer.
OF_ATTENTION: tuple[Reading, ...] = ("relations", "scores", "attention")

_READINGS: dict[Callable[..., Any], Reading] = {}
_WEIGHTS: dict[Callable[..., Any], float] = {}


def reads(reading: str, *, weight: float = 1.0) -> Callable[[Loss], Loss]:
    """Decorator of a loss inside the network: what it reads of each layer.

    Args:
        weight: Its factor where no setting names one, > 0. A loss whose paper has it alone may be too large beside a
            divergence.
    """
    if reading not in READINGS:
        raise ValueError(unknown_name("reading of a layer", reading, READINGS))

    def note(loss: Loss) -> Loss:
        _READINGS[loss], _WEIGHTS[loss] = cast(Reading, reading), weight
        return loss

    return note


def reading_of(loss: Callable[..., Any]) -> Reading:
    """What a loss reads of each layer."""
    return _READINGS[loss]


def default_weight(loss: Callable[..., Any]) -> float:
    """The factor of a loss where no setting names one."""
    return _WEIGHTS[loss]


def check_hidden_loss(loss: Callable[..., Any]) -> None:
    """Refuse a loss inside the network that does not state what it reads.

    Raises:
        ValueError: It has no `@reads(...)`.
    """
    if loss not in _READINGS:
        raise ValueError(
            f"The loss {getattr(loss, '__name__', loss)!r} does not state what it reads of a layer. Write "
            f"`@reads(...)` of losses/layer_reading.py above it, with one of {', '.join(READINGS)}."
        )


def hidden_options(loss: Callable[..., Any]) -> list[str]:
    """The options that a user may set; `causal` follows from the models."""
    return [name for name in keyword_options(loss) if name != "causal"]
