import pytest

from hf_transfer_ext.data.candidates import Candidates
from hf_transfer_ext.data.selection import SELECTIONS
from hf_transfer_ext.data.selection.random import random


def test_the_seed_decides_and_larger_sets_hold_smaller_ones():
    candidates = Candidates(50)
    assert random(candidates, 10, seed=1) == random(candidates, 10, seed=1) != random(candidates, 10, seed=2)
    assert set(random(candidates, 10)) < set(random(candidates, 20))
    assert random(candidates, 50) == list(range(50))


def test_every_row_is_chosen_equally_often():
    counts = [0] * 6
    for seed in range(600):
        for row in random(Candidates(6), 2, seed=seed):
            counts[row] += 1
    assert all(150 < count < 250 for count in counts)  # 200 expected, deviation about 12


def test_mistakes():
    for count in (0, 4):
        with pytest.raises(ValueError, match="1 to 3 rows can be chosen"):
            random(Candidates(3), count)
    with pytest.raises(ValueError, match="Did you mean 'worst_case'"):
        SELECTIONS["worst_cas"]
    with pytest.raises(ValueError, match="begin with"):
        SELECTIONS.register(lambda rows, count: [])
