"""The end of every recipe, in one place: tell what was measured and where the time went, save, publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_transfer_ext.evals.table import comparison_plot, comparison_table
from hf_transfer_ext.hub.publish import push, save_result
from hf_transfer_ext.hub.record import RunRecord, Stage, device_summary
from hf_transfer_ext.measurement import Measurement


def finish_run(
    folder: str | Path,
    record: RunRecord,
    measured: Mapping[str, Sequence[Measurement]],
    *,
    result: str,
    model: Any,
    tokenizer: Any,
    precision: str | None = None,
    overwrite: bool = False,
    files: Mapping[str, str | Path] | None = None,
    push_to: str | None = None,
    private: bool | None = None,
) -> Path:
    """Print the comparison and the stages, save the model with its card, record and plot, and push it if asked to.

    Call it on the main process only.

    Args:
        measured: Model name -> what was measured of it; may be empty.
        result: The name in `measured` that is the saved model; the others are what it is compared with.
        precision: Compute dtype, where it is not the model's own (bfloat16 under autocast).
        files: Name in the folder -> file to copy there.
        push_to: Hub repository; None keeps the result here.
    """
    record.metrics = list(measured.get(result, []))
    record.compared = {name: list(found) for name, found in measured.items() if name != result}
    record.device = device_summary(model, precision=precision)
    with TemporaryDirectory() as scratch:
        extra_files = dict(files or {})
        if measured:
            print(comparison_table(measured), end="\n\n")
            extra_files["comparison.png"] = comparison_plot(measured, Path(scratch) / "comparison.png")
        print(stage_table(record.stages), end="\n\n")
        saved = save_result(
            folder, model=model, tokenizer=tokenizer, record=record, overwrite=overwrite, extra_files=extra_files
        )
    print(f"Saved to {saved}")
    if push_to:
        print(f"Pushed to {push(saved, push_to, private=private)}")
    return saved


def stage_table(stages: Sequence[Stage]) -> str:
    """Where the time of a run went: seconds and share of each stage, and their sum."""
    total = sum(stage.seconds for stage in stages)
    width = max([len(stage.name) for stage in stages], default=0)
    lines = [f"{s.name.ljust(width)}  {s.seconds:8.1f} s  {s.seconds / (total or 1):4.0%}" for s in stages]
    return "\n".join([*lines, f"{'in all'.ljust(width)}  {total:8.1f} s"])
