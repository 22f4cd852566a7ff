from __future__ import annotations

from hf_transfer_ext.adapters.transfer.method import LinearPair, transfer_method
from hf_transfer_ext.weights.lora import LoraFactors


@transfer_method()
def copy(layer: LinearPair) -> LoraFactors:
    r"""The change as it is, put on the new base.

    .. math:: \Delta W_t = \Delta W_s

    When to use it: the target base was trained further from the source base (`lineage` checks). Between unrelated
    bases of equal shapes it does harm: the directions mean something else there.

    Returns:
        The change of the target's layer.

    Raises:
        ValueError: The layers have different shapes.

    Source: PortLLM, Khan et al. 2024, section 3, https://arxiv.org/abs/2410.10870
    """
    layer.require_equal_shapes("copy")
    return layer.change
