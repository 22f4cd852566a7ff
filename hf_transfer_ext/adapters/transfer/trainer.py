"""Transfer with the calls of a trainer: `TransferTrainer(adapter, target_base, TransferConfig(...)).train()`.

It checks the lineage of the two bases, trains the discriminator where the adapter has none, transfers by the method
that fits, compares the result with its controls, and writes all of that into the card and the record of the result.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.finish import finish_adapter
from hf_transfer_ext.adapters.transfer.by_training import (
    DISCRIMINATORS,
    LEARN,
    TrainedTransferReport,
    load_base,
    save_adapter,
    train_lora,
    transfer_by_training,
)
from hf_transfer_ext.adapters.transfer.compare import TransferComparison, compare_transfer
from hf_transfer_ext.adapters.transfer.lineage import Lineage, lineage
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.run import TransferReport, transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import (
    TransLoraSettings,
    read_discriminator,
    save_seeds,
    train_discriminator,
)
from hf_transfer_ext.adapters.transfer.travel import NOT_COMPARED, inputs_of_transfer
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows, read_rows
from hf_transfer_ext.files import refuse_existing_output, sha256_of, written_aside
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import Wanted, call_of
from hf_transfer_ext.hub.record import RunRecord, describe_dataset, last_name, read_record
from hf_transfer_ext.hub.servable import serving
from hf_transfer_ext.launch import started_processes
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.trainers.logs import plot_in
from hf_transfer_ext.weights.reference import parse_reference
from hf_transfer_ext.weights.repository import base_of_adapter, local_folder

logger = logging.getLogger(__name__)

AUTO, TRANS_LORA = "auto", "trans_lora"
#: The result among the models of a comparison.
TRANSFERRED = "transferred"
#: Heading of the card under which it says what the two bases have in common.
LINEAGE = "Lineage of the bases"

Rows = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TransferConfig(TransLoraSettings):
    """How to transfer an adapter. The settings of `TransLoraSettings` belong to trans_lora and to the controls.

    Args:
        output_dir: Folder of the new adapter, written atomically. Finished stages are kept beside it until the end,
            in a folder whose name ends in `.transfer`: the same call continues an interrupted run.
        method: trans_lora, a closed form (`TRANSFER_METHODS`), or auto: what the lineage of the bases recommends.
        method_options: Options of a closed form.
        max_rank: Largest rank of a module, for closed forms; by default the rank that the method gives.
        learn: Of trans_lora: answers, or logits where both bases have one vocabulary.
        start: Of trans_lora: the closed form that the LoRA starts from.
        discriminator: Of trans_lora, for the next transfer: retrain, copy or none. With none, an adapter that has no
            seeds gets seeds alone, and every written input is accepted.
        dtype: Of both bases: auto, float32, bfloat16 or float16.
        eval_batch_size: Examples in a forward pass of the comparison.
        overwrite: Replace an adapter that is in `output_dir`.
    """

    output_dir: str = "runs/transfer"
    method: str = AUTO
    method_options: dict[str, Any] = field(default_factory=dict)
    max_rank: int | None = None
    learn: str = "answers"
    start: str | None = None
    discriminator: str = "retrain"
    dtype: str = "auto"
    eval_batch_size: int = 32
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [AUTO, TRANS_LORA, *TRANSFER_METHODS]
        if self.method not in known:
            raise ValueError(unknown_name("transfer method", self.method, known))
        for name, choices in (("learn", LEARN), ("discriminator", DISCRIMINATORS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.start is not None and self.start not in TRANSFER_METHODS:
            raise ValueError(unknown_name("transfer method", self.start, TRANSFER_METHODS))
        if self.eval_batch_size < 1:
            raise ValueError(f"`eval_batch_size` must be at least 1, got {self.eval_batch_size}.")
        usual = {one.name: one.default for one in fields(TransferConfig)}
        of_training = {name: getattr(self, name) != usual[name] for name in ("learn", "start", "discriminator")}
        of_closed_forms = {"method_options": bool(self.method_options), "max_rank": self.max_rank is not None}
        unused = {TRANS_LORA: of_closed_forms, AUTO: {}}.get(self.method, of_training)
        if any(unused.values()):
            name = next(name for name, is_set in unused.items() if is_set)
            raise ValueError(f"`{name}` means nothing to the method {self.method!r}. Leave it out.")

    @property
    def training(self) -> TransLoraSettings:
        """The settings of trans_lora alone."""
        return TransLoraSettings(**{one.name: getattr(self, one.name) for one in fields(TransLoraSettings)})


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: JSON lines with a column text, or a JSON list of strings.

    Raises:
        ValueError: A row has no text.
    """
    rows = read_rows(Path(path))
    lacking = [i for i, row in enumerate(rows) if not isinstance(row.get("text"), str)]
    if lacking:
        raise ValueError(
            f"Row {lacking[0]} of {path} has no text in a column 'text'; it has {', '.join(rows[lacking[0]])}."
        )
    return [row["text"] for row in rows]


