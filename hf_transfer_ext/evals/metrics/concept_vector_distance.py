from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.measurement import Measurement


def concept_vector_distance(
    before: Float[Tensor, " hidden"],
    after: Float[Tensor, " hidden"],
    unembedding: Float[Tensor, "vocab hidden"],
    *,
    top: int = 200,
) -> list[Measurement]:
    r"""How much unlearning changed the MLP value vector that encodes a concept.

    .. math:: \frac{|T(v) \cap T(v')|}{|T(v) \cup T(v')|}, \quad \cos(v, v'), \quad \lVert v - v' \rVert_2

    The value vector is a column of a layer's down projection; `T(v)` are the `top` tokens whose unembeddings have the
    largest inner product with it. Methods that only teach a model to answer differently hardly change all three.

    Returns:
        `concept_jaccard` (share), `concept_cosine` (from -1 to 1) and `concept_l2`: a lower, lower and higher value,
        respectively, means more forgetting.

    Source: ConceptVectors, Hong et al., "Intrinsic evaluation of unlearning using parametric knowledge traces", 2024,
    https://arxiv.org/abs/2406.11614
    """
    if not 1 <= top <= len(unembedding):
        raise ValueError(f"`top` must be from 1 to the {len(unembedding)} tokens of the vocabulary, got {top}.")
    before, after = before.double(), after.double()
    first, second = (set((unembedding.double() @ vector).topk(top).indices.tolist()) for vector in (before, after))
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0).item()
    return [
        Measurement("concept_jaccard", len(first & second) / len(first | second), "share of top tokens", False, 1),
        Measurement("concept_cosine", cosine, "cosine", False, 1),
        Measurement("concept_l2", (before - after).norm().item(), "L2 distance", True, 1),
    ]
