"""Texts that are written during training: prompts in, one batch for the loss out, before its tokens are counted.

The Trainer counts the labeled tokens of an optimizer step right after it has read its batches. Texts are written in
between, so that the count is that of the texts which the loss sees. Every draw depends on the seed, the step, the
micro-batch and the process alone: a resumed run writes what the uninterrupted one would have written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from hf_transfer_ext.files import write_text
from hf_transfer_ext.models.generation import (
    DrawnLogProbs,
    TeacherMixture,
    continuations,
    padded_left,
    stop_token_ids,
)
from hf_transfer_ext.models.heads import head_rows
from hf_transfer_ext.models.plumbing import evaluation_mode, gathered_weights, is_sharded, pad_token_id
from hf_transfer_ext.progress import announce
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.sampled import sampled_signal
from hf_transfer_ext.teachers.signal import TeacherSignal
from hf_transfer_ext.tensors import IGNORE_INDEX, Labels, Mask
from hf_transfer_ext.trainers.generation_options import check_vocabulary, effective
from hf_transfer_ext.trainers.rollout_method import Rollout, RolloutMethod, RolloutTokens, Source, require_writer
from hf_transfer_ext.trainers.vllm_writer import VllmWriter, imported_vllm

logger = logging.getLogger(__name__)

#: Columns of a row that hold something to learn, beside its prompt.
LEARNED_COLUMNS = frozenset(("completion", "text", "messages", "conversations", "input_ids"))
#: Key of a batch under which what is known of its texts travels to the loss.
ROLLOUT = "rollout"
#: File of `output_dir` with written texts.
WRITTEN = "rollouts.jsonl"


class WritesRollouts(Trainer):
    """A `Trainer` whose batches are written by the student or the teacher, as `args.on_policy` says."""

    args: Any
    teacher: Any
    _context: int | None
    chat_template: str | None
    #: None where the data are trained on as they are.
    rollout_method: RolloutMethod | None = None
    #: The column that names a teacher for each row; a text has the teacher of its prompt. None: rows name none.
    route_column: str | None = None
    #: The engine that writes in place of transformers; made when the first text is needed.
    _engine: VllmWriter | None = None
    #: The last step of this run that wrote, and how many of its texts may still go to the file.
    _log_left: tuple[int, int] = (-1, 0)

    def start_rollouts(self) -> None:
        """Called once the model, the data and the teacher stand.

        Raises:
            ValueError: Nobody could write, or the data have nothing to write after.
        """
        if self.args.on_policy is None:
            return
        self.rollout_method = self.args.rollout_method()
        self._lengths: list[tuple[int, bool]] = []
        self._evaluated = 0
        self._announced: set[Source] = set()
        if is_sharded(accelerator=self.accelerator) and not self.accelerator.is_fsdp2:
            raise ValueError(
                f"Weights are sharded ({self.accelerator.distributed_type.value}), and on-policy distillation gathers "
                "them to write, which it does for FSDP2 alone. Set `fsdp_version: 2`, train with plain data "
                "parallelism (DDP) or ZeRO-1/2; or let the texts be written beforehand, and leave `on_policy` out."
            )
        if getattr(self, "_is_vision_dataset", False):
            raise ValueError("`on_policy` writes after prompts of text, but the data hold images. Leave it out.")
        if self.args.rollout_engine == "vllm":
            imported_vllm()
        if not isinstance(self.teacher, LiveTeacher):
            require_writer(self.args, self.rollout_method, f"a {type(self.teacher).__name__}")
        check_vocabulary(self.args.generation_options, head_rows(cast(nn.Module, self.model)))

    # ---- Before a step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._log_left = (-1, 0)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of an optimizer step with the texts that the method chooses, and the count of their tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rollout_method is None or not batches:
            return batches, count
        progress = self.state.global_step / max(1, self.state.max_steps)
        batches = [self._written_batch(batch, i, progress) for i, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _written_batch(self, batch: dict[str, Any], index: int, progress: float) -> dict[str, Any]:
        method: Any = self.rollout_method
        key = (self.args.seed, self.state.global_step, index)
        draw = random.Random(seed_of(*key, "source")).random()  # the same on all processes: none waits for another
        rows: list[Rollout] = []
        for source in method.sources(draw, self.args, progress):
            seed = seed_of(*key, source, self.accelerator.process_index)
            rows += self.rollouts_from(source, batch, seed)
        method.note([row for row in rows if row.source == "student"])
        new = [row for row in rows if row.source not in ("data", "replay")]
        self._lengths += [(len(row.written), row.ended) for row in new]
        self._log_texts(new)
        return self._collated(rows)

    def rollouts_from(self, source: Source, batch: dict[str, Any], seed: int) -> list[Rollout]:
        """One text for each prompt of a batch.

        Args:
            source: Who writes it; "data" leaves it as it is.
        """
        data = rows_of(batch, self.route_column)
        if source == "data":
            return data
        if source == "replay":
            return self.rollout_method.replayed(len(data), seed)  # type: ignore[union-attr]
        written = self._write(source, [prompt_of(row) for row in data], seed)
        return [replace(text, route=row.route) for text, row in zip(written, data, strict=True)]

    def _write(self, source: Source, prompts: list[list[int]], seed: int) -> list[Rollout]:
        method: Any = self.rollout_method
        student = self.accelerator.unwrap_model(self.model)
        tokenizer: Any = self.processing_class
        room = (self.args.max_length or self._context or 10**9) - max(map(len, prompts))
        if not min(map(len, prompts)) or room < self.args.max_new_tokens:
            raise ValueError(no_room(prompts, self.args, self._context))
        self._announce_writing(source, len(prompts))
        if source == "student" and self.args.rollout_engine == "vllm":
            return self._write_by_engine(student, prompts, seed)
        writer = self.teacher.running(student) if source == "teacher" else nullcontext(student)
        notes: DrawnLogProbs | TeacherMixture | None = None
        if source == "mixture":
            _, mask = padded_left(prompts, 0, next(student.parameters()).device)
            notes = TeacherMixture(lambda: self.teacher.running(student), mask, method.teacher_mix)
        elif source == "student" and method.notes_log_probs:
            notes = DrawnLogProbs(self.args.sampling_temperature)
        stops, options = self._stops_and_options(student)
        settings: dict[str, Any] = {
            "pad_id": pad_token_id(tokenizer), "max_new_tokens": self.args.max_new_tokens, "seed": seed,
            "stop_ids": stops, "temperature": self.args.sampling_temperature, "tokenizer": tokenizer,
            "processors": [] if notes is None else [notes], **options,
        }  # fmt: skip
        sharded = gathered_weights(student, getattr(self.teacher, "model", None), accelerator=self.accelerator)
        with sharded, self.compute_loss_context_manager(), evaluation_mode(student), writer as model:
            texts, written, ended = continuations(self.accelerator.unwrap_model(model), prompts, **settings)
        by_student: list[list[float]] | None = None
        by_teacher: list[list[float]] | None = None
        if isinstance(notes, TeacherMixture):
            by_student, by_teacher = notes.of(written)
        elif notes is not None:
            by_student = notes.of(written)
        return [
            Rollout(
                prompt + text,
                [IGNORE_INDEX] * len(prompt) + text,
                source,
                None if by_student is None else by_student[i][: len(text)],
                None if by_teacher is None else by_teacher[i][: len(text)],
                ended[i],
            )
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    def _stops_and_options(self, student: Any) -> tuple[list[int], dict[str, Any]]:
        """The tokens that end a text, and the other options of generation."""
        options = effective(self.args.generation_options)
        return options.pop("eos_token_id", None) or stop_token_ids(student, self.processing_class), options

    def _announce_writing(self, source: Source, texts: int) -> None:
        """One line before the first texts of each writer; they may take longer than the steps that learn from them."""
        if source in self._announced:
            return
        self._announced.add(source)
        writer = "both models" if source == "mixture" else f"the {source}"
        engine = ", by vLLM" if source == "student" and self.args.rollout_engine == "vllm" else ""
        title = f"texts of {writer} in each batch, up to {self.args.max_new_tokens} tokens each{engine}"
        announce(title, texts, "text", show=not self.args.disable_tqdm)

    def _write_by_engine(self, student: Any, prompts: list[list[int]], seed: int) -> list[Rollout]:
        method: Any = self.rollout_method
        if self._engine is None:
            options = self.args.rollout_engine_options
            self._engine = VllmWriter(student, self.accelerator, self.args.output_dir, options)
        self._engine.load(student, self.state.global_step)
        stops, options = self._stops_and_options(student)
        texts, log_probs = self._engine.write(
            prompts, stop_ids=stops, max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.sampling_temperature, seeds=[seed_of(seed, i) for i in range(len(prompts))],
            log_probs=method.notes_log_probs, **options,
        )  # fmt: skip
        return [
            Rollout(
                prompt + text, [IGNORE_INDEX] * len(prompt) + text, "student",
                None if log_probs is None else log_probs[i], ended=text[-1] in stops,
            )
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]  # fmt: skip

    def _collated(self, rows: Sequence[Rollout]) -> dict[str, Any]:
        """A batch for `compute_loss`, with what is known of its texts under the key `ROLLOUT`."""
        collator: Any = self.data_collator
        fields: list[dict[str, Any]] = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
        if self.route_column is not None:
            fields = [{**one, self.route_column: row.route} for one, row in zip(fields, rows, strict=True)]
        batch = dict(collator(fields))
        length = batch["labels"].shape[1]
        known: dict[str, Tensor] = {
            "by_student": torch.tensor([row.source not in ("data", "teacher") for row in rows])
        }
        for name in ("log_probs", "teacher_log_probs"):
            if any(getattr(row, name) is not None for row in rows):
                known[name] = torch.tensor([_at_labels(row, getattr(row, name), length) for row in rows])
        return {**batch, ROLLOUT: known}

    # ---- For the loss ----

    def rollout_tokens(self, known: dict[str, Tensor], mask: Mask) -> RolloutTokens:
        """What is known of each labeled token; `mask` is that of the shifted labels."""
        row = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)[mask]
        unknown = torch.full(mask.shape, torch.nan, device=mask.device)

        def at_tokens(name: str) -> Tensor:
            return (known[name][:, 1:] if name in known else unknown)[mask]

        return RolloutTokens(known["by_student"][row], row, at_tokens("log_probs"), at_tokens("teacher_log_probs"))

    def rollout_terms(self, tokens: RolloutTokens | None, *, training: bool) -> dict[str, Any]:
        """What the method adds to the arguments of the loss."""
        method = self.rollout_method
        if method is None or tokens is None:
            return {}
        return method.terms(tokens, self.args) if training else method.objective(tokens, self.args)

    def teacher_signal(
        self, model: nn.Module, inputs: dict[str, Any], mask: Mask, targets: Labels, tokens: RolloutTokens | None
    ) -> TeacherSignal:
        """What the teacher says about a batch: all that it can, or about the written tokens alone."""
        method = self.rollout_method
        if method is None or not method.sampled_tokens or tokens is None:
            return self.teacher.signal(model, inputs, mask)
        return sampled_signal(
            self.teacher, model, inputs, mask, targets[mask], tokens.log_probs,
            temperature=self.args.distill_temperature, **method.trust(),
        )  # fmt: skip

    # ---- Evaluation, logs, checkpoints ----

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A batch of evaluation has the texts that the method is evaluated on; those written for it are new ones."""
        method = self.rollout_method
        if method is not None:
            has_completions = bool((inputs["labels"] != IGNORE_INDEX).any())
            seed = seed_of(self.args.seed, "evaluation", self._evaluated, self.accelerator.process_index)
            self._evaluated += 1
            rows: list[Rollout] = []
            for source in method.evaluated_on(self.args, has_completions):
                rows += self.rollouts_from(source, inputs, seed)
            inputs = self._collated(rows)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Tells the method what an evaluation on all of the trainer's own sets has found."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        method = self.rollout_method
        if method is None or not method.reads_evaluations or eval_dataset is not None:
            return metrics  # one set of several, or another one
        own: Any = self.eval_dataset
        prefixes = [f"{metric_key_prefix}_{name}" for name in own] if isinstance(own, dict) else [metric_key_prefix]
        empty = [prefix for prefix in prefixes if f"{prefix}_ce" not in metrics]
        if empty:
            raise ValueError(
                f"{self.args.on_policy} reads the cross entropy of evaluations, but {empty[0]!r} has none: its set "
                "has no row. Leave it out."
            )
        found = method.after_evaluation(sum(metrics[f"{prefix}_ce"] for prefix in prefixes) / len(prefixes))
        self.log(found)
        return {**metrics, **found}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean length of written texts, in tokens, and the share of them that ended by themselves."""
        if self.rollout_method is not None and "loss" in logs:
            lengths, self._lengths = self._lengths, []
            own = [float(len(lengths)), float(sum(n for n, _ in lengths)), float(sum(ended for _, ended in lengths))]
            texts, tokens, ended = self.accelerator.gather(
                torch.tensor([own], device=self.args.device)
            ).sum(0).tolist()  # fmt: skip
            if texts:
                logs.update({"rollout_tokens": tokens / texts, "rollout_ended": ended / texts})
        super().log(logs, *args, **kwargs)

    def _log_texts(self, rows: Sequence[Rollout]) -> None:
        step, (last, left) = self.state.global_step, self._log_left
        if step != last:
            left = self.args.log_rollouts
        path = Path(self.args.output_dir) / WRITTEN
        if self.args.log_rollouts and self.is_world_process_zero() and not 0 <= last <= step:
            start_log(path, step)  # the first texts of a run
        shown = rows[:left]
        self._log_left = (step, left - len(shown))
        if not shown or not self.is_world_process_zero():
            return
        tokenizer: Any = self.processing_class
        with open(path, "a", encoding="utf-8") as file:
            for row in shown:
                entry = {
                    "step": step, "source": row.source, "prompt": tokenizer.decode(prompt_of(row)),
                    "text": tokenizer.decode(row.written),
                }  # fmt: skip
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self.rollout_method.state() if self.rollout_method is not None else {}
        if state:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / self._state_file(), json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.rollout_method is None or not self.rollout_method.state():
            return
        file = Path(resume_from_checkpoint) / self._state_file()
        if not file.is_file():
            raise ValueError(
                f"{str(resume_from_checkpoint)!r} has no {file.name}, which holds what {self.args.on_policy} had "
                "written and learned: it was written with another method or another number of processes."
            )
        self.rollout_method.restore(read_json(file, max_bytes=None))

    def _state_file(self) -> str:
        return f"rollouts_{self.accelerator.process_index}.json"


def start_log(path: Path, step: int) -> None:
    """Make a run's file of written texts ready: a resumed run goes on with it, a new one leaves an older file aside.

    Args:
        path: The file, which may not exist yet.
        step: The first step of the run. If it is not 0, the texts of it and of later steps are dropped, since a
            resumed run writes them again.
    """
    if not path.is_file():
        return
    if step == 0:
        place = next(n for n in itertools.count(1) if not path.with_name(f"{path.stem}.{n}{path.suffix}").exists())
        aside = path.rename(path.with_name(f"{path.stem}.{place}{path.suffix}"))
        logger.warning("%s holds texts of an earlier run, and is now %s.", path, aside.name)
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may have written half of its last one
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] < step))


def seed_of(*parts: Any) -> int:
    """A seed that depends on all the parts, and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def rows_of(batch: dict[str, Any], route_column: str | None = None) -> list[Rollout]:
    """The rows of a padded batch, without their padding.

    Args:
        route_column: Holds the place of each row's teacher; None: there is none.
    """
    lengths = batch["attention_mask"].sum(1).tolist()
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    routes = [None] * len(ids) if route_column is None else batch[route_column].tolist()
    return [Rollout(ids[i][:n], labels[i][:n], "data", route=routes[i]) for i, n in enumerate(lengths)]


