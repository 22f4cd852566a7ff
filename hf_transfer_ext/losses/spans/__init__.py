"""Losses between models with different tokenizers, on spans of the text. One file each."""

from collections.abc import Callable

from torch import Tensor

from hf_transfer_ext.losses.span_pair import SpanPair, span_pair
from hf_transfer_ext.losses.spans.alm import alm
from hf_transfer_ext.losses.spans.gold import gold
from hf_transfer_ext.losses.spans.uld import uld
from hf_transfer_ext.registry import Registry

_LOSSES: list[Callable[..., Tensor]] = [uld, gold, alm]
SPAN_LOSSES = Registry("span loss", _LOSSES)

__all__ = ["SPAN_LOSSES", "SpanPair", "span_pair", *SPAN_LOSSES]
