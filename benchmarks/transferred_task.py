"""How much of a task an adapter keeps when it is moved to another base, by every transfer method.

    python -m benchmarks.transferred_task --work runs/transferred_task --out benchmarks/results/transferred_task

The bases are Gemma 3 270M, its vocabulary cut to the texts of this benchmark, and a student of it: 14 of its 18
layers, then trained on texts about countries and elements. The task is to rewrite a person's entry ("Anna Keller, 12
March 1984, Oslo") in another form ("Keller, A. (1984-03-12) Oslo"), learned from examples made on the spot; family
names and cities of the test appear in no training example. An answer counts where greedy decoding gives it exactly,
its end included.

The adapter moves from Gemma to the student ("down"), from a student's adapter to Gemma ("up") and, where `--second`
names the GGUF file of a model of another family, from Gemma to that model ("across"): another tokenizer, other shapes,
another number of layers. A closed form that refuses such a pair is listed with its reason. No option of a
method was chosen by the test examples: closed forms run with their defaults, and everything that is trained (the
source adapter, the transfer by training, the control on the true data) with one learning rate, until the loss on the
training data stops falling.

Every model and score is saved in the work folder: the same command continues where it stopped. `--minutes` stops it
after a time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, TrainingArguments

from benchmarks import measure
from hf_transfer_ext.adapters.transfer.by_training import train_lora, transfer_by_training
from hf_transfer_ext.adapters.transfer.compare import (
    SOURCE_ADAPTED,
    SOURCE_BASE,
    TARGET_BASE,
    TRUE_DATA,
    TransferRow,
    answer_tokens,
    random_of_same_norm,
    transfer_rows,
)
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.muscle import COMPATIBLE, MuscleConfig, train_compatible
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import (
    TransLoraSettings,
    read_discriminator,
    train_discriminator,
)
from hf_transfer_ext.adapters.transfer.travel import SEEDS_FILE
from hf_transfer_ext.data.facts import fact_texts, facts
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.students.inits.uniform_depth import uniform_depth
from hf_transfer_ext.students.shape import StudentShape
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.trainers.answers import train_on_answers

PLAIN = QuestionAnswerFormat(template="plain")
LAYERS = 14
EXAMPLES = {"train": 96, "test": 100}
#: Until the loss on the training data stops falling.
EPOCHS = {"gemma": 3.0, "student": 8.0, "second": 3.0}
#: The model of another family in the committed table.
SECOND = "Qwen2.5-Coder 0.5B Instruct"
CLOSED_FORMS = tuple(TRANSFER_METHODS)
METHODS = (TRUE_DATA, "random", *CLOSED_FORMS, "trans_lora", "muscle")
DIRECTIONS = {"down": ("gemma", "student"), "up": ("student", "gemma"), "across": ("gemma", "second")}
GIVEN = (
    "Anna Peter Maria Yusuf Ines Tomas Lena Paul Sofia David Amina Jonas Clara Marco Julia Daniel Laura Martin Fatima "
    "Andreas Helen Robert Nadia Stefan Alice Victor Emma Oscar Rosa Felix"
).split()
FAMILY = (
    "Keller Brandt Rossi Demir Moreau Novak Larsen Silva Weber Costa Fischer Lopez Martin Jansen Kim Schmidt Tanaka "
    "Murphy Dubois Ivanov Berg Santos Meyer Olsen Garcia Horvat Wagner Nilsson Fontaine Walker Bauer Ferrari Cohen "
    "Jones Petrov Romero Hansen Vogel Marino Clark"
).split()
MONTHS = ("January February March April May June July August September October November December").split()


def entries(split: str) -> list[dict[str, str]]:
    """Questions and answers of the task; family names and cities belong to one split."""
    draw = random.Random(f"entries/{split}")
    cities = sorted({fact.answer for fact in facts() if fact.relation == "capital" and "," not in fact.answer})
    test = split == "test"
    families = FAMILY[-12:] if test else FAMILY[:-12]
    places = [city for i, city in enumerate(cities) if (i % 4 == 0) == test]
    rows: dict[str, str] = {}
    while len(rows) < EXAMPLES[split]:
        given, family, place = draw.choice(GIVEN), draw.choice(families), draw.choice(places)
        day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1940, 2005)
        rows[f"{given} {family}, {day} {MONTHS[month - 1]} {year}, {place}"] = (
            f"{family}, {given[0]}. ({year}-{month:02}-{day:02}) {place}"
        )
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


def settings_of(base: str, seed: int) -> TransLoraSettings:
    """Of every training on `base`: source adapter, transfer by training and control on the true data alike."""
    return TransLoraSettings(
        rows=EXAMPLES["train"], input_tokens=28, answer_tokens=36, batch_size=16, rank=16, epochs=EPOCHS[base],
        learning_rate=1e-3, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        discriminator_epochs=2.0, discriminator_learning_rate=1e-3, task_name="personal entries", seed=seed,
    )  # fmt: skip


def texts_of_the_benchmark() -> list[str]:
    """All text that the bases have to know."""
    rows = entries("train") + entries("test")
    texts = [PLAIN.prompt.replace("{question}", row["question"]) + PLAIN.separator + row["answer"] for row in rows]
    texts += [row["text"] for split in ("train", "test") for row in fact_texts(split)]
    texts += [*GIVEN, *FAMILY, *MONTHS, "Here are 10 examples:\n1. 2. 3. 4. 5. 6.", *map(str, range(10))]
    return [
        *texts,
        "Answer in as few words as possible. Is the above question from the personal entries dataset? yes no",
    ]


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The model of a GGUF file, dequantized, and its tokenizer."""
    given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, quantization_config=dequantized, **given)
    return model, AutoTokenizer.from_pretrained(path.parent, **given)