def prompt_of(row: Rollout) -> list[int]:
    """What stands before the last labeled stretch of a row: earlier turns and results of tools among it.

    A row without labels is a prompt as a whole.
    """
    labeled = [label != IGNORE_INDEX for label in row.labels]
    if not any(labeled):
        return row.ids
    start = len(labeled) - 1 - labeled[::-1].index(True)
    while start and labeled[start - 1]:
        start -= 1
    return row.ids[:start]


def _at_labels(row: Rollout, values: list[float] | None, length: int) -> list[float]:
    """The values of the written tokens at their places in a row of `length`, NaN elsewhere."""
    given = iter(values or [])
    placed = [float("nan") if label == IGNORE_INDEX else next(given, float("nan")) for label in row.labels]
    return placed + [float("nan")] * (length - len(placed))


# ---- Data ----


def holds_prompts_alone(dataset: Any) -> bool:
    """Whether the rows have prompts, and nothing that was written after them."""
    columns = set(getattr(dataset, "column_names", None) or ())
    return "prompt" in columns and not columns & LEARNED_COLUMNS


def with_prompts(dataset: Any, args: Any, *, held_out: bool = False) -> Any:
    """The data in a form that shows where the prompt of each row ends; unchanged where nothing is written.

    Conversations become prompt and completion, the last turn. With `assistant_only_loss` the labels show the turns.

    Args:
        held_out: Whether they are for evaluation.

    Raises:
        ValueError: The rows have no prompt, or no completion where one is needed.
    """
    if isinstance(dataset, dict):
        return {name: with_prompts(one, args, held_out=held_out) for name, one in dataset.items()}
    if dataset is None or args.on_policy is None:
        if holds_prompts_alone(dataset):
            raise ValueError(
                "The data hold prompts without completions, so there is nothing to learn from: let the student write "
                "them with `on_policy`, or add a column `completion`. (The trainer of `hf_transfer_ext.trl`, which is "
                "TRL's, lets the student write by default.)"
            )
        return dataset
    columns = set(dataset.column_names or ())
    if "conversations" in columns:
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")
    if columns & {"messages", "conversations"} and not args.assistant_only_loss:
        dataset = dataset.map(_last_turn_apart, with_indices=True, remove_columns="messages")
    elif not columns & {"prompt", "input_ids", "messages", "conversations"}:
        raise ValueError(
            f"`on_policy` writes after the prompts of the data, but the rows have the columns {', '.join(columns)}. "
            "Give `prompt` (and `completion`), `messages`, or `input_ids` with `labels` that are -100 in the prompt."
        )
    if held_out and holds_prompts_alone(dataset) and args.rollout_method().reads_evaluations:
        raise ValueError(
            f"The evaluation data hold prompts without completions, but {args.on_policy} reads the cross entropy of "
            "held-out completions. Add a column `completion`."
        )
    if holds_prompts_alone(dataset) and args.rollout_method().needs_completions(args):
        raise ValueError(
            f"The data hold prompts without completions, but {args.on_policy} learns from completions as well "
            f"(`on_policy_share` {args.on_policy_share:g}, `ce_weight` {args.ce_weight:g}). Let the student write all "
            "(`on_policy_share=1`), or the teacher the others (`teacher_writes`), with `ce_weight=0`; or add a column "
            "`completion`."
        )
    return dataset


