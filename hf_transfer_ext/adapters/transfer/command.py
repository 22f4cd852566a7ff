"""`hf-transfer-ext transfer`: a `TransferTrainer` from the words of a command line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_transfer_ext.adapters.transfer.trainer import AUTO, TransferConfig, TransferTrainer
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.settings import arguments_for, unknown_setting

PROGRAM = "hf-transfer-ext transfer"


def trainer_from_words(
    adapter: str,
    target_base: str,
    out: str,
    *,
    method: str = AUTO,
    source_base: str | None = None,
    options: dict[str, Any] | None = None,
    texts: str | None = None,
    rank: int | None = None,
    settings: dict[str, Any] | None = None,
    learn: str = "answers",
    start: str | None = None,
    discriminator: str = "retrain",
    dtype: str = "auto",
    template: str = "auto",
    train_data: str | None = None,
    test_data: str | None = None,
    columns: dict[str, str] | None = None,
    overwrite: bool = False,
) -> TransferTrainer:
    """A `TransferTrainer` from arguments that can be written on a command line.

    Args:
        adapter: Folder or Hub id of the source adapter.
        target_base: Folder or Hub id of the new base.
        out: Folder of the new adapter.
        method: auto (by the lineage of both bases), trans_lora, or one of `TRANSFER_METHODS`.
        source_base: The source base; by default the one that the adapter's config names.
        options: Of a closed form.
        texts: File with texts that both models read, for closed forms that need activations: JSON lines with a
            column text, or a JSON list of strings.
        rank: Of the new adapter (closed forms).
        settings: Of trans_lora: sizes and rates (`TransLoraSettings`).
        learn: Of trans_lora: answers or logits.
        start: Of trans_lora: the closed form that the LoRA starts from.
        discriminator: Of trans_lora: retrain, copy or none.
        dtype: Of both bases in trans_lora and in the comparison.
        template: How a question becomes a prompt: auto, chat or plain.
        train_data: The adapter's training data, where it is at hand: file, folder or Hub id with question and answer.
        test_data: Test data on which the result is compared with its controls.
        columns: Name in the schema -> your column of both: {question: q, answer: a}.
        overwrite: Replace an adapter that is in OUT.

    Raises:
        ValueError: As `TransferConfig` and `TransferTrainer`; the file of texts has rows without a text.
    """
    known = [one.name for one in fields(TransLoraSettings)]
    for name in settings or ():
        if name not in known:
            raise ValueError(unknown_setting("setting of trans_lora", name, known))
    args = TransferConfig(
        **(settings or {}), output_dir=out, method=method, method_options=options or {}, max_rank=rank, learn=learn,
        start=start, discriminator=discriminator, dtype=dtype, overwrite=overwrite,
    )  # fmt: skip
    return TransferTrainer(
        adapter, target_base, args, source_base=source_base, train_dataset=train_data, eval_dataset=test_data,
        texts=texts, template=QuestionAnswerFormat(template=template),
        columns=columns,
    )  # fmt: skip


def run_transfer(trainer: TransferTrainer) -> None:
    """Transfer, compare where there is test data, and print both."""
    report = trainer.train()
    if trainer.eval_data is not None:
        trainer.evaluate()
    print(f"{report.folder}: transferred in {report.seconds:.1f} s")
    print("\n".join(trainer.summary()))


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext transfer ADAPTER TARGET_BASE OUT`."""
    about = "Move a LoRA to another base model. The result is a plain PEFT LoRA for the new base."
    arguments = arguments_for(trainer_from_words, argv, program=PROGRAM, about=about, extra=PUSH_OPTIONS)
    publication = Publication.taken_from(arguments)
    trainer = trainer_from_words(**arguments)
    run_transfer(trainer)
    publication.publish(trainer.out)
    return 0
