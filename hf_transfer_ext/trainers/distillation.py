"""Knowledge distillation as a drop-in `SFTTrainer`: the data side is TRL's, the loss is ours.

`SFTTrainer` is the base because it brings chat templates, packing, completion-only and assistant-only masks, and PEFT;
`compute_loss` is replaced as a whole, and nothing else of TRL is relied upon.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from hf_transfer_ext.data.text import fit_context, require_labels
from hf_transfer_ext.data.vocabularies import compare_vocabularies
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import FusedLoss, divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.slopes import Form, own_options, require_form
from hf_transfer_ext.models.heads import causal_lm_of, head_of, head_rows, run_to_head
from hf_transfer_ext.models.loading import context_length, load_model, load_tokenizer
from hf_transfer_ext.models.plumbing import head_is_understood
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.cache import CachedTeacher, FlushCallback, open_cache, planned_spec
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.signal import Teacher
from hf_transfer_ext.tensors import next_token_targets, predicting_rows
from hf_transfer_ext.trainers.inherited import refuse_split_sequences, refuse_without_effect
from hf_transfer_ext.trainers.normalization import TokenLossNormalization
from hf_transfer_ext.trainers.on_policy_options import OnPolicyOptions
from hf_transfer_ext.trainers.rollouts import (
    ROLLOUT,
    WritesRollouts,
    holds_prompts_alone,
    require_room,
    tokenized_prompts,
    with_prompts,
)
from hf_transfer_ext.trainers.trl_names import converted, takes_trl_names

logger = logging.getLogger(__name__)


@takes_trl_names
@dataclass
class DistillationConfig(OnPolicyOptions, SFTConfig):
    """`SFTConfig` with a teacher and a loss; `OnPolicyOptions` let the student write the texts.

    What it inherits is listed in `trainers/inherited.py`: obeyed, refused, or without meaning here. TRL's names of
    settings (`beta`, `temperature`, `teacher_model_revision`, ...) are taken as keywords; see `trainers/trl_names.py`.

    Args:
        loss: A name of `DISTILLATION_LOSSES`: forward_kl, reverse_kl, generalized_jsd, ...
        loss_options: The divergence's own options, such as `{"beta": 0.3}` of generalized_jsd.
        distill_temperature: Divides both models' logits in the divergence, > 0. It is not a sampling temperature, and
            the loss is not multiplied by its square: put that into `kd_weight` to follow Hinton et al.
        kd_weight: Factor of the divergence from the teacher, >= 0.
        ce_weight: Factor of the cross entropy with the labels, >= 0. Both factors are taken as they are.
        teacher_model_name_or_path: A local folder or Hub id; not needed where the trainer is given a teacher.
        teacher_revision: Hub revision of the teacher.
        teacher_dtype: "auto", "float32", "bfloat16", ...
        teacher_model_init_kwargs: Further arguments of `from_pretrained` for the teacher, such as
            `{"attn_implementation": "sdpa"}`. These three say how to load a teacher; a loaded one refuses them.
        teacher_adapter: Name of an adapter on the student's own PEFT model that is the teacher, or "base" for its base
            with adapters off; no second model then.
        fused: Project to the vocabulary a chunk of tokens at a time, and never build full logits. Heads that are
            adapted or quantized use full logits in any case.
        disable_dropout: Set the student's own dropout to 0; an adapter of `peft_config` keeps its own.
        drop_unlabelled: Drop samples in which no token is labelled (a prompt that fills `max_length`, say) instead of
            refusing them.
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite; the last checkpoint stays.
        teacher_cache: Folder of stored teacher outputs (`teachers.cache`). With a teacher, rows that are missing in it
            are computed once and added, so that later epochs need no teacher forward; without, it is the teacher.
        teacher_cache_options: Arguments of `CacheSpec` (kind, top, samples, tau) for a new cache.

    `bf16` left alone is on where the hardware computes in bfloat16; on a CPU without such instructions it is off, as
    emulating them is several times slower than float32.
    """

    loss: str = "forward_kl"
    loss_options: dict[str, Any] | str | None = field(default_factory=dict)
    distill_temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    teacher_model_name_or_path: str | None = None
    teacher_revision: str | None = None
    teacher_dtype: str = "auto"
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_adapter: str | None = None
    fused: bool = True
    disable_dropout: bool = False
    drop_unlabelled: bool = False
    stop_on_nan: bool = True
    teacher_cache: str | None = None
    teacher_cache_options: dict[str, Any] | str | None = field(default_factory=dict)

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *SFTConfig._VALID_DICT_FIELDS,
        "loss_options",
        "teacher_model_init_kwargs",
        "teacher_cache_options",
        "on_policy_options",
        "generation_options",
    ]

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and not torch.accelerator.is_available():
            self.use_cpu, self.bf16 = True, cpu_computes_in_bf16()
        super().__post_init__()
        self.loss_options: dict[str, Any] = dict(self.loss_options or {})  # type: ignore[arg-type]
        check_loss(self.loss, self.loss_options)
        if not self.distill_temperature > 0:
            raise ValueError(f"`distill_temperature` must be > 0, got {self.distill_temperature}.")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise ValueError(
                f"`kd_weight` and `ce_weight` must be >= 0 and not both 0, got {self.kd_weight} and {self.ce_weight}."
            )
        if self.teacher_adapter and self.teacher_model_name_or_path:
            raise ValueError(
                "Name one teacher: `teacher_adapter` (on the student's own model) or `teacher_model_name_or_path`."
            )
        self.teacher_cache_options: dict[str, Any] = dict(self.teacher_cache_options or {})  # type: ignore[arg-type]
        if self.teacher_cache is None and self.teacher_cache_options:
            raise ValueError("`teacher_cache_options` are given, but no `teacher_cache`. Name its folder.")
        if self.teacher_form is not None:
            require_form(DISTILLATION_LOSSES[self.loss], self.teacher_form)
        self.check_on_policy()
        refuse_without_effect(self)

    @property
    def teacher_form(self) -> Form | None:
        """The form of the rows of the teacher that the config names; None where it names none."""
        if self.teacher_cache is not None:
            return planned_spec(self.teacher_cache, self.distill_temperature, self.teacher_cache_options).form  # type: ignore[arg-type]
        return "dense" if self.teacher_adapter or self.teacher_model_name_or_path else None


def cpu_computes_in_bf16() -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def check_loss(name: str, options: dict[str, Any]) -> None:
    """Refuse an unknown divergence, unknown options, and values out of the divergence's range."""
    divergence = DISTILLATION_LOSSES[name]
    known = own_options(divergence)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {name}", option, known or ["(it has none)"]))
    divergence(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), **options)  # ranges are the divergence's own to check


