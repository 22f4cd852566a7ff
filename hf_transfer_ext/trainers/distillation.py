"""Knowledge distillation as a drop-in `SFTTrainer`: the data side is TRL's, the loss is ours.

`SFTTrainer` is the base because it brings chat templates, packing, completion-only and assistant-only masks, and PEFT;
`compute_loss` is replaced as a whole, and nothing else of TRL is relied upon.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from hf_transfer_ext.data.text import fit_context, require_labels
from hf_transfer_ext.data.vocabularies import compare_vocabularies
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import FusedLoss, divergence_of_logits, fused_linear_divergence
from hf_transfer_ext.models.heads import (
    LMHead,
    causal_lm_of,
    head_is_understood,
    head_module,
    head_replaced,
    head_rows,
    is_plain_head,
)
from hf_transfer_ext.models.heads import logit_scale_and_softcap as scale_and_softcap
from hf_transfer_ext.models.loading import context_length, load_model, load_tokenizer
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher, TeacherSignal
from hf_transfer_ext.tensors import next_token_targets
from hf_transfer_ext.trainers.normalization import TokenLossNormalization

logger = logging.getLogger(__name__)


@dataclass
class DistillationConfig(SFTConfig):
    """`SFTConfig` with a teacher and a loss.

    Args:
        loss: A name of `DISTILLATION_LOSSES`: forward_kl, reverse_kl, generalized_jsd, ...
        loss_options: The divergence's own options, such as `{"beta": 0.3}` of generalized_jsd.
        distill_temperature: Divides both models' logits in the divergence, > 0. It is no sampling temperature, and
            the loss is not multiplied by its square: put that into `kd_weight` to follow Hinton et al.
        kd_weight: Factor of the divergence from the teacher, >= 0.
        ce_weight: Factor of the cross entropy with the labels, >= 0. Both factors are taken as they are.
        teacher_model_name_or_path: A local folder or Hub id; not needed where the trainer is given a teacher.
        teacher_revision: Hub revision of the teacher.
        teacher_dtype: "auto", "float32", "bfloat16", ...
        teacher_adapter: Name of an adapter on the student's own PEFT model that is the teacher; no second model then.
        fused: Project to the vocabulary a chunk of tokens at a time, and never build full logits. Heads that are
            adapted or quantised take the way over full logits in any case.
        drop_unlabelled: Drop samples in which no token is labelled (a prompt that fills `max_length`, say) instead of
            refusing them.
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite; the last checkpoint stays.

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
    teacher_adapter: str | None = None
    fused: bool = True
    drop_unlabelled: bool = False
    stop_on_nan: bool = True

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "loss_options"]  # noqa: RUF012

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


def cpu_computes_in_bf16() -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def check_loss(name: str, options: dict[str, Any]) -> None:
    """Refuse an unknown divergence, unknown options, and values out of the divergence's range."""
    divergence = DISTILLATION_LOSSES[name]
    known = [
        parameter.name
        for parameter in inspect.signature(divergence).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "temperature"
    ]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {name}", option, known or ["(it has none)"]))
    divergence(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), **options)  # ranges are the divergence's own to check


def without_teacher(args: DistillationConfig) -> DistillationConfig:
    """The same training on cross entropy alone: a teacher's own fine-tuning, or a student's twin to compare with."""
    plain = copy.copy(args)
    plain.kd_weight, plain.ce_weight = 0.0, 1.0
    plain.teacher_model_name_or_path = plain.teacher_adapter = None
    plain.resume_from_checkpoint, plain.push_to_hub = None, False
    plain.save_strategy = SaveStrategy.NO
    return plain


