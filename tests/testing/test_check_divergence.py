"""The contract check passes every registered divergence, and catches each way of breaking it."""

import pytest
import torch
from losses.oracles import CASES

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.slopes import accepts, fused_by
from hf_transfer_ext.registry import Registry
from hf_transfer_ext.testing import check_divergence


@pytest.mark.parametrize("name, options", CASES)
def test_every_registered_divergence_keeps_the_contract(name, options):
    check_divergence(DISTILLATION_LOSSES[name], **options)


def log_probs(student_logits, teacher_logits, temperature):
    return (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)


def good(student_logits, teacher_logits, *, temperature=1.0):
    """Source: Hinton et al. 2015."""
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def test_a_divergence_of_ones_own_passes_in_every_form():
    check_divergence(good)
    check_divergence(accepts("dense", "sparse")(good))
    check_divergence(accepts("sparse")(good))
    accepts("dense")(good)


def no_source(student_logits, teacher_logits, *, temperature=1.0):
    return good(student_logits, teacher_logits, temperature=temperature)


def other_names(student, teacher, *, temperature=1.0):
    """Source: our own."""
    return good(student, teacher, temperature=temperature)


def no_temperature(student_logits, teacher_logits):
    """Source: our own."""
    return good(student_logits, teacher_logits)


def temperature_without_effect(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits)


def any_options(student_logits, teacher_logits, *, temperature=1.0, **options):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature)


def option_without_default(student_logits, teacher_logits, *, temperature=1.0, beta):
    """Source: our own."""
    return beta * good(student_logits, teacher_logits, temperature=temperature)


def summed(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature).sum()


def shifted_minimum(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature) + 0.5


def signed(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return (log_p - log_q)[..., 0]


def raw_logits(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return ((student_logits - teacher_logits) / temperature).square().sum(-1)


def nan_on_masks(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def infinite_on_wide_logits(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    q, p = (x.softmax(-1) for x in (student_logits / temperature, teacher_logits / temperature))
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


@fused_by(lambda q, p: (good(q.log[None], p.log[None])[0], -2.0 * p.probs))
def slope_of_another(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature)


@fused_by(lambda q, p: (2.0 * good(q.log[None], p.log[None])[0], -p.probs))
def value_of_another(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature)


@fused_by(lambda q, p: (good(q.log[None], p.log[None])[0] * len(q.log), -p.probs))
def depends_on_the_chunk(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(student_logits, teacher_logits, temperature=temperature)


@accepts("dense", "mixture")
def not_linear_in_the_teacher(student_logits, teacher_logits, *, temperature=1.0):
    """Source: our own."""
    return good(teacher_logits, student_logits, temperature=temperature)


BROKEN = [
    (no_source, "names no source"),
    (other_names, r"got other_names\(student, teacher"),
    (no_temperature, "`temperature` of no_temperature is missing"),
    (temperature_without_effect, "has to divide both models' logits"),
    (any_options, "takes any arguments"),
    (option_without_default, "`beta` of option_without_default has no default"),
    (summed, "one value per token"),
    (shifted_minimum, "of a model from itself has to be 0.0"),
    (signed, "is less than its minimum"),
    (raw_logits, "ignore a number added to all logits"),
    (nan_on_masks, "both models exclude"),
    (infinite_on_wide_logits, "for logits over"),
    (slope_of_another, "differs from autograd in float64"),
    (value_of_another, "differs from its formula in float64"),
    (depends_on_the_chunk, "differs from its formula in float64"),
    (not_linear_in_the_teacher, "accepts mixtures, but its weighted sum over two teachers has another gradient"),
]


@pytest.mark.parametrize("divergence, message", BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_divergence_is_caught(divergence, message):
    with pytest.raises(AssertionError, match=message):
        check_divergence(divergence)


def test_a_minimum_other_than_zero_may_be_declared():
    check_divergence(shifted_minimum, minimum=0.5)


@pytest.mark.parametrize("divergence", [no_source, other_names, no_temperature, any_options, option_without_default])
def test_what_could_not_be_called_is_refused_at_the_door(divergence):
    registry = Registry("distillation loss", [], check=DISTILLATION_LOSSES._check)
    with pytest.raises(ValueError, match=r"A divergence is|names no source"):
        registry.register(divergence)
    assert registry.register(good) is good
