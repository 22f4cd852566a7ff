r"""The gradient norm of every sequence of a batch from one backward pass, without computing any weight's gradient.

A linear layer sees the states :math:`a_t` of a sequence and, in the backward pass, receives the gradients :math:`g_t`
of its outputs. The sequence's gradient is :math:`\sum_t g_t a_t^T`, and its squared norm needs no such matrix:

.. math:: \Big\| \sum_t g_t a_t^T \Big\|^2 = \sum_{t, u} \langle g_t, g_u \rangle \langle a_t, a_u \rangle

An embedding is a linear layer on one-hot states, so a head tied to it makes two uses of one weight, and the products
between the two count as well. Norm weights and biases have one number per feature; their gradients are summed as is.

Calls are recognized by function, not by class: whatever applies a weight through `linear`, `embedding`, `addmm`,
`layer_norm`, `rms_norm`, or a product or sum with one number per feature is covered. Any other use of a trainable
weight is detected and refused.

Source: Goodfellow, "Efficient per-example gradient computations", 2015, https://arxiv.org/abs/1510.01799; for tokens,
Li et al., "Large language models can be strong differentially private learners", 2022,
https://arxiv.org/abs/2110.05679
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Where the terms of a squared norm add up to less than this share of their absolute values, rounding would show: the
#: norm is then taken of the gradient matrix itself.
CANCELLATION = 1e-2

_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")
_SUMS = ("add", "__add__", "__radd__")
_GATHERS = ("__getitem__", "index_select", "gather", "take_along_dim")


class UnknownUse(Exception):
    """A trainable weight is used in a way for which no rule exists; the message says how."""


def gradient_norms(
    weights: Sequence[Tensor], losses: Callable[[], Float[Tensor, " samples"]], *, samples: int, length: int
) -> Float[Tensor, " samples"]:
    """L2 norm of the gradient of each sample's loss with respect to all `weights`: one forward, one backward pass.

    Needs the memory of the activations of all samples; for a weight that is used more than once (a tied embedding),
    also the states and gradients of these uses. At most one weight's gradient, of one sample, exists at a time.

    Args:
        weights: The trainable weights; one that is not used counts as 0.
        losses: Runs the model and returns the loss of each sample, which must not depend on other samples.
        samples: Number of sequences in the batch, the first dimension of all activations.
        length: Number of tokens of each, padding included; flattened activations are split by it.

    Returns:
        In float64.

    Raises:
        UnknownUse: A weight is used in a way for which no rule exists.
    """
    recorder = _Recorder(weights, samples, length)
    try:
        with recorder:
            total = losses().sum()
        _, *direct = torch.autograd.grad(total, [recorder.anchor, *weights], allow_unused=True)
        if any(gradient is not None for gradient in direct):
            raise UnknownUse("a weight is used by an operation that is not a function of torch")
        return recorder.squares().sqrt()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # it expects another shape, for example
        raise UnknownUse(f"the model fails if its weights are replaced: {error}") from error


@dataclass
class _Uses:
    """The uses of a matrix, whose gradient is the sum of `left.T @ right` over them.

    Args:
        expected: Number of uses in the forward pass.
        dense: (left, right) of linear layers.
        rows: (ids, right) of embeddings: `left` is one-hot.
    """

    expected: int = 0
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Replaces every use of a weight by one that keeps no gradient, and adds up squared norms in the backward pass."""

    def __init__(self, weights: Sequence[Tensor], samples: int, length: int) -> None:
        super().__init__()
        self.samples, self.length = samples, length
        self.weights = {id(weight): weight for weight in weights}
        device = weights[0].device
        #: Added to outputs that no gradient would reach otherwise.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.squared = torch.zeros(samples, dtype=torch.float64, device=device)
        #: Whether rows of flattened states were gathered, as experts do: then they may have another order.
        self.regrouped = False
        self.uses: dict[int, _Uses] = {}
        #: Vectors computed from weights alone, such as Gemma's `1 + weight`.
        self.derived: dict[int, Tensor] = {}
        self.recent: list[tuple[Tensor, Tensor]] = []
        #: Gradients of vectors, `(samples, features)`.
        self.features: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        name = getattr(func, "__name__", str(func))
        if not any(map(self._watched, tensors)) or not torch.is_grad_enabled():
            if name in _GATHERS and len(tensors) > 1 and tensors[0].dim() == 2 and tensors[0].is_floating_point():
                self.regrouped = True
            return func(*args, **kwargs)
        if func in _RULES:
            return _RULES[func](self, *args, **kwargs)
        if name == "addmm" and len(args) == 3 and not kwargs:
            return self._addmm(*args)
        if name in (*_PRODUCTS, *_SUMS) and len(args) == len(tensors) == 2 and not kwargs:
            return self._elementwise(func, *args, product=name in _PRODUCTS)
        found = func(*args, **kwargs)
        for tensor in _tensors((found,)):
            if tensor.requires_grad and not self._watched(tensor):
                if tensor.dim() > 1 or not all(map(self._watched, tensors)):
                    name = func.__self__.__name__ if name == "__get__" else name  # a property such as `weight.T`
                    raise UnknownUse(f"a weight is used by `{name}`")
                self.derived[id(tensor)] = tensor
        return found

    def squares(self) -> Float[Tensor, " samples"]:
        """The squared norms, after the backward pass."""
        for uses in self.uses.values():
            self._add_matrix(uses)  # one with a further use that the loss does not depend on
        sources = list(self.weights.values())
        for key, vector in self.derived.items():
            if key in self.features:
                gradients = torch.autograd.grad(
                    vector, sources, self.features.pop(key).view(-1, *vector.shape).to(vector.dtype),
                    is_grads_batched=True, allow_unused=True, retain_graph=True,
                )  # fmt: skip
                for weight, gradient in zip(sources, gradients, strict=True):
                    if gradient is not None:
                        self._add_features(weight, gradient.flatten(1))
        for gradient in self.features.values():
            self.squared += gradient.double().square().sum(1).to(self.squared.device)
        self.features.clear()
        return self.squared

    def _watched(self, tensor: Any) -> bool:
        return id(tensor) in self.weights or id(tensor) in self.derived

    def _by_sample(self, states: Tensor) -> Callable[[], Float[Tensor, "samples tokens features"]]:
        """Reads states, batch-first or flattened, by sample and token in the backward pass.

        Raises:
            UnknownUse: Their rows cannot be assigned to samples, or (when read) they were modified in place.
        """
        kept, version = states.detach(), states._version

        def read() -> Tensor:
            if kept._version != version:
                raise UnknownUse("states are modified in place after a weight was applied to them")
            return _wide(self._split(kept))

        flattened = states.dim() == 2 and len(states) == self.samples * self.length and not self.regrouped
        if flattened or (states.dim() >= 3 and len(states) == self.samples):
            return read
        raise UnknownUse(
            f"a weight is applied to states of shape {tuple(states.shape)}, not to those of whole samples"
        )

    def _split(self, states: Tensor) -> Float[Tensor, "samples tokens features"]:
        return states.detach().reshape(self.samples, -1, states.shape[-1])

    def _tap(self, output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """`output`, whose gradient by sample and token is passed to `receive` in the backward pass."""
        if not output.requires_grad:
            output = output + self.anchor.to(output.device, output.dtype)
        output.register_hook(lambda gradient: receive(_wide(self._split(gradient))))
        return output

    def _vector(self, tensor: Tensor | None, features: int) -> Tensor | None:
        """`tensor` if it is watched, else None.

        Raises:
            UnknownUse: It is neither one number nor one per feature.
        """
        if tensor is None or not self._watched(tensor):
            return None
        if tensor.dim() > 1 or tensor.numel() not in (1, features):
            raise UnknownUse(f"a weight of shape {tuple(tensor.shape)} is applied to {features} features")
        return tensor

    def _matrix(self, weight: Tensor) -> _Uses | None:
        """The uses of a watched matrix, including this one; None for one that is not watched."""
        if not self._watched(weight):
            return None
        uses = self.uses.setdefault(id(weight), _Uses())
        uses.expected += 1
        return uses

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        states, shift, uses = self._by_sample(input), self._vector(bias, len(weight)), self._matrix(weight)

        def receive(gradient: Tensor) -> None:
            self._add_use(uses, dense=(gradient, states()))
            self._add_features(shift, gradient)

        return self._tap(functional.linear(input, weight.detach(), _detached(bias)), receive)

    def _addmm(self, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        states, shift, uses = self._by_sample(input), self._vector(bias, weight.shape[1]), self._matrix(weight)

        def receive(gradient: Tensor) -> None:
            self._add_use(uses, dense=(states(), gradient))
            self._add_features(shift, gradient)

        return self._tap(torch.addmm(bias.detach(), input, weight.detach()), receive)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        if max_norm is not None or scale_grad_by_freq or input.dim() != 2 or len(input) not in (1, self.samples):
            raise UnknownUse(f"an embedding rescales itself, or reads ids of shape {tuple(input.shape)}")
        ids = input.expand(self.samples, -1)  # positions are often the same for all samples
        uses = self._matrix(weight)

        def receive(gradient: Tensor) -> None:
            if padding_idx is not None:
                gradient = gradient.masked_fill((ids == padding_idx % len(weight))[..., None], 0.0)
            self._add_use(uses, rows=(ids, gradient))

        return self._tap(functional.embedding(ids, weight.detach()), receive)

    def _layer_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
        bias: Tensor | None = None, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        normalized = functional.layer_norm(input, normalized_shape, None, None, eps)
        return self._scaled(normalized, normalized_shape, weight, bias)

    def _rms_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return self._scaled(functional.rms_norm(input, normalized_shape, None, eps), normalized_shape, weight, None)

    def _scaled(self, normalized: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """`normalized * weight + bias`."""
        features = normalized.shape[-1]
        if tuple(shape) != (features,):
            raise UnknownUse(f"a norm is taken over the shape {tuple(shape)}")
        states = self._by_sample(normalized)
        scale, shift = self._vector(weight, features), self._vector(bias, features)
        output = normalized if weight is None else normalized * weight.detach()

        def receive(gradient: Tensor) -> None:
            self._add_features(scale, gradient * states())
            self._add_features(shift, gradient)

        return self._tap(output if bias is None else output + bias.detach(), receive)

    def _elementwise(self, func: Any, first: Tensor, second: Tensor, *, product: bool) -> Tensor:
        vector, input = (first, second) if self._watched(first) else (second, first)
        states = self._by_sample(input)
        if self._watched(input) or self._vector(vector, input.shape[-1]) is None:
            raise UnknownUse(f"two weights are used by `{func.__name__}`")

        def receive(gradient: Tensor) -> None:
            self._add_features(vector, gradient * states() if product else gradient)

        output = func(first.detach(), second) if vector is first else func(first, second.detach())
        return self._tap(output, receive)

    def _add_features(self, vector: Tensor | None, gradient: Float[Tensor, "samples *tokens features"]) -> None:
        if vector is not None:
            own = gradient.reshape(self.samples, -1, vector.numel()).sum(1)
            self.features[id(vector)] = self.features[id(vector)] + own if id(vector) in self.features else own

    def _add_use(self, uses: _Uses | None, *, dense: Any = None, rows: Any = None) -> None:
        if uses is None:
            return
        uses.dense += [] if dense is None else [dense]
        uses.rows += [] if rows is None else [rows]
        if len(uses.dense) + len(uses.rows) == uses.expected:
            self._add_matrix(uses)

    def _add_matrix(self, uses: _Uses) -> None:
        """Add the squared norm of a matrix's gradient, and free its uses."""
        dense, rows = (
            tuple(torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*pairs, strict=True)) or None
            for pairs in (uses.dense, uses.rows)
        )
        uses.dense, uses.rows = [], []
        if dense is not None or rows is not None:
            self.squared += matrix_squares(dense, rows, self._token_products).to(self.squared.device)

    def _token_products(self, states: Tensor) -> Float[Tensor, "samples tokens tokens"]:
        """`states @ states.mT`, remembered for a while: several layers in a row read the same states."""
        for known, products in self.recent:
            if known.data_ptr() == states.data_ptr() and known.shape == states.shape:
                return products
        self.recent = [*self.recent[-1:], (states, states @ states.mT)]
        return self.recent[-1][1]


#: Function -> how a weight is used by it.
_RULES: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _Recorder._linear,
    functional.embedding: _Recorder._embedding,
    functional.layer_norm: _Recorder._layer_norm,
    functional.rms_norm: _Recorder._rms_norm,
}


def matrix_squares(
    dense: Any, rows: Any, token_products: Callable[[Tensor], Tensor] = lambda states: states @ states.mT
) -> Float[Tensor, " samples"]:
    """Squared norm of each sample's `left.T @ right` plus, in the rows `ids`, `added`; float64.

    Products between tokens are summed where that takes fewer operations than the matrix.

    Args:
        dense: left `(samples, tokens, out)` and right `(samples, tokens, in)`; None for no such part.
        rows: ids `(samples, other tokens)` in [0, out) and added `(samples, other tokens, in)`; None for no such part.
        token_products: Computes (or remembers) the products between the tokens of each sample.
    """
    samples = len((dense or rows)[0])

    def from_matrix(i: int) -> Tensor:
        left, right = (None, None) if dense is None else (dense[0][i], dense[1][i])
        ids, added = (None, None) if rows is None else (rows[0][i], rows[1][i])
        if left is None or right is None:
            places, ids = torch.unique(ids, return_inverse=True)  # type: ignore[misc,arg-type]
            matrix = added.new_zeros(len(places), added.shape[1])  # type: ignore[union-attr]
        else:
            matrix = left.T @ right
        if ids is not None:
            matrix.index_add_(0, ids, added)  # type: ignore[arg-type]
        return matrix.flatten().square_().sum(dtype=torch.float64)

    products = []
    if dense is not None:
        left, right = dense
        (tokens, out), features = left.shape[1:], right.shape[2]
        if rows is None and tokens * (out + features) >= out * features:
            return torch.stack([from_matrix(i) for i in range(samples)])
        products.append(token_products(left) * token_products(right))
    if rows is not None:
        ids, added = rows
        products.append((added @ added.mT).mul_(ids[:, :, None] == ids[:, None, :]))
    if dense is not None and rows is not None:
        at = left.gather(2, ids[:, None, :].expand(-1, tokens, -1))  # left[s, token, ids[s, other token]]
        products.append(at.mul_(right @ added.mT).mul_(2.0))
    total = sum(one.sum((1, 2), dtype=torch.float64) for one in products)
    size = sum(one.abs_().sum((1, 2), dtype=torch.float64) for one in products)
    for i in (total < CANCELLATION * size).nonzero()[:, 0].tolist():  # type: ignore[operator,union-attr]
        total[i] = from_matrix(i)  # type: ignore[index]
    return total  # type: ignore[return-value]


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
