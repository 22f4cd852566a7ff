import torch

from hf_transfer_ext.losses.rows import LogitRows
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal


def test_a_signal_speaks_of_the_students_tokens_or_of_its_own():
    rows = LogitRows(torch.zeros(2, 5))
    assert TeacherSignal(rows).mask is None
    own = TeacherSignal(rows, torch.tensor([[-100, 3], [4, -100]]))
    assert own.mask.tolist() == [[False, True], [True, False]]


def test_what_has_a_form_and_a_signal_is_a_teacher():
    class Cache:
        form = "sparse"

        def signal(self, student, inputs, mask):
            return None

    assert isinstance(Cache(), Teacher) and not isinstance(torch.nn.Linear(1, 1), Teacher)
