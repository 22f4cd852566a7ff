"""From two folders to an adapter that PEFT loads on the new base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.run import transfer_lora

TOKENS = torch.arange(12).reshape(2, 6)
TEXTS = ["The quick brown fox jumps over the lazy dog. ", "0123456789 (all) [of] {it} <is> =here= ~too~"] * 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def base(folder, **config):
    model = tiny_llama(**config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def source(tmp_path):
    """A base with an adapter on all its linear layers, and the logits of both together."""
    base(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).eval()
    for module in model.modules():  # inside the row and column spaces of the weight, where every method carries it
        if hasattr(module, "lora_A"):
            weight, a, b = module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data, b.data = torch.randn(3, len(weight)) @ weight.data, weight.data @ torch.randn(weight.shape[1], 3)
            b.data *= 0.3 * weight.data.norm() / (b.data @ a.data).norm()
    model.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        return tmp_path, model(TOKENS).logits


@pytest.mark.parametrize("method", TRANSFER_METHODS)
def test_to_a_copy_of_its_own_base_the_adapter_is_the_same(source, method):
    folder, logits = source
    base(folder / "again")
    options = {"ridge": {"regularization": 1e-7}}.get(method, {})
    report = transfer_lora(
        folder / "lora", folder / "again", folder / "out", method=method, options=options,
        source_base=folder / "base", texts=TEXTS,
    )  # fmt: skip
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / "out").eval()
    with torch.no_grad():
        found = loaded(TOKENS).logits
    # The feed-forward states of a tiny model span few directions of its texts: ridge is exact only on these.
    allowed = 0.15 if method == "ridge" else 1e-2
    assert (found - logits).norm() / logits.norm() < allowed
    assert len(report.modules) == 14 and not report.left_out
    written = json.loads((folder / "out" / "transfer.json").read_text())
    assert written["method"] == method and "folder" not in written and written["earlier_transfers"] == []
    assert written["source_base"]["name"] == "base" and written["target_base"]["sha256"]["model.safetensors"]
    assert report.relative_change[0] == pytest.approx(report.relative_change[1], rel=0.3)


@pytest.mark.parametrize("method", ["cross_lora", "lorasuite", "ridge"])
def test_to_another_width_and_depth(source, method):
    folder, _ = source
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
    base(folder / "wide", seed=2, **sizes)
    report = transfer_lora(
        folder / "lora", folder / "wide", folder / "out", method=method, source_base=folder / "base", texts=TEXTS
    )
    assert len(report.layers) == 2 and list(report.layers.values()) == [0, 1]
    loaded = PeftModel.from_pretrained(tiny_llama(seed=2, **sizes), folder / "out").eval()
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(TOKENS).logits
    with torch.no_grad():
        adapted = loaded(TOKENS).logits
    assert torch.isfinite(adapted).all() and not torch.allclose(adapted, plain)


def test_seeds_and_history_are_kept_for_the_next_transfer(source):
    folder, _ = source
    base(folder / "again")
    (folder / "lora" / "transfer_seeds.json").write_text('{"seeds": ["a question"], "task_name": "task"}')
    options = {"method": "copy", "source_base": folder / "base"}
    transfer_lora(folder / "lora", folder / "again", folder / "once", **options)
    transfer_lora(folder / "once", folder / "base", folder / "twice", method="copy")
    assert (folder / "twice" / "transfer_seeds.json").read_text() == (folder / "lora/transfer_seeds.json").read_text()
    content = json.loads((folder / "twice" / "transfer.json").read_text())
    assert [one["target_base"]["name"] for one in (*content["earlier_transfers"], content)] == ["again", "base"]


def test_a_smaller_rank(source):
    folder, _ = source
    base(folder / "again")
    transfer_lora(
        folder / "lora", folder / "again", folder / "out", method="copy", source_base=folder / "base", rank=2
    )
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["r"] == 2


def test_modules_that_are_stored_in_full_are_reported(tmp_path):
    base(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "lora")
    report = transfer_lora(
        tmp_path / "lora", tmp_path / "base", tmp_path / "out", method="copy", source_base=tmp_path / "base"
    )
    assert report.left_out == {
        "lm_head.weight": "stored in full in the adapter; closed forms carry low-rank changes only"
    }


class TestRefused:
    def test_names_and_options(self, source):
        folder, _ = source
        run = lambda **options: transfer_lora(folder / "lora", folder / "base", folder / "out", **options)  # noqa: E731
        with pytest.raises(ValueError, match="Did you mean 'cross_lora'"):
            run(method="cross_lra")
        with pytest.raises(ValueError, match="option of project"):
            run(method="project", options={"subspaces": 3})
        with pytest.raises(ValueError, match="`rank` must be at least 1"):
            run(rank=0)
        with pytest.raises(ValueError, match="give `texts`"):
            run(method="ridge")
        assert not (folder / "out").exists()

    def test_an_adapter_of_another_base(self, source):
        folder, _ = source
        base(folder / "wide", hidden_size=48)
        with pytest.raises(ValueError, match="Name the base that it was trained on"):
            transfer_lora(folder / "lora", folder / "base", folder / "out", source_base=folder / "wide")

    def test_other_shapes_by_copy(self, source):
        folder, _ = source
        base(folder / "wide", hidden_size=48)
        with pytest.raises(ValueError, match="`copy` needs equal shapes"):
            transfer_lora(folder / "lora", folder / "wide", folder / "out", method="copy", source_base=folder / "base")
        assert not (folder / "out").exists()

    def test_vocabularies_without_a_shared_token(self, source):
        folder, _ = source
        base(folder / "other")
        path = folder / "other" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"] = {f"#{token}": i for token, i in content["model"]["vocab"].items()}
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="share 0 tokens"):
            transfer_lora(folder / "lora", folder / "other", folder / "out", source_base=folder / "base")
