import torch
from losses.vectors.vectors_problem import cosine, problem, times

from hf_transfer_ext.losses.vectors import cosine_distance


def test_it_is_one_minus_the_cosine_after_the_projection():
    student, teacher, w = problem(width=3)
    expected = [
        sum(1 - cosine(times(w.tolist(), student[s, i].tolist()), teacher[s, i].tolist()) for s in range(2)) / 2
        for i in range(3)
    ]
    torch.testing.assert_close(cosine_distance(student, teacher, w).tolist(), expected, rtol=1e-5, atol=1e-6)


def test_lengths_do_not_count():
    student, _, _ = problem()
    assert cosine_distance(student, 3 * student).abs().max() < 1e-6
    assert (cosine_distance(student, -student) - 2).abs().max() < 1e-6
