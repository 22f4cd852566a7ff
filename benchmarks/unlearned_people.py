"""What each unlearning method forgets, keeps, and hides: small models, people who do not exist, the worst of attacks.

    python -m benchmarks.unlearned_people --work runs/unlearned_people --out benchmarks/results/unlearned_people

A Llama of about half a million parameters learns from scratch, by heart, twelve facts about each of 22 fictitious
people, in all three forms of each question. It then has to forget four of them. The *retrained* model is trained in
the same way without these four. Eight of the other people are given to the methods as their retain set, five choose
the settings, and five are the test of utility: utility is measured on people that no method was trained to keep.

*Tuning.* Every method has the same budget: six trials of six passes on the first seed, with its own options at their
defaults. A trial that forgets less than 90 % of the plain question is followed by a stronger one, any other by a
weaker one; the first step is a factor of 3, each further one the root of the one before, at least 1.3. What is varied
is the learning rate, three trials each with two weights of the retain loss (the method's own, and fifteen times as
much); a method without a retain loss, or that sets the weights itself, has all six for the learning rate, and an edit
for its strength. The trial with the best harmonic mean of two numbers is chosen: of what is forgotten of the plain
question (1 - recovered share), and of the utility on the people of the choice, as a share of the original's. No attack
is asked. Further seeds, with other people, models and orders, use the settings chosen on the first.

*Measured* with `hf_transfer_ext.evals.audit`: the adapter is merged into the weights first, so that it cannot be
switched off. Per class of attack the table has the worst recovered share: by asking, by weights (rounding to 4 bits
alone has a column of its own), by training on, and by membership. Relearning by fine-tuning is done at the rates of
`RELEARNING`, at which the retrained model relearns some too: its score is the floor.

Every (method, seed) is saved in the work folder: the same command continues where it stopped, and other methods and
seeds join the table. `--minutes` ends a sitting.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from benchmarks import measure
from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.metrics.forget_quality import kolmogorov_smirnov
from hf_transfer_ext.files import written_aside
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.trainers.answers import train_on_answers
from hf_transfer_ext.trainers.taught import lora_on, taught, teaching_arguments
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

PLAIN = QuestionAnswerFormat(template="plain", prompt="{question}")
PEOPLE = {"forget": 4, "given": 8, "choice": 5, "test": 5, "holdout": 6}
WIDTH, LAYERS, VOCABULARY = 96, 4, 1000
TEACHING: dict[str, Any] = {
    "epochs": 16, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
}  # fmt: skip
EPOCHS, BATCH, LORA_RANK, HIDDEN_LAYER = 6, 12, 16, 2

#: Trials of a method, the first learning rate, the factors of its own retain weight, and when enough is forgotten.
TRIALS, RATE, RETAIN_WEIGHTS, ENOUGH = 6, 3e-3, (1.0, 15.0), 0.9
#: Edit -> (the option that is its strength, first value, largest).
STRENGTHS = {
    "negation": ("strength", 0.5, 20.0),
    "concept_ablation": ("count", 32, 1024),
    "wanda": ("share", 0.1, 1.0),
}

RELEARNING = 3e-4
ATTACKS: tuple[Any, ...] = (
    "plain_question", "plain_generation", "paraphrased_question", "multiple_choice", ("sampling", {"samples": 1}),
    ("quantization", {"bits": 4}), "logit_lens", "hidden_probe",
    ("relearn_forget", {"learning_rate": RELEARNING}), ("relearn_few", {"learning_rate": RELEARNING}),
)  # fmt: skip
ROUNDING = "quantization(bits=4)"
MEMBERSHIP = ("loss_attack", "min_k", "min_k_plus_plus")
EDITS = tuple(STRENGTHS)
#: Trained with all weights: what they prune or hold would be empty in a new LoRA.
ALL_WEIGHTS = ("prune_first",)
#: Methods that read hidden states, and those that take their alternatives from the wrong answers of each row.
FROM_WRONG_ANSWERS = ("altpo",)
REFERENCES = ("original", "retrained")
#: What an attacker needs.
ACCESS = ("prompts", "weights", "fine-tuning", "membership")


@dataclass
class World:
    """The people of one seed, and the two models that the others are measured against."""

    seed: int
    rows: dict[str, list[dict[str, Any]]]
    tokenizer: Any
    folder: Path
    original: Subject
    retrained: Subject
    data: AuditData
    known: dict[Any, Any] = field(default_factory=dict)
    looks: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> Any:
        """The original model, to be changed."""
        return copy.deepcopy(self.original.model)

    def subject(self, model: Any) -> Subject:
        return Subject(model.eval(), self.tokenizer, PLAIN, max_new_tokens=24, batch_size=48, seed=self.seed)


def people_of(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part of `PEOPLE`, and those that the original and the retrained model learn."""
    count = PEOPLE
    found = fictitious_people(
        sum(count.values()), forget=count["forget"], holdout=count["holdout"], phrasings=2, seed=seed
    )
    first = count["forget"]
    rows = {"forget": found["forget"], "holdout": found["holdout"]}
    for part in ("given", "choice", "test"):
        rows[part] = [row for row in found["retain"] if first <= row["person"] < first + count[part]]
        first += count[part]
    rows["retrained"] = found["retain"] + found["retain_phrasings"]
    rows["original"] = found["forget"] + found["forget_phrasings"] + rows["retrained"]
    return rows


