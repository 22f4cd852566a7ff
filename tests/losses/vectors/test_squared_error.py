import pytest
import torch
from losses.vectors.vectors_problem import problem, times

from hf_transfer_ext.losses.vectors import squared_error


def test_it_is_the_squared_distance_after_the_projection():
    student, teacher, w = problem(width=3)
    expected = [0.0] * 3
    for side in range(2):
        for row in range(3):
            own = times(w.tolist(), student[side, row].tolist())
            expected[row] += sum((a - b) ** 2 for a, b in zip(own, teacher[side, row].tolist(), strict=True)) / 2
    torch.testing.assert_close(squared_error(student, teacher, w).tolist(), expected, rtol=1e-5, atol=1e-6)


def test_an_example_by_hand_and_widths_that_differ():
    one, two = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert squared_error(one, two).tolist() == [5.0] and squared_error(one, one).tolist() == [0.0]
    with pytest.raises(ValueError, match="a `projection` is needed"):
        squared_error(one, torch.zeros(1, 1, 3))
