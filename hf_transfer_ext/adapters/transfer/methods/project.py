from __future__ import annotations

import torch

from hf_transfer_ext.adapters.transfer.method import LinearPair, transfer_method
from hf_transfer_ext.weights.lora import LoraFactors


@transfer_method()
def project(
    layer: LinearPair, *, subspace: int = 320, threshold: float = 0.0, null_space: bool = True
) -> LoraFactors | None:
    r"""Project the change on the singular subspaces of the target's weight, and its rest on their complements.

    .. math::
        \Delta W_t = P_U \Delta W_s^{\parallel} P_V + (I - P_U) \Delta W_s^{\perp} (I - P_V), \quad
        P_U = U_t U_t^T, \; P_V = V_t V_t^T

    with the parallel part :math:`U_s U_s^T \Delta W_s V_s V_s^T` in the subspaces of the source's weight and the
    perpendicular part :math:`(I - U_s U_s^T) \Delta W_s (I - V_s V_s^T)` outside of both.

    When to use it: as `copy`, where the target base has moved further from the source base, so that the parts of the
    change outside of its subspaces are noise.

    Args:
        subspace: Number of singular directions, >= 1; all of a smaller matrix.
        threshold: Leave a layer out where the subspaces of both weights overlap by less than this share, 0 to 1:
            :math:`\lVert U_s^T U_t \rVert_F^2 / k`. 0 keeps every layer; a public port uses 0.3.
        null_space: With the perpendicular part (ProLoRA); without it, the first term on the unprojected change
            (LoRA-X).

    Returns:
        The change of the target's layer, of up to twice the rank with `null_space`; None under the threshold.

    Raises:
        ValueError: The layers have different shapes, or an option is out of its range.

    Source: ProLoRA, Farhadzadeh et al. 2025, https://arxiv.org/abs/2506.04244; LoRA-X, Farhadzadeh et al. 2025,
    https://arxiv.org/abs/2501.16559
    """
    layer.require_equal_shapes("project")
    if subspace < 1 or not 0 <= threshold <= 1:
        raise ValueError(
            f"`subspace` must be at least 1 and `threshold` between 0 and 1, got {subspace}, {threshold}."
        )
    left_s, right_s = _leading_directions(layer.source, subspace)
    left_t, right_t = _leading_directions(layer.target, subspace)
    if (left_s.T @ left_t).square().sum() / left_s.shape[1] < threshold:
        return None
    up, down = layer.change.left, layer.change.right
    if not null_space:
        return LoraFactors(left_t @ (left_t.T @ up), (down @ right_t) @ right_t.T)
    up_inside, down_inside = left_s @ (left_s.T @ up), (down @ right_s) @ right_s.T
    up_outside, down_outside = up - up_inside, down - down_inside
    inside = left_t @ (left_t.T @ up_inside), (down_inside @ right_t) @ right_t.T
    outside = up_outside - left_t @ (left_t.T @ up_outside), down_outside - (down_outside @ right_t) @ right_t.T
    return LoraFactors(torch.cat([inside[0], outside[0]], 1), torch.cat([inside[1], outside[1]], 0))


def _leading_directions(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first left and right singular vectors, as columns."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :count], right[:count].T
