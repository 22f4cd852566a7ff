"""Distillation from a teacher cache, through the trainer: packing, adapters, later epochs, and what is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trainers.test_distillation import TEXTS, assert_same, config, logged, make, trained, weights

from hf_transfer_ext.teachers.cache import TeacherCache

WHOLE = {"kind": "top", "top": 258}


def trained_without_teacher(folder, data=None, **options):
    trainer = make(folder, data=data, **options)
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
def test_a_cache_of_all_tokens_trains_as_the_teacher_does_and_runs_it_in_the_first_epoch_alone(tmp_path, packing):
    options = {"max_steps": -1, "num_train_epochs": 3, "ce_weight": 0.5, "learning_rate": 0.1, "packing": packing}
    if packing:
        options |= {"max_length": 24, "per_device_train_batch_size": 2}
    live = trained(tmp_path / "a", teacher=tiny_llama(2), **options)
    cached = trained(
        tmp_path / "b", teacher=tiny_llama(2), teacher_cache=str(tmp_path / "cache"), teacher_cache_options=WHOLE,
        **options,
    )  # fmt: skip
    assert_same(weights(cached), weights(live), atol=2e-3)
    first_epoch = len(cached.get_train_dataloader())
    assert 0 < cached.teacher.forwards <= first_epoch < cached.state.global_step
    alone = trained_without_teacher(tmp_path / "c", teacher_cache=str(tmp_path / "cache"), **options)
    assert alone.teacher.teacher is None and len(TeacherCache(tmp_path / "cache")) == len(alone.teacher.cache)
    assert_same(weights(alone), weights(cached), atol=1e-5)


def test_an_unbiased_cache_is_the_default_and_trains(tmp_path):
    found = trained(tmp_path / "a", teacher=tiny_llama(2), teacher_cache=str(tmp_path / "cache"), max_steps=4)
    assert found.teacher.cache.spec.kind == "top_and_samples" and len(logged(found, "kd")) == 4
    assert len(TeacherCache(tmp_path / "cache")) == len(TEXTS)


def test_the_base_teaches_its_own_adapter_through_a_cache(tmp_path):
    def student():
        return get_peft_model(tiny_llama(1), LoraConfig(r=2, target_modules=["q_proj"]))

    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_options": WHOLE, "teacher_adapter": "base"}
    one = trained(tmp_path / "a", student(), max_steps=3, **cache)
    two = trained(tmp_path / "b", student(), max_steps=3, **cache)  # after training the base is still the same
    assert one.teacher.forwards > 0 and two.teacher.forwards == 0


def test_what_a_cache_cannot_do_is_refused(tmp_path):
    folder = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sampled ones"):
        config(tmp_path, loss="adaptive_kl", teacher_cache=folder)
    with pytest.raises(ValueError, match="`teacher_cache_options` are given, but no `teacher_cache`"):
        config(tmp_path, teacher_cache_options={"top": 3})
    with pytest.raises(ValueError, match=r"Unknown option of a teacher cache 'topp'. Did you mean 'top'"):
        config(tmp_path, teacher_cache=folder, teacher_cache_options={"topp": 3})
    with pytest.raises(ValueError, match="but the teacher has 258 vocabulary entries"):
        make(tmp_path, teacher=tiny_llama(2), teacher_cache=folder, teacher_cache_options={"top": 300})
    with pytest.raises(FileNotFoundError, match="There is no teacher cache in"):
        make(tmp_path, teacher_cache=folder)
    trained(tmp_path / "a", teacher=tiny_llama(2), teacher_cache=folder, teacher_cache_options=WHOLE)
    with pytest.raises(ValueError, match=r"is not of this teacher and setting \(fingerprint .*weights is"):
        make(tmp_path, teacher=tiny_llama(3), teacher_cache=folder)
    other = Dataset.from_dict({"text": ["a text that the cache has never seen"] * 4})
    with pytest.raises(ValueError, match=r"\(fingerprint [0-9a-f]{16}\) has no rows for a text"):
        trained_without_teacher(tmp_path / "b", teacher_cache=folder, data=other)
