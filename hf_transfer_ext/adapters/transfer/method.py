"""What a closed-form transfer method is: the change of one linear layer, carried from a source base to a target base.

A method is a function `method(layer, **options) -> LoraFactors | None`. Every closed form of the literature multiplies
the source's change from both sides, `outputs @ change @ inputs`, and differs in where the two matrices come from. So
the rank stays, and the dense change is never built. None leaves the layer without an adapter, which is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.registry import keyword_options, unknown_name
from hf_transfer_ext.weights.lora import LoraFactors

#: What a method may need beside the two weights and the change.
NEEDS = {
    "residual_map": "tokens that both vocabularies share, with their input embeddings",
    "activations": "texts that both models read (`texts`)",
    "heads": "the number of attention heads of both models",
}


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: of queries, and of keys and values."""

    queries: int
    keys: int


@dataclass(frozen=True)
class LinearPair:
    """A linear layer of the target base, with the source layer whose change it gets.

    Args:
        module: The target's module name.
        source_module: The source's.
        source: Weight of the source base.
        target: Weight of the target base.
        change: What the source adapter adds to `source`.
        residual_map: Maps the source's residual stream to the target's: x_target = x_source @ residual_map.
        source_inputs: Inputs of the source layer at tokens that both models read.
        target_inputs: Inputs of the target layer at the same tokens.
        source_outputs, target_outputs: Outputs of the two layers at these tokens.
        heads: Heads of source and target.
        matched_heads: For each query head of the target, the one of the source that it corresponds to, or None.
    """

    module: str
    source_module: str
    source: Float[Tensor, "source_out source_in"]
    target: Float[Tensor, "target_out target_in"]
    change: LoraFactors
    residual_map: Float[Tensor, "source_hidden target_hidden"] | None = None
    source_inputs: Float[Tensor, "tokens source_in"] | None = None
    target_inputs: Float[Tensor, "tokens target_in"] | None = None
    source_outputs: Float[Tensor, "tokens source_out"] | None = None
    target_outputs: Float[Tensor, "tokens target_out"] | None = None
    heads: tuple[Heads, Heads] | None = None
    matched_heads: tuple[int | None, ...] | None = None

    @property
    def kind(self) -> str:
        """The last part of the module's name: "q_proj", "down_proj", ..."""
        return self.module.rpartition(".")[2]

    def need(self, name: str) -> Any:
        """A field that the method has declared among its needs; a `ValueError` where it is not there."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"`{name}` of {self.module!r} is not known. The method has to declare the need for it.")
        return value

    def carried(
        self, outputs: Float[Tensor, "target_out source_out"], inputs: Float[Tensor, "source_in target_in"]
    ) -> LoraFactors:
        """`outputs @ change @ inputs`, as factors of the same rank."""
        return LoraFactors((outputs @ self.change.left).contiguous(), (self.change.right @ inputs).contiguous())

    def require_equal_shapes(self, method: str) -> None:
        """Refuse a pair of layers of different shapes."""
        if self.source.shape != self.target.shape:
            raise ValueError(
                f"`{method}` needs equal shapes, but {self.source_module!r} is {list(self.source.shape)} in the "
                f"source and {self.module!r} is {list(self.target.shape)} in the target. Use cross_lora, ridge or "
                "trans_lora."
            )


class TransferMethod:
    """A transfer method: callable as the function it wraps, with what it needs.

    Args:
        needs: Names out of `NEEDS`.
    """

    def __init__(self, function: Callable[..., LoraFactors | None], needs: tuple[str, ...]) -> None:
        for need in needs:
            if need not in NEEDS:
                raise ValueError(unknown_name("need of a transfer method", need, NEEDS))
        functools.update_wrapper(self, function)
        self.__name__: str = function.__name__
        self.function, self.needs = function, needs
        self.options = keyword_options(function)

    def __call__(self, layer: LinearPair, **options: Any) -> LoraFactors | None:
        return self.function(layer, **options)


def transfer_method(*, needs: tuple[str, ...] = ()) -> Callable[[Callable[..., LoraFactors | None]], TransferMethod]:
    """Declare what a method needs; the arguments are those of `TransferMethod`."""
    return lambda function: TransferMethod(function, needs)


def polar(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest matrix with orthonormal rows or columns: U V^T of the singular value decomposition U S V^T."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def product_norm(factors: LoraFactors) -> float:
    """Frobenius norm of `left @ right`, from two small products."""
    grams = factors.left.T @ factors.left, factors.right @ factors.right.T
    return float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())
