"""What each loss and signal of distillation brings: one teacher, one student, equal steps and equal time.

    python -m benchmarks.distilled_facts --work runs/distilled_facts --out benchmarks/results/distilled_facts

*Texts.* Gemma 3 270M, its vocabulary cut to the texts and fine-tuned on what two packages know of countries and
elements, teaches a student: 4 of its 18 layers, trained on the same texts before. Every run starts from the same
student and has the same batches, learning rate (constant after a warmup) and optimizer. What is measured, on texts of
countries and elements that were not in training: perplexity of the real text, KL and agreement with the teacher, and
multiple-choice questions. Intervals are 95 %, over texts (or questions), of the mean over the seeds; the gain is also
given for each seed.

*Signals.* The signal of the teacher has half of the weight and cross entropy the other half; *cross entropy* alone has
no teacher. A hidden loss, with its default weight and options, is added to forward KL and compares layers by a uniform
map; as in their papers, minilm and attention_relation compare the last layers alone, and dual_head is added to cross
entropy. talking_models cuts both models in the middle. The two specialists were fine-tuned like the teacher, one on
the texts of countries and one on those of elements; *column* sends each text to its specialist. That and a teacher of
another family need whole texts: six of them, about as many tokens as two packed rows.

*Equal time*: the steps that fit into the time of forward KL's, by the median processor time of five steps with a
teacher that runs at every step (a cache is complete before the first). A signal within a tenth of that time keeps its
result. A run goes to the larger number of steps and is measured at both.

In these runs the frozen teacher does not run twice on the same text: its last hidden states are kept and read again,
which changes no result. Under hidden losses and with several teachers it runs at every step.

*Answers*: the task of `benchmarks.transferred_task`, with exact answers, for what the student writes itself: the
teacher is Gemma with the adapter that learned the task, the student has 14 layers and learned the task halfway, so
that what it writes is worth reading. All writers have the same prompts, steps and batches. The learning rate is 5e-5,
and 1e-5 for the policy gradients of sampled_reverse_kl and minillm, whose noise at 5e-5 destroys such a student; a
further row shows that gkd gains from 1e-5, too. No other rate was tried. The teacher is the only source of what is
right, except for `data`, and the measure is the share of exact answers to new questions.

Every number is saved at once: the same command continues where it stopped. `--minutes` ends a sitting.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks import measure, transferred_task
from hf_transfer_ext.adapters.transfer.compare import answered_exactly
from hf_transfer_ext.data.facts import fact_questions, fact_texts
from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.language import as_choices
from hf_transfer_ext.evals.metric import weighted_mean
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.spans import SPAN_LOSSES
from hf_transfer_ext.measurement.bootstrap import interval_of
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.students.inits.uniform_depth import uniform_depth
from hf_transfer_ext.students.shape import StudentShape
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.teachers.cache import fill_cache
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.named_teachers import COMBINATIONS
from hf_transfer_ext.trainers.taught import taught

LAYERS, ROWS, STEPS, RATE, TIMED_STEPS = 4, 2, 32, 5e-5, 5
#: Of the fine-tuning of the teachers, and of the student before all runs.
TRAINED_BEFORE = {"kd_weight": 0.0, "ce_weight": 1.0, "lr_scheduler_type": "cosine"}
TEACHING, HEALING = {"max_steps": 60, "learning_rate": 1e-3}, {"max_steps": 200, "learning_rate": 5e-4}
PLAIN = transferred_task.PLAIN
REFERENCE, ALONE = "forward_kl", "cross entropy"
#: About as many tokens as in packed rows, which three texts fill.
UNPACKED = {"packing": False, "per_device_train_batch_size": 3 * ROWS}
SPECIALISTS = ("countries", "elements")
#: What a hidden loss needs, or has in its paper, besides its defaults.
HIDDEN_SETTINGS: dict[str, dict[str, Any]] = {
    "minilm": {"layer_map": [[-1, -1]]},
    "attention_relation": {"layer_map": [[-1, -1]]},
    "talking_models": {"layer_map": [[LAYERS // 2, 9]]},
    "dual_head": {"kd_weight": 0.0, "ce_weight": 1.0},
}
#: Signal -> what it changes of the settings of forward KL.
SIGNALS: dict[str, dict[str, Any]] = {
    ALONE: {"kd_weight": 0.0, "ce_weight": 1.0},
    **{name: {"loss": name} for name in DISTILLATION_LOSSES},
    **{
        f"{'cross entropy' if name == 'dual_head' else 'forward_kl'} + {name}": {"hidden_loss": name}
        | HIDDEN_SETTINGS.get(name, {})
        for name in HIDDEN_LOSSES
    },
    **{
        f"cache: {kind}": {"teacher_cache": kind, "teacher_cache_options": {"kind": kind}}
        for kind in ("top", "top_and_samples", "samples")
    },
    **{f"two specialists by {way}": {"teachers_by": way} for way in COMBINATIONS},
    **{f"another family: {name}": {"loss": name} for name in SPAN_LOSSES},
}
WRITER_STEPS, WRITER_ROWS, WRITER_RATE, POLICY_RATE = 16, 8, 5e-5, 1e-5
#: Who writes the texts of the task -> settings.
WRITERS: dict[str, dict[str, Any]] = {
    "data": {"kd_weight": 0.0, "ce_weight": 1.0},
    "data, with the teacher's probabilities": {},
    "teacher": {"on_policy": "gkd", "on_policy_share": 0.0, "teacher_writes": True},
    "student and teacher (gkd)": {"on_policy": "gkd", "on_policy_share": 0.5, "teacher_writes": True},
    "student (gkd)": {"on_policy": "gkd", "on_policy_share": 1.0, "loss": "reverse_kl"},
    "student (gkd), learning rate 1e-5": {
        "on_policy": "gkd",
        "on_policy_share": 1.0,
        "loss": "reverse_kl",
        "learning_rate": POLICY_RATE,
    },
    "student (sampled_reverse_kl)": {
        "on_policy": "sampled_reverse_kl",
        "loss": "reverse_kl",
        "learning_rate": POLICY_RATE,
    },
    "student (distillm)": {"on_policy": "distillm", "on_policy_share": 0.5, "loss": "skew_kl"},
    "student (distillm_2)": {"on_policy": "distillm_2", "loss": "skew_kl"},
    "student (minillm)": {"on_policy": "minillm", "loss": "reverse_kl", "learning_rate": POLICY_RATE},
}
#: Of the student of the task before all runs.
HALFWAY = {"max_steps": 12, "learning_rate": 5e-5, "warmup_steps": 5}


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def specialist_of(row: dict[str, str]) -> str:
    """Which of the two specialists learned a text of the training data."""
    asked = ("chemical symbol", "atomic number", "group of elements", "discovered")
    of_elements = row["source"] in ("element", "description") or (
        row["source"] == "question" and any(words in row["text"] for words in asked)
    )
    return SPECIALISTS[of_elements]


def prepare(work: Path, second: Path | None) -> None:
    """The teachers and the student at its start, in folders of `work`; those that exist are kept."""
    texts, questions = fact_texts("train"), fact_questions("train")
    known = [row["text"] for row in texts + fact_texts("test")]
    for row in questions + fact_questions("test"):
        known += [
            PLAIN.prompt.replace("{question}", row["question"]) + PLAIN.separator,
            row["answer"],
            *row["choices"],
        ]
    if not (work / "gemma" / "config.json").exists():
        path = demo_model()
        model, tokenizer, _ = trim_vocabulary(load_model(path), load_tokenizer(path), known)
        _save(work / "gemma", model, tokenizer)
    if not (work / "second" / "config.json").exists() and second is not None:
        model, tokenizer, _ = trim_vocabulary(*transferred_task.load_gguf(second), known)
        _save(work / "second", model, tokenizer)
    lessons = {"gemma-teacher": texts, "second-teacher": texts}
    lessons |= {f"gemma-{name}": [row for row in texts if specialist_of(row) == name] for name in SPECIALISTS}
    for name, rows in lessons.items():
        base = name.partition("-")[0]
        if (work / base).exists() and not (work / name / "config.json").exists():
            arguments = settings(work / "teaching", **TRAINED_BEFORE, per_device_train_batch_size=4, **TEACHING)
            taught(
                load_model(work / base), load_tokenizer(work / base), Dataset.from_list(rows), arguments,
                folder=work / name,
            )  # fmt: skip
    if not (work / "student" / "config.json").exists():
        tokenizer = load_tokenizer(work / "gemma-teacher")
        student = uniform_depth(load_model(work / "gemma-teacher"), StudentShape(depth=LAYERS))
        arguments = settings(work / "healing", **TRAINED_BEFORE, **HEALING)
        DistillationTrainer(student, None, arguments, Dataset.from_list(texts), processing_class=tokenizer).train()
        _save(work / "student", student, tokenizer)


def settings(folder: Path, steps: int = STEPS, seed: int = 0, **changes: Any) -> DistillationConfig:
    """What all runs have in common, and what one of them changes."""
    given: dict[str, Any] = {
        "loss": REFERENCE, "kd_weight": 0.5, "ce_weight": 0.5, "max_steps": steps, "learning_rate": RATE,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "per_device_train_batch_size": ROWS,
        "max_length": 128, "packing": True, "gradient_checkpointing": False, "save_strategy": "no",
        "report_to": "none", "logging_steps": 10, "seed": seed, "disable_tqdm": True,
    }  # fmt: skip
    return DistillationConfig(str(folder), **given | changes)


def remember(model: Any) -> Any:
    """Let a frozen decoder run once on each document: its last hidden states are kept, and given again.

    Documents are rows padded on the right, or the parts of a packed row, which start at position 0. The hidden states
    of one depend on itself alone, since attention looks back and not into other documents.
    """
    run, kept = model.model.forward, {}

    def forward(input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        if attention_mask is None and position_ids is not None and len(input_ids) == 1:
            starts = [*torch.nonzero(position_ids[0] == 0).flatten().tolist(), input_ids.shape[1]]
            places = [(0, slice(start, end)) for start, end in pairwise(starts)]
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            lengths = mask.sum(1).tolist()
            if any(not mask[row, :length].all() for row, length in enumerate(lengths)):
                raise ValueError("Documents padded on the left are not remembered.")
            places = [(row, slice(length)) for row, length in enumerate(lengths)]
        keys = [tuple(input_ids[place].tolist()) for place in places]
        if any(key not in kept for key in keys):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            states = run(**given, **more).last_hidden_state
            kept.update({key: states[place].clone() for key, place in zip(keys, places, strict=True)})
        first = kept[keys[0]]
        states = first.new_zeros(*input_ids.shape, first.shape[-1])
        for key, place in zip(keys, places, strict=True):
            states[place] = kept[key]
        return BaseModelOutputWithPast(last_hidden_state=states)

    model.model.forward = forward
    return model


class StepSeconds(TrainerCallback):
    """Processor seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


class AtSteps(TrainerCallback):
    """Calls `measured(steps)` after some numbers of steps."""

    def __init__(self, steps: Sequence[int], measured: Callable[[int], None]) -> None:
        self.steps, self.measured = steps, measured

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.measured(state.global_step)


def trainer_of(work: Path, signal: str, seed: int, steps: int, teacher_of: Callable[[str], Any]) -> Any:
    """The trainer of a run, and what it starts from."""
    changes = dict(SIGNALS[signal])
    tokenizer, student = load_tokenizer(work / "student"), load_model(work / "student")
    teacher: Any = None
    extra: dict[str, Any] = {}
    if "teacher_cache" in changes:
        # Complete before the first step, as from the second epoch on: what is measured is the signal, not its capture.
        changes["teacher_cache"] = str(work / f"cache-{changes['teacher_cache']}")
    texts = fact_texts("train")
    if "teachers_by" in changes:
        changes["teachers"] = [{"model": str(work / f"gemma-{name}"), "name": name} for name in SPECIALISTS]
        if changes["teachers_by"] == "column":
            texts = [{"text": row["text"], "teacher": specialist_of(row)} for row in texts]
            changes |= UNPACKED
    elif signal.startswith("another family"):
        teacher = teacher_of("second-teacher")
        extra["teacher_processing_class"] = load_tokenizer(work / "second-teacher")
        changes |= UNPACKED
    elif "hidden_loss" in changes:
        teacher = load_model(work / "gemma-teacher")
    elif signal != ALONE:
        teacher = teacher_of("gemma-teacher")
    arguments = settings(work / "training", steps, seed, **changes)
    trainer = DistillationTrainer(
        student, teacher, arguments, Dataset.from_list(texts), processing_class=tokenizer, **extra
    )
    if "teacher_cache" in changes:
        fill_cache(
            trainer.teacher, trainer.train_dataset, batch_size=16, accelerator=trainer.accelerator, student=student
        )
    return trainer


def seconds_of_a_step(work: Path, signal: str, teacher_of: Callable[[str], Any]) -> float:
    """Median processor seconds of a step in which the teacher runs, after the first."""
    live = teacher_of if "teacher_cache" in SIGNALS[signal] else lambda name: load_model(work / name)
    trainer, clock = trainer_of(work, signal, 0, TIMED_STEPS + 1, live), StepSeconds()
    trainer.add_callback(clock)
    trainer.train()
    return statistics.median(clock.seconds[1:])


def measured_on_texts(student: Any, work: Path, teacher: Any = None) -> dict[str, list[float]]:
    """Per text: nats per token, KL, agreement, and its tokens; per question: whether the choice is right."""
    tokenizer = load_tokenizer(work / "student")
    metrics = ["nats_per_token", *(["kl_to_reference", "token_agreement"] if teacher is not None else [])]
    student.eval()
    found = evaluate(student, tokenizer, fact_texts("test"), metrics, reference=teacher, resamples=0)
    questions = as_choices(fact_questions("test"))
    answered = evaluate(student, tokenizer, questions, ["choice_accuracy"], template=PLAIN, resamples=0)
    values = {**found.values, **answered.values, "tokens": np.array([len(one.answer) for one in found.scored])}
    return {name.split("(")[0]: [round(float(one), 4) for one in rows] for name, rows in values.items()}


def task_settings(folder: Path, writer: str, seed: int = 0, **changes: Any) -> DistillationConfig:
    given: dict[str, Any] = {"packing": False, "kd_weight": 1.0, "ce_weight": 0.0, "learning_rate": WRITER_RATE}
    given |= {"per_device_train_batch_size": WRITER_ROWS, "warmup_steps": 2}
    if "on_policy" in WRITERS[writer]:
        given["max_new_tokens"] = 36
    return settings(folder, WRITER_STEPS, seed, **given | WRITERS[writer] | changes)


def task_rows(tokenizer: Any) -> Dataset:
    """The training examples of the task, as prompts and completions."""
    return Dataset.from_list(
        [
            {
                "prompt": PLAIN.prompt.replace("{question}", row["question"]) + PLAIN.separator,
                "completion": row["answer"] + tokenizer.eos_token,
            }
            for row in transferred_task.entries("train")
        ]
    )


def prepare_task(work: Path, task: Path) -> None:
    """The student halfway to the task and the teacher that learned it, in folders of `work`."""
    transferred_task.prepare_bases(task, 120)
    if not (work / "task-student" / "config.json").exists():
        tokenizer, student = load_tokenizer(task / "student"), load_model(task / "student", dtype="bfloat16").float()
        arguments = task_settings(work / "training", "data", **HALFWAY)
        rows = task_rows(tokenizer)
        DistillationTrainer(student, None, arguments, rows, processing_class=tokenizer).train()
        _save(work / "task-student", student, tokenizer)
    if not (work / "task-teacher" / "config.json").exists():
        base = load_model(task / "gemma", dtype="bfloat16")
        adapter = transferred_task.source_adapter(task, "gemma", 0)
        teacher = with_adapters(base, [adapter])[0].merge_and_unload()
        _save(work / "task-teacher", teacher, load_tokenizer(task / "gemma"))


def written(work: Path, writer: str, seed: int) -> Any:
    """The student of the task after training on texts that `writer` wrote."""
    tokenizer, student = load_tokenizer(work / "task-student"), load_model(work / "task-student")
    arguments = task_settings(work / "training", writer, seed)
    teacher = load_model(work / "task-teacher", dtype="bfloat16") if arguments.is_taught else None
    DistillationTrainer(student, teacher, arguments, task_rows(tokenizer), processing_class=tokenizer).train()
    return student.eval()


def run(options: argparse.Namespace) -> dict[str, Any]:
    work, out = options.work, options.out.with_name(options.out.name + ".json")
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in ("texts", "step_s", "steps", "answers"):
        result.setdefault(part, {})
    prepare(work, options.second)
    teacher_of = functools.cache(lambda name: remember(load_model(work / name)))
    teacher = teacher_of("gemma-teacher")
    for name, folder in (("teacher", "gemma-teacher"), ("student before", "student")):
        if name not in result["texts"]:
            against = None if name == "teacher" else teacher
            result["texts"][name] = measured_on_texts(load_model(work / folder), work, against)
    signals = [one for one in options.signals if not one.startswith("another family") or options.second is not None]
    for signal in [REFERENCE, *signals]:
        if signal not in result["step_s"]:
            measure.stop_in_time(options)
            result["step_s"][signal] = seconds_of_a_step(work, signal, teacher_of)
            print(f"{signal}: {result['step_s'][signal]:.2f} s a step", flush=True)
            write_text(out, json.dumps(result) + "\n")
    for seed in options.seeds:
        for signal in signals:
            asked = {budget: steps_of(result, signal, options.steps, budget) for budget in ("steps", "time")}
            keys = {f"{signal} | {budget} | {seed}": steps for budget, steps in asked.items() if steps is not None}
            if all(key in result["texts"] for key in keys):
                continue
            measure.stop_in_time(options)
            trainer = trainer_of(work, signal, seed, max(keys.values()), teacher_of)
            found: dict[int, Any] = {}

            def measured(steps: int, found: dict[int, Any] = found, trainer: Any = trainer) -> None:
                found[steps] = measured_on_texts(trainer.accelerator.unwrap_model(trainer.model), work, teacher)
                trainer.model.train()

            trainer.add_callback(AtSteps(list(keys.values()), measured))
            trainer.train()
            for key, steps in keys.items():
                result["steps"][key], result["texts"][key] = steps, found[steps]
                nats = np.average(found[steps]["nats_per_token"], weights=found[steps]["tokens"])
                print(f"{key}: {steps} steps, {nats:.3f} nats per token", flush=True)
            write_text(out, json.dumps(result) + "\n")
    if options.task is not None:
        run_task(options, result, out)
    return result


def steps_of(result: Mapping[str, Any], signal: str, steps: int, budget: str) -> int | None:
    """How many steps a run has; None where the run of equal steps is that of equal time, or its time is not known."""
    if budget == "steps":
        return steps
    own, other = (result["step_s"].get(name) for name in (signal, REFERENCE))
    if own is None or other is None:
        return None
    fitting = max(1, round(steps * other / own))
    return None if abs(fitting - steps) <= steps / 10 else fitting


def run_task(options: argparse.Namespace, result: dict[str, Any], out: Path) -> None:
    """The second table: who writes the texts. `options.task` is the work folder of `benchmarks.transferred_task`."""
    work, test = options.work, transferred_task.entries("test")
    prepare_task(work, options.task)
    tokenizer = load_tokenizer(work / "task-student")

    def note(key: str, model: Any, seconds: float | None = None) -> None:
        right = answered_exactly(model.eval(), tokenizer, test, template=PLAIN)
        result["answers"][key] = {"right": right.tolist(), "cpu_s": seconds}
        print(f"{key}: {right.mean():.1%} right", flush=True)
        write_text(out, json.dumps(result) + "\n")

    for name, folder, dtype in (
        ("teacher itself", "task-teacher", "bfloat16"),
        ("student before", "task-student", "auto"),
    ):
        if name not in result["answers"]:
            note(name, load_model(work / folder, dtype=dtype))
    for seed in options.seeds:
        for writer in options.writers:
            if f"{writer} | {seed}" not in result["answers"]:
                measure.stop_in_time(options)
                began = time.process_time()
                student = written(work, writer, seed)
                note(f"{writer} | {seed}", student, round(time.process_time() - began, 1))


def by_seed(result: Mapping[str, Any], signal: str, budget: str, metric: str) -> dict[str, np.ndarray]:
    """Seed -> values per text or question. A signal whose run of equal steps is that of equal time has it in both."""
    found = {}
    for key, one in result["texts"].items():
        name, _, rest = key.partition(" | ")
        if name == signal and metric in one:
            asked, _, seed = rest.partition(" | ")
            if asked == budget or (asked in ("", "steps") and f"{signal} | {budget} | {seed}" not in result["texts"]):
                found[seed] = np.array(one[metric])
    return found


def over_seeds(result: Mapping[str, Any], signal: str, budget: str, metric: str) -> np.ndarray | None:
    """Per text or question: the mean over the seeds."""
    found = by_seed(result, signal, budget, metric)
    return np.mean(list(found.values()), axis=0) if found else None


def gains(result: Mapping[str, Any], signal: str, budget: str) -> dict[str, np.ndarray]:
    """Seed -> per text: by how many nats per token the signal is better than cross entropy alone of the same seed."""
    own, alone = (by_seed(result, name, budget, "nats_per_token") for name in (signal, ALONE))
    return {seed: alone[seed] - own[seed] for seed in own if seed and seed in alone}


