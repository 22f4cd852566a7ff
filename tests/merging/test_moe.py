"""A mixture of equal experts is the dense model; of different ones it is the sum that its gate says."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from merging.tiny_models import interrupted_at_read, load, result_bytes
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_transfer_ext.cli import main
from hf_transfer_ext.merging.moe import assemble
from hf_transfer_ext.merging.moe.gates import alike_layers
from hf_transfer_ext.merging.moe.plan import parse_moe_config
from hf_transfer_ext.weights.dtypes import BF16
from hf_transfer_ext.weights.reference import ModelReference

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE, rms_norm_eps=1e-5)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}
TYPES = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
TOKENS = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
PROMPTS = [["solve this", "1 + 1"], ["a poem", "o rose"], ["def f(x):"]]


def write(kind, folder, seed):
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros, norms as ones
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return {kind: [write(kind, folder / f"{kind}{i}".replace(" ", "_"), i) for i in range(3)] for kind in KINDS}


def config_of(base, experts, mode="hidden", shared=None, **more):
    content = {
        "base_model": base,
        "gate_mode": mode,
        "experts": [{"source_model": model, "positive_prompts": PROMPTS[i]} for i, model in enumerate(experts)],
        **more,
    }
    if shared is not None:
        content["shared_experts"] = [
            {"source_model": shared, "positive_prompts": ["all"], **more.pop("of_shared", {})}
        ]
    return content


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random"])
def test_equal_experts_are_the_dense_model(tmp_path, dense, kind, mode):
    model = dense[kind][0]
    config = config_of(model, [model] * 3, mode)
    if kind == "qwen2":
        shared = {"source_model": model, "positive_prompts": ["all"], "residual_scale": 0.0}
        config["shared_experts"] = [shared]
    report = assemble(config, tmp_path / "out", allow_same_experts=True)
    assert report.architecture == TYPES.get(kind, "mixtral")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["model_type"] == report.architecture and content["num_experts_per_tok"] == 2
    assert torch.allclose(logits(tmp_path / "out"), logits(model), atol=2e-5)
    assert report.parameters == sum(tensor.numel() for tensor in load(tmp_path / "out").values())


def test_an_interrupted_one_goes_on(tmp_path, dense):
    config = config_of(dense["qwen3"][0], dense["qwen3"], "random")
    assemble(config, tmp_path / "whole")
    with interrupted_at_read(40), pytest.raises(KeyboardInterrupt):
        assemble(config, tmp_path / "out", threads=1)
    assert list(tmp_path.glob(".out.partial-merge-*")) and not (tmp_path / "out").exists()
    report = assemble(config, tmp_path / "out")
    assert 10 < report.resumed_tensors < report.tensors
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_llama_with_a_shared_expert(tmp_path, dense):
    model = dense["llama"][0]
    shared = {"source_model": model, "positive_prompts": ["all"], "residual_scale": 0.0}
    config = {**config_of(model, [model] * 2), "shared_experts": [shared]}
    assert assemble(config, tmp_path / "out", allow_same_experts=True).architecture == "qwen2_moe"
    assert torch.allclose(logits(tmp_path / "out"), logits(model), atol=2e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_every_tensor_has_its_origin(tmp_path, dense, kind):
    base, one, two = dense[kind]
    config = config_of(base, [one, two, base], "random", experts_per_token=1)
    config["experts"][1]["residual_scale"] = 0.5
    assemble(config, tmp_path / "out", max_shard_bytes=40_000)
    result, sources = load(tmp_path / "out"), [load(path) for path in (one, two, base)]
    places = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    expected = {name: tensor for name, tensor in sources[2].items() if ".mlp." not in name}
    for layer in range(3):
        for i, source in enumerate(sources):
            for projection, short in places.items():
                part = (
                    f"block_sparse_moe.experts.{i}.{short}" if kind == "mistral" else f"mlp.experts.{i}.{projection}"
                )
                tensor = source[f"model.layers.{layer}.mlp.{projection}.weight"]
                scale = 0.5 if i == 1 and projection == "down_proj" else 1.0
                expected[f"model.layers.{layer}.{part}.weight"] = scale * tensor
    gates = {name for name in result if name.endswith(".gate.weight")}
    assert len(gates) == 3 and set(result) == set(expected) | gates
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = assemble({**config, "seed": 0}, tmp_path / "again", max_shard_bytes=40_000)
    assert all(torch.equal(tensor, result[name]) for name, tensor in load(tmp_path / "again").items())
    assemble({**config, "seed": 1}, tmp_path / "other")
    assert not any(torch.equal(load(tmp_path / "other")[name], result[name]) for name in gates)
    assert again.tensors == len(result)


def test_gates_point_to_the_hidden_states(tmp_path, dense):
    base, *others = dense["llama"]
    config = config_of(base, others)
    config["experts"][0]["negative_prompts"] = ["no", "never"]
    assemble(config, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).double().eval(), byte_tokenizer()

    def state(prompts, layer):
        rows = []
        for prompt in prompts:
            ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                rows.append(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1])
        return sum(rows) / len(rows)

    for layer in range(3):
        gate = load(tmp_path / "out")[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        first = state(PROMPTS[0], layer) - state(["no", "never"], layer)
        for row, oracle in zip(gate, (first, state(PROMPTS[1], layer)), strict=True):
            assert torch.allclose(row, oracle / oracle.norm(), atol=1e-5)


def test_gates_from_embeddings(tmp_path, dense):
    base, *others = dense["llama"]
    assemble(config_of(base, others, "cheap_embed"), tmp_path / "out")
    table, tokenizer = load(base)["model.embed_tokens.weight"].double(), byte_tokenizer()
    for i in range(2):
        ids = [t for p in PROMPTS[i] for t in (256, *tokenizer(p, add_special_tokens=False)["input_ids"])]
        total = table[ids].sum(0)
        for layer in range(3):
            row = load(tmp_path / "out")[f"model.layers.{layer}.block_sparse_moe.gate.weight"][i].double()
            assert torch.allclose(row, total / total.norm(), atol=1e-5)


def test_a_gate_sends_prompts_to_their_expert(tmp_path, dense):
    """With one expert for each token, the last token of an expert's only prompt goes to it in the first layer."""
    base, *others = dense["llama"]
    config = config_of(base, others, experts_per_token=1)
    for expert, prompt in zip(config["experts"], ("solve this", "a poem"), strict=True):
        expert["positive_prompts"] = [prompt]
    assemble(config, tmp_path / "out")
    gate = load(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    embeddings = load(base)["model.embed_tokens.weight"]
    for i, prompt in enumerate(("solve this", "a poem")):
        last = byte_tokenizer()(prompt, add_special_tokens=False)["input_ids"][-1]
        assert int((gate @ embeddings[last]).argmax()) == i


def test_noise_tells_equal_experts_apart(tmp_path, dense):
    model = dense["llama"][0]
    config = config_of(model, [model] * 2, "random")
    for expert in config["experts"]:
        expert["noise_scale"] = 0.1
    assemble(config, tmp_path / "out", threads=1)
    assemble(config, tmp_path / "again", threads=3)
    result, source = load(tmp_path / "out"), load(model)["model.layers.1.mlp.up_proj.weight"]
    noise = [result[f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight"] - source for i in range(2)]
    for one in noise:
        assert float(one.std()) == pytest.approx(0.1, rel=0.1) and abs(float(one.mean())) < 0.01
        assert float((one.abs() < 0.1).float().mean()) == pytest.approx(0.683, abs=0.04)
    assert abs(float((noise[0] * noise[1]).mean())) < 1e-3
    assert all(torch.equal(one, result[name]) for name, one in load(tmp_path / "again").items())


def test_dtype_and_an_adapter_as_expert(tmp_path, dense):
    base, one, _ = dense["llama"]
    torch.manual_seed(3)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(one), LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    config = config_of(base, [base, f"{one}+{tmp_path / 'lora'}"], "random", dtype="bfloat16")
    assemble(config, tmp_path / "out")
    result = load(tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = lora.merge_and_unload().state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(result["model.layers.2.block_sparse_moe.experts.1.w3.weight"], merged.bfloat16())


def test_alike_layers_are_told(dense, tmp_path):
    gates = torch.stack([torch.eye(2, 8), torch.tensor([[1.0] * 8, [1.0] * 7 + [1.1]])])
    assert alike_layers(gates) == [1] and alike_layers(gates[:, :1]) == []


def test_typed_values():
    config = parse_moe_config(
        yaml.safe_load("""
base_model: a/base@main
gate_mode: hidden
dtype: bfloat16
experts_per_token: 1
experts:
  - source_model: a/math
    positive_prompts: ["Solve for x:"]
    negative_prompts: ["A poem"]
  - source_model: {model: a/base, lora: b/poems}
    positive_prompts: ["A poem"]
shared_experts:
  - {source_model: a/base, positive_prompts: [any], residual_scale: 0.1}
architecture: qwen
""")
    )
    assert config.base_model == ModelReference("a/base", "main") and config.dtype == BF16
    assert config.experts[1].source_model == ModelReference("a/base", None, "b/poems", None)
    assert config.experts[0].negative_prompts == ("A poem",) and config.shared_experts[0].residual_scale == 0.1
    assert [str(one) for one in config.references] == ["a/base@main", "a/math", "a/base+b/poems", "a/base"]


VALID = {
    "base_model": "a/b",
    "experts": [{"source_model": f"c/{i}", "positive_prompts": [f"prompt {i}"]} for i in range(2)],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_mod": "random"}, "Did you mean 'gate_mode'"),
        ({"gate_mode": "hiden"}, "Did you mean 'hidden'"),
        ({"base_model": None}, "`base_model` must name a model"),
        ({"experts": []}, "at least one expert"),
        ({"experts": [{"source": "x"}]}, "Did you mean 'source_model'"),
        ({"experts": [{"source_model": "x"}]}, r"experts\[0\]` has no `positive_prompts`|from 1 to 1"),
        ({"experts": [{"source_model": x, "positive_prompts": ["p"]} for x in "ab"]}, "the same prompts"),
        ({"experts": [{"source_model": "a", "positive_prompts": "p"}]}, "list of texts"),
        ({"experts": [{"source_model": "a", "noise_scale": "p"}]}, "has to be a number"),
        ({"experts_per_token": 3}, "from 1 to 2"),
        ({"experts_per_token": 0}, "from 1 to 2"),
        ({"dtype": "int8"}, "`dtype` has to be one of"),
        ({"seed": 1.5}, "`seed` has to be a whole number"),
    ],
)
def test_refused_before_a_model_is_opened(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_moe_config({**VALID, **changes})


class TestRefused:
    def refused(self, tmp_path, config, message):
        with pytest.raises(ValueError, match=message):
            assemble(config, tmp_path / "out")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_one_model_as_all_experts(self, tmp_path, dense):
        model = dense["llama"][0]
        self.refused(tmp_path, config_of(model, [model] * 2), "All experts are the same model")

    def test_types(self, tmp_path, dense):
        config = config_of(dense["llama"][0], [dense["llama"][1], dense["qwen3"][1]])
        self.refused(tmp_path, config, "qwen3.*All models have to be of one type")
        self.refused(tmp_path, config_of(dense["qwen2"][0], dense["qwen2"][1:]), "qwen of qwen2 or llama")
        config = config_of(dense["llama"][0], dense["llama"][1:], architecture="deepseek")
        self.refused(tmp_path, config, "architecture 'deepseek'")

    def test_shared_expert_without_prompts(self, tmp_path, dense):
        config = config_of(dense["qwen2"][0], dense["qwen2"][1:])
        config["shared_experts"] = [{"source_model": dense["qwen2"][0]}]
        self.refused(tmp_path, config, r"shared_experts\[0\]` needs `positive_prompts`")

    def test_biases(self, tmp_path, dense):
        LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / "biased")
        config = config_of(str(tmp_path / "biased"), dense["llama"][1:], "random")
        self.refused(tmp_path, config, r"does not fit mixtral: tensor '.*bias' should not be there")

    def test_sizes(self, tmp_path, dense):
        for changes, message in (
            ({"intermediate_size": 40}, r"shape \[40, 32\]"),
            ({"num_hidden_layers": 2}, "2 layers"),
        ):
            LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).save_pretrained(tmp_path / "other")
            self.refused(tmp_path, config_of(dense["llama"][0], [dense["llama"][1], str(tmp_path / "other")]), message)

    def test_base_that_is_an_adapter(self, tmp_path, dense):
        base, one, two = dense["llama"]
        lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / "lora")
        self.refused(tmp_path, config_of(f"{base}+{tmp_path / 'lora'}", [one, two]), "cannot be an adapter")


def test_the_command(tmp_path, dense, capsys):
    base, *others = dense["llama"]
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config_of(base, others)))
    arguments = ["moe", str(tmp_path / "c.yml"), str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert "mixtral ->" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "mergekit_moe_config.yml").read_text()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
