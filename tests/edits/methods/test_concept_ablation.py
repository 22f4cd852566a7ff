import pytest
import torch
from edits.edited_models import same_bytes, write_base
from merging.tiny_models import load
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.methods.concept_ablation import concept_scores, damped


def test_scores_by_the_definition():
    torch.manual_seed(0)
    unembedding, values, ids = torch.randn(50, 8) + 1, torch.randn(8, 5), torch.tensor([3, 7])
    for d, score in enumerate(concept_scores(unembedding, values, ids).tolist()):
        logits = [sum(float(e) * float(v) for e, v in zip(row, values[:, d], strict=True)) for row in unembedding]
        mean = sum(logits) / 50
        spread = (sum((one - mean) ** 2 for one in logits) / 50) ** 0.5
        assert score == pytest.approx(((logits[3] + logits[7]) / 2 - mean) / spread, abs=1e-6)


def test_an_example_by_hand():
    # Token 0 is (1, 0), the three others 0: along (1, 0) mean 1/4, deviation sqrt(3)/4.
    unembedding = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    values = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 5.0]])
    scores = concept_scores(unembedding, values, torch.tensor([0]))
    torch.testing.assert_close(scores, torch.tensor([3**0.5, -(3**0.5), 0.0], dtype=torch.float64))
    edited = damped(values, [0], strength=0.5, noise=0.0, seed=0)
    assert torch.equal(edited, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 5.0]]))


def test_a_score_does_not_depend_on_scale_or_on_a_shift_of_the_logits():
    torch.manual_seed(1)
    unembedding, values, ids = torch.randn(40, 6), torch.randn(6, 9), torch.tensor([1])
    scores = concept_scores(unembedding, values, ids)
    torch.testing.assert_close(concept_scores(unembedding + torch.randn(6), 3 * values, ids), scores)


def planted(folder, word: str = "Q") -> str:
    """A model in which neuron 5 of layer 1 writes the token of a word."""
    base = write_base(folder)
    model = tiny_llama()
    token = ord(word) - 33  # the byte alphabet of the tests starts at "!"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 4 * model.lm_head.weight[token]
    model.save_pretrained(base)
    return base


def test_the_vector_that_writes_the_word_is_found_and_zeroed(tmp_path):
    base = planted(tmp_path / "base")
    report = apply_edit(base, tmp_path / "out", method="concept_ablation", options={"words": ["Q"], "count": 1})
    name = "model.layers.1.mlp.down_proj.weight"
    assert [(one["tensor"], one["neuron"]) for one in report.found["vectors"]] == [(name, 5)]
    start, found = load(base), load(tmp_path / "out")
    assert report.tensors == [name] and not found[name][:, 5].any()
    others = [d for d in range(64) if d != 5]
    assert torch.equal(found[name][:, others], start[name][:, others])
    assert all(torch.equal(found[one], start[one]) for one in start if one != name)
    assert '"Q"' not in (tmp_path / "out" / "hf_transfer_ext.json").read_text()


def test_noise_is_drawn_by_the_seed(tmp_path):
    base = planted(tmp_path / "base")
    options = {"words": ["Q"], "count": 1, "strength": 0.0, "noise": 0.1}
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        apply_edit(base, tmp_path / folder, method="concept_ablation", options=options, seed=seed)
    assert same_bytes(tmp_path / "a", tmp_path / "b") and not same_bytes(tmp_path / "a", tmp_path / "c")


def test_strength_0_without_noise_leaves_every_byte(tmp_path):
    base = planted(tmp_path / "base")
    apply_edit(base, tmp_path / "out", method="concept_ablation", options={"words": ["Q"], "strength": 0})
    assert same_bytes(base, tmp_path / "out")


@pytest.mark.parametrize("width", [64, 128])
def test_value_vectors_of_conv1d_are_rows(tmp_path, width):
    write_base(tmp_path / "base")  # for its tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=64, n_inner=width, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[9] = 9 * model.lm_head.weight[ord("Q") - 33]
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tmp_path / "base" / file).read_bytes())
    report = apply_edit(folder, tmp_path / "out", method="concept_ablation", options={"words": ["Q"], "count": 1})
    name = "transformer.h.0.mlp.c_proj.weight"
    found = load(tmp_path / "out")[name]
    assert report.tensors == [name] and not found[9].any() and found[8].any()


def test_bad_input(tmp_path):
    base = write_base(tmp_path / "base")
    for options, message in (
        ({}, "needs the option 'words'"),
        ({"words": "Q"}, "has to be a list of words"),
        ({"words": ["Q"], "strength": 2}, "between 0 and 1"),
        ({"words": ["Q"], "threshold": 1000}, "No value vector raises"),
        ({"words": ["Q"], "cuont": 3}, "Did you mean 'count'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_edit(base, tmp_path / "out", method="concept_ablation", options=options)
    with pytest.raises(ValueError, match="does not read rows to forget"):
        apply_edit(base, tmp_path / "out", method="concept_ablation", options={"words": ["Q"]}, forget=[{"text": "a"}])
