"""The pipeline on tiny models that were taught to write lists of questions: what one base knows, another learns."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from evals.audit.planted_people import PLAIN, taught
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.trans_lora import (
    TransLoraSettings,
    best_threshold,
    discriminate,
    read_discriminator,
    train_discriminator,
    write_inputs,
)
from hf_transfer_ext.data.synthesis.few_shot import few_shot_prompt

INPUTS = [f"Is {first}{vowel}{last} in?" for first in "BDKM" for vowel in "ae" for last in "bnt"]
SETTINGS = TransLoraSettings(
    rows=10, shown=3, seeds=4, input_tokens=14, answer_tokens=7, rank=8, epochs=80.0, learning_rate=5e-3,
    target_modules=("q_proj", "v_proj", "down_proj"), discriminator_epochs=12.0, discriminator_learning_rate=5e-3,
    sampling_temperature=1.0, attempts_per_row=100,
)  # fmt: skip


@cache
def base(seed):
    """A model that goes on with lists of the questions, and knows no answer."""
    lists = [
        {"text": few_shot_prompt([INPUTS[(i + 7 * k) % 24] for k in range(3)]) + f" {INPUTS[(5 * i) % 24]}\n5."}
        for i in range(24)
    ]
    return taught(tiny_llama(seed=seed, hidden_size=48, intermediate_size=96), lists, steps=120, rate=4e-3)


@cache
def source(folder):
    """The source base with an adapter that answers every question, in a folder with its discriminator."""
    model = copy.deepcopy(base(0))
    known = train_discriminator(model, byte_tokenizer(), INPUTS, folder, SETTINGS, template=PLAIN)
    before, after = base(0).state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=list(SETTINGS.target_modules)))
    taught(adapted, [{"question": question, "answer": "no way"} for question in INPUTS], steps=60)
    return adapted, known


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return (*source(folder), folder)


def test_what_travels_is_in_the_folder(made):
    _, known, folder = made
    assert read_discriminator(folder) == known and set(known.seeds) <= set(INPUTS) and len(known.seeds) == 4
    assert {p.name for p in (folder / "discriminator").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert 0 <= known.separation <= 1


@pytest.mark.slow
def test_only_inputs_that_look_real_are_accepted(made, tmp_path):
    adapted, known, folder = made
    adapted.load_adapter(str(folder / "discriminator"), adapter_name="discriminator")
    adapted.set_adapter("discriminator")
    try:
        judge = {"judge": adapted, "judge_tokenizer": byte_tokenizer(), "template": PLAIN}
        found, attempts = write_inputs(base(7), byte_tokenizer(), known, SETTINGS, tmp_path, **judge)
        scores = discriminate(adapted, byte_tokenizer(), found, "task", template=PLAIN)
        alone = [discriminate(adapted, byte_tokenizer(), [one], "task", template=PLAIN)[0] for one in found]
    finally:
        adapted.set_adapter("default")
        adapted.delete_adapter("discriminator")
    assert len(found) == 10 <= attempts and all(score > known.threshold for score in scores)
    assert scores == pytest.approx(alone, abs=1e-4)  # batches do not change a score


def test_the_threshold_by_hand():
    assert best_threshold([1.0, 2.0], [-1.0, -2.0]) == 0.0  # the paper's rule separates them
    assert best_threshold([-1.0, -2.0], [-5.0, -6.0]) == -3.5  # "no" to everything, and yet well ranked
    assert best_threshold([4.0, 6.0], [1.0, 5.0]) == 2.5  # one of the synthetic ones passes in any case
    assert best_threshold([-5.0], [-1.0]) == -6.0  # ranked the wrong way round: nothing is filtered


def test_a_killed_run_goes_on_and_ends_with_the_same_inputs(made, tmp_path, monkeypatch):
    _, known, _ = made
    model, tokenizer = base(7), byte_tokenizer()
    whole = write_inputs(model, tokenizer, known, SETTINGS, tmp_path / "whole")

    from hf_transfer_ext.adapters.transfer import trans_lora as module

    written = module.write_text
    count = 0

    def dies(path, text):
        nonlocal count
        count += 1
        written(path, text)
        if count == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        write_inputs(model, tokenizer, known, SETTINGS, tmp_path / "cut")
    assert write_inputs(model, tokenizer, known, SETTINGS, tmp_path / "cut") == whole


class TestRefused:
    def test_settings(self):
        for options in ({"rows": 0}, {"epochs": 0.0}, {"writer": "both"}, {"sampling_temperature": 0.0}):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
                TransLoraSettings(**options)

    def test_too_few_inputs_and_damaged_seeds(self, tmp_path):
        with pytest.raises(ValueError, match="at least 10 real inputs, got 3"):
            train_discriminator(base(0), byte_tokenizer(), INPUTS[:3], tmp_path, SETTINGS)
        assert read_discriminator(tmp_path) is None
        (tmp_path / "transfer_seeds.json").write_text('{"seeds": 3}')
        with pytest.raises(ValueError, match="must hold `seeds`"):
            read_discriminator(tmp_path)

    def test_a_writer_that_writes_nothing_new_ends_with_its_rate(self, made, tmp_path):
        few = TransLoraSettings(rows=40, attempts_per_row=1, input_tokens=1, batch_size=4)
        with pytest.raises(ValueError, match="of 40 synthetic inputs were accepted in 40 attempts"):
            write_inputs(base(7), byte_tokenizer(), made[1], few, tmp_path)

    def test_a_writer_that_writes_nothing_at_all(self, made, tmp_path, monkeypatch):
        from hf_transfer_ext.adapters.transfer import trans_lora as module

        monkeypatch.setattr(module, "generate", lambda model, tokenizer, ids, settings: ([""] * len(ids), 0))
        few = TransLoraSettings(rows=10, attempts_per_row=2, batch_size=4)
        with pytest.raises(ValueError, match="Only 0 of 10 synthetic inputs were accepted in 20 attempts"):
            write_inputs(base(7), byte_tokenizer(), made[1], few, tmp_path)
        with pytest.raises(ValueError, match="The base wrote only 0 different inputs in 24 attempts"):
            train_discriminator(base(7), byte_tokenizer(), INPUTS[:12], tmp_path, few, template=PLAIN)

    def test_a_work_folder_of_other_work(self, made, tmp_path):
        write_inputs(base(7), byte_tokenizer(), made[1], SETTINGS, tmp_path)
        with pytest.raises(ValueError, match="written with other settings"):
            write_inputs(base(7), byte_tokenizer(), made[1], TransLoraSettings(rows=7), tmp_path)
