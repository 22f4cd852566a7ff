import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.relearn_few import relearn_few
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn
from hf_transfer_ext.evals.audit.subject import AuditData


def test_each_half_is_asked_about_after_training_on_the_other():
    shallow = subject(planted()[1])
    found = relearn_few(shallow, DATA, epochs=2.0, learning_rate=2e-3)
    assert found[1::2] == pytest.approx(relearn(shallow, FORGET[0::2], FORGET[1::2], 2.0, 2e-3))
    assert found[0::2] == pytest.approx(relearn(shallow, FORGET[1::2], FORGET[0::2], 2.0, 2e-3))


def test_one_example_has_no_other_half():
    with pytest.raises(ValueError, match="at least two examples"):
        relearn_few(subject(planted()[0]), AuditData(FORGET[:1]))
