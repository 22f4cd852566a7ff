import logging
from math import log

import pytest
import torch
from losses.unlearning.methods.answers import Answers
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.needs import ForwardPass
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning.methods.concept_poisoning import attributions

concept_poisoning = METHODS["concept_poisoning"]


class Hidden(Answers):
    """Answers of two tokens each, whose log-probabilities are a function of one layer's hidden states."""

    def __init__(self, log_probs, **parts):
        self.of, self.hidden = log_probs, parts
        super().__init__({})

    def answers(self, part, *, at_once=1, layer=0, change=None):
        assert layer == 1
        for hidden in self.hidden[part]:
            values = self.of(change(hidden[None].clone())[0])
            yield ForwardPass(values, torch.zeros(2, dtype=torch.int64), torch.tensor([2]))


def test_by_hand():
    # Two of three answers are picked: (3 + 2) / 2 nats per token of the wrong answers, and the mean of log 4.
    forget = {"alternative_nll": [6.0, 8.0, 5.0], "alternative_lengths": [2.0, 4.0, 1.0], "picked": [1.5, 1.5, 0.0]}
    assert objective("concept_poisoning", forget, {"log_probs": [log(0.25)]}) == pytest.approx(2.5 + log(4))


def test_attributions_are_the_integral_and_add_up_to_what_the_direction_gives():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(3)]
    concept = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64), dim=0)

    def log_probs(hidden):
        return -hidden[-3:-1].pow(2).sum(-1) + hidden[-3:-1].sum(-1)

    found = attributions(Hidden(log_probs, forget=rows), concept, 1, steps=5)
    for value, hidden in zip(found, rows, strict=True):
        without = hidden - (hidden @ concept)[:, None] * concept
        # Quadratic, so that the midpoint rule is exact.
        assert float(value) == pytest.approx(float(log_probs(hidden).mean() - log_probs(without).mean()), abs=1e-6)
        points = [(step + 0.5) / 5 for step in range(5)]
        total = 0.0
        for t in points:
            at = (without + t * (hidden - without)).requires_grad_()
            (gradient,) = torch.autograd.grad(log_probs(at).mean(), at)
            total += float((gradient * (hidden - without)).sum()) / 5
        assert float(value) == pytest.approx(total, abs=1e-6)


def test_a_planted_concept_is_found_and_rows_that_lack_it_are_left_out(caplog):
    """The last two rows to forget look like those to retain; the others have a direction that their answers need."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randn(4, 6, generator=draw) for _ in range(12)]
    with_it = [row + torch.tensor([3.0, 0, 0, 0, 0, 0]) for row in rows[:4]]
    whole = Hidden(lambda hidden: hidden[-3:-1, 0] - 5, forget=[*with_it, *rows[4:6]], retain=rows[6:])
    with caplog.at_level(logging.WARNING):
        found = concept_poisoning(share=0.6, layer=1).prepare(whole)
    assert found["picked"].tolist() == pytest.approx([1.5] * 4 + [0.0] * 2)
    assert found["concept_scores"][:4].min() > found["concept_scores"][4:].max()
    assert "2 of the 6 answers to forget hang least on the concept and are not poisoned" in caplog.text
    caplog.clear()
    assert concept_poisoning(share=1.0, layer=1).prepare(whole)["picked"].tolist() == [1.0] * 6 and not caplog.text


def test_what_has_no_concept_or_is_out_of_range_is_refused():
    rows = [torch.ones(4, 3)]
    whole = Hidden(lambda hidden: hidden[-3:-1, 0], forget=rows, retain=rows)
    with pytest.raises(ValueError, match="no concept to poison"):
        concept_poisoning(layer=1).prepare(whole)
    with pytest.raises(ValueError, match="`layer` of 'concept_poisoning' is 3, but the model has 2 layers"):
        concept_poisoning(layer=3).prepare(whole)
    for options, message in (
        ({"share": 0.0}, "`share` must be > 0"),
        ({"share": 1.5}, "`share` must be at most 1"),
        ({"steps": 0}, "`steps` must be >= 1"),
        ({"layer": -1}, "`layer` must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            concept_poisoning(**options)
