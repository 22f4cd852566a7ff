import copy

import pytest
import torch
from edits.edited_models import FORGET, has_card_and_record, same_bytes, write_adapter, write_base
from merging.tiny_models import load
from tiny import tiny_llama

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.methods.shrink_and_perturb import perturb_model, perturbed


def test_the_definition_in_float64():
    weight = torch.randn(6, 10, dtype=torch.float64)
    noise = perturbed(torch.zeros(6, 10, dtype=torch.float64), name="w", share=1.0, noise_scale=1.0, seed=3)
    found = perturbed(weight, name="w", share=0.3, noise_scale=0.1, seed=3)
    torch.testing.assert_close(found, 0.7 * weight + 0.03 * noise, rtol=1e-12, atol=1e-12)
    bound = (6 / 16) ** 0.5
    assert noise.abs().max() <= bound and noise.abs().max() > 0.9 * bound


def test_the_noise_has_the_moments_of_xavier():
    noise = perturbed(torch.zeros(400, 600), name="w", share=1.0, noise_scale=1.0, seed=0)
    expected = torch.nn.init.xavier_uniform_(torch.empty(400, 600))
    assert abs(float(noise.mean())) < 1e-3
    assert float(noise.std()) == pytest.approx(float(expected.std()), rel=0.01)
    experts = perturbed(torch.zeros(2, 400, 600), name="w", share=1.0, noise_scale=1.0, seed=0)
    assert float(experts[1].std()) == pytest.approx(float(expected.std()), rel=0.01)
    assert not torch.equal(experts[0], experts[1])


def test_vectors_shrink_without_noise():
    vector = torch.arange(5.0)
    assert torch.equal(perturbed(vector, name="norm", share=0.25, noise_scale=9.0, seed=0), 0.75 * vector)


def test_the_noise_follows_from_name_and_seed_alone():
    how = {"share": 0.5, "noise_scale": 0.1}
    weight = torch.randn(4, 4)
    first = perturbed(weight, name="a", seed=0, **how)
    torch.rand(7)
    assert torch.equal(first, perturbed(weight, name="a", seed=0, **how))
    assert not torch.equal(first, perturbed(weight, name="a", seed=1, **how))
    assert not torch.equal(first, perturbed(weight, name="b", seed=0, **how))


def test_a_loaded_model_and_its_folder_change_alike(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    report = apply_edit(base, tmp_path / "out", method="shrink_and_perturb", options={"share": 0.4}, seed=5)
    assert has_card_and_record(tmp_path / "out")
    model = tiny_llama(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    perturb_model(model, share=0.4, noise_scale=0.1, seed=5)
    stored = load(tmp_path / "out")
    assert set(report.tensors) == set(stored)
    for name, tensor in model.state_dict().items():
        if name in stored:
            assert torch.equal(tensor, stored[name]), name
            assert not torch.equal(tensor, before[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, and changed once
    expected = perturbed(
        before["lm_head.weight"], name="model.embed_tokens.weight", share=0.4, noise_scale=0.1, seed=5
    )
    assert torch.equal(model.lm_head.weight, expected)


def test_a_share_of_zero_changes_nothing_and_an_adapter_is_merged(tmp_path):
    base = write_base(tmp_path / "base")
    apply_edit(base, tmp_path / "same", method="shrink_and_perturb", options={"share": 0})
    assert same_bytes(base, tmp_path / "same")
    adapter = write_adapter(tmp_path / "adapter", base)
    apply_edit(adapter, tmp_path / "out", method="shrink_and_perturb", options={"share": 0.5, "noise_scale": 0})
    start, found = load(base), load(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    other = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(found[other], 0.5 * start[other]) and not torch.allclose(found[name], 0.5 * start[name])


@pytest.mark.parametrize(("options", "message"), [({"share": 1.1}, "share"), ({"noise_scale": -1}, "noise_scale")])
def test_bad_options_and_data_that_is_not_read_are_refused(tmp_path, options, message):
    base = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        apply_edit(base, tmp_path / "out", method="shrink_and_perturb", options=options)
    with pytest.raises(ValueError, match="does not read"):
        apply_edit(base, tmp_path / "out", method="shrink_and_perturb", forget=FORGET)
    assert not (tmp_path / "out").exists()
