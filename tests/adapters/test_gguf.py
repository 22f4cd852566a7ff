"""A GGUF adapter read back: names, metadata, and the change that llama.cpp would apply."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from hf_transfer_ext.adapters.gguf import convert_to_gguf, interleaved
from hf_transfer_ext.cli import main
from hf_transfer_ext.weights.lora import read_lora

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def models():
    yield "llama", tiny_llama()
    torch.manual_seed(0)
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(**SIZES))
    yield "gemma3", Gemma3ForCausalLM(Gemma3TextConfig(**SIZES))


def adapted(model, folder, **options):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model.save_pretrained(folder / "base")
    found = get_peft_model(model, LoraConfig(**{**config, **options}))
    found.save_pretrained(folder / "lora")
    return folder / "lora"


def llama_cpp_change(tensors, alpha, name):
    """alpha / rank of its own factors times B A, as llama.cpp computes it."""
    down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return alpha / down.shape[0] * up @ down


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {one.name: torch.from_numpy(np.array(one.data, dtype=np.float32)) for one in reader.tensors}
    return reader, tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)  # fmt: skip
def test_llama_cpp_would_apply_the_same_change(tmp_path, architecture, options):
    model = dict(models())[architecture]
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    folder = adapted(model, tmp_path, **options)
    reader, tensors = read(convert_to_gguf(folder, tmp_path / "lora.gguf", base=tmp_path / "base"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == architecture and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 4.0
    found = read_lora(folder)
    assert len(tensors) == 2 * len(found.modules) == 28
    for module, factors in found.modules.items():
        layer, kind = module.split(".")[2], module.rpartition(".")[2]
        change = factors.left @ factors.right
        if architecture == "llama" and kind in heads:  # row i of a head's first half beside row i of its second one
            size = len(change) // heads[kind]
            order = [h * size + half * (size // 2) + i for h in range(heads[kind]) for i in range(size // 2)
                     for half in (0, 1)]  # fmt: skip
            change = change[order]
        moved = llama_cpp_change(tensors, 4.0, f"blk.{layer}.{NAMES[kind]}.weight")
        torch.testing.assert_close(moved, change, rtol=1e-5, atol=1e-6)


def test_interleaving_by_hand():
    rows = torch.arange(8.0)[:, None]  # two heads of four features: pairs (0, 2), (1, 3) and (4, 6), (5, 7)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_half_precision_and_overwriting(tmp_path):
    folder = adapted(tiny_llama(), tmp_path)
    path = convert_to_gguf(folder, tmp_path / "out" / "lora.gguf", base=tmp_path / "base", dtype="float16")
    reader = gguf.GGUFReader(path)
    assert {one.tensor_type for one in reader.tensors} == {gguf.GGMLQuantizationType.F16}
    with pytest.raises(FileExistsError, match="set `overwrite`"):
        convert_to_gguf(folder, path, base=tmp_path / "base")
    convert_to_gguf(folder, path, base=tmp_path / "base", overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["lora.gguf"]


def test_the_command(tmp_path, capsys):
    folder = adapted(tiny_llama(), tmp_path, use_rslora=True)
    words = ["convert", str(folder), str(tmp_path / "lora.gguf"), "--to", "gguf", "--base", str(tmp_path / "base")]
    assert main(words) == 0
    assert "llama.cpp loads it" in capsys.readouterr().out
    _, tensors = read(tmp_path / "lora.gguf")
    for module, factors in read_lora(folder).modules.items():
        kind = module.rpartition(".")[2]
        if kind in ("q_proj", "k_proj"):  # in another order of the rows, see above
            continue
        moved = llama_cpp_change(tensors, 4.0, f"blk.{module.split('.')[2]}.{NAMES[kind]}.weight")
        torch.testing.assert_close(moved, factors.left @ factors.right, rtol=1e-5, atol=1e-6)
    for more, said in (
        (["--overwrite", "--rank", "2"], "convert to a LoRA of that `rank` first"),
        ([], "set `overwrite`"),
        (["--to", "ggml"], "`to` must be one of lora, gguf"),
        (["--to", "lora", "--dtype", "float16"], "`dtype` is for `to: gguf`"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


class TestRefused:
    def test_an_unknown_architecture(self, tmp_path):
        folder = adapted(tiny_llama(), tmp_path)
        path = tmp_path / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["FalconForCausalLM"]}))
        with pytest.raises(ValueError, match=r"FalconForCausalLM.*Supported: LlamaForCausalLM"):
            convert_to_gguf(folder, tmp_path / "lora.gguf", base=tmp_path / "base")
        assert not (tmp_path / "lora.gguf").exists()

    def test_what_a_gguf_adapter_cannot_hold(self, tmp_path):
        for name, options, said in (
            ("whole", {"modules_to_save": ["lm_head"]}, "stores 'lm_head.weight' whole"),
            ("tokens", {"target_modules": ["q_proj", "embed_tokens"]}, "changes the embeddings"),
            ("dora", {"use_dora": True}, "Convert it to a plain LoRA"),
        ):
            (tmp_path / name).mkdir()
            folder = adapted(tiny_llama(), tmp_path / name, **options)
            with pytest.raises(ValueError, match=said):
                convert_to_gguf(folder, tmp_path / "lora.gguf", base=tmp_path / name / "base")
        assert not list(tmp_path.glob("*gguf*"))

    def test_settings(self, tmp_path):
        folder = adapted(tiny_llama(), tmp_path)
        with pytest.raises(ValueError, match="`dtype` must be one of float32, float16"):
            convert_to_gguf(folder, tmp_path / "lora.gguf", base=tmp_path / "base", dtype="int8")
        with pytest.raises(ValueError, match="is a folder"):
            convert_to_gguf(folder, tmp_path, base=tmp_path / "base")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="give `base`"):
            convert_to_gguf(folder, tmp_path / "lora.gguf")
