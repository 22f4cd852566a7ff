"""A teacher on a real server of vLLM: what it lists is what its model computes here, and students learn from it."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from teachers.test_cache import batch, expected
from teachers.vllm_environment import served, vllm_python
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_level
from trainers.test_distillation import assert_same, config, logged, weights
from transformers import AutoModelForCausalLM

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.losses.rows import SparseRows
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.recipes.cache_teacher import main
from hf_transfer_ext.teachers import cache
from hf_transfer_ext.teachers.cache import TeacherCache
from hf_transfer_ext.teachers.demo import MODULE, demo_model
from hf_transfer_ext.teachers.documents import documents_of_row
from hf_transfer_ext.teachers.server import ServerTeacher, cache_server

pytestmark = pytest.mark.slow

TOP = 40
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve Zürich 東京 🙂",
    "a b c d",
    "1984: nineteen eighty-four",
]
PROMPTS = {"prompt": ["what is gold? ", "paris ", "naïve ", "1984: "]}
WRITES = {"on_policy_share": 1.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a small model and its tokenizer; vLLM's attention needs heads of at least 32."""
    vllm_python()
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(2, hidden_size=128).save_pretrained(folder)
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(teacher, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with served(teacher, log, "--max-model-len", "128", "--max-logprobs", str(TOP)) as running:
        yield running


def asked(server, **options):
    return ServerTeacher(server.url, "big", byte_tokenizer(), **{"top": TOP, "retries": 1, "pause": 0.1, **options})


def differences(server_teacher, model, texts):
    """The largest difference of listed log-probabilities to those of the model itself, and of the tails."""
    inputs, mask = batch(texts)
    found = server_teacher.signal(model, inputs, mask).rows.top
    wanted = SparseRows.from_logits(expected(model, texts), found.ids.shape[1]).top
    own = expected(model, texts).log_softmax(-1).gather(1, inputs["input_ids"][:, 1:][mask][:, None])[:, 0]
    assert (found.ids.sort(-1)[0] == wanted.ids.sort(-1)[0]).float().mean() > 0.999  # equally likely ones may differ
    return (
        (found.log_probs - wanted.log_probs).abs().max().item(),
        (found.tail - wanted.tail).abs().max().item(),
        (server_teacher.token_log_probs(inputs, mask) - own).abs().max().item(),
    )


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_log_probabilities_are_those_of_the_model_itself(server, teacher, style):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    found = asked(server)
    assert found._verified and found._context == 128
    found._style = style
    texts = [byte_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert max(differences(found, model, texts)) < 1e-4


def test_a_cache_from_the_server_is_that_of_the_model(server, teacher, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    how = ["--top", str(TOP), "--max-length", "64"]
    one, other = str(tmp_path / "served"), str(tmp_path / "live")
    assert main([server.url, str(data), one, *how, "--student", str(teacher), "--server-model", "big"]) == 0
    assert main([str(teacher), str(data), other, *how, "--kind", "top"]) == 0
    rows = []
    for folder in (one, other):
        stored = TeacherCache(folder)
        texts = [{"input_ids": byte_tokenizer()(text)["input_ids"] + [257]} for text in TEXTS]
        rows.append(stored.rows([d for row in texts for d in documents_of_row(row)], torch.device("cpu")).top)
    assert (rows[0].ids.sort(-1)[0] == rows[1].ids.sort(-1)[0]).float().mean() > 0.999
    torch.testing.assert_close(rows[0].log_probs, rows[1].log_probs, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(rows[0].tail, rows[1].tail, atol=1e-3, rtol=1e-2)


def trained(folder, teacher=None, server=None, *, data=None, student=None, tokenizers=(byte_tokenizer, None), **more):
    options = {"max_steps": 3, "learning_rate": 0.1, **more}
    if server is not None:
        options |= {"teacher_server": server.url, "teacher_server_model": "big"}
    own, others = tokenizers
    trainer = DistillationTrainer(
        student if student is not None else tiny_llama(1),
        None if teacher is None else AutoModelForCausalLM.from_pretrained(teacher),
        config(folder, **options),
        Dataset.from_dict(data or {"text": TEXTS}),
        processing_class=own(),
        **({"teacher_processing_class": others()} if others else {}),
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


def test_a_student_learns_from_it_off_policy_as_from_a_cache_of_the_model(server, teacher, tmp_path):
    live = trained(tmp_path / "live", server=server, teacher_server_options={"top": TOP})
    spec = {"kind": "top", "top": TOP}
    stored = trained(tmp_path / "cache", teacher, teacher_cache=str(tmp_path / "c"), teacher_cache_options=spec)
    assert logged(live, "kd") == pytest.approx(logged(stored, "kd"), rel=2e-3)
    assert_same(weights(live), weights(stored), atol=2e-3)
    assert logged(live, "kd")[-1] < logged(live, "kd")[0]


def test_a_student_writes_and_the_server_reads(server, teacher, tmp_path):
    listed = trained(tmp_path / "top", server=server, data=PROMPTS, on_policy="gkd", **WRITES)
    assert all(math.isfinite(value) and value > 0 for value in logged(listed, "kd"))
    sampled = {"on_policy": "sampled_reverse_kl", "loss": "reverse_kl", "data": PROMPTS, **WRITES}
    of_server = trained(tmp_path / "served", server=server, **sampled)
    of_model = trained(tmp_path / "live", teacher, **sampled)
    assert logged(of_server, "kd") == pytest.approx(logged(of_model, "kd"), abs=1e-4)
    assert_same(weights(of_server), weights(of_model), atol=1e-4)


@pytest.mark.parametrize("data, options", [(None, {}), (PROMPTS, {"on_policy": "gkd", **WRITES})], ids=["off", "on"])
def test_a_student_with_another_tokenizer_learns_likelihoods(server, teacher, tmp_path, data, options):
    options = {"loss": "alm", "data": data, "tokenizers": (byte_level, byte_tokenizer), **options}
    of_server = trained(tmp_path / "served", server=server, student=tiny_llama(1, vocab_size=520), **options)
    of_model = trained(tmp_path / "live", teacher, student=tiny_llama(1, vocab_size=520), **options)
    assert logged(of_server, "kd") == pytest.approx(logged(of_model, "kd"), abs=1e-4)
    assert_same(weights(of_server), weights(of_model), atol=1e-4)


def test_what_the_server_refuses_says_what_to_do(server, tmp_path):
    def document(length):
        return documents_of_row({"input_ids": [65 + i % 26 for i in range(length)]})

    for style in ("prompt_logprobs", "echo"):
        more = asked(server, top=TOP + 1)
        more._style = style
        with pytest.raises(ValueError, match=r"max allowed: 40 .*Lower `top`, or raise the limit"):
            list(more.document_rows(document(5)))
    with pytest.raises(ValueError, match=r"has no model 'bigger'\. It has: 'big'\."):
        ServerTeacher(server.url, "bigger", byte_tokenizer())
    with pytest.raises(ValueError, match=r"has another tokenizer"):
        ServerTeacher(server.url, "big", byte_level())
    found = asked(server)
    assert len(list(found.document_rows(document(127)))) == 1
    with pytest.raises(ValueError, match=r"A text has 128 tokens, but .* takes at most 127"):
        list(found.document_rows(document(128)))
    found._context = None  # as on a server that does not tell it
    with pytest.raises(ValueError, match=r"answered 400: max_tokens must be at least 1"):
        list(found.document_rows(document(128)))
    with pytest.raises(ValueError, match=r"answered 400: This model's maximum context length is 128 tokens"):
        list(found.document_rows(document(300)))


def test_a_server_that_dies_stops_a_run_that_keeps_what_it_has(server, tmp_path, monkeypatch):
    """The last test of the file: the server is gone after it."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)

    def rows():
        for i in range(64):
            if i == 32:
                server.kill()
            yield {"input_ids": [i, 2, 3, 4, i + 5]}

    with pytest.raises(OSError, match=r"No answer after 2 attempts\. What was stored so far stays"):
        cache_server(asked(server), rows(), tmp_path / "c", batch_size=8, accelerator=Accelerator(cpu=True))
    assert len(TeacherCache(tmp_path / "c")) == 32
    with pytest.raises(OSError, match=r"cannot be reached or broke off"):
        asked(server, retries=0)


def test_log_probabilities_of_gemma_3_are_those_of_the_model_itself(tmp_path):
    vllm_python()
    pytest.importorskip(MODULE)
    folder = demo_model(Path(tmp_path) / "gemma")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(folder))
    with served(folder, tmp_path / "server.log", "--max-model-len", "256") as running:
        found = ServerTeacher(running.url, "big", tokenizer, top=20)
        texts = [tokenizer(text)["input_ids"] for text in [*TEXTS, "The capital of France is Paris. " * 12]]
        assert max(differences(found, model, texts)) < 2e-3
