"""The record of a merge or a mixture of experts: hashes of the models, the configuration, losses of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import InputsInBackground, Wanted, call_of
from hf_transfer_ext.hub.record import RunRecord, Stage
from hf_transfer_ext.reading import parse_yaml, read_yaml
from hf_transfer_ext.weights.reference import ModelReference

if TYPE_CHECKING:
    from hf_transfer_ext.adapters.extract import ExtractionReport


def inputs_of(references: Iterable[ModelReference], base: ModelReference | None) -> list[Wanted]:
    """The folders and repositories behind references, without duplicates; `base+lora` gives both adapter and base."""
    wanted: dict[tuple[str, str | None], str] = {}
    for one in references:
        role = "base" if one == base else "model"
        wanted.setdefault((one.path, one.revision), role)
        if one.lora is not None:
            wanted.setdefault((str(one.lora), one.lora_revision), "model")
    return [(path, revision, role) for (path, revision), role in wanted.items()]


def content_of(config: Mapping[str, Any] | str | Path) -> Any:
    """A configuration as plain values, from a mapping or the path of a YAML file."""
    return config if isinstance(config, Mapping) else read_yaml(config)


def finish_merge(
    folder: Path,
    command: str,
    text: str,
    inputs: InputsInBackground,
    *,
    seed: int,
    seconds: float,
    script: str,
    call: Mapping[str, Any],
    wanted: Sequence[Wanted],
    adapter: ExtractionReport | None = None,
    digests: Mapping[str, str] | None = None,
    device: Mapping[str, Any] | None = None,
) -> None:
    """Write model card and record into the folder of a result.

    Args:
        command: "merge" or "moe".
        text: The configuration as YAML, without local paths.
        script: Source file of the code that created the result.
        call: All arguments of the call but the output; `config` may be the path of a YAML file.
        wanted: The models that `inputs` describes.
        adapter: The report of the adapter, if the result is one.
        digests: Name -> SHA-256 of files in `folder` that were hashed as they were written.
        device: What the record states as `RunRecord.device`; None for what torch says.
    """
    config: dict[str, Any] = parse_yaml(text, "the configuration of the merge")
    record = RunRecord("merging", f"hf-transfer-ext {command}", config, seed=seed, recipe_sha256=sha256_of(script))
    record.call = call_of({**call, "config": content_of(call["config"])}, wanted)
    record.stages.append(Stage(command, round(seconds, 3)))
    record.device = dict(device or {})
    inputs.put_into(record)
    if adapter is not None:
        record.metrics.append(adapter.measurement())
    record.not_measured.insert(0, "The result: a merge does not evaluate it.")
    finish_run(folder, record, quiet=True, digests=digests)
