import numpy as np
import pytest
from evals.audit.planted_people import DATA, FORGET, HOLDOUT, never_taught, planted, subject

from hf_transfer_ext.evals.audit.attacks.multiple_choice import multiple_choice
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData


def test_the_share_is_that_of_the_probabilities():
    original = subject(planted()[0])
    texts = [[row["answer"], *row["perturbed_answer"]] for row in FORGET]
    each = np.array([
        [original.probability([{**row, "answer": text}])[0] for text in choices]
        for row, choices in zip(FORGET, texts, strict=True)
    ])  # fmt: skip
    assert multiple_choice(original, DATA) == pytest.approx(each[:, 0] / each.sum(1), abs=1e-6)


def test_a_model_that_refuses_still_prefers_the_right_answer_and_a_guess_is_no_recovery():
    original, shallow, retrained = map(subject, planted())
    found = [
        audit(
            one, DATA, original=original, retrained=subject(never_taught()), membership=[], resamples=20,
            attacks=["plain_question", "multiple_choice"],
        )
        for one in (shallow, retrained)
    ]  # fmt: skip
    by_name = [{v.attack: v for v in one.verdicts} for one in found]
    assert by_name[0]["multiple_choice"].recovered > by_name[0]["plain_question"].recovered + 0.2
    assert by_name[1]["multiple_choice"].recovered < 0.25
    alone = audit(shallow, DATA, original=original, attacks=["multiple_choice"], resamples=20, membership=[])
    assert alone.verdicts[0].recovered is None and "pass a retrained one" in alone.verdicts[0].note


def test_without_wrong_answers_it_does_not_apply():
    with pytest.raises(ValueError, match="perturbed_answer"):
        multiple_choice(subject(planted()[0]), AuditData(HOLDOUT))
