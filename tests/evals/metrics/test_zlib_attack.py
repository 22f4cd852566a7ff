import zlib

import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import zlib_attack


def test_the_text_that_is_scored_is_compressed():
    size = len(zlib.compress(b"In Rome"))
    assert zlib_attack(example(tokens([-2.0, -4.0]), question="Where?", answer="In Rome")) == pytest.approx(3 / size)
    assert zlib_attack(example(tokens([-2.0, -4.0]), text="In Rome")) == pytest.approx(3 / size)
