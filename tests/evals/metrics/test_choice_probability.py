import math

import pytest
from evals.scored import example, tokens
from evals.shared_tofu import reference_log

from hf_transfer_ext.evals.metrics import choice_probability


def test_by_hand_with_answers_of_different_length():
    right = tokens([math.log(0.5), math.log(0.5)])  # .5 per token
    wrong = [tokens([math.log(0.25)]), tokens([math.log(0.25)] * 3)]
    assert choice_probability(example(right, perturbed=wrong)) == pytest.approx(0.5)


def test_losses_too_large_for_exp_still_compare():
    scored = example(tokens([-1000.0]), perturbed=[tokens([-1000.0])])
    assert choice_probability(scored) == pytest.approx(0.5)


@pytest.mark.parametrize("name, value", [("author", 0.377360), ("world", 0.408998)])
def test_the_published_log_gives_the_published_number(name, value):
    log = reference_log("full")[f"eval_real_{name}_wo_options.json"]
    found = [
        choice_probability(
            example(tokens([-log["avg_gt_loss"][k]]), perturbed=[tokens([-x]) for x in log["average_perturb_loss"][k]])
        )
        for k in log["avg_gt_loss"]
    ]
    assert sum(found) / len(found) == pytest.approx(value, abs=1e-6)
