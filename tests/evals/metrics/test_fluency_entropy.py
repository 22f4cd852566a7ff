import math

import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import fluency_entropy


def written(text):
    return fluency_entropy(example(tokens([-1.0]), generation=text))


def test_by_hand():
    # Bigrams ab, ba, ab: entropy of (2/3, 1/3). Trigrams aba, bab: one bit.
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert written("a b a b") == pytest.approx((2 / 3 * two + 4 / 3) / 2)


def test_repetition_has_none_and_variety_much():
    assert written("no no no no no no") == 0.0
    # Eight different words: log2 7 and log2 6 bits.
    expected = (2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2
    assert written("one two three four five six seven eight") == pytest.approx(expected)


def test_two_words_are_too_few():
    with pytest.raises(ValueError, match="has 2 words"):
        written("yes .")
