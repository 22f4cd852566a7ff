"""Try to get forgotten knowledge back: `accelerate launch recipes/audit.py --config recipes/configs/audit/demo.yaml`.

Attacks the unlearned model, compares with the original and, where given, with one that was trained without the forget
set, and writes `report.html` with its plots, `audit.json`, `examples.jsonl` and `model_index.yaml` for a card. Every
attack leaves the models as they were.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainingArguments

from hf_transfer_ext.data.forget_retain import forget_retain_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.report.html import save_audit
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine.evaluate import GenerationSettings, evaluate
from hf_transfer_ext.evals.suites.forget_retain import forget_retain
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe
from hf_transfer_ext.trainers.answers import train_on_answers


@dataclass
class AuditArguments:
    """Who is attacked, with what, and compared with whom."""

    unlearned: str = field(metadata={"help": "Folder or Hub id of the unlearned model, or of its adapter."})
    original: str = field(metadata={"help": "The model before unlearning."})
    retrained: str | None = field(default=None, metadata={"help": "A model trained without the forget set."})
    retrain_from: str | None = field(
        default=None, metadata={"help": "Make the retrained model here: this one, taught the retain set alone."}
    )
    retrain_epochs: float = 8.0
    retrain_learning_rate: float = 3e-4
    output_dir: str = "runs/audit"
    forget_data: str | None = field(default=None, metadata={"help": "File, folder or Hub id; None: made-up people."})
    retain_data: str | None = None
    holdout_data: str | None = field(default=None, metadata={"help": "The same kind of data, never trained on."})
    columns: str = field(default="{}", metadata={"help": "JSON: schema name -> your column."})
    people: int = field(default=20, metadata={"help": "Made-up people, as in the run that made them be forgotten."})
    forget_people: int = 2
    holdout_people: int = field(default=4, metadata={"help": "Made-up people beyond those, whom nobody was taught."})
    facts: int | None = None
    limit: int | None = field(default=None, metadata={"help": "Only the first rows of each set."})
    attacks: str = field(
        default=", ".join(ATTACKS), metadata={"help": 'Comma-separated, or JSON: ["sampling", {"quantization": {}}].'}
    )
    membership: str = field(
        default=", ".join((*MEMBERSHIP_METRICS, *MEMBERSHIP_ATTACKS)), metadata={"help": "The same; none: leave out."}
    )
    template: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    max_new_tokens: int = 48
    batch_size: int = 16
    dtype: str = "float32"
    seed: int = 0


def named(text: str) -> list[Any]:
    """`a, b` or a JSON list of names and of names with options."""
    text = text.strip()
    if text.startswith("["):
        return json.loads(text)
    return [] if text in ("", "none") else [name.strip() for name in text.split(",")]


def main(argv: list[str] | None = None) -> Any:
    (arguments,) = parse_recipe(AuditArguments, argv=argv)
    accelerator = Accelerator()
    data = AuditData(**{name: rows[: arguments.limit] for name, rows in forget_retain_rows(
        arguments.forget_data, arguments.retain_data, arguments.holdout_data, columns=json.loads(arguments.columns),
        people=arguments.people, forget_people=arguments.forget_people, holdout_people=arguments.holdout_people,
        facts=arguments.facts, seed=arguments.seed,
    ).items()})  # fmt: skip
    template = QuestionAnswerFormat(template=arguments.template)

    def subject(name: str) -> Subject:
        model = load_model(name, dtype=arguments.dtype).to(accelerator.device).eval()
        return Subject(
            model, load_tokenizer(name), template, arguments.max_new_tokens, arguments.batch_size, accelerator,
            arguments.seed,
        )  # fmt: skip

    began = time.monotonic()

    def tell(what: str) -> None:
        if accelerator.is_main_process:
            print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    subjects = {"unlearned": subject(arguments.unlearned), "original": subject(arguments.original)}
    if arguments.retrained is not None:
        subjects["retrained"] = subject(arguments.retrained)
    elif arguments.retrain_from is not None:
        tell("retraining without the forget set")
        subjects["retrained"] = subject(arguments.retrain_from)
        args = TrainingArguments(
            str(Path(arguments.output_dir) / "retraining"), learning_rate=arguments.retrain_learning_rate,
            num_train_epochs=arguments.retrain_epochs, per_device_train_batch_size=8, save_strategy="no",
            report_to="none", seed=arguments.seed, disable_tqdm=True, logging_strategy="no",
            use_cpu=accelerator.device.type == "cpu",
        )  # fmt: skip
        one = subjects["retrained"]
        train_on_answers(one.model, one.tokenizer, data.retain, args, template=template)
        one.model.eval()
        if accelerator.is_main_process:  # a second audit may name it as `retrained`
            for part in (one.model, one.tokenizer):
                part.save_pretrained(Path(arguments.output_dir) / "retrained")
    found = audit(
        subjects["unlearned"], data, original=subjects["original"], retrained=subjects.get("retrained"),
        attacks=named(arguments.attacks), membership=named(arguments.membership), seed=arguments.seed, progress=tell,
    )  # fmt: skip
    looks: Any = {"template": template, "accelerator": accelerator, "batch_size": arguments.batch_size}
    kept = [{key: value for key, value in row.items() if key != "perturbed_answer"} for row in data.retain]
    splits = {"forget": data.forget, "retain": kept}  # wrong answers are five passes more: for what is forgotten only
    tell("what is forgotten and what is kept")
    measured: dict[str, Any] = {}
    ratios, written = dict[str, Any](), dict[str, list[str]]()
    wrong = all(row.get("perturbed_answer") for row in data.forget)
    for name, s in subjects.items():
        measured[name] = forget_retain(s.model, s.tokenizer, splits, **looks)
        result = evaluate(
            s.model, s.tokenizer, data.forget, ["rouge_l_recall", *(["truth_ratio"] if wrong else [])], resamples=0,
            generation=GenerationSettings(arguments.max_new_tokens), **looks,
        )  # fmt: skip
        written[name] = [str(scored.generation) for scored in result.scored]
        if wrong:
            ratios[name] = next(v for metric, v in result.values.items() if metric.startswith("truth_ratio")).tolist()
    if accelerator.is_main_process:
        report = save_audit(
            arguments.output_dir, found, data, measured=measured, truth_ratios=ratios, generations=written
        )
        print(f"{'attack':<42} {'needs':<12} {'came back':>5}")
        for v in found.verdicts:
            told = "–" if v.recovered is None else f"{v.recovered:.0%}"
            print(f"{v.attack:<42} {v.access:<12} {told:>5}  {v.note}")
        tell(f"Report: {report}")
    return found


if __name__ == "__main__":
    main()
