"""An audit that was interrupted runs what is left, and reports what an uninterrupted one reports."""

from functools import wraps

import numpy as np
import pytest
import torch
from evals.audit.planted_people import DATA, planted, subject

from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData

CHOSEN = {
    "attacks": ["plain_question", "multiple_choice", {"relearn_few": {"epochs": 1}}, "logit_lens"],
    "membership": ["loss_attack", {"min_k": {"share": 0.5}}],
    "resamples": 20,
}


@pytest.fixture(scope="module")
def models():
    return planted()


def run(models, data=DATA, **options):
    original, shallow, retrained = models
    announced = []
    found = audit(
        subject(shallow), data, original=subject(original), retrained=subject(retrained), progress=announced.append,
        **{**CHOSEN, **options},
    )  # fmt: skip
    return found, announced


def assert_same(one, other):
    assert [v.to_dict() for v in one.verdicts] == [v.to_dict() for v in other.verdicts]
    assert one.scores.keys() == other.scores.keys()
    for name, values in one.scores.items():
        np.testing.assert_array_equal(values, other.scores[name])
    assert one.membership == other.membership and one.probes == other.probes and one.weights == other.weights


def test_an_interrupted_audit_goes_on_to_the_same_report(models, tmp_path, monkeypatch):
    whole, every = run(models)
    stopped_at = "relearn_few"

    @wraps(ATTACKS[stopped_at].function)
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ATTACKS[stopped_at], "function", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models, journal=tmp_path / "work")
    monkeypatch.undo()
    resumed, rest = run(models, journal=tmp_path / "work")
    assert every[2].startswith(stopped_at) and rest == every[2:]
    assert_same(resumed, whole)
    again, none = run(models, journal=tmp_path / "work")
    assert none == []
    assert_same(again, whole)


def test_what_the_verdicts_depend_on_is_in_the_key(models, tmp_path):
    """Another seed, other rows, other weights, or an option: nothing is taken from the journal."""
    few = {"attacks": ["plain_question"], "membership": []}
    run(models, journal=tmp_path, **few)
    assert run(models, journal=tmp_path, **few)[1] == []
    assert run(models, journal=tmp_path, **{**few, "resamples": 21})[1] == ["plain_question"]
    assert run(models, journal=tmp_path, **few, seed=1)[1] == ["plain_question"]
    fewer = AuditData(DATA.forget[:3], DATA.retain, DATA.holdout)
    assert run(models, data=fewer, journal=tmp_path, **few)[1] == ["plain_question"]
    weight = next(models[1].parameters())
    with torch.no_grad():
        kept = weight.clone()
        weight.flatten()[0] += 1e-3
        assert run(models, journal=tmp_path, **few)[1] == ["plain_question"]
        weight.copy_(kept)
    assert run(models, journal=tmp_path, **few)[1] == []
