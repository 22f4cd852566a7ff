"""One optimizer step is one mean; a run that would change nothing is refused."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_transfer_ext.trainers.normalization import TokenLossNormalization, require_trainable


class TwoParts(nn.Module):
    """The loss reads one of two weights."""

    def __init__(self):
        super().__init__()
        self.read, self.unread = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))


class Mean(TokenLossNormalization, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        # The second term hangs on the weight without depending on it, as the anchors of wrapped models do.
        values = model.read * labels.abs() + 0.0 * model.unread
        return self.normalize(values, labels != -100, num_items_in_batch)


def trainer_of(tmp_path, model, labels=((-100, 3, -100), (-100, 5, 7)), **options):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no", logging_steps=1,
        remove_unused_columns=False, disable_tqdm=True, **options,
    )  # fmt: skip
    args.stop_on_nan = True
    return Mean(model=model, args=args, train_dataset=Dataset.from_dict({"labels": [list(row) for row in labels]}))


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_the_mean_over_its_tokens_without_the_first_of_a_row(tmp_path, size):
    labels = ((9, 3, -100), (9, 5, 7))  # the first token of a row is predicted by nothing
    trainer = trainer_of(
        tmp_path, TwoParts(), labels, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(5.0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_that_moves_no_weight_ends_the_run(tmp_path, steps):
    model = TwoParts()
    model.read.requires_grad_(False)
    trainer = trainer_of(tmp_path, model, per_device_train_batch_size=2 // steps, gradient_accumulation_steps=steps)
    with pytest.raises(ValueError, match="gradient of all 1 trainable tensors is 0: this run would change nothing"):
        trainer.train()


def test_a_step_without_tokens_is_no_reason_to_stop(tmp_path):
    trainer = trainer_of(tmp_path, TwoParts(), ((9, -100, -100), (9, -100, -100)), per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_frozen_model_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="Nothing in the TwoParts is trainable"):
        trainer_of(tmp_path, TwoParts().requires_grad_(False))
    require_trainable(TwoParts())
