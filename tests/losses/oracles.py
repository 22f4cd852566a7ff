"""Each divergence written from its definition, as float64 loops over the vocabulary."""

import math

import torch

INFINITY = float("inf")


def probabilities(logits, temperature=1.0):
    values = [float(x) / temperature for x in logits]
    top = max(values)
    powers = [math.exp(v - top) if v > -INFINITY else 0.0 for v in values]
    total = sum(powers)
    return [p / total for p in powers]


def kl(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x > 0:
            if y == 0:
                return INFINITY
            total += x * math.log(x / y)
    return total


def mix(share, a, b):
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def adaptive(q, p, head_mass=0.5):
    head, mass = set(), 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= head_mass:
            break
        head.add(v)
        mass += p[v]
    gap = [abs(x - y) for x, y in zip(q, p, strict=True)]
    if sum(gap) == 0:
        return 0.0
    share = sum(gap[v] for v in head) / sum(gap)
    return share * kl(p, q) + (1 - share) * kl(q, p)


#: name -> (student probabilities q, teacher probabilities p, **options) -> value
ORACLES = {
    "forward_kl": lambda q, p: kl(p, q),
    "reverse_kl": lambda q, p: kl(q, p),
    "generalized_jsd": lambda q, p, beta=0.5: beta * kl(p, mix(beta, p, q)) + (1 - beta) * kl(q, mix(beta, p, q)),
    "skew_kl": lambda q, p, skew=0.1: kl(p, mix(skew, p, q)),
    "skew_reverse_kl": lambda q, p, skew=0.1: kl(q, mix(1 - skew, p, q)),
    "total_variation": lambda q, p: 0.5 * sum(abs(x - y) for x, y in zip(q, p, strict=True)),
    "adaptive_kl": adaptive,
}

#: Options that each divergence is tried with, beside its defaults.
OPTIONS = {
    "generalized_jsd": [{"beta": 0.1}, {"beta": 0.9}],
    "skew_kl": [{"skew": 0.5}],
    "skew_reverse_kl": [{"skew": 0.5}],
    "adaptive_kl": [{"head_mass": 0.9}],
}

CASES = [(name, options) for name in ORACLES for options in ({}, *OPTIONS.get(name, []))]


def value(name, student_logits, teacher_logits, temperature=1.0, **options):
    """One row of logits each -> the divergence."""
    return ORACLES[name](
        probabilities(student_logits, temperature), probabilities(teacher_logits, temperature), **options
    )


def slope_of(function, x, step=1e-6):
    """Central differences of a float64 function of one vector."""
    gradient = torch.zeros_like(x, dtype=torch.float64)
    for i in range(x.numel()):
        up, down = x.double().clone(), x.double().clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        gradient.view(-1)[i] = (function(up) - function(down)) / (2 * step)
    return gradient
