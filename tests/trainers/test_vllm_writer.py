"""The student writes by vLLM: a stand-in with vLLM's interface holds a model of its own, as the engine does."""

import copy
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama
from trainers.test_distillation import config, logged
from trainers.test_rollouts import PROMPTS, prompt_batch, trained, trainer_of
from transformers import AutoConfig, AutoModelForCausalLM

from hf_transfer_ext.models.generation import continuations
from hf_transfer_ext.trainers.rollouts import WRITTEN
from hf_transfer_ext.trainers.vllm_writer import VllmWriter, engine_weights, imported_vllm

ENGINE = {"rollout_engine": "vllm", "data": PROMPTS}


@dataclass
class SamplingParams:
    """The fields of vLLM's that are used, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Written:
    token_ids: tuple[int, ...]
    logprobs: list[dict] | None
    finish_reason: str


class ParallelLMHead(torch.nn.Module):
    """A head that multiplies with a packed copy of its weight, which may be the embedding's."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]
        self.quant_method = SimpleNamespace(process_weights_after_loading=ParallelLMHead.pack)

    def pack(self):
        with torch.no_grad():
            self.model[0].lm_head.weight.copy_(self.model[0].model.embed_tokens.weight)


class LLM:
    """Keeps what it was made with, and every state of its weights in which it wrote.

    As vLLM does, it seeds the generators of the process, adds the stop token of its config to those of a request,
    shortens a text that reaches the end of the context, and reads reloaded weights after the last one has arrived.
    """

    made: list["LLM"] = []  # noqa: RUF012
    silent = False

    def __init__(self, model, **arguments):
        self.arguments, self.resets, self.states = arguments, 0, []
        assert os.environ["WORLD_SIZE"] == "1" and arguments["seed"] == 0
        assert not list(Path(model).glob("*.safetensors")) and arguments["load_format"] == "dummy"
        assert int(os.environ["MASTER_PORT"]) > 1023
        assert json.loads((Path(model) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(7)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        self.network = torch.nn.ModuleList()
        if self.model.config.tie_word_embeddings:
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
            self.network.append(ParallelLMHead(self.model))
        context = arguments.get("max_model_len") or self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=context))
        LLM.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in list(kwargs["weights_iterator"]):
                own[name].copy_(weight)

    def apply_model(self, function):
        return [function(self.network)]

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.states.append(copy.deepcopy(self.model.state_dict()))
        found = []
        for prompt, one in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            stops = [*one.stop_token_ids, *([] if one.ignore_eos else [self.model.config.eos_token_id])]
            room = self.llm_engine.model_config.max_model_len - len(ids)
            texts, *_ = continuations(
                self.model, [ids], pad_id=257, stop_ids=stops, max_new_tokens=min(room, one.max_tokens),
                temperature=one.temperature, seed=one.seed, top_p=one.top_p,
            )  # fmt: skip
            text = [] if self.silent else texts[0]
            rows = None
            if one.logprobs is not None:
                with torch.no_grad():
                    scores = self.model(torch.tensor([ids + text])).logits[0, len(ids) - 1 : -1] / one.temperature
                values = scores.log_softmax(-1)
                rows = [{t: SimpleNamespace(logprob=values[i, t].item(), rank=1)} for i, t in enumerate(text)]
            reason = "stop" if text and text[-1] in stops else "length"
            found.append(SimpleNamespace(outputs=[Written(tuple(text), rows, reason)]))
        return found


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made, LLM.silent = [], False
    return module


