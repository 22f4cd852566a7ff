from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.span_pair import SpanPair, reads_likelihoods


@reads_likelihoods
def alm(pair: SpanPair, *, tau: float = 100.0, epsilon: float = 1e-6) -> Float[Tensor, " spans"]:
    r"""Approximate likelihood matching: cross entropy of whether each span comes as it does.

    .. math:: -a \log b - (1 - a) \log(1 - b), \quad a = e^{l_T / \tau - \epsilon}, b = e^{l_S / \tau - \epsilon}

    with the log-likelihoods l of the span. It needs one number for each span, and no vocabulary at all: the teacher
    may be a model, run on a server (`teacher_server`), or have been stored (`teacher_cache`).

    When to use it: the vocabularies differ, and the likelihoods of texts are all that a teacher on a server or a cache
    tells.

    Args:
        tau: > 0; a large one weighs unlikely spans as much as likely ones.
        epsilon: > 0, keeps both probabilities below 1.

    Returns:
        Nats for each span, smallest where both likelihoods are equal (and not 0 there: it is a cross entropy).

    Source: Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching, Minixhofer et al. 2025,
    https://arxiv.org/abs/2503.20083
    """
    if not tau > 0 or not epsilon > 0:
        raise ValueError(f"`tau` and `epsilon` of alm have to be > 0, got {tau} and {epsilon}.")
    log_a, log_b = (spans / tau - epsilon for spans in (pair.teacher_spans, pair.student_spans))
    return -log_a.exp() * log_b + torch.expm1(log_a) * torch.log(-torch.expm1(log_b))
