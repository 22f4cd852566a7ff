"""One call for a recipe or the command line: choose the method by the lineage of the bases, and transfer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.transfer.by_training import TrainedTransferReport, transfer_by_training
from hf_transfer_ext.adapters.transfer.lineage import lineage
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.run import TransferReport, transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.data.text import read_rows
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import arguments_for, unknown_setting
from hf_transfer_ext.weights.repository import base_of_adapter, local_folder

logger = logging.getLogger(__name__)

AUTO, TRANS_LORA = "auto", "trans_lora"


def transfer(
    adapter: str | Path,
    target_base: str | Path,
    out: str | Path,
    *,
    method: str = AUTO,
    source_base: str | Path | None = None,
    options: dict[str, Any] | None = None,
    texts: Sequence[str] | None = None,
    rank: int | None = None,
    settings: TransLoraSettings | None = None,
    overwrite: bool = False,
    **training: Any,
) -> TransferReport | TrainedTransferReport:
    """Transfer a LoRA to another base model, and write a plain PEFT LoRA for it.

    Args:
        adapter: Folder or Hub id of the source adapter.
        target_base: Folder or Hub id of the new base.
        out: Folder of the new adapter, written atomically.
        method: "trans_lora", a closed form (`TRANSFER_METHODS`), or "auto": what `lineage` recommends.
        source_base: The source base; by default the one that the adapter's config names.
        options, texts, rank: Of a closed form; see `transfer_lora`.
        settings, training: Of "trans_lora"; `training` holds further arguments of `transfer_by_training` (`learn`,
            `start`, `discriminator`, `template`, `dtype`, `work`).
        overwrite: Replace an adapter that is in `out`.

    Raises:
        ValueError: An unknown method, arguments of another one, or whatever the method refuses.
    """
    if method not in (AUTO, TRANS_LORA, *TRANSFER_METHODS):
        raise ValueError(unknown_name("transfer method", method, [AUTO, TRANS_LORA, *TRANSFER_METHODS]))
    if method == AUTO:
        named = source_base
        if named is None:
            base, revision = base_of_adapter(local_folder(adapter) / "adapter_config.json")
            named = base if revision is None else f"{base}@{revision}"
        found = lineage(named, target_base)
        # Where the bases are equal, a copy is the adapter with the new base's name.
        method = "copy" if found.recommended == "none" else found.recommended
        logger.info(f"Transfer by {method}. {' '.join(found.reasons)}")
    closed = {"options": options, "texts": texts, "rank": rank}
    trained = {"settings": settings, **training}
    unused = [name for name, value in (closed if method == TRANS_LORA else trained).items() if value is not None]
    if unused:
        raise ValueError(f"`{unused[0]}` means nothing to the method {method!r}. Leave it out.")
    if method == TRANS_LORA:
        return transfer_by_training(
            adapter, target_base, out, source_base=source_base, settings=settings, overwrite=overwrite, **training
        )
    return transfer_lora(
        adapter, target_base, out, method=method, options=options, source_base=source_base, texts=texts, rank=rank,
        overwrite=overwrite,
    )  # fmt: skip


def transfer_with_words(
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
    learn: str | None = None,
    start: str | None = None,
    discriminator: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> TransferReport | TrainedTransferReport:
    """`transfer` with arguments that can be written on a command line.

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
        learn: Of trans_lora: answers (the default) or logits.
        start: Of trans_lora: the closed form that the LoRA starts from.
        discriminator: Of trans_lora: retrain (the default), copy or none.
        dtype: Of trans_lora: the dtype of both bases.
        overwrite: Replace an adapter that is in OUT.

    Raises:
        ValueError: As `transfer`; the file of texts has rows without a text.
    """
    read = None
    if texts is not None:
        rows = read_rows(Path(texts))
        lacking = [i for i, row in enumerate(rows) if not isinstance(row.get("text"), str)]
        if lacking:
            raise ValueError(
                f"Row {lacking[0]} of {texts} has no text in a column 'text'; it has {', '.join(rows[lacking[0]])}."
            )
        read = [row["text"] for row in rows]
    known = [one.name for one in fields(TransLoraSettings)]
    for name in settings or ():
        if name not in known:
            raise ValueError(unknown_setting("setting of trans_lora", name, known))
    chosen = {"learn": learn, "start": start, "discriminator": discriminator, "dtype": dtype}
    return transfer(
        adapter, target_base, out, method=method, source_base=source_base, options=options, texts=read, rank=rank,
        settings=None if settings is None else TransLoraSettings(**settings), overwrite=overwrite,
        **{name: value for name, value in chosen.items() if value is not None},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext transfer ADAPTER TARGET_BASE OUT`."""
    about = "Move a LoRA to another base model. The result is a plain PEFT LoRA for the new base."
    arguments = arguments_for(
        transfer_with_words, argv, program="hf-transfer-ext transfer", about=about, extra=PUSH_OPTIONS
    )
    publication = Publication.taken_from(arguments)
    report = transfer_with_words(**arguments)
    print(f"{report.folder}: transferred in {report.seconds:.1f} s")
    if isinstance(report, TransferReport):
        change = " -> ".join(f"{value:.3g}" for value in report.relative_change)
        print(f"method {report.method}, {len(report.modules)} modules; change relative to the weights: {change}")
        for module, reason in report.left_out.items():
            print(f"left out: {module}: {reason}")
    else:
        print(f"method {TRANS_LORA}, {report.rows} inputs; {report.acceptance:.0%} of the written ones accepted")
    publication.publish(arguments["out"])
    return 0
