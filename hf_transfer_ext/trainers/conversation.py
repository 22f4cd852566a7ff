"""Two models that talk in messages (`losses/hidden/talking_models.py`): their cuts, and the layers above them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_transfer_ext.losses.hidden.talking_models import Speaker
from hf_transfer_ext.models.heads import run_to_head
from hf_transfer_ext.models.plumbing import output_head
from hf_transfer_ext.models.views import decoder_layers
from hf_transfer_ext.tensors import Mask, predicting_rows

#: Tokens whose logits exist at once.
LOGIT_TOKENS = 128
#: The name of the student's gate among the weights, a single number behind tanh.
GATE = "student_gate"


def network_shapes(role: str, width: int, message_size: int) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of the weights of a model's encoder and decoder."""
    return {
        f"{role}_encoder_in": (message_size, width),
        f"{role}_encoder_out": (message_size, message_size),
        f"{role}_decoder_in": (message_size, message_size),
        f"{role}_decoder_out": (width, message_size),
    }


def speaker(
    role: str, model: nn.Module, layer: int, states: Tensor, inputs: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Speaker:
    """A model cut above a decoder layer.

    Its encoder reads each state at a mean square of 1, as a layer that normalizes its input does, and what its decoder
    writes at a token is multiplied by the size of the state there: a model may be cut where its states are large.

    Args:
        role: "student" or "teacher", by which its networks are named in `weights`.
        inputs: What the model is called with.
    """

    size = root_mean_square(states.detach().float())

    def network(part: str, x: Tensor) -> Tensor:
        into, out = weights[f"{role}_{part}_in"], weights[f"{role}_{part}_out"]
        return nn.functional.gelu(x @ into.T) @ out.T

    def encode(known: Tensor) -> Tensor:
        return network("encoder", known.float() / root_mean_square(known.float()))

    def decode(message: Tensor) -> Tensor:
        return size * network("decoder", message)

    def upper(known: Tensor) -> Tensor:
        found: list[Tensor] = []
        with _output_replaced(decoder_layers(model)[layer], known.to(states.dtype)):
            run_to_head(model, found.append, **inputs)
        return found[-1]

    gate = torch.tanh(weights[GATE][0, 0]) if role == "student" and GATE in weights else None
    return Speaker(states, encode, decode, upper, gate)


def root_mean_square(states: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length 1"]:
    """The size of each state, > 0."""
    return states.square().mean(-1, keepdim=True).clamp(min=torch.finfo(states.dtype).tiny).sqrt()


def cross_entropy_of(
    model: nn.Module, mask: Mask, labels: Int[Tensor, " tokens"]
) -> Callable[[Float[Tensor, "batch length width"]], Float[Tensor, " tokens"]]:
    """Cross entropy of each labeled token from what the head reads, a few tokens' logits at a time."""
    head = output_head(model)

    def part(rows: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(rows), targets, reduction="none")

    def task(states: Tensor) -> Tensor:
        rows = predicting_rows(states, mask)
        blocks = zip(rows.split(LOGIT_TOKENS), labels.to(rows.device).split(LOGIT_TOKENS), strict=True)
        return torch.cat([checkpoint(part, *block, use_reentrant=False) for block in blocks])

    return task


@contextmanager
def _output_replaced(layer: nn.Module, states: Tensor) -> Iterator[None]:
    """Within the block a layer, whatever it computes, gives these states to the next one."""

    def instead(module: Any, inputs: Any, output: Any) -> Any:
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layer.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()
