"""How much of three tasks remains when the models that learned them are merged, for every method.

    python -m benchmarks.merged_tasks --work runs/merged_tasks --out benchmarks/results/merged_tasks

Gemma 3 270M, its vocabulary cut to the tokens of the questions, is fine-tuned on each of three kinds of questions
about countries and elements, once for each seed. Every merge method joins the three, with its options as published,
and again with its strength tuned on the validation questions of the first seed. Asked are facts that no fine-tuning
asked for; a question is answered right where the whole answer is the model's greedy continuation.

*normalised* is the accuracy of a merged model on a task, divided by that of the model fine-tuned on this task and
seed; the table gives its mean over the tasks, and the mean and standard deviation of that over the seeds.

The whole table takes hours on two cores, most of them for `wudi`. What is done is kept: started
again, the same command goes on where it stopped, and other methods join the table. `--minutes` ends a sitting.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from benchmarks import measure
from hf_transfer_ext.data.facts import SPLITS, facts
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.trainers.answers import train_on_answers

TASKS = {
    "places": ("capital", "region", "demonym"),
    "codes": ("currency", "domain"),
    "elements": ("symbol", "number", "series"),
}
PLAIN = QuestionAnswerFormat(template="plain")
LAMBDAS = (0.3, 0.6, 1.5)


@dataclass(frozen=True)
class Recipe:
    """How a method merges the three models.

    Args:
        options: Options of the merge as published; `weight` is 1 for each model where the method has weights.
        strength: The option to tune, and the values to try in addition to that of `options`.
        pairwise: The method takes two models: the third joins the result of the first two.
    """

    options: dict[str, Any] = field(default_factory=dict)
    strength: tuple[str, Sequence[float]] | None = None
    pairwise: bool = False


#: Densities: TIES keeps 20 %, DARE drops 90 %, Breadcrumbs keeps 15 % below the largest .6 %, DELLA's as its code.
RECIPES: dict[str, Recipe] = {
    "linear": Recipe(),
    "multislerp": Recipe(),
    "karcher": Recipe(),
    "slerp": Recipe(pairwise=True),
    "nuslerp": Recipe(pairwise=True),
    "arcee_fusion": Recipe(pairwise=True),
    "nearswap": Recipe({"t": 0.001}, ("t", (0.0003, 0.003)), pairwise=True),
    "task_arithmetic": Recipe({}, ("lambda", LAMBDAS)),
    "ties": Recipe({"density": 0.2}, ("lambda", LAMBDAS)),
    "dare_linear": Recipe({"density": 0.1}, ("lambda", LAMBDAS)),
    "dare_ties": Recipe({"density": 0.1}, ("lambda", LAMBDAS)),
    "breadcrumbs": Recipe({"density": 0.15, "gamma": 0.006, "lambda": 0.2}, ("lambda", (0.6, 1.0, 1.5))),
    "breadcrumbs_ties": Recipe({"density": 0.15, "gamma": 0.006, "lambda": 0.2}, ("lambda", (0.6, 1.0, 1.5))),
    "della": Recipe({"density": 0.5}, ("lambda", LAMBDAS)),
    "della_linear": Recipe({"density": 0.5}, ("lambda", LAMBDAS)),
    "model_stock": Recipe(),
    "sce": Recipe({"select_topk": 0.1}, ("select_topk", (0.3, 1.0))),
    "ram": Recipe(),
    "ramplus_tl": Recipe({}, ("alpha", (0.1, 0.4))),
    "tsv": Recipe({}, ("lambda", LAMBDAS)),
    "iso_c": Recipe({}, ("lambda", LAMBDAS)),
    "iso_cts": Recipe({}, ("lambda", LAMBDAS)),
    "knots": Recipe({"density": 0.2}, ("lambda", LAMBDAS)),
    "wudi": Recipe({}, ("lambda", LAMBDAS)),
}


def questions(task: str, split: str) -> list[dict[str, str]]:
    """The questions about the facts of one split; no fact is in two of them."""
    chosen = [fact for fact in facts() if fact.relation in TASKS[task] and fact.split == split]
    return [{"question": fact.question, "answer": fact.answer} for fact in chosen]


def prepare(work: Path, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """The common base and the fine-tuned models, in folders of `work`; those that are there are kept."""
    base = work / "base"
    if not (base / "config.json").exists():
        rows = [row for task in TASKS for split in SPLITS for row in questions(task, split)]
        texts = [PLAIN.prompt.replace("{question}", row["question"]) + PLAIN.separator + row["answer"] for row in rows]
        source = demo_model()
        model, tokenizer, _ = trim_vocabulary(load_model(source), load_tokenizer(source), texts)
        with written_aside(base) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    tokenizer = load_tokenizer(base)
    for seed in seeds:
        for task in TASKS:
            folder = work / f"{task}-{seed}"
            if (folder / "config.json").exists():
                continue
            measure.stop_in_time(options)
            model = load_model(base)
            args = TrainingArguments(
                str(work / "training"), learning_rate=options.learning_rate, max_steps=options.steps, bf16=True,
                per_device_train_batch_size=32, save_strategy="no", report_to="none", seed=seed, logging_steps=10,
                warmup_steps=5, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            )  # fmt: skip
            train_on_answers(model, tokenizer, questions(task, "train"), args, template=PLAIN)
            with written_aside(folder) as aside:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)


def accuracy(folder: Path, split: str) -> dict[str, float]:
    """Task -> share of its questions that greedy decoding answers verbatim."""
    model, tokenizer = load_model(folder, dtype="bfloat16"), load_tokenizer(folder)
    found = {}
    for task in TASKS:
        rows = questions(task, split)
        result = evaluate(model, tokenizer, rows, ["exact_memorization"], template=PLAIN, resamples=0, batch_size=64)
        values = next(iter(result.values.values()))
        found[task] = float((values == 1).mean())  # all tokens are the first choice: greedy decoding gives them
    return found


def merged(method: str, options: dict[str, Any], work: Path, seed: int) -> Path:
    """Merge the three models of a seed; returns a folder that the next merge overwrites."""
    base, models = str(work / "base"), [str(work / f"{task}-{seed}") for task in TASKS]
    recipe, known = RECIPES[method], MERGE_METHODS[method]
    shared = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16", "seed": seed}
    if not recipe.pairwise:
        if known.unit == "matrix":
            return _scaled(method, options, work, seed, shared)
        each = {"weight": 1.0} if "weight" in known.options else {}
        plan = shared | {"models": [{"model": one, "parameters": each} for one in models], "parameters": options}
        if known.base in ("required", "optional"):
            plan["base_model"] = base
        merge(plan, work / "merged", overwrite=True)
        return work / "merged"
    first = models[0]
    for number, second in enumerate(models[1:], start=2):
        share = 1 / number  # of the model that joins
        out = work / f"merged-{number}"
        if known.count == (2, 2):
            weighted = [{"model": first, "parameters": {"weight": 1 - share}},
                        {"model": second, "parameters": {"weight": share}}]  # fmt: skip
            plan = shared | {"models": weighted, "parameters": options, "base_model": base}
        else:
            given = options | ({"t": share} if method == "slerp" else {})
            plan = shared | {"models": [{"model": first}, {"model": second}], "base_model": first, "parameters": given}
        merge(plan, out, overwrite=True)
        first = str(out)
    return Path(first)


def _scaled(method: str, options: dict[str, Any], work: Path, seed: int, shared: dict[str, Any]) -> Path:
    """Like `merged`, for methods on whole matrices: `lambda` scales their change, which is computed only once."""
    base, others = str(work / "base"), {name: value for name, value in options.items() if name != "lambda"}
    kept = work / f"merged-{method}-{seed}"
    if not (kept / "config.json").exists():
        each = {"weight": 1.0} if "weight" in MERGE_METHODS[method].options else {}
        models = [{"model": str(work / f"{task}-{seed}"), "parameters": each} for task in TASKS]
        plan = shared | {"models": models, "base_model": base, "parameters": others, "out_dtype": "float32"}
        merge(plan, kept, overwrite=True)
    one = {"model": str(kept), "parameters": {"weight": options.get("lambda", 1.0)}}
    merge(
        shared | {"merge_method": "task_arithmetic", "base_model": base, "models": [one]},
        work / "merged",
        overwrite=True,
    )
    return work / "merged"


def run(options: argparse.Namespace) -> dict[str, Any]:
    work, out = options.work, options.out.with_name(options.out.name + ".json")
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"accuracies": {}, "steps": {}}
    settings = {"steps": options.steps, "learning_rate": options.learning_rate}
    if result.setdefault("settings", settings) != settings:
        raise ValueError(f"{out} was made with {result['settings']}, not with {settings}. Name another --out.")
    prepare(work, options.seeds, options)

    def measured(key: str, split: str, make: Callable[[], Path]) -> dict[str, float]:
        name = f"{key} | {split}"
        if name not in result["accuracies"]:
            measure.stop_in_time(options)
            result["accuracies"][name] = accuracy(make(), split)
            print(name, result["accuracies"][name], flush=True)
            measure.write_json(out, result)
        return result["accuracies"][name]

    for seed in options.seeds:
        measured("base", "test", lambda: work / "base")
        for task in TASKS:
            measured(f"{task} {seed}", "test", lambda: work / f"{task}-{seed}")  # noqa: B023
    for task in TASKS:
        measured(f"{task} {options.seeds[0]}", "validation", lambda: work / f"{task}-{options.seeds[0]}")  # noqa: B023
    for method in options.methods:
        recipe = RECIPES[method]
        chosen = dict(recipe.options)
        if recipe.strength is not None:
            name, values = recipe.strength
            own = recipe.options.get(name, MERGE_METHODS[method].options[name].default)
            scores = {}
            for value in dict.fromkeys((own, *values)):
                tried = recipe.options | {name: value}
                key = f"{method} {json.dumps(tried, sort_keys=True)} {options.seeds[0]}"
                found = measured(key, "validation", lambda: merged(method, tried, work, options.seeds[0]))  # noqa: B023
                scores[value] = statistics.mean(found.values())
            chosen |= {name: max(scores, key=lambda value: scores[value])}
        for given in (recipe.options, chosen):
            for seed in options.seeds:
                key = f"{method} {json.dumps(given, sort_keys=True)} {seed}"
                measured(key, "test", lambda: merged(method, given, work, seed))  # noqa: B023
        result.setdefault("chosen", {})[method] = chosen
        measure.write_json(out, result)
    return result


def rows_of(result: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per method and setting: accuracy per task, and the normalized average over tasks, over the seeds."""
    accuracies = result["accuracies"]
    fine_tuned = {seed: {t: accuracies[f"{t} {seed} | test"][t] for t in TASKS} for seed in seeds}

    def row(
        method: str, setting: str, options: dict[str, Any] | None, found: list[dict[str, float]]
    ) -> dict[str, Any]:
        normalised = [
            statistics.mean(one[t] / fine_tuned[seed][t] for t in TASKS)
            for seed, one in zip(seeds, found, strict=True)
        ]
        return {
            "method": method,
            "setting": setting,
            "options": options,
            **{t: statistics.mean(one[t] for one in found) for t in TASKS},
            "normalised": statistics.mean(normalised),
            "deviation": statistics.stdev(normalised) if len(normalised) > 1 else None,
        }

    rows = [row("none: the base model", "", None, [accuracies["base | test"]] * len(seeds))]
    for task in TASKS:
        found = [accuracies[f"{task} {seed} | test"] for seed in seeds]
        rows.append(row(f"none: fine-tuned on {task}", "", None, found))
    for method, chosen in result.get("chosen", {}).items():
        for setting, options in (("published", RECIPES[method].options), ("tuned", chosen)):
            if setting == "tuned" and RECIPES[method].strength is None:
                continue
            key = f"{method} {json.dumps(options, sort_keys=True)}"
            found = [accuracies[f"{key} {seed} | test"] for seed in seeds]
            rows.append(row(method, setting, options, found))
    return rows


