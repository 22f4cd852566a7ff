"""RESTOR in an unlearning run: false facts first, then forgetting them, and how much of the true ones is back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer_ext.evals.options import check_options, options_of
from hf_transfer_ext.evals.suites.restor import CATEGORIES, corrupted_facts, load_restor, restor, restor_sequence
from hf_transfer_ext.hub.table import Measured
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.recipes.teaching import save_taught, teaching_settings
from hf_transfer_ext.recipes.training import TrainingRun
from hf_transfer_ext.trainers.taught import taught


class Restoration:
    """RESTOR: corrupts a model with false facts, and measures how much of the true ones unlearning restores.

    Args:
        job: The recipe's settings.
        rows: The rows to forget: questions that get false answers; or, with `restor_data`, what is false already.

    Raises:
        ValueError: Facets, or settings of the corruption without `corrupt_epochs`.
    """

    def __init__(self, run: TrainingRun, job: Any, rows: Any, template: Any) -> None:
        self.run, self.job, self.template, self.stages = run, job, template, dict[str, Any]()
        if job.facets:
            raise ValueError("`corrupt_epochs` makes the answers to the forget questions false: leave `facets` out.")
        known = options_of(load_restor if job.restor_data else corrupted_facts)
        check_options("corruption", "RESTOR", job.restor_options, [name for name in known if name != "seed"])
        self.sets: dict[str, list[dict[str, Any]]] = {}
        self.false_rows = list(rows)
        if job.restor_data:
            self.sets = load_restor(job.restor_data, seed=run.args.seed, **job.restor_options)
        else:
            facts, self.false_rows = corrupted_facts(rows, seed=run.args.seed, **job.restor_options)
            self.sets = {"questions": facts}

    def corrupt(self, model: Any, tokenizer: Any) -> Any:
        """The model, fine-tuned on the false rows; facts are measured before and after."""
        self.measure("original", model.to(self.run.args.device), tokenizer)
        settings = teaching_settings(self.run, self.job.corrupt_epochs, self.job.corrupt_learning_rate)
        model = taught(
            model, tokenizer, self.false_rows, settings, lora_rank=self.job.lora_rank, template=self.template
        )
        save_taught(self.run, self.job.corrupted_dir, model, tokenizer)
        self.measure("before", model, tokenizer)
        return model

    def measure(self, stage: str, model: Any, tokenizer: Any, **options: Any) -> None:
        how = {"template": self.template, "batch_size": 32, **options}
        self.stages[stage] = restor(model, tokenizer, self.sets, **how)

    def added_to(self, measured: Measured, model: Any, tokenizer: Any, **options: Any) -> dict[str, list[Measurement]]:
        """Stage -> its measurements, those of the facts included; the last one has what was recovered.

        Args:
            measured: What else was measured "before" and "after" unlearning.
            model: The unlearned model.
        """
        self.measure("after", model, tokenizer, **options)
        found = {stage: [*measured.get(stage, ()), *result.measurements] for stage, result in self.stages.items()}
        try:
            found["after"] += restor_sequence(self.stages)
        except ValueError as error:  # corruption did no harm
            self.stages["after"].notes.append(str(error))
        notes = [note for result in self.stages.values() for note in result.problems]
        self.run.record.not_measured += list(dict.fromkeys(notes))
        return found


def restoration_of(run: TrainingRun, job: Any, rows: Any, template: Any) -> Restoration | None:
    """The `Restoration` that the settings ask for; None where nothing is corrupted.

    Raises:
        ValueError: As `Restoration`, or one of its settings without `corrupt_epochs`.
    """
    if job.corrupt_epochs > 0:
        return Restoration(run, job, rows, template)
    for name in ("corrupted_dir", "restor_data", "restor_options"):
        if getattr(job, name):
            raise ValueError(f"`{name}` is for a model that is corrupted here: set `corrupt_epochs` too.")
    return None


def texts_of(splits: Mapping[str, Any], restoration: Restoration | None) -> list[str]:
    """All texts of the data, and of the facts that are measured."""
    texts = [str(value) for rows in splits.values() for row in rows for value in row.values()]
    if restoration is not None:
        for fact in (row for rows in restoration.sets.values() for row in rows):
            texts += [fact["question"], *(f" {option}" for name in CATEGORIES for option in fact.get(name) or ())]
    return texts
