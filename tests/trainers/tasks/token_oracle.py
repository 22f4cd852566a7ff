"""The loss of a batch of predicted tokens by its definition, in loops over float64 log-probabilities."""

import math

import torch


def log_softmax(values):
    top = max(values)
    total = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def expected_loss(student, teacher, inputs, labels, *, kd_weight, ce_weight, shift=0):
    """Mean over the labels of kd_weight * KL(teacher || student) + ce_weight * CE."""
    with torch.no_grad():
        own, other = (model(**inputs).logits.double().tolist() for model in (student, teacher))
    total, count = 0.0, 0
    for row, tags in enumerate(labels.tolist()):
        for place, label in enumerate(tags):
            if label == -100 or place < shift:
                continue
            log_q, log_p = log_softmax(own[row][place - shift]), log_softmax(other[row][place - shift])
            total += kd_weight * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
            total -= ce_weight * log_q[label]
            count += 1
    return total / count
