"""Losses between models with different tokenizers, on spans of the text. One file each."""

from collections.abc import Callable
from inspect import signature

from torch import Tensor

from hf_transfer_ext.losses.span_pair import SpanPair, span_pair
from hf_transfer_ext.losses.spans.alm import alm
from hf_transfer_ext.losses.spans.gold import gold
from hf_transfer_ext.losses.spans.uld import uld
from hf_transfer_ext.registry import Registry

_LOSSES: list[Callable[..., Tensor]] = [uld, gold, alm]
SPAN_LOSSES = Registry("span loss", _LOSSES)


def takes_vocabularies(loss: Callable[..., Tensor]) -> bool:
    """Whether a span loss asks for the tokens that both vocabularies have: `(pair, student_ids, teacher_ids)`."""
    return "student_ids" in signature(loss).parameters


__all__ = ["SPAN_LOSSES", "SpanPair", "span_pair", "takes_vocabularies", *SPAN_LOSSES]
