"""Try to get forgotten knowledge back: `accelerate launch recipes/audit.py --config recipes/configs/audit/demo.yaml`.

Compares the attacked model with the original and with one trained without the forget set; writes a report with plots
and a card. Attacks leave the models as they were. The verdicts go into the unlearned model's own card, if it has one.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.answers import answers_of
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.report.html import save_audit
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.audit.verdict import verdict_table
from hf_transfer_ext.evals.baselines import audited_with
from hf_transfer_ext.hub.finish import add_measurements, finish_run
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.forget_retain import ForgetRetainArguments
from hf_transfer_ext.recipes.publishing import PublishArguments
from hf_transfer_ext.recipes.retrain import subjects_of, work_of
from hf_transfer_ext.recipes.run import run_recipe, start_record
from hf_transfer_ext.settings import REQUIRED


@dataclass
class AuditArguments(ForgetRetainArguments, PublishArguments):
    """Which model is attacked, how, and which models it is compared with."""

    unlearned: str = setting(REQUIRED, "models", "Unlearned model, its adapter, or a baseline: in_context_unlearning.")
    original: str = setting(REQUIRED, "models", "The model before unlearning.")
    baseline_options: dict[str, Any] = setting({}, "models", "Of the baseline: {correct: 6}.")
    retrained: str | None = setting(None, "models", "A model trained without the forget set.")
    retrain_from: str | None = setting(None, "models", "Make it here: this model, fine-tuned on the retain set.")
    retrain_epochs: float = setting(8.0, "models", "Epochs of that.")
    retrain_learning_rate: float = setting(3e-4, "models", "Peak learning rate of that.")
    shadow: str | None = setting(None, "models", "A second one, for adversarial_query; retrain: made here, likewise.")
    dtype: str = setting("float32", "models", "auto, float32 or bfloat16.")
    holdout_data: str | None = setting(None, "data", "The same kind of data, never trained on.")
    holdout_people: int = setting(4, "data", "Further made-up people, unseen in training.")
    limit: int | None = setting(None, "data", "Only the first rows of each set.")
    chat_template_kwargs: dict[str, Any] = setting({}, "data", "Of the chat template: {enable_thinking: false}.")
    attacks: list[Any] = setting(list(ATTACKS), "attacks", "Names, or {name: {option: value}}.")
    membership: list[Any] = setting([*MEMBERSHIP_METRICS, *MEMBERSHIP_ATTACKS], "attacks", "The same; []: none.")
    max_new_tokens: int = setting(48, "attacks", "Longest answer.")
    batch_size: int = setting(16, "attacks", "Examples in a forward pass.")
    update_card: bool = setting(True, "", "Put the verdicts into the unlearned model's own card, where it is local.")
    output_dir: str = setting("runs/audit", "", "Folder of the report.")
    seed: int = setting(0, "", "Seed of all random choices.")


def main(argv: list[str] | None = None) -> Any:
    (job,) = parse_recipe(AuditArguments, argv=argv)
    if job.shadow == "retrain" and not job.retrain_from:
        raise ValueError("`shadow: retrain` fine-tunes the model of `retrain_from`: set that, too.")
    publication = job.publication()
    accelerator, out, began = Accelerator(), Path(job.output_dir), time.monotonic()
    record = start_record("audit", __file__, argv, job, seed=job.seed)
    splits = job.rows(record, job.seed, job.holdout_data, holdout_people=job.holdout_people)
    data = AuditData.of(splits, job.limit)
    template = QuestionAnswerFormat(template=job.template, chat_template_kwargs=job.chat_template_kwargs)
    given: Any = {"name": job.unlearned, "options": job.baseline_options, "rows": data, "seed": job.seed}
    prompted = audited_with(template=template, record=record, **given)

    def tell(what: str) -> None:
        accelerator.print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    roles = {"unlearned": job.unlearned, "original": job.original, "retrained": job.retrained or job.retrain_from}
    roles["shadow"] = job.retrain_from if job.shadow == "retrain" else job.shadow
    subjects: Any = subjects_of(roles, job, record, data, template, accelerator, tell)
    if prompted is not None:
        subjects = {"unlearned": replace(subjects["original"], template=prompted), **subjects}
    chosen: Any = {"attacks": job.attacks, "membership": job.membership, "seed": job.seed, "progress": tell}
    tell(f"{len(job.attacks)} attacks and {len(job.membership)} on membership, {len(data.forget)} rows to forget")
    with record.stage("attack"):
        found = audit(data=data, **subjects, **chosen, journal=work_of(job.output_dir))
    tell("measuring the forget and retain sets")
    with record.stage("measure"):
        answers = answers_of({role: one for role, one in subjects.items() if role != "shadow"}, data)
    if accelerator.is_main_process:
        about = {f"{role} model": name for role, name in roles.items() if name is not None}
        about["forget set"] = f"{job.forget_data or 'made-up people'}, {len(data.forget)} rows"
        report = save_audit(out, found, data, about=about, **vars(answers))
        answers.measurements["unlearned"][:0] = verdicts = found.measurements()
        finish_run(out, record, answers.measurements, plot=None, quiet=True)
        publication.publish(out)
        print(verdict_table(found.verdicts))
        updated = job.update_card and add_measurements(job.unlearned, verdicts)
        also = f"; the verdicts are in the card of {job.unlearned}, too" * updated
        shutil.rmtree(work_of(job.output_dir), ignore_errors=True)
        tell(f"Report: {report}{also}")
    return found


if __name__ == "__main__":
    run_recipe("audit", main)
