"""What holds for every registered divergence; a new one joins by itself once it has an oracle."""

import inspect
import math

import oracles
import pytest
import torch

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.slopes import SLOPES, Outcomes, logit_gradient

NAMES = list(DISTILLATION_LOSSES)


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_divergence_has_an_oracle():
    assert set(oracles.ORACLES) == set(NAMES)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name, options", oracles.CASES)
def test_the_formula_is_its_definition(name, options, temperature):
    student, teacher = logits(2, 3, 11), logits(2, 3, 11, seed=1)
    result = DISTILLATION_LOSSES[name](student, teacher, temperature=temperature, **options)
    for b in range(2):
        for s in range(3):
            expected = oracles.value(name, student[b, s], teacher[b, s], temperature, **options)
            assert result[b, s].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name, options", oracles.CASES)
def test_the_slope_is_the_formula_and_its_gradient(name, options):
    student, teacher = logits(1, 4, 13).double().requires_grad_(), logits(1, 4, 13, seed=1).double()
    own, other = (Outcomes((z[0].detach() / 1.5).log_softmax(-1), normalized=True) for z in (student, teacher))
    value, slope = SLOPES[DISTILLATION_LOSSES[name]](own, other, **options)
    formula = DISTILLATION_LOSSES[name](student, teacher, temperature=1.5, **options)
    torch.testing.assert_close(value.float(), formula[0].detach(), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(formula.sum(), student)
    torch.testing.assert_close(logit_gradient(own, slope, 1.5), expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, options", oracles.CASES)
def test_zero_and_flat_where_both_agree(name, options):
    student = logits(1, 3, 7).requires_grad_()
    loss = DISTILLATION_LOSSES[name](student, student.detach().clone(), **options)
    torch.testing.assert_close(loss.detach(), torch.zeros(1, 3), atol=1e-6, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name, options", oracles.CASES)
def test_never_negative_and_blind_to_a_shift_of_logits(name, options):
    student, teacher = logits(4, 8, 17, scale=5.0), logits(4, 8, 17, seed=1, scale=5.0)
    loss = DISTILLATION_LOSSES[name](student, teacher, **options)
    assert (loss >= 0).all()
    shifted = DISTILLATION_LOSSES[name](student + 3.0, teacher - 7.0, **options)
    torch.testing.assert_close(loss, shifted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_both_exclude_changes_nothing(name):
    student, teacher = logits(1, 2, 9), logits(1, 2, 9, seed=1)
    closed = torch.full((1, 2, 3), -math.inf)
    widened = DISTILLATION_LOSSES[name](torch.cat([student, closed], -1), torch.cat([teacher, closed], -1))
    torch.testing.assert_close(widened, DISTILLATION_LOSSES[name](student, teacher))


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_one_side_excludes_follows_the_definition(name):
    student, teacher = logits(1, 1, 6), logits(1, 1, 6, seed=1)
    for student_closed, teacher_closed in ((2, None), (None, 3), (2, 3)):
        s, t = student.clone(), teacher.clone()
        if student_closed is not None:
            s[..., student_closed] = -math.inf
        if teacher_closed is not None:
            t[..., teacher_closed] = -math.inf
        result = DISTILLATION_LOSSES[name](s, t).item()
        assert result == pytest.approx(oracles.value(name, s[0, 0], t[0, 0]), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    student, teacher = logits(2, 3, 50).bfloat16(), logits(2, 3, 50, seed=1).bfloat16()
    result = DISTILLATION_LOSSES[name](student, teacher)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, DISTILLATION_LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_gives_formula_unit_and_source(name):
    doc = inspect.getdoc(DISTILLATION_LOSSES[name])
    assert ".. math::" in doc and "Returns:" in doc and "Source: " in doc and "https://" in doc


# One example each, worked by hand: student (1/2, 1/2), teacher (3/4, 1/4).
BY_HAND = {
    "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    "reverse_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
    "generalized_jsd": 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3))
    + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)),
    "skew_kl": 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475),
    "skew_reverse_kl": 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275),
    "total_variation": 0.25,
    # the head is the first token alone, with half of the gap: the mean of both KLs
    "adaptive_kl": 0.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.5 * math.log(4 / 3)),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_worked_by_hand(name):
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    assert DISTILLATION_LOSSES[name](student, teacher).item() == pytest.approx(BY_HAND[name], rel=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("generalized_jsd", {"beta": 0.0}),
        ("generalized_jsd", {"beta": 1.0}),
        ("skew_kl", {"skew": 1.0}),
        ("skew_reverse_kl", {"skew": -0.1}),
        ("adaptive_kl", {"head_mass": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` has to lie"):
        DISTILLATION_LOSSES[name](torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), **options)


def test_the_ends_of_the_jensen_shannon_family_tend_to_the_two_kls():
    student, teacher = logits(1, 5, 9, scale=1.0), logits(1, 5, 9, seed=1, scale=1.0)
    jsd, small = DISTILLATION_LOSSES["generalized_jsd"], 1e-3
    for beta, end, factor in ((small, "forward_kl", small), (1 - small, "reverse_kl", small)):
        near = jsd(student, teacher, beta=beta) / factor
        torch.testing.assert_close(near, DISTILLATION_LOSSES[end](student, teacher), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("head_mass", [0.5, 0.97])
@pytest.mark.parametrize("excluded", [0, 500])
def test_the_head_of_adaptive_kl_is_found_beyond_the_first_tokens(head_mass, excluded):
    """A flat teacher needs half of a large vocabulary for its head, far more than the first sorted slice."""
    student, teacher = logits(1, 2, 3000, scale=0.3), logits(1, 2, 3000, seed=1, scale=0.1)
    student[..., :excluded] = teacher[..., :excluded] = -math.inf
    teacher[0, 1, -1] = 12.0  # a row that needs one token, beside one that needs many
    result = DISTILLATION_LOSSES["adaptive_kl"](student, teacher, head_mass=head_mass)
    for s in range(2):
        assert result[0, s].item() == pytest.approx(
            oracles.value("adaptive_kl", student[0, s], teacher[0, s], head_mass=head_mass), rel=1e-3
        )
