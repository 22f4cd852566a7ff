import pytest
from evals.audit.planted_people import DATA, FORGET, RETAIN, planted, subject

from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn
from hf_transfer_ext.evals.audit.attacks.relearn_unrelated import relearn_unrelated
from hf_transfer_ext.evals.audit.subject import AuditData


def test_it_trains_on_the_retain_set_alone():
    shallow = subject(planted()[1])
    expected = relearn(shallow, RETAIN, FORGET, 2.0, 2e-3)
    assert relearn_unrelated(shallow, DATA, epochs=2.0, learning_rate=2e-3) == pytest.approx(expected)


def test_without_retain_rows_it_does_not_apply():
    with pytest.raises(ValueError, match="needs `retain` rows"):
        relearn_unrelated(subject(planted()[0]), AuditData(FORGET))
