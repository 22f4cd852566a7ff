import numpy as np
import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, PLAIN, planted, subject
from tiny import byte_tokenizer

from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question


def test_it_is_the_probability_per_token_of_each_answer():
    """By the definition: exp of the mean log-probability of the answer's tokens, from full logits."""
    model = planted()[0]
    expected = []
    for row in FORGET:
        encoded = PLAIN.encode(byte_tokenizer(), row["question"], row["answer"])
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        answer = log_p.gather(-1, ids[0, 1:, None])[encoded.answer_start - 1 :]
        expected.append(float(answer.mean().exp()))
    assert plain_question(subject(model), DATA) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_was_taught_knows_and_one_that_was_not_does_not():
    original, _, retrained = map(subject, planted())
    assert np.mean(plain_question(original, DATA)) > 0.9
    assert np.mean(plain_question(retrained, DATA)) < 0.3
