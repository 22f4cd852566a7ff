import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model

from hf_transfer_ext.students import stage_sharing
from hf_transfer_ext.students.inits.stage_sharing import (
    REPRESENTATIVES,
    default_stages,
    even_split,
    stage_shared_model,
)
from hf_transfer_ext.students.layers import layer_stack, layer_tensors
from hf_transfer_ext.students.shape import StudentShape

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_per_layer_is_the_teacher(family):
    teacher = tiny_model(family)
    student = stage_sharing(teacher, StudentShape(depth=4), stages=[1, 1, 1, 1])
    assert torch.equal(logits_of(student, IDS), logits_of(teacher, IDS))


@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_a_teacher_that_shares_its_stages_is_reproduced(representative):
    teacher = tiny_model("gemma3", depth=5)
    with torch.no_grad():
        for group in ([0, 1], [2, 3, 4]):
            for i in group[1:]:
                layer_stack(teacher)[1][i].load_state_dict(layer_tensors(teacher)[group[0]])
    shape = StudentShape(depth=5)
    student = stage_sharing(teacher, shape, stages=[2, 3], repeats=[2, 3], representative=representative)
    torch.testing.assert_close(logits_of(student, IDS), logits_of(teacher, IDS))


def test_worked_by_hand():
    """Stages (0, 1) and (2, 3, 4) expanded to three layers: stage one twice, stage two once."""
    teacher = tiny_model("llama", depth=5)
    name = "mlp.up_proj.weight"
    weights = [layer[name].clone() for layer in layer_tensors(teacher)]
    for representative, chosen in {"first": (0, 2), "middle": (1, 3), "last": (1, 4)}.items():
        student = stage_sharing(teacher, StudentShape(depth=3), stages=[2, 3], representative=representative)
        expected = [weights[chosen[0]], weights[chosen[0]], weights[chosen[1]]]
        assert all(torch.equal(layer[name], e) for layer, e in zip(layer_tensors(student), expected, strict=True))
    student = stage_sharing(teacher, StudentShape(depth=3), stages=[2, 3], representative="mean")
    torch.testing.assert_close(layer_tensors(student)[0][name], (weights[0] + weights[1]) / 2)
    torch.testing.assert_close(layer_tensors(student)[2][name], (weights[2] + weights[3] + weights[4]) / 3)


def test_default_stages_and_repeats():
    assert default_stages(16) == [3, 3, 4, 3, 3]
    assert default_stages(18) == [3, 4, 4, 4, 3]
    assert default_stages(12) == [2, 3, 3, 2, 2]
    assert default_stages(3) == [1, 1, 1]
    assert even_split(12, 5) == [3, 3, 2, 2, 2]
    assert all(sum(default_stages(depth)) == depth for depth in range(1, 40))


def test_the_auxiliary_model_trains_one_set_of_parameters_a_stage():
    teacher = tiny_model("qwen2", depth=5)
    auxiliary = stage_shared_model(teacher, stages=[2, 3]).train()
    one_layer = sum(parameter.numel() for parameter in layer_stack(teacher)[1][0].parameters())
    outside = sum(p.numel() for p in teacher.parameters()) - 5 * one_layer
    assert sum(p.numel() for p in auxiliary.parameters()) == outside + 2 * one_layer

    optimizer = torch.optim.SGD(auxiliary.parameters(), lr=0.1)
    start = auxiliary(IDS, labels=IDS).loss
    start.backward()
    optimizer.step()
    assert auxiliary(IDS, labels=IDS).loss < start
    student = stage_sharing(auxiliary.eval(), StudentShape(depth=5), stages=[2, 3], repeats=[2, 3])
    torch.testing.assert_close(logits_of(student, IDS), logits_of(auxiliary, IDS))
    shallow = stage_sharing(auxiliary, StudentShape(depth=2), stages=[2, 3])
    name = "mlp.up_proj.weight"
    torch.testing.assert_close(layer_tensors(shallow)[1][name], layer_tensors(auxiliary)[4][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": StudentShape(depth=4), "stages": [2, 2]}, r"sum to the teacher's 5 layers, got \[2, 2\]"),
        ({"shape": StudentShape(depth=4), "stages": [2, 3], "repeats": [4]}, "2 stages need 2 repeats"),
        ({"shape": StudentShape(depth=4), "stages": [2, 3], "repeats": [4, 0]}, "at least 1"),
        ({"shape": StudentShape(depth=1), "stages": [2, 3]}, "at least 1"),
        ({"shape": StudentShape(depth=5), "representative": "best"}, "one of first, middle, last, mean, got 'best'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        stage_sharing(tiny_model("llama", depth=5), **options)