def report(result: dict[str, Any], seeds: Sequence[int], command: str) -> str:
    rows = result["rows"]
    head = ["method", "options", *TASKS, "normalised", "± over seeds"]
    cells = []
    for one in rows:
        setting = ", ".join(f"{name} {value:g}" for name, value in (one["options"] or {}).items())
        setting = " ".join(filter(None, (one["setting"] + (":" if setting else ""), setting)))
        cells.append([
            one["method"], setting, *(f"{one[t]:.1%}" for t in TASKS), f"{one['normalised']:.1%}",
            None if one["deviation"] is None else f"{one['deviation']:.1%}",
        ])  # fmt: skip
    sizes = ", ".join(f"{len(questions(t, 'test'))} of {t}" for t in TASKS)
    text = [
        "# Three tasks in one model\n",
        f"`{command}`\n",
        "Gemma 3 270M (vocabulary cut to the questions) fine-tuned on three kinds of questions, "
        f"{result['settings']['steps']} steps each at {result['settings']['learning_rate']:g}, seeds "
        f"{', '.join(map(str, seeds))}; merged by every method. Accuracy is the share of test questions ({sizes}; "
        "facts that no fine-tuning asked for) whose whole answer is the greedy continuation; *normalised* divides by "
        "the model that was fine-tuned on that task, and averages over the tasks. *tuned*: the strength with the best "
        "accuracy on the validation questions of the first seed. Methods for two models take the third in a second "
        "merge.\n",
        measure.markdown_table(head, cells),
    ]
    return "\n".join(text)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = {}
    for row in result["rows"]:
        if row["setting"]:
            best.setdefault(row["method"], {})[row["setting"]] = row
    order = sorted(best, key=lambda m: max(row["normalised"] for row in best[m].values()))
    figure, axis = pyplot.subplots(figsize=(8, 0.3 * len(order) + 1.4), layout="constrained")
    for setting, color, shift in (("published", "#9970ab", -0.2), ("tuned", "#1b7837", 0.2)):
        chosen = [(order.index(m), row[setting]) for m, row in best.items() if setting in row]
        axis.barh(
            [place + shift for place, _ in chosen], [row["normalised"] for _, row in chosen], 0.38, color=color,
            xerr=[row["deviation"] or 0.0 for _, row in chosen], label=setting, error_kw={"lw": 0.8},
        )  # fmt: skip
    base = next(row for row in result["rows"] if row["method"].endswith("base model"))
    axis.axvline(base["normalised"], color="black", linestyle=":", linewidth=0.9, label="base model")
    axis.axvline(1.0, color="black", linestyle="--", linewidth=0.9, label="three fine-tuned models")
    axis.set_yticks(range(len(order)), [name.replace("_", " ") for name in order], fontsize=8)
    axis.set_xlabel("normalised accuracy, mean of three tasks")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/merged_tasks"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json, OUT.md and OUT.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the same command resumes")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    try:
        result = run(options)
    except measure.OutOfTime:
        print("The time is up; run the same command again to resume.")
        return
    result["rows"] = rows_of(result, options.seeds)
    measure.write_json(options.out.with_name(options.out.name + ".json"), result)
    command = f"python -m benchmarks.merged_tasks --out benchmarks/results/{options.out.name}"
    write_text(options.out.with_name(options.out.name + ".md"), report(result, options.seeds, command))
    plot(result, options.out.with_name(options.out.name + ".png"))
    for folder in options.work.glob("merged*"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
