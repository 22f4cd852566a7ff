"""The card and the record that go with every adapter that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.transfer.travel import SEEDS_FILE
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import Wanted, call_of, described_or_named
from hf_transfer_ext.hub.record import RunRecord, Stage
from hf_transfer_ext.measurement import Measurement


def finish_adapter(
    folder: Path,
    job: str,
    command: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Wanted],
    *,
    recipe_sha256: str,
    seconds: float,
    metrics: Sequence[Measurement] = (),
    not_measured: Sequence[str] = (),
    seed: int | None = None,
    call: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Add card and record to the folder of an adapter, before it is renamed to its final name.

    Args:
        job: As in `RunRecord`: "transfer", "resizing", ...
        command: Name of the command of `hf-transfer-ext`.
        settings: The arguments of the call.
        inputs: (path or Hub id, revision, role) of everything that was read.
        recipe_sha256: SHA-256 of the file that did the work.
        seconds: Wall time of the work.
        metrics: What was measured of the adapter.
        not_measured: Sentences on what was not.
        seed: Of random choices; None if there are none.
        call: All arguments of the call but the output; None where the record alone cannot repeat it.
        files: Name -> file to copy into the folder (plots).
    """
    record = RunRecord(job, f"hf-transfer-ext {command}", dict(settings), seed=seed, recipe_sha256=recipe_sha256)
    record.call = call_of(call or {}, inputs)
    for one in inputs:
        described, problem = described_or_named(*one)
        record.inputs.append(described)
        record.not_measured += [problem] if problem else []
    record.stages.append(Stage(job, round(seconds, 3)))
    record.metrics += metrics
    record.not_measured += not_measured
    if (folder / SEEDS_FILE).is_file():
        record.notes["Next transfer"] = [
            f"`{SEEDS_FILE}` holds examples of the task's inputs in plain text, from which trans_lora writes new ones "
            "when this adapter moves on. Publish the adapter only where these may be public."
        ]
    finish_run(folder, record, quiet=True, files=files)


def base_of_config(config: Mapping[str, Any]) -> list[Wanted]:
    """The base model that an adapter's config names, as an input; [] if it names none."""
    name = config.get("base_model_name_or_path")
    return [(name, config.get("revision"), "base")] if name else []
