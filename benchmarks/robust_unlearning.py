"""What distilling an unlearned model again, from its own copy with noise, takes from the attacks.

    python -m benchmarks.robust_unlearning --work runs/unlearned_people --out benchmarks/results/robust_unlearning

The models, people and attacks of `benchmarks.unlearned_people`, with one difference: the methods are given all people
that have to stay, since noise takes what the distillation does not cover. Utility is therefore measured on people that
the methods were trained to keep. Each method is tuned as there, on the first seed and without any attack. Its result
is then distilled into a copy of itself with noise (`recipes/robustify.py`: forward KL on the answers about both
groups), once for each (share, passes over the data) of `RUNS`; none of them is chosen. Share 0 is distillation without
noise.

The *cost* is the number of rows that the distillation reads as a share of those that the retrained model read: the
forgotten people can also be removed by training again, if the data of that training is still at hand.

Every row is saved in the work folder: the same command resumes, and `--minutes` ends a sitting.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from benchmarks import measure
from benchmarks import unlearned_people as people
from hf_transfer_ext.edits.methods.shrink_and_perturb import perturb_model
from hf_transfer_ext.recipes.robustify import as_training_rows
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig

METHODS = ("dmm", "npo", "idk")
RUNS = ((0.0, 16), (0.2, 16), (0.4, 16), (0.6, 16), (0.6, 40), (0.8, 40))
BATCH, RATE, NOISE_SCALE = 16, 2e-3, 0.1


def world_of(seed: int, work: Path) -> people.World:
    """The world of `benchmarks.unlearned_people`, in which the methods are given all people that have to stay."""
    world = people.world_of(seed, work)
    world.rows["given"] = [row for part in ("given", "choice", "test") for row in world.rows[part]]
    world.data = people.AuditData(world.rows["forget"], world.rows["given"], world.rows["holdout"])
    return world


def distilled_again(world: people.World, teacher: Any, share: float, passes: int) -> Any:
    """The student of an unlearned model that starts as its copy with noise."""
    set_seed(world.seed)
    teacher = teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    perturb_model(student, share=share, noise_scale=NOISE_SCALE, seed=world.seed)
    rows = as_training_rows(world.rows["given"] + world.rows["forget"], world.tokenizer, people.PLAIN)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            folder, loss="forward_kl", kd_weight=1.0, ce_weight=0.0, num_train_epochs=passes, learning_rate=RATE,
            lr_scheduler_type="cosine", per_device_train_batch_size=BATCH, save_strategy="no", report_to="none",
            gradient_checkpointing=False, max_length=512, **people.quiet(world.seed),
        )  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = DistillationTrainer(student, teacher, args, data, processing_class=world.tokenizer)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)


def path_of(work: Path, method: str, again: tuple[float, int] | None, seed: int) -> Path:
    name = f"{method}-{seed}" if again is None else f"{method}-{again[0]:g}x{again[1]}-{seed}"
    return work / "robust" / f"{name}.json"


def run(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        world: people.World | None = None
        for method in (*people.REFERENCES, *options.methods):
            teacher: Any = None
            for again in (None, *(RUNS if method in options.methods else ())):
                path = path_of(options.work, method, again, seed)
                if path.exists():
                    continue
                measure.stop_in_time(options)
                world = world or world_of(seed, options.work)
                row: dict[str, Any] = {"method": method, "again": again, "seed": seed}
                if method in people.REFERENCES:
                    model = (world.original if method == "original" else world.retrained).model
                elif again is None:
                    row["settings"], teacher = _unlearned(world, method, options)
                    model = teacher
                else:
                    if teacher is None:
                        chosen = json.loads(path_of(options.work, method, None, seed).read_text())["settings"]
                        teacher = people.unlearned_by(method, world, chosen)
                    model = distilled_again(world, teacher, *again)
                row |= people.measured(world, model)
                path.parent.mkdir(parents=True, exist_ok=True)
                measure.write_json(path, row)
                worst = people.worst_recovered(row)
                print(f"seed {seed}  {method} {again}  utility {row['utility']:.2f}, recovered {worst}", flush=True)


def _unlearned(world: people.World, method: str, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(settings, model): tuned on the first seed, with the same settings on all others."""
    first = path_of(options.work, method, None, options.seeds[0])
    if first.exists():
        settings = json.loads(first.read_text())["settings"]
        return settings, people.unlearned_by(method, world, settings)
    settings, _, model = people.tuned(method, world)
    return settings, model


def cost(world_rows: dict[str, list[Any]], passes: int) -> float:
    """Rows that the distillation reads / rows that the retrained model read."""
    kept = sum(len(world_rows[part]) for part in ("given", "choice", "test", "forget"))
    return passes * kept / (people.TEACHING["epochs"] * len(world_rows["retrained"]))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    text = ["# Distilling an unlearned model again\n"]
    text += [" ".join(part.split()) + "\n" for part in (__doc__ or "").split("\n\n")[2:4]]
    text.append(
        "Shares are of the original's knowledge that the worst "
        "attack of a class brings back; means over the seeds, smallest to largest seed in parentheses.\n"
    )
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for again in (None, *RUNS):
            found = [row for row in rows if row["method"] == method and row["again"] == (again and list(again))]
            if found:
                name = method if again is None else f"{method}, then share {again[0]:g} and {again[1]} passes"
                price = None if again is None else f"{cost(people.people_of(0), again[1]):.0%}"
                attacks = [[one["attacks"].get("multiple_choice") for one in found]]
                attacks += [
                    [(one["worst"][access] or {}).get("recovered") for one in found] for access in people.ACCESS
                ]
                table.append(
                    [
                        name, len(found), price, _range([one["utility"] for one in found], ".2f"),
                        _range([one["forget_probability"] for one in found], ".2f"),
                        _range([people.worst_recovered(one) for one in found], ".0%"),
                        *(_range(values, ".0%") for values in attacks),
                    ]
                )  # fmt: skip
    columns = [
        "model",
        "seeds",
        "cost",
        "utility",
        "forget probability",
        "worst of all",
        "multiple choice",
        "ask",
        "weights",
    ]
    text.append(measure.markdown_table([*columns, "train", "membership"], table))
    settings = {row["method"]: row["settings"] for row in rows if row.get("settings")}
    text.append("Settings, chosen on the first seed: " + "; ".join(f"{k} {v}" for k, v in settings.items()) + ".\n")
    about = measure.machine(("torch", "transformers", "peft"))
    return "\n".join(text) + f"\n{about['processor']}, {about['cores']} cores, {about['versions']}\n"


def _range(values: Sequence[float | None], form: str) -> str | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    mean = f"{statistics.fmean(there):{form}}"
    return mean if len(there) == 1 else f"{mean} ({min(there):{form}} to {max(there):{form}})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/unlearned_people"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the settings")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=list(people.METHODS), metavar="METHOD")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the same command resumes")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    try:
        run(options)
    except measure.OutOfTime:
        print("The time is up; run the same command again to resume.")
    rows = [
        json.loads(path.read_text())
        for method in (*people.REFERENCES, *people.METHODS)
        for again in (None, *RUNS)
        for seed in range(100)
        if (path := path_of(options.work, method, again, seed)).exists()
    ]
    measure.write_json(options.out.with_suffix(".json"), {"rows": rows})
    options.out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
