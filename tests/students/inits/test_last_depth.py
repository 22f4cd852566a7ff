import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model

from hf_transfer_ext.students import last_depth
from hf_transfer_ext.students.layers import layer_stack
from hf_transfer_ext.students.shape import StudentShape

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_teacher(family):
    teacher = tiny_model(family)
    assert torch.equal(logits_of(last_depth(teacher, StudentShape(depth=4)), IDS), logits_of(teacher, IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_runs_the_teachers_last_layers_on_the_embeddings(family):
    """The student's hidden states equal the teacher's layers 2 and 3 applied to what the student feeds its first."""
    teacher = tiny_model(family)
    student = last_depth(teacher, StudentShape(depth=2))
    seen = {}
    for i, layer in enumerate(layer_stack(student)[1]):
        layer.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].detach().clone()))
    logits_of(student, IDS)
    entered = {}
    first, *_ = layer_stack(teacher)[1]
    first.register_forward_pre_hook(lambda _, args: entered.__setitem__("embeddings", args[0].detach().clone()))
    third, fourth = layer_stack(teacher)[1][2:]
    third.register_forward_pre_hook(lambda _, args: (entered["embeddings"], *args[1:]))
    fourth.register_forward_pre_hook(lambda _, args: entered.__setitem__("second", args[0].detach().clone()))
    logits_of(teacher, IDS)
    assert torch.equal(seen[0], entered["embeddings"])
    assert torch.equal(seen[1], entered["second"])


def test_more_layers_than_the_teacher_are_refused():
    with pytest.raises(ValueError, match="between 1 and 4"):
        last_depth(tiny_model("llama"), StudentShape(depth=5))
