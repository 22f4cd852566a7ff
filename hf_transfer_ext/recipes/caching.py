"""What `cache-teacher` shares with the training that reads its cache: settings, and the rows of a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from hf_transfer_ext.models.heads import head_rows
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.recipes.run import load_named
from hf_transfer_ext.teachers.cache import TeacherCache, fill_cache, open_likelihoods
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.spans import LikelihoodTeacher
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.named_teachers import check_server_options
from hf_transfer_ext.trainers.several_teachers import span_server

#: Settings of the training that decide which tokens of a text are taught.
TOKENIZATION = ("max_length", "completion_only_loss", "assistant_only_loss", "chat_template_path", "drop_unlabelled")


def refuse_unfit(settings: Mapping[str, Any], *, is_server: bool) -> None:
    """Refuse settings that the kind of teacher does not have, before anything is loaded."""
    student, model, options = (settings[name] for name in ("student", "server_model", "server_options"))
    likelihoods = settings["kind"] == "likelihoods"
    needed = [is_server or likelihoods, is_server, True]
    if [student is not None, model is not None, is_server or options is None] != needed:
        raise ValueError(
            "A server needs `student` (for its tokenizer) and `server_model`, and may have `server_options`; a folder "
            "or a Hub id has none of them, except `student` with `kind: likelihoods`, whose texts are those of the "
            f"student in the teacher's tokens. Got teacher {settings['teacher']!r}, student {student!r}, "
            f"server_model {model!r} and server_options {options!r}."
        )
    if settings["teacher_tokenizer"] is not None and not (is_server and likelihoods):
        raise ValueError(
            "`teacher_tokenizer` is for a server with `kind: likelihoods`. Leave it out: elsewhere the tokenizer is "
            "the one beside the teacher, or the student's own."
        )
    others = {"samples": None, "temperature": 1, "tau": 1, "revision": None}
    given = [name for name, plain in others.items() if settings[name] != plain]
    if is_server and (given or settings["kind"] not in (None, "top", "likelihoods")):
        raise ValueError(
            "A server lists its likeliest tokens at temperature 1: `kind` can only be top (or likelihoods), and "
            f"`samples`, `temperature`, `tau` and `revision` have to be left out; got kind {settings['kind']!r} and "
            f"{', '.join(given) or 'none of these'}."
        )
    check_server_options(options or {})
    if "top" in (options or {}):
        raise ValueError("`server_options` hold `top`, which is an option of its own. Move it out.")


def cache_likelihoods(
    student: Any, tokenizer: Any, rows: Any, settings: Mapping[str, Any], accelerator: Accelerator
) -> TeacherCache:
    """Store the likelihoods of the student's texts in the teacher's tokens, as the span loss `alm` reads them.

    Args:
        student, tokenizer: The student's model and tokenizer.
        rows: The texts in the student's tokens.
        settings: Those of `cache-teacher`, which name the teacher.
    """
    revision, name, batch_size = (settings[one] for one in ("revision", "teacher_tokenizer", "batch_size"))
    source: Any = None
    if settings["server_model"] is not None:
        own = None if name is None else load_tokenizer(name)
        options, where = settings["server_options"] or {}, (settings["teacher"], settings["server_model"])
        source = span_server(*where, own, options, setting="`teacher_tokenizer`")
        own = source.tokenizer
    else:
        model, own = load_named(settings["teacher"], revision=revision, dtype=settings["dtype"])
        source = LiveTeacher(model, accelerator)
    how: Any = {"temperature": settings["temperature"], "revision": revision}
    cached = open_likelihoods(settings["folder"], source, own, **how)
    reader = LikelihoodTeacher(cached, tokenizer, own, head_rows(student))
    how = {"batch_size": batch_size, "accelerator": accelerator, "student": reader.model or student}
    return fill_cache(cached, reader.respelled(rows), **how)


def tokenized_as_in_training(
    model: Any, tokenizer: Any, data: Any, settings: Mapping[str, Any]
) -> tuple[Any, Accelerator]:
    """The rows of a data set as the distillation trainer makes them, and its accelerator.

    Args:
        model: Causal language model with this tokenizer.
        settings: Holds the values of `TOKENIZATION`.

    Raises:
        ValueError: The chat template brings tokens that the model does not have.
    """
    rows_before = head_rows(model)
    with tempfile.TemporaryDirectory() as scratch:
        plain: Any = {"output_dir": scratch, "kd_weight": 0.0, "ce_weight": 1.0, "report_to": "none"}
        args = DistillationConfig(**plain, **{name: settings[name] for name in TOKENIZATION})
        trainer = DistillationTrainer(model, None, args, data, processing_class=tokenizer)
    if head_rows(model) != rows_before:
        raise ValueError(
            f"The tokens of `chat_template_path` {settings['chat_template_path']!r} make the head grow from "
            f"{rows_before} to {head_rows(model)} rows, which nobody trained. Name a .jinja file with the template "
            "alone."
        )
    return trainer.train_dataset, trainer.accelerator
