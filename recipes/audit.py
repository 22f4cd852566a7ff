"""Try to get forgotten knowledge back: `accelerate launch recipes/audit.py --config recipes/configs/audit/demo.yaml`.

Attacks the unlearned model, compares with the original and, where given, with one that was trained without the forget
set, and writes `report.html`, `audit.json` and `examples.jsonl`. Every attack leaves the models as they were.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from hf_transfer_ext.data.forget_retain import forget_retain_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.audit import audit
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine import evaluate
from hf_transfer_ext.evals.report import save_audit
from hf_transfer_ext.evals.suites.forget_retain import forget_retain
from hf_transfer_ext.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe


@dataclass
class AuditArguments:
    """Who is attacked, with what, and compared with whom."""

    unlearned: str = field(metadata={"help": "Folder or Hub id of the unlearned model, or of its adapter."})
    original: str = field(metadata={"help": "The model before unlearning."})
    retrained: str | None = field(default=None, metadata={"help": "A model trained without the forget set."})
    output_dir: str = "runs/audit"
    forget_data: str | None = field(default=None, metadata={"help": "File, folder or Hub id; None: made-up people."})
    retain_data: str | None = None
    holdout_data: str | None = field(default=None, metadata={"help": "The same kind of data, never trained on."})
    columns: str = field(default="{}", metadata={"help": "JSON: schema name -> your column."})
    people: int = field(default=20, metadata={"help": "Made-up people, as in the run that made them be forgotten."})
    forget_people: int = 2
    holdout_people: int = field(default=2, metadata={"help": "Made-up people beyond those, whom nobody was taught."})
    facts: int | None = None
    attacks: str = field(
        default=", ".join(ATTACKS), metadata={"help": 'Comma-separated, or JSON: ["sampling", {"quantization": {}}].'}
    )
    template: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    max_new_tokens: int = 48
    batch_size: int = 16
    dtype: str = "float32"
    seed: int = 0


def main(argv: list[str] | None = None) -> Any:
    (arguments,) = parse_recipe(AuditArguments, argv=argv)
    accelerator = Accelerator()
    text = arguments.attacks.strip()
    attacks = json.loads(text) if text.startswith("[") else [name.strip() for name in text.split(",")]
    data = AuditData(**forget_retain_rows(
        arguments.forget_data, arguments.retain_data, arguments.holdout_data, columns=json.loads(arguments.columns),
        people=arguments.people, forget_people=arguments.forget_people, holdout_people=arguments.holdout_people,
        facts=arguments.facts, seed=arguments.seed,
    ))  # fmt: skip
    template = QuestionAnswerFormat(template=arguments.template)

    def subject(name: str) -> Subject:
        model = load_model(name, dtype=arguments.dtype).to(accelerator.device).eval()
        return Subject(
            model, load_tokenizer(name), template, arguments.max_new_tokens, arguments.batch_size, accelerator,
            arguments.seed,
        )  # fmt: skip

    subjects = {"unlearned": subject(arguments.unlearned), "original": subject(arguments.original)}
    if arguments.retrained is not None:
        subjects["retrained"] = subject(arguments.retrained)
    found = audit(
        subjects["unlearned"], data, original=subjects["original"], retrained=subjects.get("retrained"),
        attacks=attacks, seed=arguments.seed,
    )  # fmt: skip
    looks = {"template": template, "accelerator": accelerator, "batch_size": arguments.batch_size}
    splits = {"forget": data.forget, "retain": data.retain}
    measured = {name: forget_retain(s.model, s.tokenizer, splits, **looks) for name, s in subjects.items()}
    ratios = {}
    if all(row.get("perturbed_answer") for row in data.forget):
        for name, s in subjects.items():
            result = evaluate(s.model, s.tokenizer, data.forget, ["truth_ratio"], resamples=0, **looks)
            ratios[name] = next(iter(result.values.values())).tolist()
    if accelerator.is_main_process:
        report = save_audit(arguments.output_dir, found, data, measured=measured, truth_ratios=ratios)
        for v in found.verdicts:
            told = "–" if v.recovered is None else f"{v.recovered:.0%} came back"
            print(f"{v.attack:<40} {told:<20} {v.note}")
        print(f"Report: {report}")
    return found


if __name__ == "__main__":
    main()
