import numpy as np
import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.paraphrased_question import paraphrased_question
from hf_transfer_ext.evals.audit.subject import AuditData, reworded

WITHOUT = AuditData([{k: v for k, v in row.items() if k != "paraphrased_question"} for row in FORGET])


def test_the_best_wording_of_each_example_counts():
    original = subject(planted()[0])
    wordings = ("Say: {question}", "{question} Now.")
    tries = [original.probability(reworded(FORGET, wording)) for wording in wordings]
    own = original.probability([{**row, "question": row["paraphrased_question"]} for row in FORGET])
    assert paraphrased_question(original, WITHOUT, wordings=wordings) == pytest.approx(np.max(tries, 0))
    assert paraphrased_question(original, DATA, wordings=wordings) == pytest.approx(np.max([*tries, own], 0))


def test_nothing_to_ask_is_refused():
    original = subject(planted()[0])
    assert paraphrased_question(original, DATA, wordings=()).shape == (4,)  # the data's own paraphrases
    with pytest.raises(ValueError, match="no column `paraphrased_question`"):
        paraphrased_question(original, WITHOUT, wordings=())
