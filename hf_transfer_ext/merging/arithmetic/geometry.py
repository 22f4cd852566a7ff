"""Spherical methods: each is a linear combination whose factors follow from scalar products.

One pass computes the Gram matrix of a tensor over the models, arithmetic on that small matrix gives the factors, and a
second pass combines. Scalar products are summed in float64, for long vectors over float32 blocks: the angle between
two fine-tunes of the same base is small, and its cosine needs more digits than a float32 sum provides.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import changes_of
from hf_transfer_ext.merging.method import Pieces, gives, in_float

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, Gram, Numbers, Scalar

#: Elements whose products are summed in float32.
BLOCK = 1024


@gives("gram")
def gram_of_models(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """G_ij = <theta_i, theta_j>; of the changes from the base if there is one."""
    return {"gram": _gram(pieces, with_base=False)}


@gives("gram")
def gram_with_base(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """G_ij = <theta_i, theta_j>, with the base at index 0."""
    return {"gram": _gram(pieces, with_base=True)}


def _gram(pieces: Pieces, *, with_base: bool) -> Gram | np.ndarray:
    total: Any = 0.0
    for base, models in pieces:
        vectors: list[Any] = list(models)
        if base is not None:
            vectors = [base, *models] if with_base else changes_of(base, models)
        of_kernels = isinstance(vectors[0], np.ndarray) and kernels.can_take(*vectors)
        total = total + (kernels.products(vectors) if of_kernels else _products(vectors).cpu())
    return total


def _products(vectors: Sequence[Tensor]) -> Gram:
    import torch

    rows = torch.stack([in_float(vector).reshape(-1) for vector in vectors])
    length = rows.shape[1]
    # A block has float32 error, but errors of many blocks cancel; short vectors have too few blocks for this.
    whole = length - length % BLOCK if length >= 64 * BLOCK else 0
    blocks = rows[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1)
    rest = rows[:, whole:].double()
    return (blocks @ blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.T


def norm_of(factors: Float[Tensor, " models"], gram: Gram) -> Scalar:
    """Norm of sum_i f_i x_i, from the Gram matrix of the x_i."""
    return root(factors @ gram @ factors)


def unit_gram(gram: Gram) -> tuple[Float[Tensor, " models"], Gram]:
    """Norms of the vectors, and the Gram matrix of the normalized vectors; 0 stays 0."""
    norms = root(gram.diagonal())
    safe = one_in_place_of_0(norms)
    return norms, gram / safe / safe[:, None]


def root(squares: Numbers) -> Any:
    """Square roots; values that rounding made negative count as 0. The gradient at 0 is 0 (undefined for a norm)."""
    positive, own = squares > 0, library_of(squares)
    return own.sqrt(own.where(positive, squares, own.ones_like(squares))) * positive


def library_of(values: Any) -> ModuleType:
    """torch for tensors, and numpy for numbers and arrays: formulas with functions of both do not import torch."""
    if isinstance(values, (float, np.ndarray)):
        return np
    import torch

    return torch


def one_in_place_of_0(norms: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Norms to divide by: 1 for a vector of 0, which then stays unchanged."""
    import torch

    return torch.where(norms > 0, norms, torch.ones_like(norms))


def cosines_of(gram: Float[Tensor, "*rows models models"]) -> Float[Tensor, "*rows models models"]:
    """Cosines between vectors; 0 for vectors of 0."""
    import torch

    norms = root(gram.diagonal(dim1=-2, dim2=-1))
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram / products.clamp(min=1e-300), torch.zeros_like(gram)).clamp(-1, 1)


@gives("products")
def cosine_sums(
    pieces: Pieces, *, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False, **options: Any
) -> dict[str, Any]:
    """<x_1, x_1>, <x_1, x_2> and <x_2, x_2> of two models (or changes), for the tensor or for each column."""
    import torch

    if not nuslerp_flatten and not nuslerp_row_wise:
        return {"products": torch.ones(3, 1, dtype=torch.float64)}  # unused: pieces have whole rows, with their own
    total, rows = torch.zeros(3, 1, dtype=torch.float64), 0
    for base, models in pieces:
        vectors = models if base is None else changes_of(base, models)
        one, two = (vector.reshape(-1, vector.shape[-1]).double() for vector in vectors)
        total = total + torch.stack([(one * one).sum(0), (one * two).sum(0), (two * two).sum(0)]).cpu()
        rows += len(one)
    # A one-dimensional tensor is a single vector under every combination of options.
    return {"products": total if rows > 1 and not nuslerp_flatten else total.sum(1, keepdim=True)}


def slerp_factors(
    first: Numbers,
    both: Numbers,
    second: Numbers,
    t: Coefficient,
    *,
    parallel: float = 1.0,
) -> tuple[Any, Any]:
    r"""Factors of two vectors for the point at position t on the arc between them.

    .. math::
        \frac{\sin((1 - t) \Omega)}{\sin \Omega}, \quad \frac{\sin(t \Omega)}{\sin \Omega}, \quad
        \cos \Omega = \frac{\langle x_1, x_2 \rangle}{\|x_1\| \|x_2\|}

    Args:
        first, both, second: <x_1, x_1>, <x_1, x_2> and <x_2, x_2>, as tensors or as numbers.
        parallel: For |cos Omega| above this, the factors are those of a straight line: 1 - t and t.

    Returns:
        The factors, in float64.
    """
    own = library_of(first)
    cosine = own.clip(both / own.clip(root(first) * root(second), 1e-14, None), -1, 1)
    line = (own.abs(cosine) > parallel) | (1 - cosine * cosine < 1e-16)
    # A right angle for parallel vectors, for which these factors are not used.
    angle = own.arccos(own.where(line, own.zeros_like(cosine), cosine))
    start = own.where(line, 1 - t, own.sin((1 - t) * angle) / own.sin(angle))
    end = own.where(line, t, own.sin(t * angle) / own.sin(angle))
    return start, end
