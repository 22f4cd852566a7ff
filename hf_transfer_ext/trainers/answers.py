"""Plain fine-tuning on answers: teaching a model something new, and relearning what it was trained to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
) -> Trainer:
    """Minimize the cross entropy of the answers' tokens (of the whole text, where an example has no question).

    The model is trained in place; the trainer is returned for its logs. Prompts and answers are tokenized as in
    unlearning and evaluation. `args.resume_from_checkpoint` names a checkpoint to continue from.
    """
    pairs = ForgetRetainPairs(examples, None, tokenizer, template=template, columns=columns)
    collate = forget_retain_collator(pad_token_id(tokenizer))

    def flat(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)["forget"]
        del batch["index"]
        return batch

    args.remove_unused_columns = False
    trainer = AnswersTrainer(
        model=model, args=args, train_dataset=pairs, processing_class=tokenizer, data_collator=flat
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer
