"""NearSwap: use the other model where it is close to the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.method import Promises, merge_method
from hf_transfer_ext.merging.types import Coefficient


@merge_method(count=(1, 1), promises=Promises(alone={"t": 1e9}))
def nearswap(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    t: Coefficient,
) -> Float[Tensor, "*shape"]:
    r"""Replace elements of the base by those of the other model if they differ by at most t; move the others by t.

    .. math:: \theta = \theta_0 + \min(1, t / |\theta_1 - \theta_0|) (\theta_1 - \theta_0)

    When to use it: to let a base take on a second model only where both are almost equal already.

    Args:
        t: Largest change of an element, in units of the weights; >= 0.

    Returns:
        The merged weights.

    Source: QuartetAnemoi-70B, alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    change = models[0] - base
    limit = torch.as_tensor(t, dtype=base.dtype, device=base.device)
    return base + torch.minimum(torch.maximum(change, -limit), limit)
