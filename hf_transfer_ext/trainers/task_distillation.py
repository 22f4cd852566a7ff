"""Distillation of the tasks in `trainers/tasks/`, on the plain `Trainer`: a task states its batches and its loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.loading import load_model, tokenizer_in
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.several import frozen_bytes, shown_bytes
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.distillation_models import (
    check_length,
    check_vocabularies,
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
from hf_transfer_ext.trainers.distillation_task import require_class
from hf_transfer_ext.trainers.logs import RunningSums
from hf_transfer_ext.trainers.normalization import TokenLossNormalization
from hf_transfer_ext.trainers.tasks import CAUSAL_LM, TASKS
from hf_transfer_ext.trainers.trained_along import TrainsAlong
from hf_transfer_ext.trainers.trl_names import converted

logger = logging.getLogger(__name__)


class TaskDistillationTrainer(TrainsAlong, TokenLossNormalization, Trainer):  # type: ignore[misc]
    """Distill classifiers, encoder-decoders, masked language models, embedders and vision-language models.

    Args:
        model: Student: a model, a `PeftModel`, a path or a Hub id.
        teacher: A model, a path or a Hub id; None where the config names the teacher or an adapter, or `kd_weight`
            is 0.
        args: `DistillationConfig` with the `task`.
        train_dataset: Rows with the columns that the task reads (`hf-transfer-ext methods TASK`); others are left out,
            and a warning names them.
        processing_class: The student's tokenizer, or its processor; loaded from beside the student where it is not
            given.
        teacher_processing_class: The same of the teacher.
        peft_config: An adapter to train instead of all weights.
        kwargs: Everything else that `Trainer` takes.

    Logs the parts of the loss, `kd` and `ce`, and `hidden` (the loss between layers; of several their weighted sum,
    and each as `hidden_mse`, ...), as means over the items (texts, words, tokens) since the last log line on all
    processes, and what else the task counts. In evaluation over the whole set, as `eval_kd`, ...; `eval_loss` is the
    sum of these parts times their weights.
    """

    _tag_names = ["distillation", "hf_transfer_ext"]  # noqa: RUF012
    nan_advice = "Lower the learning rate, and check the data for corrupt rows."

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        config: Any = converted(args, DistillationConfig) if args is not None else DistillationConfig()
        if config.task == CAUSAL_LM:
            raise ValueError(
                f"`task` is {CAUSAL_LM!r}, which DistillationTrainer trains. Set one of {', '.join(TASKS)}, or use "
                "that trainer."
            )
        if kwargs.get("compute_loss_func") is not None or kwargs.get("data_collator") is not None:
            raise ValueError(
                "`compute_loss_func` and `data_collator` cannot be used here: the task makes the batches and their "
                "loss. Register a task of your own with `@TASKS.register` (`trainers/tasks/`)."
            )
        refuse_empty(train_dataset)
        task = TASKS[config.task]
        kind = task.kind()
        teacher = one_teacher(teacher, config)
        if isinstance(teacher, (str, Path)):
            stated = teacher_loading(config)
            named = {key: stated[key] for key in ("revision", "trust_remote_code") if key in stated}
            teacher_processing_class = teacher_processing_class or task.load_reader(teacher, **named)
            teacher = load_model(teacher, **{**task.loading(teacher, stated.get("revision")), **stated})
        if isinstance(model, (str, Path)):
            revision = dict(config.model_init_kwargs or {}).get("revision")
            like = None if teacher is None else causal_lm_of(teacher).config
            loading = task.loading(model, revision, like=like, data=train_dataset)
            packed = kwargs.pop("quantization_config", None)
            model, reader = load_student(model, config, packed, task.load_reader, **loading)
            processing_class = processing_class or reader
        elif config.model_init_kwargs is not None:
            raise ValueError(
                "`model_init_kwargs` says how to load a model, but the student is loaded already. Give its path, or "
                "leave it out."
            )
        if processing_class is None:
            processing_class = task.load_reader(causal_lm_of(model).config.name_or_path)
        task.check_reader("student", processing_class)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"The task {config.task} learns from a model, got a {type(teacher).__name__}.")
        both = {"student": model} | ({"teacher": teacher} if teacher is not None else {})
        for one in both.values():
            require_class(one, kind, config.task)
        if teacher is not None:
            teacher_processing_class = teacher_processing_class or tokenizer_beside(teacher, task.load_reader)
            if task.needs_teachers_reader:
                require_tokenizer(teacher, tokenizer_in(teacher_processing_class))
                task.check_reader("teacher", teacher_processing_class)
            if task.shares_tokens:
                readers = tokenizer_in(processing_class), tokenizer_in(teacher_processing_class)
                check_vocabularies(model, teacher, *readers)
        fit_default_length(config, both.values())
        for name, one in both.items():
            check_length(name, one, config.max_length)
        if config.disable_dropout:
            disable_dropout(model)
        model = task.trainable(config, model, peft_config)
        if teacher is not None:
            refuse_shared_weights(model, teacher)
        if hasattr(model, "peft_config") and config.gradient_checkpointing:
            model.enable_input_require_grads()  # else no gradient reaches the adapters behind frozen embeddings
        network: Any = teacher if config.teacher_adapter is None else model
        self.task = task(
            config, model, network if config.is_taught else None, processing_class, teacher_processing_class
        )
        self._sums = RunningSums()
        self._taught_by = teacher
        self.teacher: LiveTeacher | None = None
        prepared = self.task.prepared(train_dataset) if train_dataset is not None else None
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.task.prepared(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.task.prepared(eval_dataset)
        super().__init__(
            model=model,
            args=config,
            train_dataset=prepared,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=self.task.collate,
            **kwargs,
        )
        self.label_names = ["labels"]  # in every batch, whatever the model itself takes
        if config.is_taught:
            how: Any = {"fused": config.fused, "select": task.select}
            if config.teacher_adapter is not None:
                self.teacher = AdapterTeacher(self.model, config.teacher_adapter, self.accelerator, **how)
            else:
                self.teacher = LiveTeacher(network, self.accelerator, **how)
            logger.info("Memory of the frozen teacher: %s.", shown_bytes(self.frozen_bytes))
        between = [] if self.task.between is None else self.task.between.losses
        self.train_along([*self.task.trained_along(), *between])

    @property
    def job(self) -> str:
        """ "distillation", or "fine-tuning" where nobody teaches."""
        return "distillation" if self.args.is_taught else "fine-tuning"

    def model_inputs(self) -> dict[str, Any]:
        """The student, and a teacher that is a model."""
        return {"student": self.model} | ({"teacher": self._taught_by} if self._taught_by is not None else {})

    @property
    def frozen_bytes(self) -> dict[str, int]:
        """Memory of the teacher's own frozen weights in bytes; an adapter of the student takes none."""
        return frozen_bytes({"teacher": self.teacher}) if self.teacher is not None else {}

    def record(self) -> RunRecord:
        """The record of this training so far, with what the task adds."""
        found = super().record()
        self.describe(found)
        return found

    def describe(self, record: RunRecord) -> None:
        """Add to a record what the settings alone do not say."""
        record.config |= self.task.facts()
        if any(self.frozen_bytes.values()):
            record.config["frozen_teacher_bytes"] = self.frozen_bytes

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset  # the task has left out what it does not read

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator  # the same of streamed rows

    # ---- The loss ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            self.task.progress(self.state.global_step / max(self.state.max_steps, 1))
        self.task.wants_outputs = return_outputs and self.compute_metrics is not None
        items = self.task.items(inputs)
        weight = self.token_weight(items, num_items_in_batch)
        self.task.views = None if self.task.between is None else {}
        try:
            found = self.task.losses(model, self.teacher, inputs, weight)
            loss, sums = found.loss, {**found.sums, "items": items.sum()}
            if self.teacher is not None:
                plain = self.accelerator.unwrap_model(model)  # DDP follows one forward pass alone
                between = self.task.between_layers(plain, self.teacher.network, inputs)
                if between is not None:
                    loss, sums = loss + self.args.hidden_weight * weight * between.total, sums | between.sums
        finally:
            self.task.views = None
        self._sums.add(model, sums, self.args.device)
        return (loss, found.outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        step = self.state.global_step
        drawn = (self.task.drawn(batch, step) for batch in epoch_iterator)
        return super().get_batch_samples(drawn, num_batches, device)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:  # type: ignore
        """The items of a step, on all processes where `average_tokens_across_devices` asks for it."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(int(self.task.items(batch).sum()) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() // self.get_tp_size()
        return count

    def _means(self, mode: str) -> dict[str, float]:
        """What was noted on all processes since the last call, as means over the items; and forgets it."""
        total = self._sums.take(mode, self.accelerator)
        if not total:
            return {}
        items, labelled = max(total.pop("items"), 1.0), max(total.pop("labelled", 0.0), 1.0)
        means = {"accuracy": total.pop("correct") / labelled} if "correct" in total else {}
        if self.teacher is None:
            total.pop("kd", None)
        return means | {name: value / items for name, value in total.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to a training log line, as means over all items since the last one."""
        if "loss" in logs:
            logs.update(self._means("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the parts of the loss to the metrics of this evaluation set, under its own prefix."""
        self._sums.sums["eval"], self.task.evaluates = {}, True
        try:
            output: Any = super().evaluation_loop(*args, **kwargs)
        finally:
            self.task.evaluates = False
        prefix, means = kwargs.get("metric_key_prefix", "eval"), self._means("eval")
        if means:
            parts = {"kd": self.args.kd_weight, "ce": self.args.ce_weight, "hidden": self.args.hidden_weight}
            means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in parts.items())
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def measure(self, rows: Any, *, model: Any = None, dataset: str | None = None) -> list[Any]:
        """Measure a model on held-out rows of the data, and compare it with the teacher.

        Args:
            model: The student by default; the teacher itself is measured without comparison.
            dataset: Name of the rows in a report.
        """
        model = self.accelerator.unwrap_model(self.model if model is None else model).to(self.args.device)
        task, reference = self.task, self.teacher
        if self.teacher is not None and model is self._taught_by:
            theirs = task.tokenizer if task.teacher_tokenizer is None else task.teacher_tokenizer
            task, reference = type(task)(self.args, model, None, theirs), None
        size = self.args.per_device_eval_batch_size
        return task.measure(model, task.prepared(rows), reference, batch_size=size, dataset=dataset)

    def plan(self) -> str:
        """What is going to be trained, and which memory its frozen teacher takes, in words."""
        between = [] if self.task.between is None else [one.label for one in self.task.between.losses]
        lines = plan_of(self, self.args.loss, *between)
        lines.append(f"Memory of the frozen teacher: {shown_bytes(self.frozen_bytes)}")
        return "\n".join([*lines, "Nothing was trained or written."])
