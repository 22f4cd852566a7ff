"""A teacher on a server that dies in the middle of a training: the run stops, and resumes as if it never had."""

import pytest
import torch
from datasets import Dataset
from teachers.test_server import server  # noqa: F401
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import TEXTS, assert_same, config, weights
from transformers import TrainerCallback

from hf_transfer_ext import DistillationTrainer


class Dies(TrainerCallback):
    def __init__(self, server, step):  # noqa: F811
        self.server, self.step = server, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.server.faults = [(503, b"", {})] * 99


def start(folder, server, **options):  # noqa: F811
    settings = {
        "teacher_server": server.url, "teacher_server_model": "big", "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "teacher_server_options": {"top": 6, "retries": 2, "pause": 0.0},
        "per_device_train_batch_size": 2, **options,
    }  # fmt: skip
    trainer = DistillationTrainer(
        tiny_llama(1), None, config(folder, **settings), Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def test_a_run_stops_when_its_server_dies_and_resumes(tmp_path, server):  # noqa: F811
    whole = start(tmp_path / "whole", server)
    whole.train()
    cut = start(tmp_path / "cut", server)
    cut.add_callback(Dies(server, 3))
    with pytest.raises(OSError, match=r"answered 503\. No answer after 3 attempts\..*start the same run again"):
        cut.train()
    assert cut.state.global_step == 3
    server.faults = []
    resumed = start(tmp_path / "cut", server)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(resumed), weights(whole), atol=0.0)