def prepare_second(work: Path, gguf: Path) -> None:
    """The model of another family, its vocabulary cut to the same texts; it is kept where it exists."""
    if (work / "second" / "config.json").exists():
        return
    model, tokenizer, _ = trim_vocabulary(*load_gguf(gguf), texts_of_the_benchmark())
    _save(work / "second", model, tokenizer)


def prepare_bases(work: Path, healing_steps: int) -> None:
    """Gemma and its student, in folders of `work`; those that exist are kept."""
    if not (work / "gemma" / "config.json").exists():
        path = demo_model()
        model, tokenizer, _ = trim_vocabulary(load_model(path), load_tokenizer(path), texts_of_the_benchmark())
        _save(work / "gemma", model, tokenizer)
    if not (work / "student" / "config.json").exists():
        tokenizer = load_tokenizer(work / "gemma")
        student = uniform_depth(load_model(work / "gemma"), StudentShape(depth=LAYERS))
        arguments = TrainingArguments(
            str(work / "healing"), max_steps=healing_steps, per_device_train_batch_size=8, learning_rate=1e-4,
            warmup_steps=5, bf16=True, use_cpu=True, save_strategy="no", report_to="none", logging_steps=10,
        )  # fmt: skip
        train_on_answers(student, tokenizer, fact_texts("train"), arguments, template=PLAIN)
        _save(work / "student", student, tokenizer)


def source_adapter(work: Path, base: str, seed: int) -> Path:
    """The adapter that moves, trained on the task, with its seeds and discriminator."""
    folder = work / f"{base}-{seed}"
    settings, rows = settings_of(base, seed), entries("train")
    tokenizer = load_tokenizer(work / base)
    if not (folder / "adapter_config.json").exists():
        tuned = train_lora(
            work / base, tokenizer, rows, work / f"{base}-{seed}.training", settings, template=PLAIN, dtype="bfloat16"
        )
        with written_aside(folder) as aside:
            tuned.save_pretrained(str(aside))
    if not (folder / SEEDS_FILE).exists():
        model = load_model(work / base, dtype="bfloat16")
        inputs = [row["question"] for row in rows][:48]
        train_discriminator(model, tokenizer, inputs, folder, settings, template=PLAIN)
    return folder


def moved(method: str, work: Path, direction: str, seed: int, notes: dict[str, Any]) -> Path:
    """The adapter for the target, by one method."""
    source, target = DIRECTIONS[direction]
    folder = work / f"{direction}-{method.replace(' ', '-')}-{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    adapter, settings = source_adapter(work, source, seed), settings_of(target, seed)
    # Gemma writes the inputs: the student's training on sentences left it little of a sense for lists.
    settings = replace(settings, writer="source" if source == "gemma" else "target")
    if method == "trans_lora":
        report = transfer_by_training(
            adapter, work / target, folder, settings=settings, template=PLAIN, dtype="bfloat16", discriminator="copy",
            work=work / f"{folder.name}.stages",
        )  # fmt: skip
        notes["acceptance"] = report.acceptance
    elif method == "muscle":
        tokenizer = load_tokenizer(work / target)
        old = with_adapters(load_model(work / source, dtype="bfloat16"), [adapter])[0]
        own = moved(TRUE_DATA, work, direction, seed, notes)
        new = PeftModel.from_pretrained(load_model(work / target, dtype="bfloat16"), str(own), is_trainable=True)
        arguments = MuscleConfig(
            str(work / f"{folder.name}.training"), num_train_epochs=settings.epochs, bf16=True, use_cpu=True,
            learning_rate=settings.learning_rate, per_device_train_batch_size=settings.batch_size, seed=seed,
            save_strategy="no", report_to="none", logging_steps=5,
        )  # fmt: skip
        tuned = train_compatible(old, new, tokenizer, entries("train"), arguments, template=PLAIN)
        with written_aside(folder) as aside:
            tuned.save_pretrained(str(aside), selected_adapters=[COMPATIBLE])
            for path in (aside / COMPATIBLE).iterdir():
                path.rename(aside / path.name)
            (aside / COMPATIBLE).rmdir()
    elif method == TRUE_DATA:
        tuned = train_lora(
            work / target, load_tokenizer(work / target), entries("train"), work / f"{folder.name}.training", settings,
            template=PLAIN, dtype="bfloat16",
        )  # fmt: skip
        with written_aside(folder) as aside:
            tuned.save_pretrained(str(aside))
    else:
        texts = [row["text"] for row in fact_texts("test")][:40] if method in ("lorasuite", "ridge") else None
        random_one = method == "random"
        transfer_lora(
            adapter, work / target, folder, method=random_of_same_norm if random_one else method,
            options={"seed": seed} if random_one else None, texts=texts,
        )  # fmt: skip
    return folder


