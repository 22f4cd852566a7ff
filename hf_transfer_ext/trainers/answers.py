"""Plain fine-tuning on answers: teaching a model something new, and relearning what it was trained to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_transfer_ext.data.forget_retain import ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.models.plumbing import pad_token_id
from hf_transfer_ext.trainers.logs import LogsSpeed


class AnswersTrainer(LogsSpeed, Trainer):
    """Plain cross entropy as the model computes it."""


def train_on_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    args: TrainingArguments,
    *,
    template: QuestionAnswerFormat | None = None,
    columns: Mapping[str, str] | None = None,
    on_each_process: bool = False,
) -> Trainer:
    """Minimize the cross entropy of the answers' tokens (of the whole text, where an example has no question).

    The model is trained in place; the trainer is returned for its logs. Prompts and answers are tokenized as in
    unlearning and evaluation. `args.resume_from_checkpoint` names a checkpoint to continue from.

    Args:
        on_each_process: Every process reads all batches instead of its share, so that the steps and their result are
            those of one process, however many there are.
    """
    pairs = ForgetRetainPairs(examples, None, tokenizer, template=template, columns=columns)
    collate = forget_retain_collator(pad_token_id(tokenizer))

    def flat(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)["forget"]
        del batch["index"]
        return batch

    args.remove_unused_columns = False
    kind = _OnEachProcess if on_each_process else AnswersTrainer
    trainer = kind(model=model, args=args, train_dataset=pairs, processing_class=tokenizer, data_collator=flat)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


class _OnEachProcess(AnswersTrainer):
    """A `Trainer` whose processes all read the batches, and in the order, that one process alone would read."""

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )
