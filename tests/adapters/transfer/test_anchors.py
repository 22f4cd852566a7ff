import itertools

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.anchors import (
    even_layers,
    layer_similarities,
    linear_cka,
    match_layers,
    paired_activations,
    residual_map,
    shared_positions,
    shared_token_ids,
)


def test_positions_are_shared_where_both_tokenizations_end_after_the_same_characters():
    assert shared_positions([2, 5, 6], [1, 2, 6]) == ([0, 2], [1, 2])
    assert shared_positions([0, 1, 1, 3], [1, 3]) == ([2, 3], [0, 1])  # the last of several tokens has read it all
    assert shared_positions([2], [1]) == ([], [])


def test_tokens_are_shared_by_what_they_are_and_not_by_their_ids():
    one, other = byte_tokenizer(), byte_tokenizer()
    ids = shared_token_ids(one, other)
    assert ids[0] == ids[1] == list(range(256))  # the two special tokens are each model's own


def test_the_residual_map_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    source, true = torch.randn(40, 6, generator=generator), torch.randn(6, 9, generator=generator)
    torch.testing.assert_close(residual_map(source, source @ true), true, rtol=1e-4, atol=1e-4)


def test_cka_by_hand_and_its_invariances():
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    y = torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_cka(x, y) == pytest.approx(1**2 / (2 * 2))  # (y.x)^2 / (|x|^2 |y|^2)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(50, 5, generator=generator)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    assert linear_cka(wide, 3 * wide @ turn + 2) == pytest.approx(1.0)
    assert linear_cka(torch.ones(4, 2), torch.ones(4, 3)) == 0.0


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (4, 4), (5, 3)])
def test_matched_layers_have_the_largest_sum_of_all_rising_maps(shape):
    similarity = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    found = match_layers(similarity)
    few, many = sorted(shape)
    sums = []
    for chosen in itertools.combinations(range(many), few):
        pairs = zip(range(few), chosen, strict=True) if shape[0] <= shape[1] else zip(chosen, range(few), strict=True)
        sums.append(sum(float(similarity[source, target]) for source, target in pairs))
    assert sum(float(similarity[s, t]) for t, s in found.items()) == pytest.approx(max(sums))
    assert list(found) == sorted(found) and list(found.values()) == sorted(found.values()) and len(found) == few


def test_layers_by_relative_depth():
    assert even_layers(3, 3) == {0: 0, 1: 1, 2: 2}
    assert even_layers(2, 5) == {0: 0, 4: 1}
    assert even_layers(5, 3) == {0: 0, 1: 2, 2: 4}


def test_two_readings_of_a_text_are_paired_row_by_row():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    ours, theirs = paired_activations((model, model), (tokenizer, tokenizer), ["abc", "de"], (names, names))
    for name in names:
        inputs, outputs = ours[name]
        assert inputs.shape[0] == 5 and torch.equal(inputs, theirs[name][0])
        torch.testing.assert_close(outputs, model.get_submodule(name)(inputs))
    few, _ = paired_activations((model, model), (tokenizer, tokenizer), ["abc", "de"], (names, names), max_tokens=2)
    assert few[names[0]][0].shape[0] == 2


def test_layers_of_a_model_match_themselves():
    features = {i: torch.randn(30, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    assert match_layers(layer_similarities(features, features)) == {0: 0, 1: 1, 2: 2}