def run(options: argparse.Namespace) -> dict[str, Any]:
    work, out = options.work, options.out.with_name(options.out.name + ".json")
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"tokens": {}, "notes": {}}
    prepare_bases(work, options.healing_steps)
    if "across" in options.directions:
        prepare_second(work, options.second)
    test = entries("test")

    def measured(key: str, base: str, adapter: Path | None) -> None:
        model = load_model(work / base, dtype="bfloat16")
        if adapter is not None:
            model = with_adapters(model, [adapter])[0]
        found = answer_tokens(model.eval(), load_tokenizer(work / base), test, template=PLAIN)
        result["tokens"][key] = [round(float(one), 4) for one in found]
        print(f"{key}: {(found == 1).mean():.1%} of answers, {found.mean():.1%} of tokens", flush=True)
        measure.write_json(out, result)

    for seed in options.seeds:
        for direction in options.directions:
            source, target = DIRECTIONS[direction]
            for base in (source, target):
                if base not in result["tokens"]:
                    measured(base, base, None)
            if f"{source} {seed}" not in result["tokens"]:
                measure.stop_in_time(options)
                measured(f"{source} {seed}", source, source_adapter(work, source, seed))
            for method in options.methods:
                key = f"{direction} {method} {seed}"
                notes = result["notes"].setdefault(key, {})
                if key not in result["tokens"] and "refused" not in notes:
                    measure.stop_in_time(options)
                    try:
                        adapter = moved(method, work, direction, seed, notes)
                    except ValueError as error:
                        if method not in (*CLOSED_FORMS, "muscle"):
                            raise
                        notes["refused"] = str(error).replace(str(work), "")
                        print(f"{key}: refused: {error}", flush=True)
                        continue
                    measured(key, target, adapter)
            known = read_discriminator(work / f"{source}-{seed}")
            if known is not None:
                result["notes"][f"{source} {seed}"] = {
                    "separation": known.separation, "threshold": known.threshold,
                }  # fmt: skip
    measure.write_json(out, result)
    return result


def runs_of(result: dict[str, Any], direction: str) -> dict[int, dict[str, np.ndarray]]:
    """Seed -> model -> share of right tokens of each test answer, for the seeds that every method has finished."""
    source, target = DIRECTIONS[direction]
    tokens = {key: np.array(shares) for key, shares in result["tokens"].items()}
    found = {}
    for seed in range(100):
        keys = {
            SOURCE_BASE: source, SOURCE_ADAPTED: f"{source} {seed}", TARGET_BASE: target,
            **{
                method: key for method in METHODS
                if "refused" not in result["notes"].get(key := f"{direction} {method} {seed}", {})
            },
        }  # fmt: skip
        if all(key in tokens for key in keys.values()):
            found[seed] = {name: tokens[key] for name, key in keys.items()}
    return found


def verdicts(rows: Sequence[TransferRow]) -> dict[str, str]:
    """Closed form -> whether its 95 % interval lies above, below or across that of random factors."""
    by_name = {row.name: row.accuracy.interval for row in rows}
    limit = by_name["random"]
    said = {}
    for name in CLOSED_FORMS:
        if name not in by_name:
            continue
        own = by_name[name]
        if own is None or limit is None:
            said[name] = "not decided"
        elif own[0] > limit[1]:
            said[name] = "better than random"
        elif own[1] < limit[0]:
            said[name] = "worse than random"
        else:
            said[name] = "no better than random"
    return said


