"""The end of every job, of commands, recipes and calls from Python alike: card, record, publication."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_transfer_ext.files import path_inside, sha256_of, write_text
from hf_transfer_ext.hub.card import CARD_FILE
from hf_transfer_ext.hub.inputs import Wanted, call_of
from hf_transfer_ext.hub.publish import earlier_card, holds_weights, push, save_result
from hf_transfer_ext.hub.record import (
    RECORD_FILE,
    RunInput,
    RunRecord,
    Stage,
    describe_dataset,
    describe_input,
    device_summary,
    read_record,
)
from hf_transfer_ext.hub.report import report_card
from hf_transfer_ext.hub.table import comparison_plot, comparison_table
from hf_transfer_ext.hub.teacher_cache import FINGERPRINT_FILE, SHARDS
from hf_transfer_ext.measurement import Measurement


def finish_run(
    folder: str | Path,
    record: RunRecord,
    measured: Mapping[str, Sequence[Measurement]] | None = None,
    *,
    result: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    precision: str | None = None,
    overwrite: bool = False,
    files: Mapping[str, str | Path] | None = None,
    digests: Mapping[str, str] | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    plot: str | None = "comparison.png",
    quiet: bool = False,
) -> Path:
    """Leave `folder` with a card and a record, whatever the job: a model, an adapter, or a report without weights.

    Call it on the main process only.

    Args:
        measured: Model name -> its measurements. None leaves what the record holds already.
        result: The name in `measured` that is the saved model; the others are what it is compared with. None where no
            model was made: all of them are compared with each other.
        model: The model to save. None where the weights, or the files of a report, are in `folder` already.
        precision: Compute dtype, where it is not the model's own (bfloat16 under autocast).
        files: Name in the folder -> file to copy there.
        digests: As in `save_result`, for weights that are in `folder` already.
        push_to: Hub repository; None keeps the result here. With it, `private`, `revision`, `create_pr` and `token`
            as in `push`.
        plot: File of the plot of what was measured; None for none.
        quiet: Print nothing but the address of what was published.
    """
    folder, tell = Path(folder), (lambda text: None) if quiet else print
    if measured is not None:
        record.metrics = list(measured.get(result or "", []))
        record.compared = {name: list(found) for name, found in measured.items() if name != result}
    if not record.device or model is not None:
        record.device = device_summary(model, precision=precision)
    with TemporaryDirectory() as scratch:
        extra_files = dict(files or {})
        if measured:
            tell(comparison_table(measured) + "\n")
        if measured and plot is not None:
            try:
                extra_files[plot] = comparison_plot(measured, Path(scratch) / plot)
            except ImportError as error:  # a plot is not worth the loss of the run
                tell(f"No plot was drawn: {error}")
        if record.stages:
            tell(stage_table(record.stages) + "\n")
        if model is not None or holds_weights(folder):
            replace = overwrite if model is not None else True
            save_result(
                folder, model=model, tokenizer=tokenizer, record=record, overwrite=replace, extra_files=extra_files,
                digests=digests,
            )  # fmt: skip
        else:
            _complete_report(folder, record, extra_files)
    tell(f"Saved to {folder}")
    if push_to:
        how: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
        print(f"Pushed to {push(folder, push_to, **how)}")
    return folder


def _complete_report(folder: Path, record: RunRecord, files: Mapping[str, str | Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        shutil.copyfile(source, path_inside(folder, name))
    if record.compared:
        write_text(folder / "table.txt", comparison_table(record.compared) + "\n")
    # The report itself may quote the data, so it is published only by name (`push --include`).
    shown = [path for path in folder.iterdir() if path.suffix == ".png" or path.name == "table.txt"]
    kept = [path for path in sorted(shown) if path.is_file() and not path.is_symlink()]
    record.result |= {path.name: sha256_of(path) for path in kept}
    earlier = earlier_card(folder)
    plots = sorted(path.name for path in folder.glob("*.png"))
    write_text(folder / CARD_FILE, report_card(record, plots=plots, earlier=earlier))
    record.write(folder)


def finish_cache(folder: Path, record: RunRecord, settings: Mapping[str, Any], *, is_server: bool) -> None:
    """Add card and record to a teacher cache; data sets of earlier runs into the same folder stay among the inputs.

    Args:
        settings: All arguments of the call.
        is_server: The teacher is behind a server, so that it cannot be described and the call not be repeated.
    """
    dataset: Wanted = (settings["dataset"], settings["dataset_revision"], "dataset")
    teacher: Wanted = (settings["teacher"], settings["revision"], "teacher")
    student: list[Wanted] = [(settings["student"], None, "student")] if settings["student"] is not None else []
    if is_server:
        record.inputs.append(RunInput(str(settings["server_model"]), "teacher"))
    else:
        record.inputs.append(describe_input(*teacher))
        call = {name: value for name, value in settings.items() if name != "folder"}
        record.call = call_of({**call, "revision": None, "dataset_revision": None}, [teacher, dataset, *student])
    record.inputs.append(describe_dataset(*dataset[:2]))
    record.inputs += [describe_input(*one) for one in student]  # whose tokens the texts are in
    if (folder / RECORD_FILE).is_file():
        before = [item for item in read_record(folder).inputs if item.role == "dataset"]
        record.inputs += [item for item in before if item not in record.inputs]
        record.call = {}  # one of several
    names = [FINGERPRINT_FILE, *sorted(path.name for path in folder.glob(SHARDS))]
    record.result = {name: sha256_of(folder / name) for name in names}
    finish_run(folder, record, quiet=True)


def add_measurements(folder: str | Path, found: Sequence[Measurement]) -> bool:
    """Put measurements that were made later, an audit's verdicts say, into the card and record of a model folder.

    Those of the same name are replaced. False where `folder` is not a local folder with a record.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file() or not holds_weights(folder):
        return False
    record = read_record(folder)
    names = {m.name for m in found}
    record.metrics = [*(m for m in record.metrics if m.name not in names), *found]
    save_result(folder, record=record, overwrite=True)
    return True


def stage_table(stages: Sequence[Stage]) -> str:
    """Where the time of a run went: seconds and share of each stage, and their sum."""
    total = sum(stage.seconds for stage in stages)
    width = max([len(stage.name) for stage in stages], default=0)
    lines = [f"{s.name.ljust(width)}  {s.seconds:8.1f} s  {s.seconds / (total or 1):4.0%}" for s in stages]
    return "\n".join([*lines, f"{'in all'.ljust(width)}  {total:8.1f} s"])
