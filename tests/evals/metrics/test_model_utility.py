import numpy as np
import pytest
from evals.metrics.test_truth_ratio import SETS, from_log
from evals.shared_tofu import reference_log

from hf_transfer_ext.evals.engine.evaluate import compute_metrics
from hf_transfer_ext.evals.metrics import model_utility
from hf_transfer_ext.measurement import Measurement


def share(value, examples=1):
    return Measurement("x", value, "share", True, examples)


def test_by_hand():
    assert model_utility({"a": share(0.5, 2), "b": share(0.25, 3)}).value == pytest.approx(1 / 3)
    assert model_utility({"a": share(0.5, 2), "b": share(0.25, 3)}).examples == 5
    assert model_utility({"a": share(1.0), "b": share(0.0)}).value == 0.0


def test_a_part_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"'b' is 1\.5"):
        model_utility({"a": share(0.5), "b": share(1.5)})
    with pytest.raises(ValueError, match="at least one"):
        model_utility({})


@pytest.mark.parametrize("definition, value", [("arithmetic", 0.503353), ("geometric", 0.522074)])
def test_the_published_log_gives_the_published_number(definition, value):
    parts = {}
    for name in SETS:
        log = reference_log("full")[name]
        probability = "answer_probability" if name == "eval_log.json" else "choice_probability"
        result = compute_metrics(
            from_log(log), [probability, ("truth_ratio", {"definition": definition, "role": "retain"})]
        )
        parts |= {f"{name} {m.name}": m for m in result.measurements}
        parts[f"{name} rouge"] = share(float(np.mean(list(log["rougeL_recall"].values()))))
    assert len(parts) == 9
    assert model_utility(parts).value == pytest.approx(value, abs=1e-6)


def test_the_interval_is_that_of_the_mean_over_resampled_examples():
    parts = {"a": share(0.5, 2), "b": share(0.25, 3)}
    drawn = np.stack([np.linspace(0.4, 0.6, 101), np.full(101, 0.25)])
    low, high = model_utility(parts, drawn=drawn).interval
    assert (low, high) == pytest.approx((2 / (1 / 0.405 + 4), 2 / (1 / 0.595 + 4)), rel=1e-4)
    assert model_utility(parts).interval is None
    with pytest.raises(ValueError, match="one row for each of the 2 parts, but has 1"):
        model_utility(parts, drawn=drawn[:1])
