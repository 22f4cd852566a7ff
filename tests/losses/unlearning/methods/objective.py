"""What a method minimizes, on a few numbers."""

import torch

from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS


def objective(name, forget, retain=None):
    """gamma * mean forget loss + alpha * mean retain loss, with the method's own losses, options and weights.

    Args:
        forget: What the forget loss asks for, by name, as lists.
        retain: The same of the retain loss; None for a method without one.
    """
    method = METHODS[name]
    assert (method.retain is None) == (retain is None)
    value = method.gamma * _mean(UNLEARNING_LOSSES[method.forget], forget, method.forget_options)
    if retain is not None:
        value += method.alpha * _mean(RETAIN_LOSSES[method.retain], retain, {})
    return value


def _mean(loss, needs, options):
    tensors = {
        name: torch.tensor(value, dtype=torch.int64 if name.endswith("targets") else torch.float64)
        for name, value in needs.items()
    }
    return float(loss(**tensors, **options).mean())
