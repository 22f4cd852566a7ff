from __future__ import annotations

import numpy as np
from jaxtyping import Int

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval


def negative_flip_rate(
    old: Int[np.ndarray, " examples"], new: Int[np.ndarray, " examples"], right: Int[np.ndarray, " examples"]
) -> list[Measurement]:
    r"""How often an update breaks what worked, from the choices of both models in each example.

    .. math:: \mathrm{NFR} = P(\text{old right, new wrong}), \quad
        \mathrm{NFR}_{mc} = P(\text{new wrong, new} \ne \text{old})

    The second one also counts a change from one wrong choice to another, which users notice as well.

    Returns:
        `negative_flip_rate` and `negative_flip_rate_choices`, shares of all examples.

    Source: Yan et al., "Positive-congruent training", 2021, https://arxiv.org/abs/2011.09161; with several choices
    Echterhoff et al., "MUSCLE: a model update strategy for compatible LLM evolution", 2024,
    https://arxiv.org/abs/2407.09435
    """
    if not len(old):
        raise ValueError("Negative flips need at least one example.")
    flips = {
        "negative_flip_rate": (old == right) & (new != right),
        "negative_flip_rate_choices": (new != right) & (old != new),
    }
    found = []
    for name, flipped in flips.items():
        values = flipped.astype(np.float64)
        interval = mean_interval(values)
        found.append(Measurement(name, float(values.mean()), "share of examples", False, len(values), interval))
    return found