def between_stages(args: DistillationConfig) -> DistillationConfig:
    """A copy for a stage before the run itself: it neither resumes, nor saves checkpoints, nor publishes."""
    plain = copy.copy(args)
    plain.resume_from_checkpoint, plain.push_to_hub = None, False
    plain.save_strategy = SaveStrategy.NO
    return plain


def without_teacher(args: DistillationConfig) -> DistillationConfig:
    """The same training on cross entropy alone: a teacher's own fine-tuning, or a student's twin to compare with."""
    plain = between_stages(args)
    plain.kd_weight, plain.ce_weight = 0.0, 1.0
    plain.teacher_model_name_or_path = plain.teacher_adapter = plain.teacher_cache = None
    plain.teacher_cache_options = {}
    plain.on_policy = None
    forget_loading(plain)
    return plain


#: Settings that say how a teacher is loaded -> their value where they say nothing.
TEACHER_LOADING: dict[str, Any] = {
    "teacher_revision": None,
    "teacher_dtype": "auto",
    "teacher_model_init_kwargs": None,
}


def forget_loading(args: DistillationConfig) -> None:
    """Reset what says how to load the teacher, once that is done or there is none."""
    for name, nothing in TEACHER_LOADING.items():
        setattr(args, name, nothing)


class DistillationTrainer(WritesRollouts, TokenLossNormalization, SFTTrainer):  # type: ignore[misc]
    """Minimize `kd_weight * D(student, teacher) + ce_weight * CE` per labeled token.

    The texts are those of the data, or written by the student and the teacher during training (`on_policy`).

    Args:
        model: Student: a model, a `PeftModel`, a path or a Hub id.
        teacher: A model, a path or a Hub id, or anything that is a `Teacher`; None where the config names the
            teacher, or `kd_weight` is 0.
        args: `DistillationConfig`; an `SFTConfig` or plain `TrainingArguments` is converted.
        teacher_processing_class: The teacher's tokenizer, to compare vocabularies; loaded from the teacher's path
            where it is given by one.
        teacher_model: TRL's name for `teacher`.
        kwargs: Everything else that `SFTTrainer` takes (`peft_config`, `quantization_config` of the student, ...).

    Logs the parts of the loss, `kd` and `ce` in nats per labeled token, and what SFTTrainer logs: `entropy` of the
    student in nats, `mean_token_accuracy`, `num_tokens` read so far. All are means over the tokens since the last log
    line, on all processes; in evaluation over the whole set, as `eval_kd`, ... or `eval_<name>_kd`, ... of several
    sets. There `eval_loss` is a mean over tokens as well, `kd_weight * eval_kd + ce_weight * eval_ce`.
    """

    _tag_names = ["distillation", "hf_transfer_ext"]  # noqa: RUF012
    _name = "Distillation"
    nan_advice = (
        "Lower the learning rate, check the data for corrupt samples, or choose a divergence that stays finite where "
        "one model excludes tokens (skew_kl, generalized_jsd)."
    )

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | Any = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Any = None,
        teacher_model: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DistillationConfig() if args is None else converted(args, DistillationConfig)
        refuse_empty(train_dataset)
        train_dataset, eval_dataset = with_prompts(train_dataset, args), with_prompts(eval_dataset, args)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` cannot be used here: the loss is computed inside the model's head, from `loss`, "
                "`kd_weight` and `ce_weight`. Register a divergence with `@DISTILLATION_LOSSES.register`, or override "
                "`compute_loss`."
            )
        if kwargs.pop("tools", None):
            raise ValueError(
                "`tools` are functions to call while a text is written, which does not happen here: no result would "
                "come back. Leave `tools` out; a column `tools`, and results among the turns of a prompt, are read."
            )
        if isinstance(processing_class, (Dataset, IterableDataset, dict)):
            raise TypeError(
                "The fifth argument is `processing_class`, and it is a data set. Give `eval_dataset` and "
                "`processing_class` by name."
            )
        if teacher is not None and teacher_model is not None:
            raise ValueError("`teacher` and `teacher_model` are two names of one argument. Leave one out.")
        teacher = one_teacher(teacher if teacher_model is None else teacher_model, args)
        if isinstance(model, (str, Path)):
            model, tokenizer = load_student(model, args, kwargs.pop("quantization_config", None))
            processing_class = processing_class or tokenizer
        elif args.model_init_kwargs is not None or kwargs.get("quantization_config") is not None:
            raise ValueError(
                "`model_init_kwargs` and `quantization_config` say how to load a model, but the student is loaded "
                "already. Give its path, or leave them out."
            )
        if processing_class is None:
            processing_class = load_tokenizer(model.config.name_or_path)
        if isinstance(teacher, (str, Path)):
            how = teacher_loading(args)
            if teacher_processing_class is None:
                named = {key: how[key] for key in ("revision", "trust_remote_code") if key in how}
                teacher_processing_class = load_tokenizer(teacher, **named)
            teacher = load_model(teacher, **how)
        teaches = isinstance(teacher, nn.Module) and args.kd_weight > 0
        if teaches:
            teacher_processing_class = teacher_processing_class or tokenizer_beside(teacher)
            check_vocabularies(model, teacher, processing_class, teacher_processing_class)
        both = {name: one for name, one in (("student", model), ("teacher", teacher)) if isinstance(one, nn.Module)}
        fit_default_length(args, both.values())
        for name, checked in both.items():
            check_length(name, checked, args.max_length)
        if args.disable_dropout:
            disable_dropout(model)
        self._context = context_length(causal_lm_of(model))
        self._sums: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
        self._tokens_read = 0.0
        obeyed, args.model_init_kwargs = args.model_init_kwargs, None  # SFTTrainer would say that they are ignored
        with _any_head_passes(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        args.model_init_kwargs = obeyed
        refuse_split_sequences(self.accelerator.parallelism_config)  # a launcher may set it, too
        if teaches and args.chat_template_path is not None:  # which may have brought new tokens to the student
            check_vocabularies(self.model, teacher, processing_class, teacher_processing_class)
        self.divergence = DISTILLATION_LOSSES[args.loss]
        self._fused = None if args.fused else False  # None until the first batch shows whether the head allows it
        self._taught_by = teacher
        self.teacher = self._teacher_of(teacher) if args.kd_weight > 0 else None
        self.start_rollouts()

    @property
    def job(self) -> str:
        """ "distillation", or "fine-tuning" where nobody teaches."""
        return "distillation" if self.args.kd_weight > 0 else "fine-tuning"

    def model_inputs(self) -> dict[str, Any]:
        """The student, and a teacher that is a model."""
        named = {"teacher": self._taught_by} if isinstance(self._taught_by, nn.Module) else {}
        return {"student": self.model, **named}

    def _teacher_of(self, teacher: Any) -> Teacher:
        live: LiveTeacher | None = None
        if self.args.teacher_adapter is not None:
            live = AdapterTeacher(self.model, self.args.teacher_adapter, self.accelerator, fused=self.args.fused)
        elif isinstance(teacher, nn.Module):
            refuse_shared_weights(self.model, teacher)
            live = LiveTeacher(teacher, self.accelerator, fused=self.args.fused)
        found: Teacher = live or teacher
        if self.args.teacher_cache is not None:
            found = self._cached(live, teacher)
        require_form(self.divergence, found.form)
        return found

    def _cached(self, live: LiveTeacher | None, teacher: Any) -> CachedTeacher:
        if live is None and teacher is not None:
            raise ValueError(
                f"`teacher_cache` stores the outputs of a model, got a teacher of type {type(teacher).__name__}. "
                "Leave one of them out."
            )
        tokenizer: Any = self.processing_class
        options: Any = self.args.teacher_cache_options
        cached = open_cache(
            str(self.args.teacher_cache), live, tokenizer, temperature=self.args.distill_temperature,
            options=options, revision=self.args.teacher_revision,
        )  # fmt: skip
        self.add_callback(FlushCallback(cached.cache, self.accelerator))
        return cached

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **kwargs: Any
    ) -> Any:
        if holds_prompts_alone(dataset):
            prompts = tokenized_prompts(dataset, processing_class, args, self.chat_template)
            require_room(prompts, args, self._context)
            return prompts
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **kwargs)
        require_room(prepared, args, self._context)
        if packing or "input_ids" not in (prepared.column_names or []):
            return prepared
        return checked_samples(dataset, prepared, args, self._context)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        known = inputs.pop(ROLLOUT, None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        targets, mask = next_token_targets(inputs.pop("labels"))
        weight = self.token_weight(mask, num_items_in_batch)
        written = None if known is None else self.rollout_tokens(known, mask)
        signal = None if self.teacher is None else self.teacher_signal(model, inputs, mask, targets, written)
        if signal is not None and signal.mask is not None and signal.targets is not None:
            targets, mask = signal.targets, signal.mask
        terms = {
            "teacher": None if signal is None else signal.rows,
            "divergence": self.divergence,
            "weights": weight.expand(int(mask.sum())),
            "labels": targets[mask],
            "kd_weight": self.args.kd_weight,
            "ce_weight": self.args.ce_weight,
            "temperature": self.args.distill_temperature,
            "statistics": True,
            **self.args.loss_options,
            **self.rollout_terms(written),
        }
        if self._fused is None:
            self._fused = head_is_understood(model)
        if self._fused and not return_outputs:
            outputs, parts = self._loss_inside_the_head(model, inputs, mask, terms)
        else:
            outputs = model(**inputs)
            parts = divergence_of_logits(predicting_rows(outputs.logits, mask), **terms)
        # DDP and FSDP follow a model's output to the parameters that made it: all of the output leads to the loss.
        loss = parts.loss + 0.0 * outputs.logits[..., :1].sum()
        if self.aux_loss_enabled:  # a mean of its micro-batch, as in SFTTrainer
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._note(model, inputs, parts, outputs)
        return (loss, outputs) if return_outputs else loss

    def _loss_inside_the_head(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, terms: dict[str, Any]
    ) -> tuple[Any, FusedLoss]:
        """Run the student with the loss in place of its head: no logits, and the weights whole however sharded."""
        found: list[FusedLoss] = []

        def loss_of(hidden: Tensor) -> Tensor:
            found.append(fused_divergence(predicting_rows(hidden, mask), head_of(model), **terms))
            # Stands where the logits would: it has to lead to the loss, and through it to the head.
            return hidden[..., :1] + 0.0 * found[-1].loss

        outputs = run_to_head(model, loss_of, **inputs)
        return outputs, found[-1]

    def _note(self, model: nn.Module, inputs: dict[str, Any], parts: FusedLoss, outputs: Any) -> None:
        """Add a batch to the sums that the next log line, or the end of this evaluation, turns into means."""
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        sums = {"tokens": len(parts.divergence), "read": read, "kd": parts.divergence, "ce": parts.cross_entropy}
        if parts.statistics is not None:
            sums |= {"entropy": parts.statistics.entropy, "correct": parts.statistics.correct}
        if self.aux_loss_enabled:
            sums |= {"aux_loss": outputs.aux_loss.detach(), "batches": 1}
        noted = self._sums["train" if model.training else "eval"]
        for name, values in sums.items():
            value = values.float().sum() if isinstance(values, Tensor) else torch.tensor(float(values))
            noted[name] = noted.get(name, 0.0) + value.to(self.args.device)

    def _means(self, mode: str) -> dict[str, float]:
        """What was noted on all processes since the last call, as means over the labeled tokens; and forgets it."""
        noted, self._sums[mode] = self._sums[mode], {}
        if not noted:
            return {}
        names = sorted(noted)
        gathered = self.accelerator.gather(torch.stack([noted[name] for name in names])[None]).sum(0).tolist()
        total = dict(zip(names, gathered, strict=True))
        tokens = max(total["tokens"], 1.0)
        if mode == "train":
            self._tokens_read += total["read"]
        means = {
            "ce": total["ce"] / tokens,
            "entropy": total["entropy"] / tokens,
            "mean_token_accuracy": total["correct"] / tokens,
            "num_tokens": self._tokens_read,
        }
        if self.args.kd_weight > 0:
            means["kd"] = total["kd"] / tokens
        if "aux_loss" in total:
            means["aux_loss"] = total["aux_loss"] / total["batches"]
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to a training log line, as means over all tokens since the last one."""
        if "loss" in logs:
            logs.update(self._means("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the parts of the loss to the metrics of this evaluation set, under its own prefix."""
        self._sums["eval"] = {}
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix, means = kwargs.get("metric_key_prefix", "eval"), self._means("eval")
        if means:
            loss = self.args.ce_weight * means["ce"] + self.args.kd_weight * means.get("kd", 0.0)
            means["loss"] = loss + self.router_aux_loss_coef * means["aux_loss"] if "aux_loss" in means else loss
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output


@contextmanager
def _any_head_passes(model: Any) -> Iterator[None]:
    """Let SFTTrainer accept an adapted head: it refuses one because its own loss would bypass the adapter."""
    causal, plain = causal_lm_of(model), nn.Linear(1, 1)
    own = causal.get_output_embeddings

    def shown() -> Any:
        head = own()
        return plain if isinstance(head, BaseTunerLayer) else head

    causal.get_output_embeddings = shown
    try:
        yield
    finally:
        del causal.get_output_embeddings


def one_teacher(teacher: Any, args: DistillationConfig) -> Any:
    """The teacher that was given or named: a model, a `Teacher`, a path, or None for an adapter of the student.

    Raises:
        ValueError: None is named, or two.
        TypeError: It is not something that can teach.
    """
    named = args.teacher_model_name_or_path
    if teacher is not None and not isinstance(teacher, (str, Path, nn.Module, Teacher)):
        raise TypeError(
            f"`teacher` has to be a model, a path, a Hub id or a `Teacher` (with `form` and `signal`), got "
            f"{type(teacher).__name__}."
        )
    given = str(teacher) if isinstance(teacher, (str, Path)) else None
    if isinstance(teacher, nn.Module):
        given = causal_lm_of(teacher).config.name_or_path
    if teacher is not None and (args.teacher_adapter is not None or (named is not None and named != given)):
        raise ValueError(
            f"Two teachers are named: `teacher` ({given or type(teacher).__name__!r}), and in the config "
            f"{named or args.teacher_adapter!r}. Leave one of them out."
        )
    teacher = named if teacher is None else teacher
    if teacher is None and args.teacher_adapter is None and args.teacher_cache is None and args.kd_weight > 0:
        raise ValueError(
            "Distillation needs a teacher: pass `teacher=`, or set `teacher_model_name_or_path`, `teacher_cache` or "
            "`teacher_adapter`. (With `kd_weight=0` there is none, and this is plain fine-tuning.)"
        )
    if teacher is not None and args.kd_weight == 0:
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


def load_student(path: str | Path, args: DistillationConfig, quantization_config: Any) -> tuple[Any, Any]:
    """The student and its tokenizer, loaded as `model_init_kwargs` say, by default in float32; adapters trainable."""
    settings: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **dict(args.model_init_kwargs or {})}  # type: ignore[arg-type]
    dtype = settings.pop("torch_dtype", settings.pop("dtype", "float32"))
    if quantization_config is not None:
        if "quantization_config" in settings:
            raise ValueError("`quantization_config` is given twice: to the trainer, and in `model_init_kwargs`.")
        settings["quantization_config"] = quantization_config
    model = load_model(path, dtype=dtype, **settings)
    for name in getattr(model, "active_adapters", []) if hasattr(model, "peft_config") else []:
        model.peft_config[name].inference_mode = False
        model.set_adapter(name)  # trainable, where it was loaded for inference
    named = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    return model, load_tokenizer(path, **named)


def tokenizer_beside(teacher: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder, or the part of the Hub's cache, that a loaded teacher came from; None without one.

    One with more tokens than the teacher has entries is not its own: its vocabulary was trimmed since.
    """
    name = causal_lm_of(teacher).config.name_or_path
    if not name:
        return None
    try:
        tokenizer = load_tokenizer(name, local_files_only=True)
    except FileNotFoundError:
        return None
    return tokenizer if len(tokenizer) <= head_rows(teacher) else None


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
