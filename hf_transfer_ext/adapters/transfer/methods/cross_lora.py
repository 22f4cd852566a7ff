from __future__ import annotations

import torch

from hf_transfer_ext.adapters.transfer.method import LinearPair, polar, transfer_method
from hf_transfer_ext.weights.lora import LoraFactors


@transfer_method(needs=("residual_map",))
def cross_lora(layer: LinearPair, *, subspace: int = 320) -> LoraFactors:
    r"""Carry the change through the leading singular directions of both weights, aligned by an explicit rotation.

    .. math::
        \Delta W_t = U_t R U_s^T \, \Delta W_s \, V_s R^T V_t^T

    A singular value decomposition fixes each pair (u_i, v_i) only up to its sign, and close pairs only up to a
    rotation, so directions of two models cannot be paired by their number. R is the rotation that makes the directions
    agree on the side that reads or writes the residual stream, where the shared tokens say what corresponds to what:

    .. math::
        R = \mathrm{polar}(V_t^T M^T V_s) \text{ for layers that read it}, \quad
        R = \mathrm{polar}(U_t^T M^T U_s) \text{ for layers that write it}

    with the residual map M, :math:`x_t = x_s M`.

    When to use it: bases of other shapes that share tokens, as the start of a training. Measure it beside random
    factors (`compare_transfer`).

    Args:
        subspace: Number of singular directions, >= 1; all of a smaller matrix.

    Returns:
        The change of the target's layer.

    Raises:
        ValueError: `subspace` is out of its range, or neither side of the layer is the residual stream.

    Source: Cross-LoRA, Xia et al. 2025, https://arxiv.org/abs/2508.05232. The rotation is this package's own: as
    published, flipping the arbitrary signs of one decomposition changes the result.
    """
    if subspace < 1:
        raise ValueError(f"`subspace` must be at least 1, got {subspace}.")
    residual_map = layer.need("residual_map")
    hidden_s, hidden_t = residual_map.shape
    left_s, _, right_s = torch.linalg.svd(layer.source, full_matrices=False)
    left_t, _, right_t = torch.linalg.svd(layer.target, full_matrices=False)
    count = min(subspace, left_s.shape[1], left_t.shape[1])
    left_s, left_t, right_s, right_t = left_s[:, :count], left_t[:, :count], right_s[:count], right_t[:count]
    reads = (layer.source.shape[1], layer.target.shape[1]) == (hidden_s, hidden_t)
    writes = (layer.source.shape[0], layer.target.shape[0]) == (hidden_s, hidden_t)
    if layer.kind in WRITES and writes:
        rotation = polar(left_t.T @ residual_map.T @ left_s)
    elif reads:
        rotation = polar(right_t @ residual_map.T @ right_s.T)
    elif writes:
        rotation = polar(left_t.T @ residual_map.T @ left_s)
    else:
        raise ValueError(
            f"Neither side of {layer.module!r} ({list(layer.target.shape)}) is the residual stream of "
            f"{hidden_t} features, so nothing aligns its directions. Use ridge or trans_lora."
        )
    return layer.carried(left_t @ rotation @ left_s.T, right_s.T @ rotation.T @ right_t)


#: Layers that write the residual stream, where both sides have its width.
WRITES = ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj")
