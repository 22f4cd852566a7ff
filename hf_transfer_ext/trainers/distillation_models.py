"""The models and data of a distillation: loaded as the settings say, and refused where they do not fit together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.data.text import fit_context, require_labels
from hf_transfer_ext.data.vocabularies import compare_vocabularies
from hf_transfer_ext.models.heads import causal_lm_of, head_rows
from hf_transfer_ext.models.loading import context_length, load_model, load_tokenizer, tokenizer_in
from hf_transfer_ext.teachers.signal import Teacher
from hf_transfer_ext.trainers.distillation_config import TEACHER_LOADING, DistillationConfig

logger = logging.getLogger(__name__)


def one_teacher(teacher: Any, args: DistillationConfig) -> Any:
    """The teacher that was given or named: a model, a `Teacher`, a path, or None for an adapter of the student.

    Raises:
        ValueError: None is named, or two.
        TypeError: It is not something that can teach.
    """
    named = args.teacher_model_name_or_path
    elsewhere = args.teacher_adapter or args.teacher_server or (args.teachers and "`teachers`")
    if teacher is not None and not isinstance(teacher, (str, Path, nn.Module, Teacher)):
        raise TypeError(
            f"`teacher` has to be a model, a path, a Hub id or a `Teacher` (with `form` and `signal`), got "
            f"{type(teacher).__name__}."
        )
    given = str(teacher) if isinstance(teacher, (str, Path)) else None
    if isinstance(teacher, nn.Module):
        given = causal_lm_of(teacher).config.name_or_path
    if teacher is not None and (elsewhere or (named is not None and named != given)):
        raise ValueError(
            f"Two teachers are named: `teacher` ({given or type(teacher).__name__!r}), and in the config "
            f"{named or elsewhere!r}. Leave one of them out."
        )
    teacher = named if teacher is None else teacher
    if teacher is None and not elsewhere and args.teacher_cache is None and args.is_taught:
        raise ValueError(
            "Distillation needs a teacher: pass `teacher=`, or set `teacher_model_name_or_path`, `teacher_cache`, "
            "`teacher_adapter`, `teacher_server` or `teachers`. (With `kd_weight=0` there is none, and this is plain "
            "fine-tuning.)"
        )
    if teacher is not None and not args.is_taught:
        logger.warning("`kd_weight` is 0: the teacher is not used, and this is plain fine-tuning.")
        return None
    if not isinstance(teacher, (str, Path)):
        stated = [name for name, nothing in TEACHER_LOADING.items() if (getattr(args, name) or nothing) != nothing]
        if stated:
            raise ValueError(
                f"`{stated[0]}` says how to load a teacher, but there is none to load: the teacher is a model in "
                "memory, an adapter, or left out. Give its path or Hub id, or leave the setting out."
            )
    return teacher


def teacher_loading(args: DistillationConfig) -> dict[str, Any]:
    """The arguments of `load_model` for the teacher.

    Raises:
        ValueError: Revision or dtype are given twice.
    """
    how: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **dict(args.teacher_model_init_kwargs or {})}  # type: ignore[arg-type]
    if "torch_dtype" in how:
        how["dtype"] = how.pop("torch_dtype")
    for key, name in (("revision", "teacher_revision"), ("dtype", "teacher_dtype")):
        stated = getattr(args, name)
        if key in how and stated != TEACHER_LOADING[name]:
            raise ValueError(f"`{key}` of the teacher is given twice: `{name}`, and in `teacher_model_init_kwargs`.")
        how.setdefault(key, stated)
    return how


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, modules and numbers (`attention_dropout`) alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_student(
    path: str | Path,
    args: DistillationConfig,
    quantization_config: Any,
    load_reader: Callable[..., Any] = load_tokenizer,
    **loading: Any,
) -> tuple[Any, Any]:
    """The student and its tokenizer, loaded as `model_init_kwargs` say, by default in float32; adapters trainable.

    Args:
        load_reader: Loads the tokenizer; `load_processor` where the student reads more than text.
        loading: Passed to `load_model` where `model_init_kwargs` do not say otherwise.
    """
    settings: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **dict(args.model_init_kwargs or {})}  # type: ignore[arg-type]
    dtype = settings.pop("torch_dtype", settings.pop("dtype", "float32"))
    if quantization_config is not None:
        if "quantization_config" in settings:
            raise ValueError("`quantization_config` is given twice: to the trainer, and in `model_init_kwargs`.")
        settings["quantization_config"] = quantization_config
    model = load_model(path, dtype=dtype, **{**loading, **settings})
    train_adapters(model)
    named = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    return model, load_reader(path, **named)


def train_adapters(model: Any) -> None:
    """Make the active adapters of a model trainable, where they were loaded for inference; others are left alone."""
    for name in getattr(model, "active_adapters", []) if hasattr(model, "peft_config") else []:
        model.peft_config[name].inference_mode = False
        model.set_adapter(name)


def tokenizer_beside(teacher: Any, load_reader: Callable[..., Any] = load_tokenizer) -> Any:
    """The tokenizer (or processor) in the folder, or the part of the Hub's cache, that a loaded teacher came from.

    None where there is none.

    One with more tokens than the teacher has entries is not its own: its vocabulary was trimmed since.
    """
    model = causal_lm_of(teacher)
    name = model.config.name_or_path
    if not name:
        return None
    try:
        reader = load_reader(name, local_files_only=True)
    except FileNotFoundError:
        return None
    has_head = model.get_output_embeddings() is not None
    rows = head_rows(teacher) if has_head else model.get_input_embeddings().num_embeddings
    return reader if len(tokenizer_in(reader)) <= rows else None


def refuse_shared_weights(student: Any, teacher: Any) -> None:
    """Refuse a teacher that would change, or freeze, with the student.

    Raises:
        ValueError: The student trains weights of the teacher.
    """
    held = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters() if not parameter.is_meta}
    shared = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.numel() and parameter.untyped_storage().data_ptr() in held - {0}
    ]
    if shared:
        raise ValueError(
            f"Teacher and student share {len(shared)} tensors that are trained ({shared[0]}, ...): the teacher would "
            "be the student itself. For an adapter's own base as the teacher, leave `teacher` out and set "
            '`teacher_adapter="base"`; otherwise load the teacher a second time.'
        )


def checked_samples(dataset: Any, prepared: Any, args: DistillationConfig, context: int | None) -> Any:
    """Refuse samples beyond the context, and those with nothing to learn unless the config drops them."""
    if args.max_length is None and context is not None:
        prepared = fit_context(prepared, context)
    if args.drop_unlabelled:
        return require_labels(prepared, on_unlabelled="skip")
    dropped = len(dataset) - len(prepared) if isinstance(dataset, Dataset) else 0
    if dropped:
        raise ValueError(
            f"{dropped} of {len(dataset)} samples have no labeled token within `max_length` ({args.max_length}): "
            "nothing can be learned from them. Raise `max_length`, fix the data, or drop them with "
            "`drop_unlabelled=True`."
        )
    return require_labels(prepared)


def refuse_empty(dataset: Any) -> None:
    """Raise a `ValueError` for a training set without samples, streaming ones included."""
    if isinstance(dataset, IterableDataset):
        empty = next(iter(dataset), None) is None
    else:
        empty = dataset is not None and len(dataset) == 0
    if empty:
        raise ValueError("The training data set is empty. Check its name, split and filters.")


def fit_default_length(args: DistillationConfig, models: Iterable[Any]) -> None:
    """Lower a `max_length` that is at TRL's default to the context of the models, with a warning."""
    shortest = min(
        (n for n in (context_length(causal_lm_of(model)) for model in models) if n is not None), default=None
    )
    default = DistillationConfig.__dataclass_fields__["max_length"].default
    if shortest is not None and args.max_length == default and shortest < default:
        logger.warning("`max_length` is %d by default; the models take %d tokens, which is used.", default, shortest)
        args.max_length = shortest


