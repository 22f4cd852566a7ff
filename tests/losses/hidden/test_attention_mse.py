"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import MASK, random

from hf_transfer_ext.losses.hidden import attention_mse


def test_attention_follows_its_definition_and_leaves_out_what_is_not_seen():
    unseen = ~torch.ones(3, 3, dtype=torch.bool).tril()
    student = random(2, 2, 3, 3).masked_fill(unseen, -math.inf)
    teacher = random(2, 4, 3, 3, seed=1).masked_fill(unseen, torch.finfo(torch.float32).min)
    paper, found = attention_mse(student, teacher, MASK, relative=False), attention_mse(student, teacher, MASK)
    for b in range(2):
        for t in range(3):
            seen = [s for s in range(t + 1) if MASK[b, s] and MASK[b, t]]
            total = sum(
                (student[b, a, t, s].item() - (teacher[b, 2 * a, t, s] + teacher[b, 2 * a + 1, t, s]).item() / 2) ** 2
                for a in range(2)
                for s in seen
            )
            size = sum(
                ((teacher[b, 2 * a, t, s] + teacher[b, 2 * a + 1, t, s]).item() / 2) ** 2
                for a in range(2)
                for s in seen
            )
            assert paper[b, t].item() == pytest.approx(total / 2 / max(len(seen), 1), rel=1e-4)
            assert found[b, t].item() == pytest.approx(total / size if seen else 0.0, rel=1e-4)
    with pytest.raises(ValueError, match="3 attention heads cannot be averaged to 2"):
        attention_mse(student, random(2, 3, 3, 3), MASK)
