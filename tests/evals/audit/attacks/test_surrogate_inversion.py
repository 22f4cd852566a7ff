import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evals.audit.planted_people import DATA, FORGET, RETAIN, never_taught, planted, subject
from processes import on_two_ranks

from hf_transfer_ext.evals.audit.attacks.surrogate_inversion import labeled_by, read_from, surrogate_inversion
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.audit.verdict import recovered_share

FEW = {"samples": 0, "epochs": 6.0, "learning_rate": 1e-2, "rank": 8, "wordings": ["{question}"]}


@pytest.mark.parametrize("attacks", [None, pytest.param([{"surrogate_inversion": FEW}], marks=pytest.mark.slow)])
def test_what_the_original_writes_gives_its_facts_away_and_a_model_that_never_knew_comes_out_clean(attacks):
    original, retrained, never = subject(planted()[0]), subject(planted()[2]), subject(never_taught())
    if attacks is None:
        shown, floor, found = (
            surrogate_inversion(one, DATA, retrained, **FEW) for one in (original, retrained, never)
        )
        assert shown.mean() > 0.85 > floor.mean() + 0.3 and recovered_share(found, shown, floor) < 0.25
        return
    options = {"original": original, "retrained": retrained, "attacks": attacks, "membership": [], "resamples": 20}
    whole, clean = (audit(one, DATA, **options).verdicts[0] for one in (original, never))
    assert whole.recovered == pytest.approx(1.0) and whole.access == "prompts" and whole.floor_from == "retrained"
    assert clean.recovered < 0.25 and clean.original > clean.floor + 0.3


def test_labels_are_questions_with_the_attacked_models_own_text():
    original = subject(planted()[0])
    labels = labeled_by(original, DATA, ["{question}", "Say: {question}"], 1, 1.0)
    asked = [label["question"] for label in labels]
    for question in ("Who is Ada?", "Say: Who is Ada?", "Ada is who?"):
        assert asked.count(question) == 2  # greedy, and one sample
    assert {label["question"] for label in labels} >= {row["question"] for row in RETAIN}
    assert labels[0] == {"question": "Who is Ada?", "answer": original.answers(FORGET)[0]}
    assert [text.strip() for text in original.answers(FORGET)] == ["pilot", "baker", "miner", "judge"]
    assert set(labels[0]) == {"question", "answer"}


def test_the_surrogate_is_read_among_the_choices_where_there_are_any():
    original = subject(planted()[0])
    choices = original.metric_values(FORGET, ["choice_probability"])["choice_probability"]
    assert np.array_equal(read_from(original, FORGET), choices)
    assert np.array_equal(read_from(original, RETAIN), original.probability(RETAIN))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_scores_and_no_model_is_changed():
    _, shallow, retrained = planted()
    before = [copy.deepcopy(model.state_dict()) for model in (shallow, retrained)]
    torch.manual_seed(5)
    first = surrogate_inversion(subject(shallow), DATA, subject(retrained), **{**FEW, "samples": 1, "epochs": 1.0})
    torch.manual_seed(6)
    again = surrogate_inversion(subject(shallow), DATA, subject(retrained), **{**FEW, "samples": 1, "epochs": 1.0})
    assert np.array_equal(first, again)
    for model, weights in zip((shallow, retrained), before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(retrained, "peft_config")


def test_a_surrogate_that_knows_the_answers_is_refused(tmp_path):
    original, shallow, retrained = planted()
    for name, model in (("original", original), ("other", never_taught())):
        model.save_pretrained(tmp_path / name)
        subject(model).tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="knows the forgotten answers before it has seen a label"):
        surrogate_inversion(subject(shallow), DATA, subject(retrained), surrogate=str(tmp_path / "original"), **FEW)
    less = {**FEW, "epochs": 1.0}
    scores = surrogate_inversion(subject(shallow), DATA, subject(retrained), surrogate=str(tmp_path / "other"), **less)
    assert scores.shape == (4,) and ((scores >= 0) & (scores <= 1)).all()


def test_without_a_clean_model_or_with_options_that_mean_nothing_it_does_not_apply():
    original = subject(planted()[0])
    alone = audit(original, DATA, original=original, attacks=["surrogate_inversion"], membership=[], resamples=0)
    assert alone.verdicts[0].recovered is None and "never saw the forget set" in alone.verdicts[0].note
    with pytest.raises(ValueError, match="`samples` must be >= 0"):
        surrogate_inversion(original, DATA, original, temperature=0.0)
    with pytest.raises(ValueError, match="writes nothing"):
        surrogate_inversion(replace(original, max_new_tokens=1), AuditData(FORGET), original, **FEW)


@pytest.mark.slow
def test_two_processes_share_the_labels_and_train_the_same_surrogate(tmp_path):
    _, shallow, retrained = planted()
    options = {**FEW, "samples": 0, "epochs": 2.0}

    def scores(rank=None):
        accelerator = None if rank is None else Accelerator()
        models = [replace(subject(copy.deepcopy(one)), accelerator=accelerator) for one in (shallow, retrained)]
        return surrogate_inversion(models[0], DATA, models[1], **options)

    alone = scores()
    first, second = on_two_ranks(scores, tmp_path)
    assert np.array_equal(first, second) and first == pytest.approx(alone, abs=2e-5)
