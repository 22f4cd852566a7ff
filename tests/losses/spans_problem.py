"""Two sides of a text that are split differently, and a float64 oracle of their spans."""

import math

import torch


def logits(length, vocab, seed):
    return 2 * torch.randn(length, vocab, generator=torch.Generator().manual_seed(seed))


def log_softmax(row, temperature=1.0):
    values = [x / temperature for x in row.tolist()]
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


STUDENT = logits(6, 7, 0), torch.tensor([1, 4, 0, 6, 2, 5]), [(1, 2), (2, 5), (5, 6)]
TEACHER = logits(5, 9, 1), torch.tensor([3, 8, 2, 7, 0]), [(1, 3), (3, 4), (4, 5)]


def oracle(side, temperature=1.0):
    """Merged distributions and span likelihoods by the chain rule, token by token."""
    z, ids, groups = side
    merged, spans = [], []
    for first, end in groups:
        before = sum(log_softmax(z[i - 1], temperature)[ids[i]] for i in range(first, end - 1))
        last = log_softmax(z[end - 2], temperature)
        merged.append([math.exp(before + value) for value in last])
        spans.append(before + last[ids[end - 1]])
    return merged, spans
