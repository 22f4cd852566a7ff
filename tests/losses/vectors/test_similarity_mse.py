import torch
from losses.vectors.vectors_problem import cosine, problem

from hf_transfer_ext.losses.vectors import similarity_mse


def test_it_compares_the_cosines_of_all_pairs():
    student, teacher, _ = problem(width=3, teacher_width=5)
    x, y, p, q = (side.tolist() for side in (*student, *teacher))
    expected = [sum((cosine(x[i], y[j]) - cosine(p[i], q[j])) ** 2 for j in range(3)) / 3 for i in range(3)]
    torch.testing.assert_close(similarity_mse(student, teacher).tolist(), expected, rtol=1e-5, atol=1e-6)


def test_single_texts_are_compared_with_each_other_and_a_rotation_changes_nothing():
    student, _, _ = problem(sides=1)
    turned = student @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert similarity_mse(student, turned).abs().max() < 1e-6
    assert similarity_mse(student, torch.ones(1, 3, 4)).min() > 0
