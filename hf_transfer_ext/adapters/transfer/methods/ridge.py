from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.adapters.transfer.method import LinearPair, transfer_method
from hf_transfer_ext.weights.lora import LoraFactors


@transfer_method(needs=("activations",))
def ridge(layer: LinearPair, *, regularization: float = 1e-3) -> LoraFactors:
    r"""Map inputs and outputs of the layer between the models by ridge regression on texts that both have read.

    .. math::
        \Delta W_t = N^T \Delta W_s M^T, \quad
        M = (X_t^T X_t + \gamma_t I)^{-1} X_t^T X_s, \quad
        N = (Y_s^T Y_s + \gamma_s I)^{-1} Y_s^T Y_t

    A target input is read as the source input it predicts, the source's change is applied, and what comes out is
    written as the target output it predicts. Rows of X and Y are the layers' inputs and outputs at the same tokens.

    When to use it: unrelated bases or layers with fused projections, with some thousand tokens of text that both
    models read, as the start of a training. Measure it beside random factors (`compare_transfer`).

    Args:
        regularization: Gamma as a share of the mean squared feature, > 0.

    Returns:
        The change of the target's layer.

    Raises:
        ValueError: `regularization` is not positive.

    Source: this package's own; anchors as in relative representations, Moschella et al. 2023,
    https://arxiv.org/abs/2209.15430
    """
    if not regularization > 0:
        raise ValueError(f"`regularization` must be greater than 0, got {regularization}.")
    inputs = ridge_map(layer.need("target_inputs"), layer.need("source_inputs"), regularization)
    outputs = ridge_map(layer.need("source_outputs"), layer.need("target_outputs"), regularization)
    return layer.carried(outputs.T, inputs.T)


def ridge_map(
    x: Float[Tensor, "tokens features"], y: Float[Tensor, "tokens others"], regularization: float
) -> Float[Tensor, "features others"]:
    """The matrix that predicts y from x with the least squared error, in float64 inside."""
    x, y = x.double(), y.double()
    gram = x.T @ x
    gamma = regularization * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(gram + gamma * torch.eye(len(gram), dtype=gram.dtype), x.T @ y).float()
