"""Apply an edit: from a model folder and data to a model folder or a LoRA, with card and record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from hf_transfer_ext.adapters.extract import ExtractionReport
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.edits.method import Edited, EditMethod
from hf_transfer_ext.edits.methods import EDITS
from hf_transfer_ext.edits.methods.acu import STATE_FILE
from hf_transfer_ext.edits.subject import Rows, Subject, closing, data_digest, mean_loss
from hf_transfer_ext.edits.write import write_lora, write_model, write_tensors_of
from hf_transfer_ext.files import refuse_existing_output, sha256_of
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import InputsInBackground, call_of
from hf_transfer_ext.hub.record import RunRecord, Stage, describe_dataset
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging.record import inputs_of
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import pad_token_id
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference

logger = logging.getLogger(__name__)

#: Trials of a strength within a bound; each halves the range.
TRIALS = 6

#: Data: rows, or a file, folder or Hub id of a data set.
Data = Rows | str | Path | None


@dataclass(frozen=True)
class EditReport:
    """What an edit did.

    Args:
        folder: The output folder.
        method: Name of the edit.
        options: All options with which it ran; `strength` as it was found within a bound.
        tensors: The tensors that were calculated anew; all others are copies.
        found: What the method chose.
        adapter: What the adapter represents and what it leaves out, if the result is one.
        seconds: Wall time.
    """

    folder: str
    method: str
    options: dict[str, Any]
    tensors: list[str]
    found: dict[str, Any] = field(default_factory=dict)
    adapter: ExtractionReport | None = None
    seconds: float = 0.0


def apply_edit(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    options: dict[str, Any] | None = None,
    tuned: str | Path | None = None,
    forget: Data = None,
    retain: Data = None,
    columns: dict[str, str] | None = None,
    template: QuestionAnswerFormat | None = None,
    retain_bound: float | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> EditReport:
    """Edit a model without training, and write the result with its card and record, atomically.

    Args:
        model: Folder or Hub id of the model, `path[@revision]`.
        out: Folder of the result.
        method: A name of `EDITS`.
        options: The method's own options.
        tuned: The fine-tune or adapter (`path[@revision][+lora]`), for methods that need one.
        forget: Data to forget: rows, or a file, folder or Hub id.
        retain: Data to retain, in the same forms.
        columns: Schema name -> the data's own column.
        template: How a question becomes a prompt.
        retain_bound: Look for the largest `strength`, up to the one in `options`, at which the loss on `retain`
            rises by no more than this, in nats per token; at least 0. Each of the trials is written to disk and
            measured as it is.
        lora_rank: Write the change as a LoRA of this rank instead of a model.
        seed: Of whatever the method draws.
        threads: Tensors that are edited at the same time; all cores if None.
        overwrite: Replace a result that is in `out`.

    Raises:
        ValueError: An unknown method or option, data that is missing or would not be read, or what the method
            refuses. Nothing was written.
        FileExistsError: `out` holds a result, or other files.
    """
    began = time.perf_counter()
    chosen, own = EDITS[method], dict(options or {})
    given = {"tuned": tuned is not None, "forget": forget is not None, "retain": retain is not None}
    if retain_bound is not None:
        _check_bound(chosen, own, retain_bound, given)
    chosen.check(own, given)
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"`lora_rank` has to be at least 1, got {lora_rank}.")
    if lora_rank is not None and not chosen.lora:
        raise ValueError(f"`{method}` cannot be written as a LoRA; leave `lora_rank` out.")
    reference = parse_reference(model, "model")
    tuned_reference = None if tuned is None else parse_reference(tuned, "tuned")
    refuse_existing_output(out, overwrite=overwrite, inputs=_paths(reference, tuned_reference), also=[STATE_FILE])
    rows = {name: rows_of(data) for name, data in (("forget", forget), ("retain", retain))}
    opened = open_model(reference)
    try:
        end = None if tuned_reference is None else open_model(tuned_reference)
    except BaseException:
        opened.close()
        raise
    references = [one for one in (reference, tuned_reference) if one is not None]
    wanted = inputs_of(references, reference)
    with closing(opened, end), InputsInBackground(wanted) as described:
        subject = Subject(
            opened, end, rows["forget"], rows["retain"], template or QuestionAnswerFormat(), columns or {}, seed
        )
        own = {**{k: v for k, v in chosen.options.items() if k not in own}, **own}
        measured: list[Measurement] = []
        if retain_bound is not None:
            own["strength"], measured = _within_bound(chosen, subject, own, retain_bound, Path(out), threads)
        edited = chosen(subject, **own)
        record = _record(chosen, own, retain_bound, {"forget": forget, "retain": retain}, rows, edited, seed)
        record.metrics += measured
        sources = [data for data in (forget, retain) if isinstance(data, (str, Path))]
        if not chosen.private and len(sources) == sum(rows[part] is not None for part in rows):
            call: dict[str, Any] = {"model": model, "method": method, "options": options, "tuned": tuned}
            call |= {"forget": forget, "retain": retain, "columns": columns, "template": template}
            call |= {"retain_bound": retain_bound, "lora_rank": lora_rank, "seed": seed}
            record.call = call_of(call, [*((data, None, "dataset") for data in sources), *wanted])

        def complete(folder: Path, adapter: ExtractionReport | None) -> None:
            for name, tensors in edited.files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
            record.stages.append(Stage("edit", round(time.perf_counter() - began, 3)))
            described.put_into(record)
            if adapter is not None:
                record.metrics.append(adapter.measurement())
            finish_run(folder, record, quiet=True)

        adapter = None
        if lora_rank is not None:
            content = {
                "method": method,
                "options": repr(sorted(own.items())),
                "data": repr(record.config),
                "seed": seed,
            }
            adapter = write_lora(
                opened, edited.jobs, out,
                rank=lora_rank, content=content, complete=complete, overwrite=overwrite, seed=seed,
            )  # fmt: skip
        else:
            write_model(
                opened, edited.jobs, out,
                complete=complete, also=(STATE_FILE,), overwrite=overwrite, threads=threads, seed=seed,
            )  # fmt: skip
    changed = [name for name, job in edited.jobs.items() if not job.is_copy]
    return EditReport(str(out), method, own, changed, edited.found, adapter, time.perf_counter() - began)


def rows_of(data: Data) -> Rows | None:
    """The rows of data in any of its forms; None stays None.

    Raises:
        ValueError: There are no rows.
    """
    if data is None:
        return None
    rows = load_rows(data) if isinstance(data, (str, Path)) else list(data)
    if not rows:
        raise ValueError("A set without rows was given: there is nothing to forget or to retain in it.")
    return rows


def largest_within(rise_at: Callable[[float], float], strength: float, bound: float, *, trials: int = TRIALS) -> float:
    """The largest strength in (0, strength] at which `rise_at` is no more than `bound`, by bisection.

    The strength itself is tried first. Where the rise grows with the strength, the result is within
    strength / 2^trials of the largest; everything that is returned was measured and is within the bound, or is 0.
    """
    if rise_at(strength) <= bound:
        return strength
    low, high = 0.0, strength
    for _ in range(trials):
        middle = (low + high) / 2
        low, high = (middle, high) if rise_at(middle) <= bound else (low, middle)
    return low


def _check_bound(method: EditMethod, options: Mapping[str, Any], bound: float, given: dict[str, bool]) -> None:
    if not bound >= 0:
        raise ValueError(f"`retain_bound` has to be at least 0 nats per token, got {bound}.")
    if "strength" not in method.options:
        raise ValueError(f"`retain_bound` changes the option `strength`, which `{method.__name__}` has not.")
    if not given["retain"]:
        raise ValueError("`retain_bound` is measured on rows to retain: give `retain`.")
    if "retain" not in (*method.needs, *method.optional):
        given["retain"] = False  # read by the bound, not by the method


def _within_bound(
    method: EditMethod, subject: Subject, options: dict[str, Any], bound: float, out: Path, threads: int | None
) -> tuple[float, list[Measurement]]:
    """The strength, and the loss on the retain set before and after."""
    pad_id = pad_token_id(subject.tokenizer)
    before = mean_loss(subject.live, subject.retain, pad_id)
    losses = {0.0: before}

    def rise_at(strength: float) -> float:
        jobs = method(subject, **{**options, "strength": strength}).jobs
        with TemporaryDirectory(prefix=f".{out.name}.trial-", dir=_existing(out.absolute().parent)) as trial:
            write_tensors_of(Path(trial), subject.model, jobs, threads=threads, seed=subject.seed)
            edited = load_model(trial, dtype="float32").eval()
            losses[strength] = mean_loss(edited, subject.retain, pad_id)
        return losses[strength] - before

    strength = largest_within(rise_at, float(options["strength"]), bound)
    if strength == 0:
        logger.warning(f"No strength that was tried keeps the retain loss within {bound} nats: nothing changes.")
    unit, examples = "nats per token", len(subject.retain)
    return strength, [
        Measurement("retain_loss_before", before, unit, False, examples=examples),
        Measurement("retain_loss", losses[strength], unit, False, examples=examples),
    ]


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _paths(*references: ModelReference | None) -> list[str | None]:
    return [path for one in references if one is not None for path in (one.path, one.lora)]


def _record(
    method: EditMethod,
    options: Mapping[str, Any],
    bound: float | None,
    data: Mapping[str, Data],
    rows: Mapping[str, Rows | None],
    edited: Edited,
    seed: int,
) -> RunRecord:
    """The record: settings, what was found, and for the data its digest and its source, never a row."""
    config: dict[str, Any] = {"method": method.__name__, "options": method.public(options), "retain_bound": bound}
    for part, own in rows.items():
        if own is not None:
            config[part] = {"rows": len(own), "sha256": data_digest(own)}
    config["found"] = edited.found
    record = RunRecord("unlearning", "hf-transfer-ext edit", config, seed=seed, recipe_sha256=sha256_of(__file__))
    if method.private:
        record.command = []  # which holds these options in plain words
    for source in data.values():
        if isinstance(source, (str, Path)):
            record.inputs.append(describe_dataset(source))
    record.not_measured.insert(0, "Whether the edit forgets: an edit alone measures nothing. Run an audit on it.")
    return record


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext edit MODEL OUT --method NAME`."""
    about = "Unlearn without training: edit tensors in closed form, with a bound on the retain set's loss."
    arguments = arguments_for(apply_edit, argv, program="hf-transfer-ext edit", about=about, hidden=["template"])
    report = apply_edit(**arguments)
    print(f"{report.folder}: {report.method}, {len(report.tensors)} tensors changed in {report.seconds:.1f} s")
    for name, value in report.found.items():
        print(f"{name}: {value}")
    return 0
