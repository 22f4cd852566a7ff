"""GGUF files of models, read back by transformers: the same logits, the same tokens, and refusals by name."""

import json
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from hub_server import front_matter
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_fallback, byte_level, unigram
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_transfer_ext.cli import main
from hf_transfer_ext.export import PRE_TOKENIZERS, export
from hf_transfer_ext.hub.publish import pull
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.reproduce import reproduce

SIZES = {
    "vocab_size": 520, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257,
}  # fmt: skip
IDS = torch.arange(60).reshape(2, 30)
TEXT = "The capital of France is Paris, and café!"


def made(kind):
    torch.manual_seed(0)
    model = {
        "llama": lambda: tiny_llama(hidden_size=64, rms_norm_eps=1e-5, vocab_size=520),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, tie_word_embeddings=True, **SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, head_dim=128, **SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=None, **SIZES)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(num_hidden_layers=3, head_dim=256, query_pre_attn_scalar=256, sliding_window=8, **SIZES)
        ),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(num_hidden_layers=7, head_dim=256, query_pre_attn_scalar=256, sliding_window=8, **SIZES)
        ),
    }[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def saved(folder, kind="llama", tokenizer=None):
    model = made(kind)
    model.save_pretrained(folder)
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read_back(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_model_is_read_back_as_it_was(tmp_path, kind):
    model = saved(tmp_path / "model", kind)
    report = export(str(tmp_path / "model"), str(tmp_path / "x.gguf"), quantize="f32")
    assert report.architecture == {"mistral": "llama"}.get(kind, kind) and not report.in_f16
    torch.testing.assert_close(logits(read_back(tmp_path / "x.gguf")), logits(model), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert tokenizer(TEXT)["input_ids"] == load_tokenizer(tmp_path / "model")(TEXT)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "x.gguf"]


@pytest.mark.parametrize("quantize, error", [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_smaller_types_lose_what_they_have_to(tmp_path, quantize, error):
    model = saved(tmp_path / "model")
    report = export(str(tmp_path / "model"), str(tmp_path / "x.gguf"), quantize=quantize)
    back = read_back(tmp_path / "x.gguf")
    for (name, old), (_, new) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert (old - new).norm() <= error * old.norm(), name
    if quantize == "q8_0":
        weights = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
        again = gguf.quants.dequantize(
            gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        )
        assert np.array_equal(back.model.layers[0].mlp.up_proj.weight.detach().numpy(), again)
        whole = export(str(tmp_path / "model"), str(tmp_path / "y.gguf"), quantize="f32")
        assert report.bytes < 0.4 * whole.bytes
    types = {str(t.name): t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["output_norm.weight"] == "F32" and types["token_embd.weight"] == quantize.upper()


def test_rows_that_do_not_divide_into_blocks_are_named(tmp_path, capsys):
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=48, intermediate_size=50, num_attention_heads=4)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "x.gguf"), "--to", "gguf", "--quantize", "q8_0"]
    assert main(words) == 0
    assert "stored as f16" in (out := capsys.readouterr().out) and "blk.0.ffn_down.weight" in out
    assert main(words) == 2 and "exists" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    torch.testing.assert_close(logits(read_back(tmp_path / "x.gguf")), logits(model), rtol=0.05, atol=0.1)


def sentencepiece():
    """The byte-fallback tokenizer with all merges that SentencePiece would try, in the order of its own."""
    stated = json.loads(byte_fallback().backend_tokenizer.to_str())
    vocabulary, merges = stated["model"]["vocab"], stated["model"]["merges"]
    tokens = list(dict.fromkeys("".join(pair) for pair in merges))
    stated["model"]["merges"] = [
        [token[:i], token[i:]] for token in tokens for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(stated))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def with_pattern(pattern):
    stated = json.loads(byte_level().backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    own = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    stated["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, own]}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stated)), bos_token="<bos>")


def values_of(path, key):
    return gguf.GGUFReader(path).get_field(key).contents()


def test_tokenizers_of_both_kinds(tmp_path):
    for name, tokenizer in {"byte": byte_level(), "piece": sentencepiece()}.items():
        torch.manual_seed(0)
        tiny_llama(vocab_size=720).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        export(str(tmp_path / name), str(tmp_path / f"{name}.gguf"))
    byte, piece = tmp_path / "byte.gguf", tmp_path / "piece.gguf"
    assert values_of(byte, "tokenizer.ggml.model") == "gpt2" and values_of(byte, "tokenizer.ggml.pre") == "gpt-2"
    assert values_of(piece, "tokenizer.ggml.model") == "llama"
    tokens, kinds = values_of(piece, "tokenizer.ggml.tokens"), values_of(piece, "tokenizer.ggml.token_type")
    assert len(tokens) == 720 and tokens[-1] == "[PAD719]" and kinds[-1] == 5
    assert {kind for token, kind in zip(tokens, kinds, strict=True) if token.startswith("<0x")} == {6}
    assert [kinds[tokens.index(t)] for t in ("<bos>", "<unk>", "▁")] == [3, 2, 1]
    assert values_of(piece, "tokenizer.ggml.add_bos_token") is True
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="byte.gguf")
    assert (
        back(TEXT, add_special_tokens=False)["input_ids"] == byte_level()(TEXT, add_special_tokens=False)["input_ids"]
    )
    assert (
        as_sentencepiece_would(TEXT, tokens, values_of(piece, "tokenizer.ggml.scores"))
        == sentencepiece()(TEXT, add_special_tokens=False)["input_ids"]
    )


def as_sentencepiece_would(text, tokens, scores):
    """llama.cpp's algorithm: of all neighbors whose joined text is a token, those of the best score, from the left."""
    known = {token: number for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [(scores[known[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known]
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    found = []
    for part in parts:
        found += [known[part]] if part in known else [known[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("pattern, name", PRE_TOKENIZERS.items())
def test_rules_for_words_have_names(tmp_path, pattern, name):
    tiny_llama(vocab_size=600).save_pretrained(tmp_path / "model")
    with_pattern(pattern).save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), str(tmp_path / "x.gguf"))
    assert values_of(tmp_path / "x.gguf", "tokenizer.ggml.pre") == name


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (unigram, "is a Unigram model"),
        (byte_fallback, "not those of a SentencePiece model"),
        (lambda: with_pattern(r"\w+|\s+"), "by a rule that llama.cpp has no name for"),
    ],
)
def test_tokenizers_that_would_give_other_tokens_are_refused(tmp_path, tokenizer, message):
    tiny_llama(vocab_size=720).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "model"), str(tmp_path / "x.gguf"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel, and how llama.cpp orders its weights"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}, "`sliding_window`"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"vocab_size": 100}, "ids up to"),
    ],
)
def test_settings_that_llama_cpp_reads_otherwise_are_refused(tmp_path, changes, message):
    saved(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "model"), str(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match="Unknown type 'q4'"):
        export(str(tmp_path / "model"), str(tmp_path / "x.gguf"), quantize="q4")
    with pytest.raises(ValueError, match="Unknown format 'onnx'"):
        export(str(tmp_path / "model"), str(tmp_path / "x.gguf"), to="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_rotary_embedding_of_llama_3(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny_llama(rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), str(tmp_path / "x.gguf"))
    found = next(t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors if str(t.name) == "rope_freqs.weight")
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(np.array(found)), model.model.rotary_emb.inv_freq)


def test_adapters_go_through_the_same_command(tmp_path):
    base = made("llama")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    words = [str(tmp_path / "lora"), str(tmp_path / "x.gguf")]
    report = export(*words, base=str(tmp_path / "base"), quantize="f32")
    assert (report.architecture, report.tensors) == ("lora", 4)
    with pytest.raises(ValueError, match="f32 or f16"):
        export(*words, base=str(tmp_path / "base"), quantize="q8_0", overwrite=True)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="`base` belongs to an adapter"):
        export(str(tmp_path / "base"), str(tmp_path / "y.gguf"), base="x")
    # A model with its adapter is exported as what they are together.
    export(f"{tmp_path / 'base'}+{tmp_path / 'lora'}", str(tmp_path / "y.gguf"), quantize="f32")
    merged = get_peft_model(made("llama"), config)
    merged.load_adapter(tmp_path / "lora", "again")
    merged.set_adapter("again")
    together = logits(merged.merge_and_unload())
    torch.testing.assert_close(logits(read_back(tmp_path / "y.gguf")), together, rtol=1e-4, atol=1e-4)


def write_texts(folder):
    rows = [{"text": f"{TEXT} {n} is a metal, and so on."} for n in ("gold", "iron", "tin", "lead")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    return folder / "texts.jsonl"


def test_a_folder_has_a_card_and_a_record_with_what_the_type_costs(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    saved(tmp_path / "model", "qwen2")
    hub.seed("tester/model", tmp_path / "model", private=True)
    words = [
        "tester/model",
        str(tmp_path / "out"),
        "--quantize",
        "q8_0",
        "--data",
        str(write_texts(tmp_path)),
        "--rows",
        "2",
    ]
    assert main(["export", *words, "--push_to_hub", "tester/model-gguf"]) == 0
    printed = capsys.readouterr().out
    assert "token_agreement" in printed and "Pushed to" in printed
    record = read_record("tester/model-gguf")
    assert record.job == "export" and list(record.result) == ["comparison.png", "model-q8_0.gguf"]
    found = {m.name: m.value for m in record.metrics}
    original = {m.name: m.value for m in record.compared["original"]}
    assert found["perplexity"] == pytest.approx(original["perplexity"], rel=0.02)
    assert 0 < found["kl_to_reference"] < 0.01 and found["token_agreement"] > 0.9
    card = hub.files("tester/model-gguf")["README.md"].decode()
    assert (
        front_matter(card)["base_model_relation"] == "quantized" and front_matter(card)["base_model"] == "tester/model"
    )
    assert 'from_pretrained("tester/model-gguf", gguf_file="model-q8_0.gguf")' in card
    assert "| this model |" in card and "llama.cpp itself was not run" in card
    again = AutoModelForCausalLM.from_pretrained(pull("tester/model-gguf"), gguf_file="model-q8_0.gguf")
    assert again.config.model_type == "qwen2"
    found = reproduce("tester/model-gguf", search=[str(tmp_path)])
    assert found.verdict == "equal" and found.by == "bytes", found.text()
    assert main(["export", "tester/model", str(tmp_path / "x.gguf"), "--push_to_hub", "tester/x"]) == 2
    assert "single GGUF file has no card" in capsys.readouterr().err
    with pytest.raises(FileExistsError):
        export("tester/model", str(tmp_path / "out"))
    export("tester/model", str(tmp_path / "out"), data=None, overwrite=True)
    assert "the export had no data" in " ".join(read_record(tmp_path / "out").not_measured)
    assert [p.name for p in (tmp_path / "out").glob("*.gguf")] == ["model-f16.gguf"]


def test_an_adapter_has_a_card_and_a_record_too(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    base = made("llama")
    base.save_pretrained(tmp_path / "base")
    hub.seed("tester/base", tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = "tester/base"
    adapted.save_pretrained(tmp_path / "lora")
    for command, how in (("export", ["--quantize", "f16"]), ("convert", ["--to", "gguf", "--dtype", "float16"])):
        words = [command, str(tmp_path / "lora"), str(tmp_path / command), *how]
        assert main([*words, "--push_to_hub", f"tester/{command}"]) == 0
        record = read_record(f"tester/{command}")
        (error,) = record.metrics
        assert error.name == "relative_error_of_change" and 0 < error.value < 1e-3 and error.examples == 4
        card = hub.files(f"tester/{command}")["README.md"].decode()
        assert "--lora adapter-f16.gguf" in card and front_matter(card)["base_model_relation"] == "adapter"
        found = reproduce(f"tester/{command}", inputs=[f"lora={tmp_path / 'lora'}"])
        assert found.verdict == "equal", found.text()
    assert main(["convert", str(tmp_path / "lora"), "x.gguf", "--to", "gguf", "--push_to_hub", "tester/x"]) == 2
