"""Several teachers, or one on a server: from the settings to the `Teacher` that the trainer calls at each step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.models.heads import head_rows
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.reading import one_line
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.cache import open_cache, open_likelihoods
from hf_transfer_ext.teachers.learned import LearnedTeachers
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.server import KEY_VARIABLE, ServerTeacher
from hf_transfer_ext.teachers.several import ConfidentTeachers, MixedTeachers, RoutedTeachers, Several, no_such_place
from hf_transfer_ext.teachers.signal import Teacher
from hf_transfer_ext.teachers.spans import LikelihoodTeacher, SpanTeacher
from hf_transfer_ext.trainers.distillation_models import check_length, check_vocabularies
from hf_transfer_ext.trainers.named_teachers import NamedTeacher, named_teachers

#: Rows of a column that are read at once: one by one takes a minute for a million.
ROWS_AT_ONCE = 10_000


def server_teacher(
    url: str, model: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> ServerTeacher:
    """A teacher on a server; its key is read from the environment variable `TEACHER_API_KEY`."""
    return ServerTeacher(url, model, tokenizer, api_key=os.environ.get(KEY_VARIABLE), **options)


def span_server(
    url: str, model: str, tokenizer: PreTrainedTokenizerBase | None, options: Mapping[str, Any], *, setting: str
) -> ServerTeacher:
    """A teacher on a server that reads texts in tokens of its own.

    Args:
        tokenizer: Of the server's model; None: loaded by the model's name there, if that is a folder or a Hub id.
        setting: What a tokenizer is given by, as a message has it.

    Raises:
        ValueError: There is no tokenizer of that name.
    """
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(model)
        except (OSError, ValueError) as error:
            raise ValueError(
                "A span loss with a server needs the tokenizer of its model, but the name there, "
                f"{model!r}, is not a folder or Hub id with one ({one_line(error)}). Pass it as {setting}."
            ) from error
    options = {"top": 1, **options}  # the text's own tokens are listed in any case
    return server_teacher(url, model, tokenizer, options)


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
    model, own = _loaded(entry, args)
    check_vocabularies(student, model, tokenizer, own)
    check_length(f"teacher {entry.name!r}", model, args.max_length)
    return LiveTeacher(model, accelerator, fused=args.fused)


def _loaded(entry: NamedTeacher, args: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of an entry, and the tokenizer beside it."""
    code = {"trust_remote_code": args.trust_remote_code}
    model = load_model(str(entry.model), revision=entry.revision, dtype=entry.dtype, **{**code, **entry.options})
    return model, load_tokenizer(str(entry.model), revision=entry.revision, **code)


def started_spans(entry: NamedTeacher, student: Any, tokenizer: Any, accelerator: Accelerator, args: Any) -> Any:
    """The teacher of an entry for a span loss: it reads the text in tokens of its own.

    Arguments as of `started`.

    Raises:
        ValueError: Its tokenizer is not at hand, or its tokens do not stand for bytes.
    """
    if entry.cache is not None or entry.server is not None:
        own = None if entry.tokenizer is None else load_tokenizer(entry.tokenizer)
        source: Any = None
        if entry.server is not None:
            how: Any = {"setting": f"`tokenizer` of the teacher {entry.name!r}"}
            source = span_server(entry.server, str(entry.server_model), own, entry.options, **how)
        return span_reader(source, entry.cache, own, student, tokenizer, args)
    if entry.adapter is not None:
        live: LiveTeacher = AdapterTeacher(student, entry.adapter, accelerator, fused=args.fused)
        return SpanTeacher(live, tokenizer, tokenizer, head_rows(student))
    model, own = _loaded(entry, args)
    return SpanTeacher(LiveTeacher(model, accelerator, fused=args.fused), tokenizer, own, head_rows(student))