def report(result: dict[str, Any], command: str) -> str:
    """The tables, with what they do and do not show."""
    text = ["# One task, moved to another base\n", f"`{command}`\n"]
    tasks = entries("test")
    text.append(
        f"Gemma 3 270M and a student of {LAYERS} of its 18 layers (vocabulary cut, then trained on texts about "
        "countries and elements). The task rewrites a person's entry: "
        f"“{tasks[0]['question']}” becomes “{tasks[0]['answer']}”; "
        f"{EXAMPLES['train']} training examples, {len(tasks)} test examples whose family names and cities are new. "
        "*accuracy*: the exact answer is the greedy continuation. *retention*: share of the source adapter's gain. "
        "*negative flips*: share of test examples that the source answers with its adapter and the new model does "
        "not. *tokens*: share of the answer's tokens that are the most probable ones after the right tokens before "
        "them, which shows what the exact answer hides. Means over the seeds; 95 % bootstrap intervals over the test "
        "examples. Closed forms run with their defaults; no option was chosen by the test examples. trans_lora sees "
        "no training example beyond its five seeds; true data and muscle, which starts from it and learns for as long "
        "again to keep the source's right answers, see them all. "
        f"Training on Gemma takes {EPOCHS['gemma']:g} epochs and on the student {EPOCHS['student']:g}: in "
        "a first try with 3 epochs its training loss was still falling, and the control on the true data answered "
        "42 %.\n"
    )
    for direction, (source, target) in DIRECTIONS.items():
        runs = runs_of(result, direction)
        title = {"gemma": "Gemma 3 270M", "student": "its student", "second": SECOND}
        text.append(f"## From {title[source]} to {title[target]}\n")
        if not runs:
            text.append("Not measured.\n")
            continue
        rows = transfer_rows([{name: (one == 1) * 1.0 for name, one in run.items()} for run in runs.values()])
        token_rows = transfer_rows(list(runs.values()))
        text.append(f"Seeds: {', '.join(map(str, runs))}.\n")
        cells = [
            [row.name, *map(_share, (row.accuracy, row.retention, row.negative_flips, tokens.accuracy))]
            for row, tokens in zip(rows, token_rows, strict=True)
        ]
        head = ["", "accuracy", "retention", "negative flips", "tokens"]
        text.append(measure.markdown_table(head, cells))
        for what, measured in (("answers", rows), ("tokens", token_rows)):
            said = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts(measured).items())
            text.append(f"Closed forms beside random factors, by {what}: {said}.\n")
        refusals = {
            f"{method}: {note['refused']}"
            for method in METHODS
            for seed in runs
            if "refused" in (note := result["notes"].get(f"{direction} {method} {seed}", {}))
        }
        text += [f"Refused: {one}\n" for one in sorted(refusals)]
        accepted = [result["notes"][f"{direction} trans_lora {seed}"]["acceptance"] for seed in runs]
        areas = [result["notes"][f"{source} {seed}"]["separation"] for seed in runs]
        text.append(
            f"The discriminator ranks {np.mean(areas):.0%} of the pairs of a real and a synthetic input correctly and "
            f"accepted {np.mean(accepted):.0%} of the synthetic inputs, by a threshold from held-out inputs.\n"
        )
    text.append("The student's layers come from Gemma; only the pair with the second model crosses families.\n")
    return "\n".join(text)


def _share(measurement: Any) -> str | None:
    if measurement is None:
        return None
    low, high = measurement.interval or (float("nan"), float("nan"))
    return f"{measurement.value:.1%} ({low:.0%} to {high:.0%})"


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/transferred_task"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="path without ending; .json and .md are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--directions", nargs="+", default=["down", "up"], choices=list(DIRECTIONS))
    parser.add_argument("--second", type=Path, help=f"GGUF file of {SECOND}, for the direction across")
    parser.add_argument("--healing-steps", type=int, default=120, help="training steps of the student on texts")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many; the same command continues")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    if "across" in options.directions and options.second is None:
        parser.error("the direction across needs --second FILE.gguf")
    try:
        result = run(options)
    except measure.OutOfTime:
        print("The time is up; the same command continues from here.")
        result = json.loads(options.out.with_name(options.out.name + ".json").read_text())
    seeds = " ".join(map(str, options.seeds))
    command = f"python -m benchmarks.transferred_task --out benchmarks/results/{options.out.name} --seeds {seeds}"
    command += f" --directions {' '.join(options.directions)}" + " --second FILE.gguf" * (options.second is not None)
    write_text(options.out.with_name(options.out.name + ".md"), report(result, command))


if __name__ == "__main__":
    main()
