"""MUSCLE: train a new adapter so that an update of the base model breaks as little as possible of what worked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_transfer_ext.adapters.transfer.compare import answered_exactly
from hf_transfer_ext.data.forget_retain import ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.metrics.negative_flip_rate import negative_flip_rate
from hf_transfer_ext.losses.distillation.forward_kl import forward_kl
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode, pad_token_id
from hf_transfer_ext.tensors import Labels, Logits, PerToken, next_token_view
from hf_transfer_ext.trainers.logs import require_reporters
from hf_transfer_ext.trainers.normalization import TokenLossNormalization

#: The adapter that is trained, beside the new base's own.
COMPATIBLE = "compatible"


def compatibility_loss(
    student_logits: Logits,
    old_logits: Logits,
    new_logits: Logits,
    targets: Labels,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> PerToken:
    r"""Follow the old model where the student is wrong, and the new model where it is right.

    .. math::
        m_i \, \mathrm{KL}(p_{old} \,\|\, p) + (1 - m_i) \, \mathrm{KL}(p_{new} \,\|\, p)
        - w \log p(y_i), \quad m_i = 1[\arg\max p \ne y_i]

    The mask m is computed from the student's own logits and carries no gradient.

    Args:
        targets: The right tokens; where they are IGNORE_INDEX the caller masks the result.
        temperature: > 0, divides all logits in both divergences. The result is not multiplied by temperature**2.
        ce_weight: Weight w of the cross-entropy, >= 0; the paper adds it where the new model is much more accurate
            than the old one.

    Returns:
        Nats per token, >= 0. Nothing is masked.

    Source: MUSCLE, Echterhoff et al. 2024, section 4, https://arxiv.org/abs/2407.09435
    """
    wrong = student_logits.argmax(-1) != targets
    old = forward_kl(student_logits, old_logits, temperature=temperature)
    new = forward_kl(student_logits, new_logits, temperature=temperature)
    loss = torch.where(wrong, old, new)
    if ce_weight:
        chosen = targets.clamp(min=0).unsqueeze(-1)
        loss = loss - ce_weight * student_logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)
    return loss


@dataclass
class MuscleConfig(TrainingArguments):
    """`TrainingArguments` with the options of the loss.

    Args:
        loss_temperature: `temperature` of `compatibility_loss`.
        ce_weight: `ce_weight` of `compatibility_loss`.
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite.
    """

    loss_temperature: float = 1.0
    ce_weight: float = 0.0
    stop_on_nan: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_reporters(self.report_to)
        if not self.loss_temperature > 0:
            raise ValueError(f"`loss_temperature` must be greater than 0, got {self.loss_temperature}.")
        if self.ce_weight < 0:
            raise ValueError(f"`ce_weight` must be at least 0, got {self.ce_weight}.")
        self.remove_unused_columns = False


class MuscleTrainer(TokenLossNormalization, Trainer):  # type: ignore[misc]
    """Minimize `compatibility_loss` per labeled token.

    Args:
        old: The old base with its adapter; not trained.
        model: The new base with its task adapter and a trainable one; see `train_compatible`.
        task: Name of the new base's task adapter.
    """

    def __init__(self, old: Any, model: PeftModel, task: str, args: MuscleConfig, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.old, self.task = old.eval(), task

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        whole = self.accelerator.unwrap_model(model)
        with torch.no_grad(), evaluation_mode(whole), active_adapter(whole, self.task):
            new = whole(**batch).logits
        with torch.no_grad():
            old = self.old(**{name: tensor.to(self.old.device) for name, tensor in batch.items()}).logits
        outputs = model(**batch)
        student, targets, mask = next_token_view(outputs.logits, inputs["labels"])
        loss = compatibility_loss(
            student,
            old[:, :-1].to(student.device),
            new[:, :-1],
            targets,
            temperature=self.args.loss_temperature,
            ce_weight=self.args.ce_weight,
        )
        total = self.normalize(loss, mask, num_items_in_batch)
        return (total, outputs) if return_outputs else total


def train_compatible(
    old: Any,
    new: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    args: MuscleConfig,
    *,
    template: QuestionAnswerFormat | None = None,
) -> PeftModel:
    """Train an adapter for a new base that keeps the right answers of an old model.

    The new adapter, `compatible`, starts as a copy of the active adapter of `new`, which stays as it is.

    When to use it: when a base is replaced by its successor with the same tokenizer, and users would notice
    answers that used to be right and no longer are. Train the task on the new base first; this needs the task's
    data.

    Args:
        old: The old base with its task adapter.
        new: The new base with its own task adapter as the active one; of LoRA type.
        examples: Rows with `question` and `answer`, or `text`.
        args: The paper trains 10 epochs with a LoRA of rank 128 and alpha 256 on all linear layers.

    Returns:
        `new` with `compatible` as its active adapter. Save it by `save_pretrained(folder,
        selected_adapters=["compatible"])`.

    Raises:
        ValueError: The models have different vocabularies, or several adapters of `new` are active.
    """
    sizes = [one.get_input_embeddings().weight.shape[0] for one in (old, new)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"A compatible update compares the models token by token: the old one has {sizes[0]} tokens and the new "
            f"one {sizes[1]}. Use `transfer_by_training`, which works for any two tokenizers."
        )
    active = list(new.active_adapters)
    if len(active) != 1:
        raise ValueError(f"`new` must have one active adapter, its task's, and it has {', '.join(active) or 'none'}.")
    (task,) = active
    if COMPATIBLE in new.peft_config:
        raise ValueError(f"`new` already has an adapter {COMPATIBLE!r}. Delete or rename it.")
    new.add_adapter(COMPATIBLE, new.peft_config[task])
    state = {name: tensor for name, tensor in new.named_parameters() if f".{COMPATIBLE}." in name}
    own = dict(new.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(own[name.replace(f".{COMPATIBLE}.", f".{task}.")])
    new.set_adapter(COMPATIBLE)
    pairs = ForgetRetainPairs(examples, None, tokenizer, template=template)
    collate = forget_retain_collator(pad_token_id(tokenizer))

    def flat(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: tensor for name, tensor in collate(samples)["forget"].items() if name != "index"}

    trainer = MuscleTrainer(old, new, task, args, train_dataset=pairs, data_collator=flat, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return new.eval()


def negative_flips(
    old: Any,
    new: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, str]],
    *,
    template: QuestionAnswerFormat | None = None,
) -> dict[str, tuple[Measurement, Measurement]]:
    """How often each adapter of the new base breaks an answer of the old model.

    Args:
        examples: Test rows with `question` and `answer`; an answer is right where greedy decoding gives it exactly.

    Returns:
        Adapter name -> accuracy and negative flip rate, both with 95 % intervals.
    """
    before = answered_exactly(old, tokenizer, examples, template=template).astype(np.int64)
    found = {}
    for adapter in new.peft_config:
        with active_adapter(new, adapter):
            after = answered_exactly(new, tokenizer, examples, template=template)
        accuracy = Measurement(
            "accuracy", float(after.mean()), "share of examples", True, len(after), mean_interval(after)
        )
        flips = negative_flip_rate(before, after.astype(np.int64), np.ones(len(after), dtype=np.int64))
        found[adapter] = accuracy, flips[0]
    return found
