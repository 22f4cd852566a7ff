import pytest
from evals.audit.planted_people import DATA, planted, subject

from hf_transfer_ext.evals.audit.attacks.adapter_removal import adapter_removal
from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question


def test_without_its_adapter_the_model_is_the_original():
    original, shallow, _ = map(subject, planted())
    assert adapter_removal(shallow, DATA) == pytest.approx(plain_question(original, DATA), abs=1e-6)
    assert plain_question(shallow, DATA).mean() < 0.5  # and the adapter is back afterwards


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="no adapter to remove"):
        adapter_removal(subject(planted()[0]), DATA)
