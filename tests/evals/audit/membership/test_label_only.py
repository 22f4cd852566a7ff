import numpy as np
import pytest
from evals.audit.planted_people import FORGET, HOLDOUT, planted, subject

from hf_transfer_ext.evals.audit.membership.label_only import label_only
from hf_transfer_ext.evals.audit.references import References
from hf_transfer_ext.evals.audit.subject import reworded

ROWS = [*FORGET, *HOLDOUT]


@pytest.fixture
def models():
    original, shallow, retrained = map(subject, planted())
    return original, shallow, retrained, References(original, retrained)


def test_label_only_reads_what_is_written_and_nothing_else(models):
    original, references = models[0], models[3]
    wordings = ("{question}", "Tell: {question}")
    recalls = [original.recall(reworded(ROWS, wording)) for wording in wordings]
    assert label_only(original, ROWS, references, wordings=wordings) == pytest.approx(-np.mean(recalls, axis=0))
    with pytest.raises(ValueError, match="nothing to ask"):
        label_only(original, ROWS, references, wordings=())
