import math

import numpy as np
import pytest
from evals.scored import example, tokens
from evals.shared_tofu import reference_log

from hf_transfer_ext.evals.engine.evaluate import compute_metrics
from hf_transfer_ext.evals.metrics import truth_ratio
from hf_transfer_ext.evals.metrics.truth_ratio import forget_summary, ratio_of_losses, retain_summary

SETS = ["eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json"]


def from_log(log: dict) -> list:
    """Scored examples that have the losses of a published log."""
    return [
        example(
            tokens([-log["avg_gt_loss"][key]]),
            paraphrase=tokens([-log["avg_paraphrased_loss"][key]]),
            perturbed=[tokens([-loss]) for loss in log["average_perturb_loss"][key]],
            index=i,
        )
        for i, key in enumerate(log["avg_paraphrased_loss"])
    ]


def test_by_hand():
    wrong = [tokens([math.log(0.1)]), tokens([math.log(0.4)] * 2)]
    scored = example(tokens([math.log(0.9)]), paraphrase=tokens([math.log(0.5)]), perturbed=wrong)
    assert truth_ratio(scored) == pytest.approx(0.25 / 0.5)
    assert truth_ratio(scored, definition="geometric") == pytest.approx(0.2 / 0.5)


def test_the_answer_stands_for_a_missing_paraphrase():
    assert truth_ratio(example(tokens([math.log(0.5)]), perturbed=[tokens([math.log(0.25)])])) == pytest.approx(0.5)


def test_both_definitions_agree_on_one_wrong_answer_and_arithmetic_is_never_smaller():
    rng = np.random.default_rng(0)
    assert ratio_of_losses(1.0, [2.0]) == pytest.approx(ratio_of_losses(1.0, [2.0], "geometric"))
    for losses in rng.exponential(2.0, size=(50, 5)).tolist():
        assert ratio_of_losses(1.0, losses) >= ratio_of_losses(1.0, losses, "geometric")


def test_summaries_by_hand():
    values = np.array([0.5, 2.0, 4.0, 0.0])
    assert forget_summary(values) == pytest.approx((0.5 + 0.5 + 0.25 + 0.0) / 4)
    assert retain_summary(values) == pytest.approx((0.5 + 0 + 0 + 1.0) / 4)


@pytest.mark.parametrize(
    "definition, forget, retained",
    [
        ("arithmetic", 0.500555, [0.459087, 0.403939, 0.437999]),
        ("geometric", 0.483356, [0.482683, 0.456009, 0.492337]),
    ],
)
def test_the_published_log_gives_the_published_numbers(definition, forget, retained):
    log = reference_log("full")
    found = compute_metrics(from_log(log["eval_log_forget.json"]), [{"truth_ratio": {"definition": definition}}])
    assert found.measurements[0].value == pytest.approx(forget, abs=1e-6)
    assert found.measurements[0].examples == 300
    for name, value in zip(SETS, retained, strict=True):
        options = {"definition": definition, "role": "retain"}
        assert compute_metrics(from_log(log[name]), [("truth_ratio", options)]).measurements[0].value == pytest.approx(
            value, abs=1e-6
        )


def test_unknown_options_are_refused():
    scored = [example(tokens([-1.0]), perturbed=[tokens([-2.0])])]
    assert (
        "must be arithmetic or geometric"
        in compute_metrics(scored, [("truth_ratio", {"definition": "mean"})]).problems[0]
    )
    with pytest.raises(ValueError, match="forget or retain"):
        compute_metrics(scored, [("truth_ratio", {"role": "keep"})])
