"""One call for a recipe or the command line: choose the method by the lineage of the bases, and transfer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.transfer.by_training import TrainedTransferReport, transfer_by_training
from hf_transfer_ext.adapters.transfer.lineage import lineage
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.run import TransferReport, transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.registry import unknown_name
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