def check_length(role: str, model: Any, max_length: int | None) -> None:
    """Refuse sequences that are longer than a model was built for."""
    longest = context_length(causal_lm_of(model))
    if longest is not None and max_length is not None and max_length > longest:
        raise ValueError(
            f"`max_length` is {max_length}, but the {role} {causal_lm_of(model).config.name_or_path!r} takes at most "
            f"{longest} tokens. Set `max_length={longest}` or less."
        )


def require_tokenizer(teacher: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a teacher without a tokenizer, for losses that let it read the text in its own tokens."""
    if tokenizer is None:
        raise ValueError(
            f"The teacher {causal_lm_of(teacher).config.name_or_path!r} has no tokenizer beside it. Pass it as "
            "`teacher_processing_class`."
        )


def check_vocabularies(
    student: Any,
    teacher: Any,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse models whose tokens differ. Padding rows that only one of them has are fine.

    Token maps are compared, not sizes; without the teacher's tokenizer only models of one size pass.
    """
    sizes = [head_rows(model) for model in (student, teacher)]
    if teacher_tokenizer is not None:
        compare_vocabularies(student_tokenizer, teacher_tokenizer, *sizes).require_identical()
    elif sizes[0] != sizes[1]:
        names = [causal_lm_of(model).config.name_or_path for model in (student, teacher)]
        raise ValueError(
            f"Student {names[0]!r} has {sizes[0]} vocabulary entries, teacher {names[1]!r} has {sizes[1]}. Pass "
            "`teacher_processing_class` so that their tokens can be compared: padding rows are fine."
        )


def plan_of(trainer: Any, *losses: str | None) -> list[str]:
    """What a training is going to do, in lines: the student, what is trained of it, the losses, the rows."""
    sizes = [(one.numel(), one.requires_grad) for one in trainer.model.parameters()]
    total, trained = sum(size for size, _ in sizes) / 1e6, sum(size for size, learns in sizes if learns) / 1e6
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed"
    name = type(causal_lm_of(trainer.model)).__name__
    return [
        f"Student: {name}, {total:.4g} M parameters, of which {trained:.4g} M are trained",
        f"Loss: {', '.join(filter(None, losses))}",
        f"Training rows: {rows}",
    ]