def _last_turn_apart(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(
            f"Row {index} does not end with an answer of the assistant to something: give its turns as `prompt` "
            "instead of `messages` where the student is to write the answer."
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def tokenized_prompts(
    dataset: Any, tokenizer: Any, args: Any, chat_template: str | None, route_column: str | None = None
) -> Any:
    """Prompts alone as token ids with labels that are -100 throughout, and the column that names their teachers."""

    def tokenized(row: Mapping[str, Any]) -> dict[str, Any]:
        if not is_conversational(dict(row)):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
            goes_on = row["prompt"][-1]["role"] == "assistant"
            ids = tokenizer.apply_chat_template(
                row["prompt"], tools=tools, chat_template=chat_template, add_generation_prompt=not goes_on,
                continue_final_message=goes_on, tokenize=True, return_dict=True,
                **(row.get("chat_template_kwargs") or {}),
            )["input_ids"]  # fmt: skip
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}

    workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    others = [name for name in dataset.column_names if name != route_column]
    dataset = dataset.map(tokenized, remove_columns=others, **workers)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def require_room(dataset: Any, args: Any, context: int | None) -> None:
    """Refuse prompts that are empty, or leave no room for `max_new_tokens`. Streaming data are checked in training."""
    if args.on_policy is None or isinstance(dataset, IterableDataset):
        return
    for index, row in enumerate(dataset):
        prompt = prompt_of(Rollout(row["input_ids"], row.get("labels") or row["input_ids"], "data"))
        longest = (args.max_length or context or 10**9) - args.max_new_tokens
        if not 0 < len(prompt) <= longest:
            raise ValueError(f"Row {index}: {no_room([prompt], args, context)}")


def no_room(prompts: Sequence[Sequence[int]], args: Any, context: int | None) -> str:
    """Why these prompts cannot be written after."""
    if not min(map(len, prompts)):
        return (
            "a prompt has no token, so that nothing can be written after it. (A row whose labels cover all of its "
            "tokens has none: text without a prompt.) Give the row a prompt, or leave it out."
        )
    limit = args.max_length or context
    return (
        f"a prompt has {max(map(len, prompts))} tokens, which leaves no room for `max_new_tokens` "
        f"({args.max_new_tokens}) within the {limit} tokens of a text. Lower `max_new_tokens`, raise `max_length`, or "
        "leave the row out."
    )
