"""What a configuration may set for the tasks of `trainers/tasks/`: all else is refused with its reason."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from hf_transfer_ext.trainers import inherited
from hf_transfer_ext.trainers.named_hidden_losses import named_hidden_losses, refuse_side
from hf_transfer_ext.trainers.tasks import TASKS

#: Settings of texts that these tasks obey, beside those of `TrainingArguments`.
OBEYED = frozenset(("model_init_kwargs", "trust_remote_code", "max_length", "dataset_num_proc", "pad_to_multiple_of"))
#: Setting of ours -> why these tasks refuse it.
REFUSED = {
    "on_policy": "only language models write texts to learn from",
    "on_policy_share": "only language models write texts to learn from",
    "teacher_writes": "only language models write texts to learn from",
    "teacher_cache": "it stores distributions of next tokens, by the tokens of a text",
    "teacher_server": "servers give distributions of next tokens",
    "teachers": "several teachers are combined at the next token",
    "drop_unlabelled": "rows without a label learn from the teacher; leave such rows out of the data instead",
}


def check_task(args: Any) -> None:
    """Refuse settings that the task does not obey.

    Raises:
        ValueError: The task is unknown, or a setting would have no effect.
    """
    task = TASKS[args.task]
    for name, why in REFUSED.items():
        if getattr(args, name):
            raise ValueError(f"`{name}` is {getattr(args, name)!r}, but `task` is {args.task!r}: {why}.")
    losses = named_hidden_losses(args)
    if task.unread_in_encoder is None:
        refuse_side(losses, args.task)
    for loss in losses:
        unread = task.unread_in_encoder if loss.side == "encoder" else task.unread
        if loss.reading in unread:
            raise ValueError(f"`hidden_loss` is {loss.name}, but `task` is {args.task!r}: {unread[loss.reading]}.")
    elsewhere = {one.name for one in fields(TrainingArguments)} | inherited.REFUSED.keys() | OBEYED
    for one in fields(SFTConfig):
        if one.name in elsewhere or not one.init:
            continue
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if getattr(args, one.name) != default:
            raise ValueError(
                f"`{one.name}` is {getattr(args, one.name)!r}, but it is about the next tokens of a text, which the "
                f"task {args.task} does not read. Leave it out."
            )
    if args.pad_to_multiple_of == "auto":
        args.pad_to_multiple_of = None
    task.check(args)
