"""The student writes by a real vLLM engine: its texts are those of transformers with the weights of each step.

These tests run in an environment that has vLLM. The first one starts them there.
"""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from teachers.vllm_environment import for_vllm, vllm_python
from tiny import tiny_llama
from trainers.test_distillation import assert_same, logged, weights
from trainers.test_rollouts import ROWS, trainer_of
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from hf_transfer_ext.trainers.vllm_writer import VllmWriter

pytestmark = pytest.mark.slow

in_its_environment = pytest.mark.skipif(
    find_spec("vllm") is None, reason="runs in the environment with vLLM, by the first test of the file"
)
#: Three prompts of different lengths.
IDS = [[65, 66, 67], [1, 2, 3, 4, 5, 6, 7, 8, 9], [200]]
SMALL = {"enforce_eager": True, "max_model_len": 64, "kv_cache_memory_bytes": 2**26}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="this is the environment with vLLM")
def test_the_others_pass_in_the_environment_with_vllm():
    python, root = vllm_python(), Path(__file__).parents[2]
    command = ["nice", "-n", "5", python, "-m", "pytest", "-q", "-m", "slow", str(Path(__file__).relative_to(root))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=for_vllm(PYTHONPATH=str(root)))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "9 passed, 1 skipped" in done.stdout, done.stdout[-2000:]


def llama(seed=1, **config):
    """vLLM's attention needs heads of at least 32 on a CPU."""
    return tiny_llama(seed, hidden_size=128, **config)


def qwen2():
    """Biases, and one weight for embedding and head."""
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=258, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512,
                    **shape, **ends)
    ).eval()  # fmt: skip


def gemma3():
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=258, num_key_value_heads=2, head_dim=32, initializer_range=0.2,
                         max_position_embeddings=512, sliding_window=32, **shape, **ends)
    ).eval()  # fmt: skip
    with torch.no_grad():  # its large embedding, which is the head as well, would repeat the last token for ever
        model.model.embed_tokens.weight.mul_(0.05)
    return model


def adapted():
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    return get_peft_model(llama(), config)


def greedy(model, prompts, tokens=16, **options):
    """Each prompt's likeliest continuation by transformers, the prompt alone in its batch."""
    found = []
    for prompt in prompts:
        text = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, eos_token_id=257,
            pad_token_id=257, **options,
        )  # fmt: skip
        found.append(text[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    student = llama()
    made = VllmWriter(student, Accelerator(cpu=True), tmp_path_factory.mktemp("engine"), SMALL)
    made.load(student, 0)
    return made, student


def written(writer, prompts=IDS, *, temperature=1.0, seeds=(1, 2, 3), stop_ids=(257,), max_new_tokens=16, **options):
    how = {"log_probs": False, "stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "temperature": temperature}
    return writer[0].write(prompts, seeds=seeds, **{**how, **options})[0]


@in_its_environment
@pytest.mark.parametrize("make", [llama, qwen2, gemma3, adapted], ids=lambda make: make.__name__)
def test_after_each_step_the_texts_are_those_of_the_new_weights(tmp_path, make):
    student = make()
    trainer = trainer_of(
        tmp_path, student, llama(2), ROWS, rollout_engine="vllm", rollout_engine_options=SMALL, max_steps=3,
        learning_rate=0.2, log_rollouts=4,
    )  # fmt: skip
    before, seen = trainer._written_batch, []

    def compared(*arguments):
        batch = before(*arguments)
        by_vllm = written((trainer._engine, None), temperature=0.0)
        seen.append((by_vllm, greedy(trainer.model.eval(), IDS)))
        trainer.model.train()
        return batch

    trainer._written_batch = compared
    trainer.train()
    assert len(seen) == 3 and all(by_vllm == by_transformers for by_vllm, by_transformers in seen)
    assert seen[0] != seen[1] != seen[2]
    assert all(torch.isfinite(torch.tensor(logged(trainer, "kd"))))


@in_its_environment
def test_draws_follow_temperature_seed_and_options(writer):
    plain = greedy(writer[1], IDS)
    assert written(writer, temperature=0.0) == plain
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert written(writer, temperature=1.5, **options) == plain
    penalized = greedy(writer[1], IDS, repetition_penalty=1.7)
    assert written(writer, temperature=0.0, repetition_penalty=1.7) == penalized
    first = written(writer)
    assert written(writer, IDS[::-1], seeds=(3, 2, 1))[::-1] == first != written(writer, seeds=(4, 5, 6))
    count = 600
    drawn = written(writer, IDS[:1] * count, temperature=1.3, seeds=range(count), max_new_tokens=1)
    with torch.no_grad():
        wanted = (writer[1](torch.tensor(IDS[:1])).logits[0, -1] / 1.3).softmax(-1)
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=258) / count
    error = 4 * (wanted * (1 - wanted) / count).sqrt() + 1 / count
    assert ((found - wanted).abs() <= error).all() and found.max() < 0.9


@in_its_environment
def test_texts_end_at_the_given_stop_tokens_and_log_probabilities_are_those_of_the_draw(writer):
    made, student = writer
    plain = written(writer, temperature=0.0)
    stops = [plain[0][3], plain[1][5]]
    cut = [text[: min([text.index(stop) + 1 for stop in stops if stop in text], default=16)] for text in plain]
    assert written(writer, temperature=0.0, stop_ids=stops) == cut
    texts, log_probs = made.write(
        IDS, stop_ids=[257], max_new_tokens=12, temperature=0.8, seeds=[7, 8, 9], log_probs=True
    )
    for prompt, text, values in zip(IDS, texts, log_probs, strict=True):
        with torch.no_grad():
            scores = student(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1] / 0.8
        assert values == pytest.approx(scores.log_softmax(-1)[range(len(text)), text].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match=r"A prompt has 60 tokens, which leaves no room for `max_new_tokens` \(12\)"):
        made.write([[5] * 60], stop_ids=[257], max_new_tokens=12, temperature=1.0, seeds=[1], log_probs=False)


@in_its_environment
def test_two_runs_are_one_and_the_draws_of_the_training_go_on(tmp_path):
    def state():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    student = llama()
    before = state()
    VllmWriter(student, Accelerator(cpu=True), tmp_path, SMALL)
    for one, other in zip(before, state(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    runs = []
    for name in "ab":
        runs.append(
            trainer_of(
                tmp_path / name,
                llama(dtype="float32", attention_dropout=0.1),
                llama(2),
                ROWS,
                rollout_engine="vllm",
                rollout_engine_options=SMALL,
                max_steps=2,
                on_policy="sampled_reverse_kl",
                loss="reverse_kl",
            )
        )
        runs[-1].train()
    assert_same(weights(runs[0]), weights(runs[1]), atol=0.0)


TWO = """
from trainers.test_vllm_engine import IDS, ROWS, SMALL, greedy, llama, trainer_of, written

trainer = trainer_of(
    {folder!r}, llama(), llama(2), ROWS, rollout_engine="vllm", rollout_engine_options=SMALL, max_steps=2,
    learning_rate=0.2, per_device_train_batch_size=2,
)
before = trainer._written_batch

def compared(*arguments):
    batch = before(*arguments)
    student = trainer.accelerator.unwrap_model(trainer.model)
    same = written((trainer._engine, None), temperature=0.0) == greedy(student.eval(), IDS)
    print("SAME" if same else "OTHER", trainer.accelerator.num_processes, flush=True)
    student.train()
    return batch

trainer._written_batch = compared
trainer.train()
"""


@in_its_environment
def test_two_processes_have_an_engine_each(tmp_path):
    (tmp_path / "two.py").write_text(TWO.format(folder=str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join(str(Path(__file__).parents[n]) for n in (1, 2))
    done = subprocess.run(
        [*command, str(tmp_path / "two.py")], capture_output=True, text=True, env=for_vllm(PYTHONPATH=paths)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("SAME 2") == 4 and "OTHER" not in done.stdout


@in_its_environment
def test_a_student_in_bfloat16_writes_in_bfloat16(tmp_path):
    student = llama(initializer_range=0.05).bfloat16()
    made = VllmWriter(student, Accelerator(cpu=True), tmp_path, SMALL)
    for step in range(2):
        student.load_state_dict(llama(step, initializer_range=0.05).state_dict())
        made.load(student, step)
        texts, log_probs = made.write(
            IDS, stop_ids=[257], max_new_tokens=12, temperature=1.0, seeds=[7, 8, 9], log_probs=True
        )
        for prompt, text, values in zip(IDS, texts, log_probs, strict=True):
            with torch.no_grad():
                scores = student(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].float()
            found = scores.log_softmax(-1)[range(len(text)), text]
            assert (found - torch.tensor(values)).abs().max() < 0.05
            other = llama(1 - step, initializer_range=0.05)(torch.tensor([prompt + text])).logits.log_softmax(-1)
            assert (other[0, range(len(prompt) - 1, other.shape[1] - 1), text] - found).abs().max() > 0.2
    assert made.engine.llm_engine.model_config.dtype == torch.bfloat16
