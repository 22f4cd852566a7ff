"""A training job between its settings and its saved result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_transfer_ext.files import refuse_existing_output
from hf_transfer_ext.hub.access import require_write_access
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.hub.table import Measured
from hf_transfer_ext.recipes.run import start_record
from hf_transfer_ext.trainers.logs import drawn
from hf_transfer_ext.trainers.saving import last_checkpoint, training_folder


@dataclass
class TrainingRun:
    """A training job between its start and its end (`start_training`).

    Args:
        out: Folder of the result; it appears when the run is over.
        work: Folder beside it, for checkpoints and finished stages.
        args: The trainer's configuration; its `output_dir` is inside `work`, and it does not push.
        push_to: Repository that the result is published in; None for none.
        publication: How: private, revision and token, as in `push`.
        files: Name -> file that goes into the result.
    """

    out: Path
    work: Path
    args: Any
    record: RunRecord
    overwrite: bool
    push_to: str | None
    publication: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def replaces(self) -> bool:
        """Whether results beside this one may be replaced: on `overwrite`, and by a resumed run."""
        return self.overwrite or _resumes(self.args.resume_from_checkpoint)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to go on from: the one that was named, or the newest whole one; None to start anew."""
        chosen = self.args.resume_from_checkpoint
        if not _resumes(chosen):
            return None
        return last_checkpoint(self.args.output_dir) if str(chosen).lower() in ("true", "yes", "1") else str(chosen)

    def finish(self, measured: Measured, result: str, model: Any, tokenizer: Any, trainer: Any) -> None:
        """Save the model with card, record and plot, and publish it where that was asked for. On the main process."""
        how: dict[str, Any] = {"precision": "bfloat16" if self.args.bf16 else None, "overwrite": self.overwrite}
        how |= {"files": self.files | drawn(trainer.state.log_history, self.work), "push_to": self.push_to}
        how |= {"result": result, "model": model, "tokenizer": tokenizer, **self.publication}
        finish_run(self.out, self.record, measured, **how)


def start_training(
    job: str,
    script: str,
    argv: Sequence[str] | None,
    arguments: Any,
    args: Any,
    *,
    overwrite: bool,
    inputs: Sequence[str | Path | None] = (),
) -> TrainingRun:
    """Refuse an existing result, record the settings, make the training folder and set the seed.

    Args:
        arguments: The recipe's own settings.
        inputs: Files and folders that the run reads, which its output must not replace.
        args: A `TrainingArguments`. Only the whole result is published, at the end, not the trainer's checkpoints.

    Raises:
        FileExistsError: A result, or an earlier run's checkpoints, is there and is neither replaced nor gone on from.
        PermissionError: The result is to be published, and there is no login or no right to write there.
    """
    out = refuse_existing_output(args.output_dir, overwrite=overwrite, inputs=inputs)
    record = start_record(job, script, argv, arguments, args, seed=args.seed)
    work = training_folder(out, resume=_resumes(args.resume_from_checkpoint), overwrite=overwrite, inputs=inputs)
    push_to = (args.hub_model_id or out.name) if args.push_to_hub else None
    how: Any = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
    require_write_access(None if getattr(arguments, "dry_run", False) else push_to, **how)
    args.push_to_hub, args.output_dir = False, str(work / "checkpoints")
    set_seed(args.seed)
    return TrainingRun(out, work, args, record, overwrite, push_to, how)


@contextmanager
def output_of(job: Any, args: Any) -> Iterator[None]:
    """Within the block, a dry run writes to a scratch folder; an output that would be in the way is refused first."""
    if not job.dry_run:
        yield
        return
    refuse_existing_output(str(args.output_dir), overwrite=job.overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir, args.resume_from_checkpoint, job.overwrite = f"{scratch}/out", None, False
        yield


def _resumes(chosen: Any) -> bool:
    return bool(chosen) and str(chosen).lower() not in ("false", "no", "none", "0")
