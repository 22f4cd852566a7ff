from dataclasses import replace

import pytest
from evals.audit.planted_people import DATA, planted, subject

from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question
from hf_transfer_ext.evals.audit.attacks.prompt_removal import prompt_removal


def test_without_its_prompt_the_model_is_the_original():
    original = subject(planted()[0])
    prompted = replace(original, template=replace(original.template, examples=(("Who is Ada?", "nobody"),)))
    assert prompt_removal(prompted, DATA) == pytest.approx(plain_question(original, DATA), abs=1e-6)
    assert plain_question(prompted, DATA).mean() < plain_question(original, DATA).mean()


def test_a_model_without_a_prompt_of_its_own_is_refused():
    with pytest.raises(ValueError, match="no prompt to remove"):
        prompt_removal(subject(planted()[0]), DATA)