class DistillationTrainer(TokenLossNormalization, SFTTrainer):  # type: ignore[misc]
    """Minimise `kd_weight * D(student, teacher) + ce_weight * CE` per labelled token, on fixed data.

    Args:
        model: Student: a model, a `PeftModel`, a path or a Hub id.
        teacher: A model, a path or a Hub id; None where the config names the teacher, or `kd_weight` is 0.
        args: `DistillationConfig`.
        teacher_processing_class: The teacher's tokenizer, to compare vocabularies; loaded from the teacher's path
            where it is given by one.
        kwargs: Everything else that `SFTTrainer` takes.

    Logs `kd` and `ce`, nats per labelled token, beside `loss`; in evaluation as `eval_kd`, `eval_ce`.
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
        args: DistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or DistillationConfig()
        refuse_empty(train_dataset)
        teacher = teacher if teacher is not None else args.teacher_model_name_or_path
        if teacher is None and args.teacher_adapter is None and args.kd_weight > 0:
            raise ValueError(
                "Distillation needs a teacher: pass `teacher=`, or set `teacher_model_name_or_path` or "
                "`teacher_adapter`. (With `kd_weight=0` there is none, and this is plain fine-tuning.)"
            )
        if isinstance(model, (str, Path)):
            model = load_model(model, dtype="float32")
        if processing_class is None:
            processing_class = load_tokenizer(model.config.name_or_path)
        if isinstance(teacher, (str, Path)):
            if teacher_processing_class is None:
                teacher_processing_class = load_tokenizer(teacher, revision=args.teacher_revision)
            teacher = load_model(teacher, revision=args.teacher_revision, dtype=args.teacher_dtype)
        if teacher is not None and args.kd_weight > 0:
            check_vocabularies(model, teacher, processing_class, teacher_processing_class)
        for name, checked in (("student", model), ("teacher", teacher)):
            if checked is not None:
                check_length(name, checked, args.max_length)
        self._context = context_length(causal_lm_of(model))
        with _any_head_passes(model):
            super().__init__(
                model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
            )
        self.divergence = DISTILLATION_LOSSES[args.loss]
        self._fused = None if args.fused else False  # None until the first batch shows whether the head allows it
        self.teacher: LiveTeacher | None = None
        if args.kd_weight > 0:
            if args.teacher_adapter is not None:
                self.teacher = AdapterTeacher(self.model, args.teacher_adapter, self.accelerator, fused=args.fused)
            else:
                self.teacher = LiveTeacher(teacher, self.accelerator, fused=args.fused)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **kwargs: Any
    ) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **kwargs)
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
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        targets, mask = next_token_targets(inputs.pop("labels"))
        weight = self.token_weight(mask, num_items_in_batch)
        signal = self.teacher.signal(model, inputs) if self.teacher is not None else None
        head = head_module(model)
        if self._fused is None:
            self._fused = head_is_understood(model, inputs["input_ids"])
        terms = {
            "weights": weight.expand(int(mask.sum())),
            "labels": targets[mask],
            "kd_weight": self.args.kd_weight,
            "ce_weight": self.args.ce_weight,
            "temperature": self.args.distill_temperature,
            **self.args.loss_options,
        }
        if self._fused and (signal is None or signal.hidden is not None) and not return_outputs:
            outputs, parts = self._loss_inside_the_head(model, head, inputs, mask, signal, terms)
        else:
            outputs, parts = self._loss_on_logits(model, inputs, mask, signal, terms)
        loss = parts.loss
        if self.aux_loss_enabled:  # a mean of its micro-batch, as in SFTTrainer
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._note(model, parts, mask)
        return (loss, outputs) if return_outputs else loss

    def _loss_inside_the_head(
        self,
        model: nn.Module,
        head: nn.Module,
        inputs: dict[str, Any],
        mask: Tensor,
        signal: TeacherSignal | None,
        terms: dict[str, Any],
    ) -> tuple[Any, FusedLoss]:
        """Run the student with its head replaced by the loss: no logits, and the weights whole however sharded."""
        scale, softcap = scale_and_softcap(causal_lm_of(model).config)
        found: list[FusedLoss] = []

        def loss_of(hidden: Tensor) -> Tensor:
            student = LMHead(head.weight, head.bias, scale, softcap)  # type: ignore[arg-type]
            rows = hidden[:, :-1][mask]
            if signal is not None and signal.hidden is not None and signal.head is not None:
                teacher_rows, teacher_head = signal.hidden[:, :-1][mask], signal.head
            else:
                teacher_rows, teacher_head = rows.detach(), student  # not read: kd_weight is 0
            found.append(fused_linear_divergence(rows, student, teacher_rows, teacher_head, self.divergence, **terms))
            # Stands where the logits would. DDP and FSDP follow a model's output to the parameters that made it, so it
            # has to lead to the loss, and through it to the head.
            return hidden[..., :1] + 0.0 * found[-1].loss

        with head_replaced(head, loss_of):
            outputs = model(**inputs)
        parts = found[-1]
        return outputs, parts._replace(loss=parts.loss + 0.0 * outputs.logits.sum())

    def _loss_on_logits(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        mask: Tensor,
        signal: TeacherSignal | None,
        terms: dict[str, Any],
    ) -> tuple[Any, FusedLoss]:
        outputs = model(**inputs)
        rows = outputs.logits[:, :-1][mask]
        teacher_rows = rows.detach()
        if signal is not None:
            if signal.logits is not None:
                teacher_rows = signal.logits[:, :-1][mask]
            elif signal.hidden is not None and signal.head is not None:
                teacher_rows = signal.head.logits(signal.hidden[:, :-1][mask])
        parts = divergence_of_logits(rows, teacher_rows, self.divergence, **terms)
        return outputs, parts._replace(loss=parts.loss + 0.0 * outputs.logits[..., :1].sum())

    def _note(self, model: nn.Module, parts: FusedLoss, mask: Tensor) -> None:
        """Keep the parts of the loss for the next log line, as means over this batch's labelled tokens."""
        mode = "train" if model.training else "eval"
        sums = torch.stack([parts.divergence.sum(), parts.cross_entropy.sum(), mask.sum().float()])
        kd, ce, tokens = self.accelerator.gather(sums[None]).sum(0).tolist()
        if tokens:
            if self.args.kd_weight > 0:
                self._metrics[mode]["kd"].append(kd / tokens)
            self._metrics[mode]["ce"].append(ce / tokens)


@contextmanager
def _any_head_passes(model: Any) -> Iterator[None]:
    """Let SFTTrainer accept an adapted head: it refuses one because its own loss would pass the adapter by."""
    adapted = hasattr(model, "peft_config") and not is_plain_head(head_module(model))
    if adapted:
        plain = nn.Linear(1, 1)
        model.get_output_embeddings = lambda: plain
    try:
        yield
    finally:
        if adapted:
            del model.get_output_embeddings


def checked_samples(dataset: Any, prepared: Any, args: DistillationConfig, context: int | None) -> Any:
    """Refuse samples beyond the context, and those with nothing to learn unless the config drops them."""
    if args.max_length is None and context is not None:
        prepared = fit_context(prepared, context)
    if args.drop_unlabelled:
        return require_labels(prepared, on_unlabelled="skip")
    dropped = len(dataset) - len(prepared) if isinstance(dataset, Dataset) else 0
    if dropped:
        raise ValueError(
            f"{dropped} of {len(dataset)} samples have no labelled token within `max_length` ({args.max_length}): "
            "nothing can be learnt from them. Raise `max_length`, mend the data, or drop them with "
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
