from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.span_pair import SpanPair


def uld(pair: SpanPair) -> Float[Tensor, " spans"]:
    r"""Universal logit distillation: the distance of the sorted probabilities, which needs no common vocabulary.

    .. math:: \sum_i | \mathrm{sort}(q)_i - \mathrm{sort}(p)_i |

    The smaller vocabulary is filled up with zeros. The paper compares position by position; here the merged
    distributions of aligned spans are compared, which are the plain ones where a span is one token on both sides.

    When to use it: the vocabularies share hardly a token. It sees how sure the teacher is, and not of what: add cross
    entropy (the paper's weight of this loss is 1.5).

    Returns:
        For each span, from 0 to 2; 0 where both are equally sure.

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, Boizard et al. 2024,
    https://arxiv.org/abs/2402.12030
    """
    return sorted_distance(pair.student.exp(), pair.teacher.exp())


def sorted_distance(
    student: Float[Tensor, "spans student_vocab"], teacher: Float[Tensor, "spans teacher_vocab"]
) -> Float[Tensor, " spans"]:
    """Sum of the absolute differences of sorted probabilities; the shorter row is filled up with zeros."""
    width = max(student.shape[1], teacher.shape[1])
    q, p = (
        torch.nn.functional.pad(side.sort(dim=-1, descending=True).values, (0, width - side.shape[1]))
        for side in (student, teacher)
    )
    return (q - p).abs().sum(-1)
