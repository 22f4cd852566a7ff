"""Knowledge distillation as a drop-in `SFTTrainer`: the data side is TRL's, the loss is ours.

`SFTTrainer` is the base because it brings chat templates, packing, completion-only and assistant-only masks, and PEFT;
`compute_loss` is replaced as a whole, and nothing else of TRL is relied upon.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import SFTTrainer

from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES, forward_kl
from hf_transfer_ext.losses.fused import FusedLoss, divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.slopes import require_form
from hf_transfer_ext.models.heads import LMHead, causal_lm_of, head_rows
from hf_transfer_ext.models.loading import context_length, load_model, load_tokenizer
from hf_transfer_ext.models.plumbing import head_is_understood
from hf_transfer_ext.teachers.cache import CachedTeacher, FlushCallback, TeacherCache, open_cache
from hf_transfer_ext.teachers.learned import LearnedTeachers
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.server import ServerTeacher
from hf_transfer_ext.teachers.several import (
    RoutedTeachers,
    Several,
    frozen_bytes,
    open_combined_cache,
    shown_bytes,
    single_teachers,
    teacher_forms,
)
from hf_transfer_ext.teachers.signal import Teacher
from hf_transfer_ext.teachers.spans import SpanTeacher
from hf_transfer_ext.tensors import next_token_targets, predicting_rows
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.distillation_models import (
    check_length,
    check_vocabularies,
    checked_samples,
    disable_dropout,
    fit_default_length,
    load_student,
    one_teacher,
    plan_of,
    refuse_empty,
    refuse_shared_weights,
    require_tokenizer,
    teacher_loading,
    tokenizer_beside,
)
from hf_transfer_ext.trainers.hidden_loss import HiddenLosses, predicting_tokens
from hf_transfer_ext.trainers.inherited import refuse_split_sequences
from hf_transfer_ext.trainers.logs import RunningSums
from hf_transfer_ext.trainers.named_teachers import named_teachers
from hf_transfer_ext.trainers.normalization import TokenLossNormalization
from hf_transfer_ext.trainers.rollouts import (
    ROLLOUT,
    WritesRollouts,
    holds_prompts_alone,
    require_room,
    tokenized_prompts,
    with_prompts,
)
from hf_transfer_ext.trainers.several_teachers import (
    KeepsRoutes,
    check_routes,
    combined,
    routes_of,
    server_teacher,
    span_reader,
    span_server,
    started,
    started_spans,
)
from hf_transfer_ext.trainers.span_losses import SpanLosses, span_teachers
from hf_transfer_ext.trainers.tasks import CAUSAL_LM
from hf_transfer_ext.trainers.token_losses import loss_inside_the_head
from hf_transfer_ext.trainers.trained_along import TrainsAlong
from hf_transfer_ext.trainers.trl_names import converted, script_of

logger = logging.getLogger(__name__)


class DistillationTrainer(WritesRollouts, TrainsAlong, TokenLossNormalization, SFTTrainer):  # type: ignore[misc]
    """Minimize `kd_weight * D(student, teacher) + ce_weight * CE + hidden_weight * H` per labeled token.

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

    Logs the parts of the loss, `kd` and `ce` in nats per labeled token and `hidden` (the loss between layers; of
    several their weighted sum, and each as `hidden_mse`, ...), and what SFTTrainer logs: `entropy` of the student in
    nats, `mean_token_accuracy`, `num_tokens` read so far. All are means over the tokens since the last log line, on
    all processes; in evaluation over the whole set, as `eval_kd`, ... or `eval_<name>_kd`, ... of several sets. There
    `eval_loss` is a mean over tokens as well, of what training minimizes: the same parts with the same weights, and
    those of the `on_policy` method for each token.
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
        if teacher_model is not None and script_of(args) is None:
            logger.warning(
                "`teacher_model` is TRL's name for `teacher`. The other settings and their defaults are our own here; "
                "a script for TRL finds TRL's in `hf_transfer_ext.trl`."
            )
        args = DistillationConfig() if args is None else converted(args, DistillationConfig)
        if args.task != CAUSAL_LM:
            raise ValueError(f"`task` is {args.task!r}, which TaskDistillationTrainer trains. Use that trainer.")
        refuse_empty(train_dataset)
        train_dataset = with_prompts(train_dataset, args)
        eval_dataset = with_prompts(eval_dataset, args, held_out=True)
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
        routes = routes_of(teacher, args)
        if routes is not None:
            self.route_column = routes[0]
            check_routes(train_dataset, *routes)
            check_routes(eval_dataset, *routes, "evaluation data")
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
        teaches = isinstance(teacher, nn.Module) and args.is_taught
        if teaches:
            teacher_processing_class = teacher_processing_class or tokenizer_beside(teacher)
            if args.is_span_loss:
                require_tokenizer(teacher, teacher_processing_class)
            else:
                check_vocabularies(model, teacher, processing_class, teacher_processing_class)
        both = {"student": model}
        if isinstance(teacher, nn.Module) and not args.is_span_loss:  # else its tokens are not those of `max_length`
            both["teacher"] = teacher
        fit_default_length(args, both.values())
        for name, checked in both.items():
            check_length(name, checked, args.max_length)
        if args.disable_dropout:
            disable_dropout(model)
        self._context = context_length(causal_lm_of(model))
        self._sums = RunningSums()
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
        if not hasattr(self, "router_aux_loss_coef"):  # TRL before 1.14 reads it from the settings alone
            self.router_aux_loss_coef = args.router_aux_loss_coef
        refuse_split_sequences(self.accelerator.parallelism_config)  # a launcher may set it, too
        if (
            teaches and args.chat_template_path is not None and not args.is_span_loss
        ):  # which may have brought new tokens to the student
            check_vocabularies(self.model, teacher, processing_class, teacher_processing_class)
        self.divergence = forward_kl if args.is_span_loss else DISTILLATION_LOSSES[args.loss]
        self._fused = None if args.fused else False  # None until the first batch shows whether the head allows it
        self._taught_by = teacher
        self.teacher: Any = None
        self.teacher = self._teacher_of(teacher, teacher_processing_class) if args.is_taught else None
        if self.teacher is not None:
            logger.info("Memory of the frozen teachers: %s.", shown_bytes(self.frozen_bytes))
        self.hidden_losses = self._hidden_losses() if args.hidden_loss is not None else None
        self.span_losses = SpanLosses(self.args, self.model, self.teacher) if self.span_teachers else None
        between = [] if self.hidden_losses is None else self.hidden_losses.losses
        spaces = [] if self.span_losses is None else self.span_losses.dual_spaces.values()
        self.train_along([*between, *spaces])
        self.start_rollouts()

    @property
    def job(self) -> str:
        """ "distillation", or "fine-tuning" where nobody teaches."""
        return "distillation" if self.args.is_taught else "fine-tuning"

    def model_inputs(self) -> dict[str, Any]:
        """The student, and a teacher that is a model."""
        named = {"teacher": self._taught_by} if isinstance(self._taught_by, nn.Module) else {}
        teachers = single_teachers({"teacher": self.teacher}) if self.teacher is not None else {}
        models = [one.model for one in teachers.values() if not named and hasattr(one, "model")]
        several = {f"teacher-{place}": model for place, model in enumerate(models, 1) if isinstance(model, nn.Module)}
        return {"student": self.model, **named, **several}

    @property
    def span_teachers(self) -> dict[str, SpanTeacher]:
        """The teachers that read the text in tokens of their own, by name."""
        return span_teachers(self.teacher)

    def _teacher_of(self, teacher: Any, tokenizer: Any) -> Teacher | SpanTeacher | Several:
        args: Any = self.args
        own: Any = self.processing_class
        live: LiveTeacher | None = None
        if self.args.teacher_adapter is not None:
            live = AdapterTeacher(self.model, self.args.teacher_adapter, self.accelerator, fused=self.args.fused)
        elif isinstance(teacher, nn.Module):
            refuse_shared_weights(self.model, teacher)
            live = LiveTeacher(teacher, self.accelerator, fused=self.args.fused)
        found: Any = live or teacher
        if args.teachers is not None:
            entries, start = named_teachers(args.teachers, args.teachers_by), started
            if args.is_span_loss:
                start = started_spans
            members = {one.name: start(one, self.model, own, self.accelerator, args) for one in entries}
            found = combined(entries, members, args)
        elif args.is_span_loss:
            found = self._span_teacher(live, tokenizer)
        elif args.teacher_server is not None:
            options = args.teacher_server_options
            found = server_teacher(args.teacher_server, args.teacher_server_model, own, options)
        if args.teacher_cache is not None:
            found = found if args.is_span_loss else self._cached(live, found)
            cached: CachedTeacher = getattr(found, "source", found)
            self.add_callback(FlushCallback(cached.cache, self.accelerator))
        if isinstance(found, RoutedTeachers):
            if args.packing:
                raise ValueError(
                    "`packing` puts several rows into one, which no single teacher is for. Switch it off."
                )
            self.data_collator = KeepsRoutes(self.data_collator, found.column, list(found.teachers))
        if not args.is_span_loss:
            for form in teacher_forms(found):
                require_form(self.divergence, form)
        for one in span_teachers(found).values():
            logger.info("Vocabularies of student and teacher: %s.", one.vocabularies)
        return found

    def _set_signature_columns_if_needed(self) -> None:
        is_new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        teacher = getattr(self, "teacher", None)
        if is_new and isinstance(teacher, RoutedTeachers):
            columns: Any = self._signature_columns
            columns.append(teacher.column)

    @property
    def frozen_bytes(self) -> dict[str, int]:
        """Memory of each teacher's own frozen weights in bytes; an adapter of the student, or a cache, takes none."""
        return frozen_bytes({"teacher": self.teacher}) if self.teacher is not None else {}

    def _span_teacher(self, live: LiveTeacher | None, tokenizer: Any) -> SpanTeacher:
        args: Any = self.args
        own: Any = self.processing_class
        if args.teacher_tokenizer is not None:
            if live is not None or tokenizer is not None:
                raise ValueError(
                    "`teacher_tokenizer` is for a server, or a cache without its teacher, but the teacher's tokenizer "
                    "is given otherwise: beside its model, or as `teacher_processing_class`. Leave one of them out."
                )
            tokenizer = load_tokenizer(args.teacher_tokenizer)
        source: Any = live
        if args.teacher_server is not None:
            setting: Any = {"setting": "`teacher_tokenizer` or `teacher_processing_class`"}
            options = args.teacher_server_options
            source = span_server(args.teacher_server, args.teacher_server_model, tokenizer, options, **setting)
        elif (live is None and args.teacher_cache is None) or isinstance(live, AdapterTeacher):
            raise ValueError(
                f"`loss: {self.args.loss}` compares spans of text with a teacher model that has another tokenizer. "
                "Name it by `teacher_model_name_or_path`, or give the model with `teacher_processing_class`; several "
                "go into `teachers`."
            )
        elif live is not None and args.teacher_cache is None:
            return SpanTeacher(live, own, tokenizer, head_rows(self.model))
        return span_reader(source, args.teacher_cache, tokenizer, self.model, own, args)

    def record(self) -> RunRecord:
        """The record of this training so far; with another tokenizer, how much of the vocabularies matches."""
        found = super().record()
        self.describe(found)
        return found

    def describe(self, record: RunRecord) -> None:
        """Add to a record what the settings alone do not say about the teacher."""
        if self.span_teachers:
            record.config["vocabulary_alignment"] = self._alignments()
        if any(self.frozen_bytes.values()):
            record.config["frozen_teacher_bytes"] = self.frozen_bytes

    def _alignments(self) -> str:
        """How much of the vocabularies of student and teachers matches, in words."""
        found = {name: str(one.vocabularies) for name, one in self.span_teachers.items()}
        return found["teacher"] if [*found] == ["teacher"] else "; ".join(f"{n}: {text}" for n, text in found.items())

    def plan(self) -> str:
        """What is going to be trained, and which memory its frozen teachers take, in words."""
        between = [] if self.hidden_losses is None else [one.label for one in self.hidden_losses.losses]
        lines = plan_of(self, self.args.loss, *between)
        lines.append(f"Memory of the frozen teachers: {shown_bytes(self.frozen_bytes)}")
        if self.span_teachers:
            lines.append(f"Vocabularies: {self._alignments()}")
        return "\n".join([*lines, "Nothing was trained or written."])

    def _cached(self, live: LiveTeacher | None, teacher: Any) -> CachedTeacher:
        if isinstance(teacher, ServerTeacher):
            return CachedTeacher(TeacherCache(str(self.args.teacher_cache), teacher.fingerprint()), teacher)
        folder, tokenizer = str(self.args.teacher_cache), cast(Any, self.processing_class)
        how: Any = {"temperature": self.args.distill_temperature, "options": self.args.teacher_cache_options}
        if isinstance(teacher, Several):
            return open_combined_cache(folder, teacher, tokenizer, **how)
        if live is None and teacher is not None:
            raise ValueError(
                f"`teacher_cache` stores the outputs of models, adapters and servers, got a teacher of type "
                f"{type(teacher).__name__}. Leave one of them out."
            )
        return open_cache(folder, live, tokenizer, **how, revision=self.args.teacher_revision)

    def _hidden_losses(self) -> HiddenLosses:
        """The losses between layers, with their projections.

        Raises:
            ValueError: The teacher has no layers to read.
        """
        if not isinstance(self.teacher, LiveTeacher):
            raise ValueError(
                f"`hidden_loss` reads the teacher's layers, but {type(self.teacher).__name__} gives predictions "
                "alone. Use a model or an adapter as the teacher."
            )
        return HiddenLosses(self.args, self.model, self.teacher.network, causal=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `TrainsAlong`; a checkpoint holds the gate of learned teachers, too."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and isinstance(self.teacher, LearnedTeachers):
            self.teacher.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self.teacher, LearnedTeachers):
            self.teacher.load(resume_from_checkpoint)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **kwargs: Any
    ) -> Any:
        if holds_prompts_alone(dataset):
            prompts = tokenized_prompts(dataset, processing_class, args, self.chat_template, self.route_column)
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
        inputs.pop("_prediction_loss_only", None)  # a note of SFTTrainer to its own loss, before TRL 1.15
        known = inputs.pop(ROLLOUT, None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        targets, mask = next_token_targets(inputs.pop("labels"))
        weight = self.token_weight(mask, num_items_in_batch)
        written = None if known is None else self.rollout_tokens(known, mask)
        hidden, teacher = self.hidden_losses, cast(Any, self.teacher)
        with nullcontext({}) if hidden is None else hidden.teacher_viewed(teacher.network) as teacher_layers:
            spans = None if self.span_losses is None else self.span_losses.spans(model, inputs, mask)
            says = teacher is not None and spans is None
            signal = self.teacher_signal(model, inputs, mask, targets, written) if says else None
        if signal is not None and signal.mask is not None and signal.targets is not None:
            targets, mask = signal.targets, signal.mask
        terms = {
            "teacher": None if signal is None else signal.rows,
            "divergence": self.divergence,
            "weights": weight.expand(int(mask.sum())),
            "labels": targets[mask],
            "kd_weight": 0.0 if spans is not None else self.args.kd_weight,
            "ce_weight": self.args.ce_weight,
            "temperature": self.args.distill_temperature,
            "statistics": True,
            **({} if spans is not None else self.args.loss_options),
            **self.rollout_terms(written, training=model.training),
        }

        def losses_of(states: Tensor, head: LMHead | None) -> FusedLoss:
            rows = predicting_rows(states, mask)
            if head is None:
                parts = divergence_of_logits(rows, **terms)
            else:
                parts = fused_divergence(rows, head, float32_logits=self.args.float32_logits, **terms)
            if self.span_losses is None or spans is None:
                return parts
            found = self.span_losses(model, states, student_layers, head, spans, inputs, weight)
            return parts._replace(loss=parts.loss + found.loss, divergence=found.values)

        if self._fused is None:
            self._fused = head_is_understood(model)
        viewed: Any = hidden or self.span_losses
        with nullcontext({}) if viewed is None else viewed.student_viewed(model) as student_layers:
            if self._fused and not return_outputs:
                outputs, parts = loss_inside_the_head(model, inputs, losses_of)
            else:
                outputs = model(**inputs)
                parts = losses_of(outputs.logits, None)
        # DDP and FSDP follow a model's output to the parameters that made it: all of the output leads to the loss.
        loss = parts.loss + 0.0 * outputs.logits[..., :1].sum()
        between = None
        if hidden is not None:
            models = self.accelerator.unwrap_model(model), teacher.network  # DDP follows one forward pass alone
            compared = predicting_tokens(inputs, mask, targets[mask])
            between = hidden(student_layers, teacher_layers, compared, *models)
            loss = loss + self.args.hidden_weight * weight * between.total
        objective = loss.detach() / weight
        if self.aux_loss_enabled:  # a mean of its micro-batch, as in SFTTrainer
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        aligned = None
        if spans is not None:
            counts = (one.share * one.signal.student.sizes.sum() for one in spans)
            aligned = sum(counts, torch.zeros((), device=mask.device))
        layers = {} if between is None else between.sums
        self._note(model, inputs, parts, outputs, objective=objective, aligned=aligned, **layers)
        return (loss, outputs) if return_outputs else loss

    def _note(
        self, model: nn.Module, inputs: dict[str, Any], parts: FusedLoss, outputs: Any, **more: Tensor | None
    ) -> None:
        """Add a batch to the sums that the next log line, or the end of this evaluation, turns into means."""
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        sums = {"tokens": len(parts.cross_entropy), "read": read, "kd": parts.divergence, "ce": parts.cross_entropy}
        if parts.statistics is not None:
            sums |= {"entropy": parts.statistics.entropy, "correct": parts.statistics.correct}
        sums |= {name: values.detach() for name, values in more.items() if values is not None}
        if self.aux_loss_enabled:
            sums |= {"aux_loss": outputs.aux_loss.detach(), "batches": 1}
        self._sums.add(model, sums, self.args.device)

    def _means(self, mode: str) -> dict[str, float]:
        """What was noted on all processes since the last call, as means over the labeled tokens; and forgets it."""
        total = self._sums.take(mode, self.accelerator)
        if not total:
            return {}
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
        means |= {name: value / tokens for name, value in total.items() if name.startswith(("hidden", "aligned"))}
        if "aux_loss" in total:
            means["aux_loss"] = total["aux_loss"] / total["batches"]
        if mode == "eval":
            means["loss"] = total["objective"] / tokens + self.router_aux_loss_coef * means.get("aux_loss", 0.0)
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to a training log line, as means over all tokens since the last one."""
        if "loss" in logs:
            logs.update(self._means("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the parts of the loss to the metrics of this evaluation set, under its own prefix."""
        self._sums.sums["eval"] = {}
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._means("eval").items()})
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
