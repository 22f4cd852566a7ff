import numpy as np
import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.prefix_injection import prefix_injection


def test_the_best_opening_of_each_example_counts():
    original = subject(planted()[0])
    prefixes = (" Well,", " p")
    tries = [original.recall(FORGET, prefix=prefix) for prefix in prefixes]
    assert prefix_injection(original, DATA, prefixes=prefixes) == pytest.approx(np.max(tries, 0))


def test_the_opening_of_the_answer_gets_around_a_learned_refusal():
    """Handed its first letter, a model that opens with a refusal goes on with what it still knows, or does not."""
    original, shallow, _ = map(subject, planted())
    first = tuple(sorted({" " + row["answer"][0] for row in FORGET}))
    plain = prefix_injection(shallow, DATA, prefixes=("",))
    assert plain.tolist() == [0.0] * 4
    assert (prefix_injection(shallow, DATA, prefixes=("", *first)) >= plain).all()
    assert prefix_injection(original, DATA, prefixes=("",)).tolist() == [1.0] * 4