class TransferTrainer:
    """Carry a LoRA to another base model, and measure what it keeps.

        trainer = TransferTrainer("my/lora", "org/new-base", TransferConfig(output_dir="moved"), eval_dataset=test)
        trainer.train()
        trainer.evaluate()

    When to use it: whenever a base model is replaced and the adapters on it should not be lost. It runs in one
    process; the models are on the accelerator, if there is one.

    Args:
        adapter: Folder or Hub id of the source adapter.
        target_base: Folder or Hub id of the new base.
        source_base: The source base; by default the one that the adapter's config names.
        train_dataset: The adapter's own training data (`question` and `answer`), where it is at hand: rows, a file, a
            folder or a Hub id. An adapter without `transfer_seeds.json` gets its seeds and discriminator from it, and
            the comparison gets the control that is trained on the true data.
        eval_dataset: Test data for `evaluate`.
        texts: Plain texts that both models read, for closed forms that need activations, or a file with them: JSON
            lines with a column text, or a JSON list of strings.
        template: How a question becomes a prompt.
        columns: Name in the schema -> your column: {"question": "q", "answer": "a"}.

    Attributes:
        lineage: What the bases have in common, once `train` has compared them; None where they cannot be compared.
        report: What `train` wrote.
        comparison: What `evaluate` measured.

    Raises:
        ValueError: Rows without a question or an answer; several processes.
    """

    def __init__(
        self,
        adapter: str | Path,
        target_base: str | Path,
        args: TransferConfig | None = None,
        *,
        source_base: str | Path | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        texts: str | Path | Sequence[str] | None = None,
        template: QuestionAnswerFormat | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        if started_processes() > 1:
            raise ValueError(
                f"A transfer runs in one process, and the launcher started {started_processes()}. Start it with "
                "--num_processes 1."
            )
        self.adapter, self.target_base, self.args = adapter, target_base, args or TransferConfig()
        if texts is not None and self.args.method == TRANS_LORA:
            raise ValueError(f"`texts` means nothing to the method {TRANS_LORA!r}. Leave it out.")
        self.source_base = source_base
        self.train_data, self.eval_data = train_dataset, eval_dataset
        self.texts, self.template, self.columns = texts, template, dict(columns or {})
        self.out = Path(self.args.output_dir)
        self.work = Path(f"{self.out}.transfer")
        self.lineage: Lineage | None = None
        self.report: TransferReport | TrainedTransferReport | None = None
        self.comparison: TransferComparison | None = None

    @cached_property
    def train_rows(self) -> list[dict[str, Any]] | None:
        return self._rows(self.train_data, "train", "train_dataset")

    @cached_property
    def eval_rows(self) -> list[dict[str, Any]] | None:
        return self._rows(self.eval_data, "test", "eval_dataset")

    @cached_property
    def text_rows(self) -> list[str] | None:
        if isinstance(self.texts, (str, Path)):
            return read_texts(self.texts)
        return None if self.texts is None else list(self.texts)

    @property
    def source_name(self) -> str:
        """The source base with its revision."""
        if self.source_base is not None:
            return str(self.source_base)
        base, revision = base_of_adapter(local_folder(self.adapter) / "adapter_config.json")
        return base if revision is None else f"{base}@{revision}"

    def train(self) -> TransferReport | TrainedTransferReport:
        """Check the lineage, transfer, and add the check to card and record.

        Raises:
            FileExistsError: There is an adapter in `output_dir`, and `overwrite` is off.
            ValueError: Whatever the method refuses.
        """
        args = self.args
        own_inputs = [self.adapter, self.target_base, self.source_base]
        refuse_existing_output(self.out, overwrite=args.overwrite, inputs=own_inputs)
        for rows in (self.train_rows, self.eval_rows, self.text_rows):  # refused before any work
            if rows is not None and not rows:
                raise ValueError("A dataset of the transfer has no rows. Leave it out, or give one with rows.")
        self.lineage, lines = self._lineage()
        method = args.method
        if method == AUTO:
            # Where the bases are equal, a copy is the adapter with the new base's name.
            recommended = TRANS_LORA if self.lineage is None else self.lineage.recommended
            method = "copy" if recommended == "none" else recommended
        lines.append(f"Transferred by {method}{', which that recommends' if args.method == AUTO else ''}.")
        if method == TRANS_LORA:
            self._make_transferable()
            self.report = transfer_by_training(
                self.adapter, self.target_base, self.out, source_base=self.source_base, settings=args.training,
                template=self.template, learn=args.learn, start=args.start, discriminator=args.discriminator,
                dtype=args.dtype, work=self.work / "stages", overwrite=args.overwrite,
            )  # fmt: skip
        else:
            self.report = transfer_lora(
                self.adapter, self.target_base, self.out, method=method, options=args.method_options,
                source_base=self.source_base, texts=self.text_rows, rank=args.max_rank, overwrite=args.overwrite,
            )  # fmt: skip
        record = read_record(self.out)
        record.notes = {LINEAGE: lines, **record.notes}
        if self.lineage is not None:
            found = self.lineage
            record.config["lineage"] = {
                "relation": found.relation, "distances": found.distances, "shared_tokens": found.shared_tokens,
                "recommended": found.recommended,
            }  # fmt: skip
        self._describe_data(record)
        finish_run(self.out, record, quiet=True)
        if self.eval_data is None:
            shutil.rmtree(self.work, ignore_errors=True)
        return self.report

    def evaluate(self) -> TransferComparison:
        """Measure the result beside its controls, and put the numbers into its card and record.

        Raises:
            ValueError: There is no `eval_dataset`.
        """
        rows = self.eval_rows
        if rows is None:
            raise ValueError("Comparing a transfer with its controls needs test data: give `eval_dataset`.")
        record = read_record(self.out)
        with record.stage("compare"):
            self.comparison = compare_transfer(
                self.source_name, self.adapter, self.target_base, {TRANSFERRED: self.out}, rows,
                self.work / "controls", true_rows=self.train_rows, settings=self.args.training,
                template=self.template, dtype=self.args.dtype, batch_size=self.args.eval_batch_size,
            )  # fmt: skip
        dataset = last_name(self.eval_data) if isinstance(self.eval_data, (str, Path)) else None
        measured = self.comparison.measured(dataset)
        record.not_measured = [one for one in record.not_measured if one != NOT_COMPARED]
        missing = self.comparison.not_measured
        record.not_measured += [f"In the comparison, {name}: {reason}." for name, reason in missing.items()]
        finish_run(self.out, record, measured, result=TRANSFERRED, plot=None, quiet=True)
        shutil.rmtree(self.work, ignore_errors=True)
        return self.comparison

    def _describe_data(self, record: RunRecord) -> None:
        """Add the data sets to the record, and the call that makes the result again where all data are named."""
        given = (self.train_data, self.eval_data, self.texts)
        datasets: list[Wanted] = [(one, None, "dataset") for one in given if isinstance(one, (str, Path))]
        record.inputs += [describe_dataset(name) for name, _, _ in datasets]
        if record.call or len(datasets) < sum(one is not None for one in given):
            return
        source, target = (parse_reference(name, "base") for name in (self.source_name, self.target_base))
        settings = asdict(self.args)
        del settings["output_dir"], settings["overwrite"]
        call: dict[str, Any] = {"adapter": self.adapter, "target_base": self.target_base, "settings": settings}
        call |= {"source_base": self.source_name, "train_data": self.train_data, "test_data": self.eval_data}
        call |= {"texts": self.texts, "columns": self.columns, "template": self.template}
        record.recipe_sha256 = sha256_of(__file__)
        record.call = call_of(call, [*inputs_of_transfer(self.adapter, source, target), *datasets])

    def summary(self) -> list[str]:
        """What was done and measured, in lines for a terminal."""
        lines = list(read_record(self.out).notes.get(LINEAGE, []))
        if isinstance(self.report, TransferReport):
            change = " -> ".join(f"{value:.3g}" for value in self.report.relative_change)
            lines.append(f"{len(self.report.modules)} modules; change relative to the weights: {change}")
            lines += [f"left out: {module}: {reason}" for module, reason in self.report.left_out.items()]
        elif self.report is not None:
            accepted = f"{self.report.acceptance:.0%} of the written inputs accepted"
            lines.append(f"{self.report.rows} inputs learned; {accepted}")
        if self.comparison is not None:
            lines += self.comparison.lines()
        return [*lines, *serving(self.out)]

    def _lineage(self) -> tuple[Lineage | None, list[str]]:
        try:
            found = lineage(self.source_name, self.target_base)
        except ValueError as error:
            if self.args.method == AUTO:
                raise
            return None, [f"The bases were not compared: {error}"]
        if self.args.method != AUTO and self.args.method in found.refused:
            logger.warning(f"`{self.args.method}` makes little sense here: {found.refused[self.args.method]}")
        return found, [f"The bases are related as: {found.relation}.", *found.reasons]

    def _make_transferable(self) -> None:
        """Train seeds and discriminator where the adapter has none and its training data is at hand."""
        if self.train_rows is None or read_discriminator(local_folder(self.adapter)) is not None:
            return
        folder = Path(self.adapter)
        if not folder.is_dir():
            raise ValueError(
                f"The adapter {str(self.adapter)!r} has no seeds for a transfer, and they cannot be added to a "
                "repository: download it (`hf-transfer-ext pull`) and name its folder."
            )
        inputs = list(dict.fromkeys(row["question"] for row in self.train_rows))
        if self.args.discriminator == "none":
            save_seeds(inputs, folder, self.args.training)
            return
        reference = parse_reference(self.source_name, "source_base")
        model = load_base(reference, self.args.dtype)
        tokenizer = load_tokenizer(reference.path, revision=reference.revision)
        train_discriminator(model, tokenizer, inputs, folder, self.args.training, template=self.template)

    def _rows(self, data: Rows | None, split: str, name: str) -> list[dict[str, Any]] | None:
        if data is None:
            return None
        if isinstance(data, (str, Path)):
            data = load_rows(data, split="train" if Path(data).is_file() else split)
        found = []
        for index, row in enumerate(data):
            renamed = {role: row.get(self.columns.get(role, role)) for role in ("question", "answer")}
            lacking = [role for role, value in renamed.items() if not isinstance(value, str) or not value.strip()]
            if lacking:
                raise ValueError(
                    f"Row {index} of `{name}` has no text as its {lacking[0]} (column "
                    f"{self.columns.get(lacking[0], lacking[0])!r}); it has {', '.join(map(str, row))}."
                )
            found.append(renamed)
        return found


def transfer_again(
    adapter: str,
    target_base: str,
    out: str | Path,
    *,
    settings: dict[str, Any],
    source_base: str,
    train_data: str | None,
    test_data: str | None,
    texts: str | None,
    columns: dict[str, str],
    template: QuestionAnswerFormat | None,
) -> None:
    """Run the transfer, and the comparison, of a call that a `TransferTrainer` wrote into its record."""
    trainer = TransferTrainer(
        adapter, target_base, TransferConfig(**settings, output_dir=str(out)), source_base=source_base,
        train_dataset=train_data, eval_dataset=test_data, texts=texts, template=template, columns=columns,
    )  # fmt: skip
    trainer.train()
    if test_data is not None:
        trainer.evaluate()


def teach_source(
    adapter: str | Path, source_base: str | Path, rows: Sequence[Mapping[str, str]], args: TransferConfig, *,
    epochs: float, learning_rate: float, template: QuestionAnswerFormat | None = None,
) -> None:  # fmt: skip
    """Train the source adapter itself, and save it in the folder `adapter`.

    Args:
        rows: `question` and `answer` of each training example.
        args: Target modules, rank, batch size, dtype and seed of the LoRA, and whether it may replace another one.
        epochs: Passes over the rows.
        learning_rate: Peak rate.

    Raises:
        FileExistsError: There is an adapter, and `args.overwrite` is off.
    """
    folder, began = Path(adapter), time.perf_counter()
    refuse_existing_output(folder, overwrite=args.overwrite, inputs=[source_base])
    settings = TransLoraSettings(
        target_modules=args.target_modules, rank=args.rank, batch_size=args.batch_size, seed=args.seed, epochs=epochs,
        learning_rate=learning_rate, bf16=args.bf16, report_to=args.report_to, logging_steps=args.logging_steps,
    )  # fmt: skip
    reference = parse_reference(source_base, "source_base")
    tokenizer = load_tokenizer(reference.path, revision=reference.revision)
    work = Path(f"{folder}.training")
    tuned = train_lora(reference, tokenizer, rows, work, settings, template=template, dtype=args.dtype)
    with written_aside(folder, overwrite=args.overwrite, inputs=[source_base]) as aside:
        save_adapter(tuned, aside, reference)
        finish_adapter(
            aside, "fine-tuning", "transfer", asdict(settings), [(reference.path, reference.revision, "base")],
            recipe_sha256=sha256_of(__file__), seconds=time.perf_counter() - began, seed=args.seed,
            files=plot_in(work),
        )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
