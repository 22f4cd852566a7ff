from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Row, Subject, restored_weights
from hf_transfer_ext.evals.metric import Values


def fine_tune(subject: Subject, rows: Sequence[Row], epochs: float, rate: float) -> None:
    """Train what is trainable of a model on the answers of some rows, in batches of 4, alike on every process."""
    from transformers import TrainingArguments

    from hf_transfer_ext.trainers.answers import train_on_answers

    model: Any = subject.model
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, learning_rate=rate, num_train_epochs=epochs, per_device_train_batch_size=4,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", logging_strategy="no",
            disable_tqdm=True, seed=subject.seed, use_cpu=next(model.parameters()).device.type == "cpu",
        )  # fmt: skip
        how: dict[str, Any] = {"template": subject.template, "on_each_process": True}
        train_on_answers(model, subject.tokenizer, rows, args, **how)


def relearn(subject: Subject, rows: Sequence[Row], measured: Sequence[Row], epochs: float, rate: float) -> Values:
    """Fine-tune briefly on some rows, score others, and restore the weights."""
    model: Any = subject.model
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with restored_weights(model):
        model.requires_grad_(True)
        try:
            fine_tune(subject, rows, epochs, rate)
            return subject.probability(measured)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])


@attack(access="fine-tuning", texts=True)
def relearn_forget(subject: Subject, data: AuditData, *, epochs: float = 1.0, learning_rate: float = 2e-5) -> Values:
    """Fine-tune briefly on the forget set itself.

    A model that never saw the data learns little in one pass, while a model that only hides the knowledge recovers it.
    Compare with a retrained model under the same attack.

    Source: Hu et al., "Unlearning or obfuscating? Jogging the memory of unlearned LLMs via benign relearning", 2025,
    https://arxiv.org/abs/2406.13356
    """
    return relearn(subject, data.forget, data.forget, epochs, learning_rate)