def test_each_text_is_written_by_the_current_student(vllm, tmp_path, monkeypatch):
    seen, lines = [], []
    monkeypatch.setattr("hf_transfer_ext.trainers.rollouts.announce", lambda *line, show: lines.append(line))
    trainer = trainer_of(tmp_path, **ENGINE, max_steps=3, log_rollouts=9, rollout_engine_options={"max_model_len": 64})
    before = trainer._written_batch

    def noted(*args):
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return before(*args)

    trainer._written_batch = noted
    trainer.train()
    (engine,) = LLM.made
    assert [title.endswith(", by vLLM") for title, *_ in lines] == [True]
    assert len(engine.states) == len(seen) == engine.resets == 3
    for state, student in zip(engine.states, seen, strict=True):
        assert all(torch.equal(state[name], weight) for name, weight in student.items())
    assert not torch.equal(engine.states[0]["lm_head.weight"], engine.states[2]["lm_head.weight"])
    fixed = {"load_format": "dummy", "distributed_executor_backend": "external_launcher", "max_model_len": 64}
    assert "WORLD_SIZE" not in os.environ
    assert fixed.items() <= engine.arguments.items() and not list(tmp_path.glob(".vllm*"))
    rows = [json.loads(line) for line in (tmp_path / WRITTEN).read_text().splitlines()]
    assert len(rows) == 12 and len({row["text"] for row in rows}) > 3
    assert (
        trained(tmp_path / "again", **ENGINE, max_steps=3)
        .model.state_dict()["lm_head.weight"]
        .equal(trainer.model.state_dict()["lm_head.weight"])
    )


def test_noted_log_probabilities_are_those_of_the_drawn_tokens(vllm, tmp_path):
    options = {"on_policy": "sampled_reverse_kl", "loss": "reverse_kl", "sampling_temperature": 0.8}
    trainer = trainer_of(tmp_path, **ENGINE, **options, on_policy_share=1.0)
    (row,) = trainer.rollouts_from("student", prompt_batch(), seed=3)
    with torch.no_grad():
        scores = trainer.model(torch.tensor([row.ids])).logits[0] / 0.8
    start = len(row.ids) - len(row.written)
    values = scores.log_softmax(-1)[range(start - 1, len(row.ids) - 1), row.written]
    assert row.log_probs == pytest.approx(values.tolist(), rel=1e-4)
    trainer.train()
    assert torch.isfinite(torch.tensor(logged(trainer, "kd"))).all()


def test_adapters_are_merged_for_the_engine_and_the_base_stays_bit_for_bit(vllm, tmp_path):
    torch.manual_seed(0)
    student = get_peft_model(
        tiny_llama(1).bfloat16(),
        LoraConfig(
            r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, modules_to_save=["lm_head"]
        ),
    )
    with torch.no_grad():
        student.base_model.model.lm_head.modules_to_save["default"].weight += 1.0
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    found = dict((name, weight.clone()) for name, weight in engine_weights(student))
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    merged = copy.deepcopy(student).merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, msg=lambda m, n=name: f"{n}: {m}")
    VllmWriter(student, Accelerator(cpu=True), tmp_path, {}).load(student, 0)
    state = LLM.made[0].model.state_dict()
    assert all(torch.equal(state[name], weight.float()) for name, weight in found.items())


def test_weights_that_one_embedding_and_head_share_are_not_adapted_on_one_side(vllm, tmp_path):
    def adapted(**options):
        return get_peft_model(
            tiny_llama(1, tie_word_embeddings=True), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        )

    for options in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="embedding and output head share one weight, and its adapter changes"):
            VllmWriter(adapted(**options), Accelerator(cpu=True), tmp_path, {})
    for options in ({}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}):
        student = adapted(**options)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.05 * parameter.requires_grad
            wanted = student.eval()(torch.tensor([[65, 66, 67]])).logits
        VllmWriter(student, Accelerator(cpu=True), tmp_path, {}).load(student, 0)
        found = LLM.made[-1].model.eval()(torch.tensor([[65, 66, 67]])).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_an_engine_leaves_the_draws_of_the_training_alone(vllm, tmp_path):
    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    def seeded():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)

    student = tiny_llama(1)
    seeded()
    wanted = draws()
    seeded()
    VllmWriter(student, Accelerator(cpu=True), tmp_path, {})
    assert draws() == wanted


