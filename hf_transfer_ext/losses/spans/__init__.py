"""Losses between models with different tokenizers, on spans of the text. One file each."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from hf_transfer_ext.losses.span_pair import SpanPair, needs_likelihoods_alone, span_pair
from hf_transfer_ext.losses.spans.alm import alm
from hf_transfer_ext.losses.spans.dskd import dskd
from hf_transfer_ext.losses.spans.gold import gold
from hf_transfer_ext.losses.spans.uld import uld
from hf_transfer_ext.registry import Registry

_LOSSES: list[Callable[..., Any]] = [uld, gold, alm, dskd]
SPAN_LOSSES = Registry("span loss", _LOSSES)


def takes_vocabularies(loss: Callable[..., Any]) -> bool:
    """Whether a span loss asks for the tokens that both vocabularies have: `(pair, student_ids, teacher_ids)`."""
    return "student_ids" in signature(loss).parameters


def has_projections(loss: Callable[..., Any]) -> bool:
    """Whether a span loss compares hidden states through projections of its own, and not pairs of predictions."""
    return "projections" in signature(loss).parameters


__all__ = [
    "SPAN_LOSSES",
    "SpanPair",
    "has_projections",
    "needs_likelihoods_alone",
    "span_pair",
    "takes_vocabularies",
    *SPAN_LOSSES,
]
