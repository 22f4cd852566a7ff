import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model

from hf_transfer_ext.students import linear_expansion
from hf_transfer_ext.students.inits.linear_expansion import Learngene, auxiliary_model, fit_learngene, learngene_of
from hf_transfer_ext.students.layers import layer_stack, layer_tensors
from hf_transfer_ext.students.shape import StudentShape

IDS = torch.arange(24).reshape(2, 12)


def make_linear(teacher, seed=1):
    """Give the teacher layers that are linear in l / L, and return the line."""
    torch.manual_seed(seed)
    layers = layer_tensors(teacher)
    base = {name: torch.randn_like(tensor) * 0.1 for name, tensor in layers[0].items()}
    slope = {name: torch.randn_like(tensor) * 0.1 for name, tensor in layers[0].items()}
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, tensor in layer.items():
                tensor.copy_(base[name] + i / len(layers) * slope[name])
    return Learngene(base, slope)


def test_worked_by_hand():
    """Layers 1 and 3 at places 0 and 1/2: base 1, slope 4; four layers are 1, 2, 3, 4."""
    gene = fit_learngene([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    assert gene.base["w"].item() == pytest.approx(1.0) and gene.slope["w"].item() == pytest.approx(4.0)
    assert [gene.layer(i / 4)["w"].item() for i in range(4)] == pytest.approx([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_linear_layers_is_reproduced(family):
    teacher = tiny_model(family, depth=5).double()
    line = make_linear(teacher)
    found = learngene_of(teacher)
    for name, tensor in line.base.items():
        torch.testing.assert_close(found.base[name], tensor, rtol=0, atol=1e-13)
        torch.testing.assert_close(found.slope[name], line.slope[name], rtol=0, atol=1e-13)
    student = linear_expansion(teacher, StudentShape(depth=5))
    torch.testing.assert_close(logits_of(student, IDS), logits_of(teacher, IDS), rtol=0, atol=1e-10)


def test_the_fit_is_the_least_squares_of_every_entry():
    torch.manual_seed(0)
    layers = [{"w": torch.randn(3, 2, dtype=torch.float64)} for _ in range(6)]
    gene = fit_learngene(layers)
    places = torch.stack([torch.ones(6, dtype=torch.float64), torch.arange(6) / 6.0], dim=1)
    values = torch.stack([layer["w"].flatten() for layer in layers])
    base, slope = torch.linalg.lstsq(places, values).solution
    torch.testing.assert_close(gene.base["w"].flatten(), base)
    torch.testing.assert_close(gene.slope["w"].flatten(), slope)


def test_one_layer_has_no_slope():
    gene = fit_learngene([{"w": torch.tensor([2.0]), "count": torch.tensor(3)}])
    assert gene.slope["w"].item() == 0.0 and gene.base["w"].item() == 2.0
    assert gene.layer(0.5)["count"].item() == 3


@pytest.mark.parametrize("num_layers", [1, 3, 9])
def test_a_given_learngene_is_expanded_to_any_depth(num_layers):
    teacher = tiny_model("gemma3", depth=3)
    gene = make_linear(tiny_model("gemma3", depth=3))
    student = linear_expansion(teacher, StudentShape(depth=num_layers), learngene=gene)
    name = "mlp.up_proj.weight"
    for i, layer in enumerate(layer_tensors(student)):
        torch.testing.assert_close(layer[name], gene.base[name] + i / num_layers * gene.slope[name])
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    kinds = teacher.config.layer_types
    assert student.config.layer_types == [kinds[i * 3 // num_layers] for i in range(num_layers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_model_computes_what_its_expansion_does(family):
    teacher = tiny_model(family, depth=4)
    auxiliary = auxiliary_model(teacher)
    expanded = linear_expansion(teacher, StudentShape(depth=4))
    torch.testing.assert_close(logits_of(auxiliary, IDS), logits_of(expanded, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_auxiliary_model_trains_base_and_slope_and_nothing_else(checkpointing):
    teacher = tiny_model("llama", depth=4)
    auxiliary = auxiliary_model(teacher).train()
    if checkpointing:
        auxiliary.gradient_checkpointing_enable()
    one_layer = sum(parameter.numel() for parameter in layer_stack(teacher)[1][0].parameters())
    outside = sum(p.numel() for p in teacher.parameters()) - 4 * one_layer
    assert sum(p.numel() for p in auxiliary.parameters()) == outside + 2 * one_layer

    optimizer = torch.optim.SGD(auxiliary.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = auxiliary(IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gene, start = learngene_of(auxiliary), learngene_of(teacher)
    assert all(not torch.equal(gene.base[name], start.base[name]) for name in gene.base)
    assert all(not torch.equal(gene.slope[name], start.slope[name]) for name in gene.slope)
    student = linear_expansion(auxiliary.eval(), StudentShape(depth=4))
    torch.testing.assert_close(logits_of(student, IDS), logits_of(auxiliary, IDS), rtol=1e-5, atol=1e-5)
    assert linear_expansion(auxiliary, StudentShape(depth=7)).config.num_hidden_layers == 7


def test_layers_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="no line can be fitted"):
        fit_learngene([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}])