def test_the_engine_computes_in_the_precision_of_the_training(vllm, tmp_path, monkeypatch):
    for student, mixed, options, wanted in (
        (tiny_llama(1), "no", {}, torch.float32),
        (tiny_llama(1).bfloat16(), "no", {}, torch.bfloat16),
        (tiny_llama(1), "bf16", {}, torch.bfloat16),
        (tiny_llama(1), "bf16", {"dtype": "float32"}, "float32"),
    ):
        monkeypatch.setattr(Accelerator, "mixed_precision", mixed)
        VllmWriter(student, Accelerator(cpu=True), tmp_path, options)
        assert LLM.made[-1].arguments["dtype"] == wanted


def test_the_stop_tokens_are_those_of_the_settings_alone(vllm, tmp_path):
    student = tiny_llama(1)
    greedy = student.generate(torch.tensor([[65, 66, 67]]), do_sample=False, max_new_tokens=6, eos_token_id=[])
    text = greedy[0, 3:].tolist()
    student.config.eos_token_id = text[1]  # ends texts where the config says so, as vLLM takes it by itself
    writer = VllmWriter(student, Accelerator(cpu=True), tmp_path, {})
    writer.load(student, 0)
    how = {"max_new_tokens": 6, "temperature": 0.01, "seeds": [1], "log_probs": False}
    assert writer.write([[65, 66, 67]], stop_ids=[text[4]], **how) == ([text[: text.index(text[4]) + 1]], None)
    trainer = trainer_of(tmp_path, tiny_llama(1), **ENGINE, generation_options={"eos_token_id": [text[4]]})
    trainer._write("student", [[65, 66, 67]], seed=0)
    assert trainer._stops_and_options(trainer.model)[0] == [text[4]]


def test_a_prompt_without_room_in_the_engines_context_is_refused(vllm, tmp_path):
    trainer = trainer_of(tmp_path, **ENGINE, rollout_engine_options={"max_model_len": 12})
    with pytest.raises(ValueError, match=r"A prompt has \d+ tokens, which leaves no room for `max_new_tokens` \(6\)"):
        trainer.train()


def test_what_vllm_cannot_do_is_refused(vllm, tmp_path):
    virtual = get_peft_model(tiny_llama(1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt learning, which cannot be merged into weights"):
        trained(tmp_path / "a", virtual, **ENGINE)
    LLM.silent = True
    with pytest.raises(ValueError, match=r"vLLM wrote nothing after prompt 0 of a batch"):
        trained(tmp_path / "b", **ENGINE)


def test_without_vllm_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="`rollout_engine: vllm` needs vLLM, which is not installed"):
        config(tmp_path, on_policy="gkd", max_new_tokens=6, rollout_engine="vllm")
    with pytest.raises(ImportError, match="`rollout_engine: vllm` needs vLLM, which cannot be imported"):
        imported_vllm()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rollout_engine": "sglang"}, "has to be transformers or vllm, got 'sglang'"),
        ({"rollout_engine_options": {"max_model_len": 9}}, "are arguments of vLLM"),
        ({"rollout_engine": "vllm", "rollout_engine_options": {"seed": 1}}, "'seed', which follows from the training"),
        ({"rollout_engine": "vllm", "sampling_temperature": 0.005}, "0.005, but vLLM samples at 0.01 or above"),
        (
            {"rollout_engine": "vllm", "generation_options": {"typical_p": 0.5}},
            "'typical_p', which vLLM does not take",
        ),
        (
            {"rollout_engine": "vllm", "on_policy": "minillm", "loss": "reverse_kl"},
            "an engine that has only the student",
        ),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"on_policy": "gkd", "on_policy_share": 1.0, "max_new_tokens": 6, **options})


def test_an_engine_without_rollouts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`rollout_engine` is 'vllm', but no text is written during training"):
        config(tmp_path, rollout_engine="vllm")
