from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hf_transfer_ext.losses.hidden.hidden_mse import projected
from hf_transfer_ext.losses.vectors.similarity_mse import similarity_mse


def lealla(
    student: Float[Tensor, "sides rows width"], teacher: Float[Tensor, "sides rows teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
    *, feature_weight: float = 1e3, logit_weight: float = 1e-2,
) -> Float[Tensor, " rows"]:  # fmt: skip
    r"""Feature distillation on unit vectors, and distillation of the cosines within the batch.

    .. math:: \beta \frac{1}{d} \Big| \frac{W x_S}{|W x_S|} - \frac{x_T}{|x_T|} \Big|^2
              + \gamma \frac{1}{n} \sum_j \big( \cos(x_i^S, y_j^S) - \cos(x_i^T, y_j^T) \big)^2

    The paper adds the loss of the pairs, a translation ranking with a margin: `ce_weight: 1` of the task
    sentence_embedding.

    When to use it: small embedders, of several languages above all, on pairs of a text and its translation.

    Deviation: the paper says mean squared error and not whether the vectors are of unit length; here they are, as
    LaBSE's embeddings are.

    Args:
        projection: W, trained along and left out of the result; None for equal widths.
        feature_weight: beta, >= 0.
        logit_weight: gamma, >= 0.

    Returns:
        For each row, >= 0; the first part is a mean over the sides of a pair.

    Source: LEALLA, Mao and Nakagawa 2023, https://arxiv.org/abs/2302.08387
    """
    if feature_weight < 0 or logit_weight < 0:
        raise ValueError(f"Weights of lealla must be >= 0, got {feature_weight} and {logit_weight}.")
    differences = [
        normalize(projected(own, other, projection), dim=-1) - normalize(other.detach().float(), dim=-1)
        for own, other in zip(student, teacher, strict=True)
    ]
    features = sum(one.square().mean(-1) for one in differences) / len(differences)
    return feature_weight * features + logit_weight * similarity_mse(student, teacher)