def _cell(values: np.ndarray | None, weights: np.ndarray | None, form: str) -> str | None:
    if values is None:
        return None
    weights = np.ones(len(values)) if weights is None else weights.astype(float)
    low, high = interval_of(weighted_mean, [[values, weights]]) or (float("nan"), float("nan"))
    return f"{np.average(values, weights=weights):{form}} ({low:{form}} to {high:{form}})"


def report(result: Mapping[str, Any], command: str) -> str:
    """The tables."""
    text = [f"# What the signals of a teacher bring\n\n`{command}`\n"]
    text += [" ".join(part.split()) + "\n" for part in (__doc__ or "").split("\n\n")[2:6]]
    tokens = np.array(result["texts"]["teacher"]["tokens"])
    for budget in ("steps", "time"):
        rows = []
        for signal in ("teacher", "student before", *SIGNALS):
            nats = over_seeds(result, signal, budget, "nats_per_token")
            if nats is None:
                continue
            gained = gains(result, signal, budget) if signal != ALONE else {}
            each = [np.average(one, weights=tokens) for one in gained.values()]
            mean = np.mean(list(gained.values()), axis=0) if gained else None
            steps = [result["steps"].get(f"{signal} | {one} | {seed}") for one in (budget, "steps") for seed in gained]
            steps += [result["steps"].get(f"{signal} | {one} | 0") for one in (budget, "steps")]
            rows.append(
                [
                    signal, len(by_seed(result, signal, budget, "nats_per_token")) if signal in SIGNALS else None,
                    next(filter(None, steps), None),
                    f"{result['step_s'][signal]:.2f}" if signal in result["step_s"] else None,
                    f"{np.exp(np.average(nats, weights=tokens)):.1f}",
                    _cell(mean, tokens, ".3f"),
                    f"{min(each):.3f} to {max(each):.3f}" if each else None,
                    *(
                        _cell(over_seeds(result, signal, budget, name), tokens, ".3f")
                        for name in ("kl_to_reference", "token_agreement")
                    ),
                    _cell(over_seeds(result, signal, budget, "choice_accuracy"), None, ".3f"),
                ]
            )  # fmt: skip
        text.append(f"## Equal {budget}\n")
        head = ["signal", "seeds", "steps", "CPU s a step", "perplexity", "nats gained on cross entropy"]
        head += ["smallest and largest seed", "KL to the teacher", "agreement", "questions right"]
        text.append(measure.markdown_table(head, rows) if rows else "Not measured.\n")
    text.append("## Who writes the texts\n")
    text.append(" ".join((__doc__ or "").split("\n\n")[6].split()) + "\n")
    rows = []
    for writer in ("teacher itself", "student before", *WRITERS):
        found = {
            key.rpartition(" | ")[2]: one
            for key, one in result["answers"].items()
            if writer in (key, key.rpartition(" | ")[0])
        }
        if found:
            right = {seed: np.array(one["right"], dtype=float) for seed, one in found.items()}
            data = {seed: result["answers"].get(f"data | {seed}") for seed in right}
            gained = [right[seed] - np.array(one["right"], dtype=float) for seed, one in data.items() if one]
            seconds = [one["cpu_s"] for one in found.values() if one["cpu_s"] is not None]
            rows.append(
                [
                    writer,
                    len(found) if writer in WRITERS else None,
                    _cell(np.mean(list(right.values()), axis=0), None, ".1%"),
                    _cell(np.mean(gained, axis=0), None, ".1%") if gained and writer != "data" else None,
                    f"{statistics.mean(seconds):.0f}" if seconds else None,
                ]
            )
    head = ["texts by", "seeds", "exact answers", "more than data", "CPU s"]
    text.append(measure.markdown_table(head, rows) if rows else "Not measured.\n")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/distilled_facts"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="path without ending; .json and .md are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--signals", nargs="+", default=list(SIGNALS), choices=list(SIGNALS))
    parser.add_argument("--writers", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--second", type=Path, help="GGUF file of a model of another family")
    parser.add_argument("--task", type=Path, help="work folder of benchmarks.transferred_task: also the second table")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many; the same command continues")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    try:
        result = run(options)
    except measure.OutOfTime:
        print("The time is up; the same command continues from here.")
        result = json.loads(options.out.with_name(options.out.name + ".json").read_text())
    command = (
        f"python -m benchmarks.distilled_facts --out benchmarks/results/{options.out.name} --steps {options.steps}"
    )
    write_text(options.out.with_name(options.out.name + ".md"), report(result, command))


if __name__ == "__main__":
    main()