def span_reader(
    teacher: LiveTeacher | ServerTeacher | None, folder: str | None, own: Any, student: Any, tokenizer: Any, args: Any
) -> LikelihoodTeacher:
    """A teacher that tells the likelihoods of a text in its own tokens: a server, or a cache of any teacher.

    Args:
        teacher: None: the cache alone.
        folder: Of the cache; None: each text is asked for anew.
        own: The teacher's tokenizer; that of a server where it is None.
        student: The student, unwrapped.
        tokenizer: The student's.
        args: `DistillationConfig`.

    Raises:
        ValueError: The cache is of something else, or the teacher's tokenizer is not known.
    """
    if isinstance(teacher, ServerTeacher):
        own = teacher.tokenizer
    if own is None:
        raise ValueError(
            f"The cache {folder!r} holds likelihoods of texts in the tokens of its teacher, and does not hold the "
            "tokenizer. Name it by `teacher_tokenizer`, or by `tokenizer` of an entry of `teachers`, or pass it as "
            "`teacher_processing_class`."
        )
    source: Any = teacher
    if folder is not None:
        how: Any = {"temperature": args.distill_temperature, "revision": args.teacher_revision}
        source = open_likelihoods(folder, teacher, own, **how)
    return LikelihoodTeacher(source, tokenizer, own, head_rows(student))


def combined(entries: Sequence[NamedTeacher], teachers: Mapping[str, Any], args: Any) -> Several:
    """Several teachers as one, as `teachers_by` says.

    Raises:
        ValueError: Their rows cannot be combined in this way.
    """
    if args.teachers_by == "column":
        routed = RoutedTeachers(teachers, column=args.teacher_column)
        if routed.sharded:
            raise ValueError(
                "`teachers_by: column` runs a teacher only where the batch has rows for it, but under FSDP and ZeRO-3 "
                "all processes have to run it together. Use `teachers_by: weight`, plain DDP, or caches."
            )
        return routed
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
        for row in rows:
            _require_column(self.column, list(row), "A row of the batch")
        routes = [
            place_of(row[self.column], self.column, self.names, f"row {index} of the batch")
            for index, row in enumerate(rows)
        ]
        rest = [{name: value for name, value in row.items() if name != self.column} for row in rows]
        return {**self.collator(rest, *args, **kwargs), self.column: torch.tensor(routes)}


def place_of(value: Any, column: str, names: Sequence[str], where: str) -> int:
    """The place in `names` of the teacher that a row names.

    Args:
        value: Of the column: a name, or a place from 0.
        where: What a message calls the row.

    Raises:
        ValueError: There is no such teacher.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"{where}: {unknown_name(f'teacher in the column {column!r}', value, names)}")
        return list(names).index(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(
            f"{where}: the column {column!r} is {value!r}, which names no teacher. Each row needs one of "
            f"{', '.join(names)}, or its place from 0: fill it in, or leave the row out."
        )
    place = int(value)
    if not 0 <= place < len(names):
        raise ValueError(f"{where}: {no_such_place(place, column, names)}")
    return place


def check_routes(dataset: Any, column: str, names: Sequence[str], what: str = "training data") -> None:
    """Refuse data of which a row names no teacher, before anything is trained. Streamed data are checked by the batch.

    Args:
        dataset: One data set, or several by name.
        what: What a message calls it.

    Raises:
        ValueError: The column is missing, or a row names a teacher that does not exist.
    """
    if isinstance(dataset, Mapping):
        for name, one in dataset.items():
            check_routes(one, column, names, f"{what} {name!r}")
    elif isinstance(dataset, Dataset):
        _require_column(column, dataset.column_names, f"The {what}")
        alone = dataset.with_format(None).select_columns([column])
        for start in range(0, len(alone), ROWS_AT_ONCE):
            for index, value in enumerate(alone[start : start + ROWS_AT_ONCE][column], start):
                place_of(value, column, names, f"Row {index} of the {what}")


def _require_column(column: str, found: Sequence[str], what: str) -> None:
    if column not in found:
        raise ValueError(
            f"`teachers_by: column` needs the column {column!r} in the data, which names a teacher for each row. "
            f"{what} has {', '.join(sorted(found))}. Add it, or set `teacher_column`."
        )


def routes_of(teacher: Any, args: Any) -> tuple[str, list[str]] | None:
    """The column that routes rows to teachers, and the teachers' names; None where nothing is routed.

    Args:
        teacher: What the trainer was given.
        args: `DistillationConfig`.
    """
    if not args.is_taught:
        return None
    if isinstance(teacher, RoutedTeachers):
        return teacher.column, list(teacher.teachers)
    if args.teachers is not None and args.teachers_by == "column":
        return args.teacher_column, [one.name for one in named_teachers(args.teachers, args.teachers_by)]
    return None
