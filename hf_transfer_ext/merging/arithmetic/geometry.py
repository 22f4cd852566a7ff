"""Methods that move on a sphere: all of them end in a linear combination whose factors follow from scalar products.

So one pass gives the Gram matrix of a tensor's models, some arithmetic on a matrix of the size of the number of models
gives the factors, and a second pass combines. Scalar products are summed in float64, those of long vectors from blocks
in float32: the angle between two fine-tunes of one base is small, and its cosine needs more digits than a sum in
float32 leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import changes_of, in_float
from hf_transfer_ext.merging.method import Pieces, gives

Gram = Float[Tensor, "models models"]

#: Elements whose products are summed in float32.
BLOCK = 1024


@gives("gram")
def gram_of_models(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """G_ij = <theta_i, theta_j>; of the changes from the base where there is one."""
    return {"gram": _gram(pieces, with_base=False)}


@gives("gram")
def gram_with_base(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """G_ij = <theta_i, theta_j> with the base as number 0."""
    return {"gram": _gram(pieces, with_base=True)}


def _gram(pieces: Pieces, *, with_base: bool) -> Gram:
    total = torch.zeros((), dtype=torch.float64)
    for base, models in pieces:
        vectors = list(models)
        if base is not None:
            vectors = [base, *models] if with_base else changes_of(base, models)
        total = total + _products(vectors).cpu()
    return total


def _products(vectors: Sequence[Tensor]) -> Gram:
    rows = torch.stack([in_float(vector).reshape(-1) for vector in vectors])
    length = rows.shape[1]
    # A block's error is that of float32, but many blocks err in both directions; short vectors have too few.
    whole = length - length % BLOCK if length >= 64 * BLOCK else 0
    blocks = rows[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1)
    rest = rows[:, whole:].double()
    return (blocks @ blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.T


def norm_of(factors: Tensor, gram: Gram) -> float:
    """Norm of sum_i f_i x_i, from the Gram matrix of the x_i."""
    return float((factors @ gram @ factors).clamp(min=0).sqrt())


def unit_gram(gram: Gram, floor: float = 0.0) -> tuple[Tensor, Gram]:
    """Norms of the vectors (plus `floor`), and the Gram matrix of the vectors divided by them; 0 stays 0."""
    norms = gram.diagonal().clamp(min=0).sqrt() + floor
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    return norms, gram / safe / safe[:, None]


def cosines_of(gram: Float[Tensor, "*rows models models"]) -> Float[Tensor, "*rows models models"]:
    """Cosines between vectors; 0 for vectors without a direction."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram / products.clamp(min=1e-300), torch.zeros_like(gram)).clamp(-1, 1)


@gives("products")
def cosine_sums(
    pieces: Pieces, *, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False, **options: Any
) -> dict[str, Any]:
    """<x_1, x_1>, <x_1, x_2>, <x_2, x_2> of two models (or changes): of the tensor, or of each column."""
    if not nuslerp_flatten and not nuslerp_row_wise:
        return {"products": torch.ones(3, 1, dtype=torch.float64)}  # rows are whole in a piece, and find their own
    total, rows = torch.zeros(3, 1, dtype=torch.float64), 0
    for base, models in pieces:
        vectors = models if base is None else changes_of(base, models)
        one, two = (vector.reshape(-1, vector.shape[-1]).double() for vector in vectors)
        total = total + torch.stack([(one * one).sum(0), (one * two).sum(0), (two * two).sum(0)]).cpu()
        rows += len(one)
    # A tensor of one dimension is one vector in every reading of the options.
    return {"products": total if rows > 1 and not nuslerp_flatten else total.sum(1, keepdim=True)}


def slerp_factors(products: Float[Tensor, "*products"], t: float) -> tuple[Tensor, Tensor]:
    """Factors of two vectors for the point at t between them, from their scalar products."""
    first, both, second = products
    cosine = both / (first.clamp(min=0).sqrt() * second.clamp(min=0).sqrt()).clamp(min=1e-14)
    angle = cosine.clamp(-1, 1).arccos()
    sine = angle.sin()
    parallel = sine.abs() < 1e-8
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    start = torch.where(parallel, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / safe)
    end = torch.where(parallel, torch.full_like(sine, t), (t * angle).sin() / safe)
    return start.float(), end.float()
