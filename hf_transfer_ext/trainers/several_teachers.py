"""Several teachers, or one on a server, from their settings to what the trainer asks at each step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.reading import one_line
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.cache import open_cache
from hf_transfer_ext.teachers.learned import LearnedTeachers
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.server import KEY_VARIABLE, ServerTeacher
from hf_transfer_ext.teachers.several import ConfidentTeachers, MixedTeachers, RoutedTeachers
from hf_transfer_ext.teachers.signal import Teacher
from hf_transfer_ext.trainers.distillation_models import check_length, check_vocabularies
from hf_transfer_ext.trainers.named_teachers import NamedTeacher


def server_teacher(
    url: str, model: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> ServerTeacher:
    """A teacher on a server; its key is read from the environment variable `TEACHER_API_KEY`."""
    return ServerTeacher(url, model, tokenizer, api_key=os.environ.get(KEY_VARIABLE), **options)


def span_server(args: Any, tokenizer: PreTrainedTokenizerBase | None) -> ServerTeacher:
    """A teacher on a server that reads texts in tokens of its own.

    Args:
        args: `DistillationConfig`.
        tokenizer: Of the server's model; None: loaded by the model's name there, if that is a folder or a Hub id.

    Raises:
        ValueError: There is no tokenizer of that name.
    """
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(args.teacher_server_model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`loss: {args.loss}` with a server needs the tokenizer of its model, but the name there, "
                f"{args.teacher_server_model!r}, is not a folder or Hub id with one ({one_line(error)}). Pass it as "
                "`teacher_processing_class`."
            ) from error
    options = {"top": 1, **args.teacher_server_options}  # the text's own tokens are listed in any case
    return server_teacher(args.teacher_server, args.teacher_server_model, tokenizer, options)


def started(entry: NamedTeacher, student: Any, tokenizer: Any, accelerator: Accelerator, args: Any) -> Teacher:
    """The teacher of an entry, loaded and placed.

    Args:
        student: The student, unwrapped.
        tokenizer: The student's.
        args: `DistillationConfig`.

    Raises:
        ValueError: It does not share the student's vocabulary, or its context is too short.
    """
    if entry.adapter is not None:
        return AdapterTeacher(student, entry.adapter, accelerator, fused=args.fused)
    if entry.cache is not None:
        return open_cache(entry.cache, None, tokenizer, temperature=args.distill_temperature)
    if entry.server is not None:
        return server_teacher(entry.server, str(entry.server_model), tokenizer, entry.options)
    code = {"trust_remote_code": args.trust_remote_code}
    model = load_model(str(entry.model), revision=entry.revision, dtype=entry.dtype, **{**code, **entry.options})
    own = load_tokenizer(str(entry.model), revision=entry.revision, **code)
    check_vocabularies(student, model, tokenizer, own)
    check_length(f"teacher {entry.name!r}", model, args.max_length)
    return LiveTeacher(model, accelerator, fused=args.fused)


def combined(entries: Sequence[NamedTeacher], teachers: Mapping[str, Teacher], args: Any) -> Teacher:
    """Several teachers as one, as `teachers_by` says.

    Raises:
        ValueError: Their rows cannot be combined in this way.
    """
    if args.teachers_by == "column":
        if any(getattr(teacher, "sharded", False) for teacher in teachers.values()):
            raise ValueError(
                "`teachers_by: column` runs a teacher only where the batch has rows for it, but under FSDP and ZeRO-3 "
                "all processes have to run it together. Use `teachers_by: weight`, plain DDP, or caches."
            )
        return RoutedTeachers(teachers, column=args.teacher_column)
    temperature = args.distill_temperature
    if args.teachers_by == "confidence":
        return ConfidentTeachers(teachers, sharpness=args.teacher_sharpness, temperature=temperature)
    if args.teachers_by == "learned":
        return LearnedTeachers(teachers, temperature=temperature)
    weights = {entry.name: 1.0 if entry.weight is None else float(entry.weight) for entry in entries}
    return MixedTeachers(teachers, weights, temperature=temperature)


class KeepsRoutes:
    """A data collator that keeps the column which says which teacher a row is for, as numbers.

    Args:
        collator: Makes the rest of the batch.
        column: Holds names of teachers, or their places from 0.
        names: The teachers' names, in order.
    """

    def __init__(self, collator: Any, column: str, names: Sequence[str]) -> None:
        self.collator, self.column, self.names = collator, column, list(names)

    def __call__(self, rows: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        routes = [self._place(row) for row in rows]
        rest = [{name: value for name, value in row.items() if name != self.column} for row in rows]
        return {**self.collator(rest, *args, **kwargs), self.column: torch.tensor(routes)}

    def _place(self, row: Mapping[str, Any]) -> int:
        if self.column not in row:
            raise ValueError(
                f"`teachers_by: column` needs the column {self.column!r} in the data, got {', '.join(sorted(row))}."
            )
        value = row[self.column]
        if isinstance(value, str):
            if value not in self.names:
                raise ValueError(unknown_name(f"teacher in the column {self.column!r}", value, self.names))
            return self.names.index(value)
        return int(value)
