"""What is saved with a transferred adapter: where it came from, and what its next transfer needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hf_transfer_ext.hub.inputs import Wanted
from hf_transfer_ext.hub.record import RunInput, describe_input
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.weights.reference import ModelReference

#: The transfer that made an adapter, in its folder.
TRANSFER_FILE = "transfer.json"
#: Example inputs of the task, and the folder of the discriminator beside them.
SEEDS_FILE = "transfer_seeds.json"
DISCRIMINATOR_FOLDER = "discriminator"
#: What the record of every transfer says.
NOT_COMPARED = (
    "Whether the adapter still does its task on the new base, next to a copy and to random factors of the same norm."
)


def copy_seeds(folder: Path, out: Path, *, with_discriminator: bool = True) -> None:
    """Copy the seeds of an adapter, where it has any, and its discriminator."""
    if (folder / SEEDS_FILE).is_file():
        shutil.copyfile(folder / SEEDS_FILE, out / SEEDS_FILE)
    if with_discriminator and (folder / DISCRIMINATOR_FOLDER).is_dir():
        shutil.copytree(folder / DISCRIMINATOR_FOLDER, out / DISCRIMINATOR_FOLDER)


def origin(adapter: str | Path, source: ModelReference, target: ModelReference, folder: Path) -> dict[str, Any]:
    """The adapter and both bases with revision and digests, and the transfers that led to the adapter.

    Args:
        folder: Where the adapter's files are.
    """
    earlier: list[dict[str, Any]] = []
    if (folder / TRANSFER_FILE).is_file():
        content = read_json(folder / TRANSFER_FILE)
        earlier = [*content.pop("earlier_transfers", []), content]
    return {
        "source_adapter": _described(ModelReference(str(adapter))),
        "source_base": _described(source),
        "target_base": _described(target),
        "earlier_transfers": earlier,
    }


def inputs_of_transfer(adapter: str | Path, source: ModelReference, target: ModelReference) -> list[Wanted]:
    """What a transfer reads, for its record; the target is the base of its result."""
    return [
        (adapter, None, "adapter"),
        (source.path, source.revision, "source"),
        (target.path, target.revision, "base"),
    ]


def _described(reference: ModelReference) -> dict[str, Any]:
    found: RunInput = describe_input(reference.path, reference.revision)
    return {"name": found.name, "revision": found.revision, "sha256": found.sha256}
