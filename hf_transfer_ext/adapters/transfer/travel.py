"""What is saved with a transferred adapter: where it came from, and what its next transfer needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hf_transfer_ext.hub.inputs import Wanted
from hf_transfer_ext.hub.record import RECORD_FILE, RunInput, describe_input, read_record
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


def refuse_other_base(folder: Path, source: ModelReference) -> None:
    """Refuse a source base whose weights are not those that the adapter's own record names as its base.

    Adapters without a record of this package are not checked: PEFT stores no digest of the base.

    Raises:
        ValueError: The digests differ.
    """
    if not (folder / RECORD_FILE).is_file():
        return
    known = next((one.sha256 for one in read_record(folder).inputs if one.role == "base"), {})
    given = describe_input(source.path, source.revision).sha256
    differing = sorted(name for name in known.keys() & given.keys() if known[name] != given[name])
    if differing:
        raise ValueError(
            f"The adapter {str(folder)!r} was made for a base with other weights than {source.path!r}: {differing[0]} "
            f"has sha256 {given[differing[0]][:12]} there, and {known[differing[0]][:12]} in the adapter's record. "
            "Name the base that it was trained on as `source_base`."
        )


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