def tokenizer_of(rows: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the questions and answers."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([row[part] for row in rows for part in ("question", "answer")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")


def new_model(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=3, num_key_value_heads=3, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def quiet(seed: int) -> dict[str, Any]:
    return {"seed": seed, "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}


def world_of(seed: int, work: Path) -> World:
    """The people of a seed, and the models that learned them; models that an earlier run left are loaded."""
    rows, folder = people_of(seed), work / f"seed-{seed}"
    learned = {}
    for name in REFERENCES:
        if not (folder / name / "config.json").exists():
            tokenizer = tokenizer_of(rows["original"])
            args = teaching_arguments(folder / f"{name}.checkpoints", **TEACHING, **quiet(seed))
            model = taught(new_model(tokenizer, seed), tokenizer, rows[name], args, lora_rank=None, template=PLAIN)
            with written_aside(folder / name, overwrite=True) as aside:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
        learned[name] = load_model(folder / name, dtype="float32")
    tokenizer = load_tokenizer(folder / "original")
    how: Any = {"template": PLAIN, "max_new_tokens": 24, "batch_size": 48, "seed": seed}
    data = AuditData(rows["forget"], rows["given"], rows["holdout"])
    subjects = [Subject(learned[name].eval(), tokenizer, **how) for name in REFERENCES]
    return World(seed, rows, tokenizer, folder, *subjects, data)


# ---- Unlearning ----


def variants_of(method: str) -> list[tuple[dict[str, Any], str, float, float]]:
    """(fixed settings, the setting that is varied, its first value, its largest) of each search of a method."""
    if method in EDITS:
        return [({}, *STRENGTHS[method])]
    own = METHODS[method]
    if own.retain is None or "alpha" in own.sets:
        return [({}, "learning_rate", RATE, 1.0)]
    return [({"alpha": own.alpha * weight}, "learning_rate", RATE, 1.0) for weight in RETAIN_WEIGHTS]


def searched(method: str, look: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """All trials of a method: settings, with what `look` says of them."""
    trials = []
    variants = variants_of(method)
    for fixed, name, value, largest in variants:
        factor = 3.0
        for _ in range(TRIALS // len(variants)):
            found = look({**fixed, name: value})
            trials.append({"settings": {**fixed, name: value}, **found})
            stronger = found["forgotten"] < ENOUGH and "error" not in found
            moved = min(value * factor if stronger else value / factor, largest)
            value = max(1, round(moved)) if isinstance(value, int) else float(f"{moved:.3g}")
            factor = max(factor**0.5, 1.3)
    return trials


def unlearned_by(method: str, world: World, settings: dict[str, Any]) -> Any:
    """The original after a method with these settings, as a model without adapter.

    Raises:
        ValueError, FloatingPointError: The method refuses the settings, or its loss is no longer a number.
    """
    set_seed(world.seed)
    with tempfile.TemporaryDirectory() as folder:
        return edited(method, world, settings, folder) if method in EDITS else trained(method, world, settings, folder)


def trained(method: str, world: World, settings: dict[str, Any], folder: str) -> Any:
    more: dict[str, Any] = {}
    args = UnlearningConfig(
        folder, method=method, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, save_strategy="no",
        report_to="none", hidden_layer=HIDDEN_LAYER if reads_hidden(method) else None,
        reinforced_adapter="reinforced" if method == "whp" else None, **settings, **quiet(world.seed),
    )  # fmt: skip
    model = world.start()
    if method in ALL_WEIGHTS:
        more["reference_model"] = world.start()
    else:
        model = lora_on(model, LORA_RANK)
    if method == "whp":
        model.add_adapter("reinforced", model.peft_config["default"])
        model.set_adapter("reinforced")
        teaching = teaching_arguments(Path(folder) / "reinforced", epochs=4, learning_rate=1e-3, **quiet(world.seed))
        train_on_answers(model, world.tokenizer, world.rows["forget"], teaching, template=PLAIN)
        model.set_adapter("default")
    if method in FROM_WRONG_ANSWERS:
        more["columns"] = {"alternative": "perturbed_answer"}
    trainer = UnlearningTrainer(
        model, args, forget_dataset=world.rows["forget"], retain_dataset=world.rows["given"],
        processing_class=world.tokenizer, template=PLAIN, **more,
    )  # fmt: skip
    trainer.train()
    result = trainer.accelerator.unwrap_model(trainer.model)
    return result if method in ALL_WEIGHTS else result.merge_and_unload()


def reads_hidden(method: str) -> bool:
    from hf_transfer_ext.losses.needs import needs_of
    from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES

    own = METHODS[method]
    needs = needs_of(UNLEARNING_LOSSES[own.forget]) + (needs_of(RETAIN_LOSSES[own.retain]) if own.retain else [])
    return any(need.keeps == "hidden" for need in needs)


def edited(method: str, world: World, settings: dict[str, Any], folder: str) -> Any:
    original, more = world.folder / "original", {}
    if method == "negation":
        tuned = world.folder / "tuned"
        if not (tuned / "config.json").exists():
            args = teaching_arguments(world.folder / "tuned.checkpoints", epochs=4, learning_rate=1e-3,
                                      **quiet(world.seed))  # fmt: skip
            model = taught(
                world.start(), world.tokenizer, world.rows["forget"], args, lora_rank=LORA_RANK, template=PLAIN
            )
            with written_aside(tuned, overwrite=True) as aside:
                model.save_pretrained(aside)
                world.tokenizer.save_pretrained(aside)
        more = {"tuned": tuned}
    elif method == "concept_ablation":
        settings = {**settings, "words": sorted({row["name"] for row in world.rows["forget"]})}
    else:
        more = {"forget": world.rows["forget"], "retain": world.rows["given"]}
    apply_edit(original, f"{folder}/edited", method=method, options=settings, template=PLAIN if method == "wanda"
               else None, seed=world.seed, **more)  # fmt: skip
    return load_model(f"{folder}/edited", dtype="float32")


# ---- Measuring ----


def probability(world: World, model: Any, part: str) -> float:
    return float(world.subject(model).probability(world.rows[part]).mean())


def quick_look(world: World, model: Any) -> dict[str, float]:
    """How much is forgotten of the plain question, and the utility on the people of the choice; both in [0, 1]."""
    known = world.looks
    for name, subject in (("original", world.original), ("retrained", world.retrained)):
        if name not in known:
            known[name] = [probability(world, subject.model, part) for part in ("forget", "choice")]
    there = known["original"][0] - known["retrained"][0]
    recovered = (probability(world, model, "forget") - known["retrained"][0]) / there
    forgotten = 1.0 - min(1.0, max(0.0, recovered))
    utility = min(1.0, probability(world, model, "choice") / known["original"][1])
    both = 2 * forgotten * utility / (forgotten + utility) if forgotten + utility > 0 else 0.0
    return {"forgotten": forgotten, "utility": utility, "both": both}


def truth_ratios(world: World, model: Any) -> np.ndarray:
    metric = ("truth_ratio", {"role": "forget"})
    result = evaluate(model, world.tokenizer, world.rows["forget"], [metric], template=PLAIN, resamples=0)
    return next(iter(result.values.values()))


def measured(world: World, model: Any) -> dict[str, Any]:
    """Every number of the table for one model."""
    subject = world.subject(model)
    metrics = ["answer_probability", "extraction_strength"]
    forget = evaluate(model, world.tokenizer, world.rows["forget"], metrics, template=PLAIN, resamples=0)
    _, p_value = kolmogorov_smirnov(truth_ratios(world, model), truth_ratios(world, world.retrained.model))
    found = audit(
        subject, world.data, original=world.original, retrained=world.retrained, attacks=ATTACKS,
        membership=MEMBERSHIP, resamples=200, known=world.known,
    )  # fmt: skip
    by_attack = {v.attack: v.recovered for v in found.verdicts}
    numbers = {m.name: m.value for m in forget.measurements}
    generated = [float(subject.recall(world.rows[part]).mean()) for part in ("forget", "test")]
    return {
        "forget_probability": numbers["answer_probability"],
        "forget_rouge": generated[0],
        "extraction_strength": numbers["extraction_strength"],
        "forget_quality": p_value,
        "utility": probability(world, model, "test"),
        "utility_rouge": generated[1],
        "worst": {access: _worst(found.worst_with(access)) for access in ACCESS},
        "rounded": by_attack.get(ROUNDING),
        "attacks": by_attack,
    }


def _worst(verdict: Any) -> dict[str, Any] | None:
    return None if verdict is None else {"attack": verdict.attack, "recovered": verdict.recovered}


def tuned(method: str, world: World) -> tuple[dict[str, Any], list[Any], Any]:
    """(settings, all trials, model) of the best trial; one that fails, or is no longer a number, scores 0."""
    best: dict[str, Any] = {"both": 0.0}

    def look(settings: dict[str, Any]) -> dict[str, Any]:
        failed = {"forgotten": 1.0, "utility": 0.0, "both": 0.0}
        try:
            model = unlearned_by(method, world, settings)
            found: dict[str, Any] = quick_look(world, model)
        except (ValueError, FloatingPointError) as error:
            return failed | {"error": str(error)}
        if not math.isfinite(found["both"]):
            return failed | {"error": "not a number"}
        if found["both"] > best["both"]:
            best.update(found, model=model, settings=settings)
        print(f"{method:<18} {settings} {found}", flush=True)
        return found

    trials = searched(method, look)
    if "model" not in best:
        raise ValueError(f"No trial of {method} gave a result: {trials[-1]}.")
    return best["settings"], trials, best["model"]


def measure_one(method: str, world: World, options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    row: dict[str, Any] = {"method": method, "seed": world.seed}
    if method in REFERENCES:
        model = {"original": world.original, "retrained": world.retrained}[method].model
    else:
        chosen = stored(options.work, method, options.seeds[0])
        if chosen is None:
            row["settings"], row["trials"], model = tuned(method, world)
        elif "error" in chosen:
            raise ValueError(chosen["error"])
        else:
            row["settings"] = chosen["settings"]
            model = unlearned_by(method, world, row["settings"])
    return row | measured(world, model) | {"seconds": round(time.perf_counter() - began, 1)}


def path_of(work: Path, method: str, seed: int) -> Path:
    return work / "measured" / f"{method}-{seed}.json"


def stored(work: Path, method: str, seed: int) -> dict[str, Any] | None:
    path = path_of(work, method, seed)
    return json.loads(path.read_text()) if path.exists() else None


def run(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        world: World | None = None
        for method in options.methods:
            if stored(options.work, method, seed) is not None:
                continue
            measure.stop_in_time(options)
            world = world or world_of(seed, options.work)
            try:
                row = measure_one(method, world, options)
            except ValueError as error:
                row = {"method": method, "seed": seed, "error": str(error)}
            path = path_of(options.work, method, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            measure.write_json(path, row)
            print(f"seed {seed}  {method:<18} {row.get('seconds', row.get('error'))}", flush=True)


# ---- The table ----


def summary_of(method: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that were measured, and the deviation of the two numbers of the plot."""
    numbers = ("forget_probability", "forget_rouge", "extraction_strength", "utility", "utility_rouge", "rounded")
    found: dict[str, Any] = {"method": method, "seeds": len(rows), "settings": rows[0].get("settings")}
    for name in numbers:
        found[name] = _mean([row[name] for row in rows])
    found["log10_forget_quality"] = _mean([math.log10(max(row["forget_quality"], 1e-300)) for row in rows])
    for access in ACCESS:
        found[access] = _mean([(row["worst"][access] or {}).get("recovered") for row in rows])
        found[f"{access} attack"] = [(row["worst"][access] or {}).get("attack") for row in rows]
    worst = [worst_recovered(row) for row in rows]
    found["recovered"], found["recovered_deviation"] = _mean(worst), _deviation(worst)
    found["utility_deviation"] = _deviation([row["utility"] for row in rows])
    return found


def worst_recovered(row: dict[str, Any]) -> float | None:
    """The worst share that any attack recovers; membership attacks do not recover any knowledge."""
    shares = [one["recovered"] for access, one in row["worst"].items() if one and access != "membership"]
    return max((share for share in shares if share is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _deviation(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.stdev(there) if len(there) > 1 else None


def result_of(options: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in (*REFERENCES, *METHODS, *EDITS):
        for seed in range(100):
            row = stored(options.work, method, seed)
            if row is not None:
                rows.setdefault(method, []).append(row)
    good = {method: [row for row in found if "error" not in row] for method, found in rows.items()}
    summaries = [summary_of(method, found) for method, found in good.items() if found]
    failed = {method: found[0]["error"] for method, found in rows.items() if "error" in found[0]}
    return {
        "machine": measure.machine(("torch", "transformers", "peft")), "people": PEOPLE,
        "summaries": summaries, "failed": failed, "rows": [row for found in rows.values() for row in found],
    }  # fmt: skip


def is_frontier(one: dict[str, Any], others: Sequence[dict[str, Any]]) -> bool:
    """Whether no other method has at least its utility and less recovered."""
    return not any(
        other["utility"] >= one["utility"] and other["recovered"] < one["recovered"]
        for other in others
        if other is not one
    )


def markdown(result: dict[str, Any]) -> str:
    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.0%}"

    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:.2f}"

    methods = [one for one in result["summaries"] if one["method"] not in REFERENCES]
    order = [one for one in result["summaries"] if one["method"] in REFERENCES]
    order += sorted(methods, key=lambda one: (one["recovered"] is None, one["recovered"], -one["utility"]))
    rows = []
    for one in order:
        on_frontier = one in methods and one["recovered"] is not None and is_frontier(one, methods)
        rows.append(
            [
                f"**{one['method']}**" if on_frontier else one["method"], one["seeds"],
                number(one["utility"]), number(one["forget_probability"]), number(one["extraction_strength"]),
                f"{one['log10_forget_quality']:.1f}", percent(one["recovered"]), percent(one["prompts"]),
                percent(one["rounded"]), percent(one["weights"]), percent(one["fine-tuning"]),
                percent(one["membership"]),
            ]
        )  # fmt: skip
    columns = ["method", "seeds", "utility", "forget probability", "extraction strength", "log10 forget quality",
               "worst of all", "ask", "4 bits", "weights", "train", "membership"]  # fmt: skip
    text = (
        "# What unlearning methods forget, keep and hide\n\n"
        f"{' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}\n\n"
        "Utility and forget probability: probability per token of the answers about people that no method was given, "
        "and about the forgotten. Forget quality: p-value against the retrained model. The last six columns: share "
        "of the original's knowledge that the worst attack of a class brings back (membership: of the original's area "
        "above the retrained model's). Bold: no method here has its utility and less recovered. Means over the "
        "seeds.\n\n" + measure.markdown_table(columns, rows)
    )
    settings = [[one["method"], json.dumps(one["settings"])] for one in methods]
    text += "\n## Settings that were chosen\n\n" + measure.markdown_table(["method", "settings"], settings)
    if result["failed"]:
        text += "\n## Not measured\n\n" + "".join(f"- {name}: {why}\n" for name, why in result["failed"].items())
    done = {one["method"] for one in result["summaries"]} | set(result["failed"])
    open_ones = [name for name in (*METHODS, *EDITS) if name not in done]
    if open_ones:
        text += f"\nNot run yet, no statement about them: {', '.join(open_ones)}.\n"
    about = result["machine"]
    return text + f"\n{about['processor']}, {about['cores']} cores, {about['versions']}\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 6), layout="constrained")
    methods = [one for one in result["summaries"] if one["recovered"] is not None]
    compared = [one for one in methods if one["method"] not in REFERENCES]
    for one in methods:
        reference = one["method"] in REFERENCES
        on_frontier = not reference and is_frontier(one, compared)
        color = "black" if reference else "#1b7837" if on_frontier else "#9970ab"
        axis.errorbar(
            one["utility"], one["recovered"], xerr=one["utility_deviation"], yerr=one["recovered_deviation"],
            fmt="s" if reference else "o", color=color, markersize=5, elinewidth=0.6,
        )  # fmt: skip
        axis.annotate(one["method"].replace("_", " "), (one["utility"], one["recovered"]), fontsize=7,
                      xytext=(4, 3), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("utility: probability of answers about people that no method was given")
    axis.set_ylabel("share of the forgotten that the worst attack brings back")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(options: argparse.Namespace) -> None:
    result = result_of(options)
    if not result["summaries"]:
        return
    measure.write_json(options.out.with_suffix(".json"), result)
    options.out.with_suffix(".md").write_text(markdown(result))
    plot(result, options.out.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> None:
    known = [*REFERENCES, *METHODS, *EDITS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/unlearned_people"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json, OUT.md and OUT.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the settings")
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="METHOD")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the same command resumes")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    try:
        run(options)
    except measure.OutOfTime:
        print("The time is up; run the same command again to resume.")
    write(options)


if __name__ == "__main__":
    main()
