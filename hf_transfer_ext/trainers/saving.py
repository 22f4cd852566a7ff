"""What a run leaves behind: full weights under every way of sharding them, and the checkpoint to resume from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_transfer_ext.files import publish, refuse_existing_output, refuse_inputs_inside
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.students.auxiliary import SHARED_FILE
from hf_transfer_ext.teachers.learned import GATE_FILE
from hf_transfer_ext.trainers.logs import CURVE_PLOT, TRAINING_PLOT
from hf_transfer_ext.trainers.results import SETTINGS_PICKLE, ask_for_whole_weights
from hf_transfer_ext.trainers.trained_along import PARTS_FILE

#: What recipes put into their training folder. `--overwrite` removes a folder with these entries and no others.
TRAINING_ENTRIES = (
    *("checkpoints", "teaching", "teacher", "teacher.checkpoints", "learngene", "learngene.checkpoints", "student"),
    *("twin", "twin.checkpoints", "unlearned"),
    *("vocabulary_map.json", TRAINING_PLOT, CURVE_PLOT),
)


#: Hidden entries of a run that was killed (`files`).
_LEFT_BY_A_KILL = re.compile(r"\..*\.(partial-.*|old-.*|output-lock)")


def training_folder(
    out: str | Path, *, resume: bool, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """The folder beside `out` for checkpoints and finished stages; `out` itself is written atomically at the end.

    What an earlier run left there is used on `resume`, removed on `overwrite`, and else refused: a new run must not
    mix its stages with those of another one. Every process calls it.

    Args:
        inputs: Files and folders that the run reads; the folder is not removed if one of them lies in it.

    Raises:
        FileExistsError: An earlier run's folder, and neither `resume` nor `overwrite`; or `overwrite`, and entries
            that no recipe makes (`TRAINING_ENTRIES`).
        ValueError: One of the inputs would be removed.
    """
    from accelerate import PartialState

    out = Path(out)
    folder = out.with_name(f"{out.name}.training")
    state = PartialState()
    left = folder.exists() and not resume
    state.wait_for_everyone()  # all have looked before one removes
    if left and not overwrite:
        raise FileExistsError(
            f"An earlier run left its checkpoints in {str(folder)!r}. Go on with it by --resume_from_checkpoint true, "
            "or start anew by --overwrite true, which removes them."
        )
    if left:
        refuse_inputs_inside(folder, inputs)
        foreign = _foreign_entries(folder)
    state.wait_for_everyone()
    if left and foreign:
        raise FileExistsError(
            f"The folder of checkpoints {str(folder)!r} holds {foreign[0]!r}, which no earlier run made and "
            "--overwrite would remove. Move it away, or name another output folder."
        )
    if left and state.is_main_process:
        shutil.rmtree(folder)
    state.wait_for_everyone()
    return folder


def _foreign_entries(folder: Path) -> list[str]:
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name for name in names if name not in TRAINING_ENTRIES and not _LEFT_BY_A_KILL.fullmatch(name))


def save_whole(trainer: Any, folder: str | Path) -> Path:
    """Save a trainer's model and tokenizer to `folder` atomically; every process calls it.

    An earlier result in `folder` is replaced; other files in it are refused before anything is saved.
    """
    folder = refuse_existing_output(folder, overwrite=True)
    aside = folder.with_name(f".{folder.name}.partial-save")
    ask_for_whole_weights(trainer)
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside), _internal_call=True)  # card and record come with the finished result
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if not any(aside.glob("*.safetensors")):
            raise OSError(f"The trainer wrote no safetensors weights to {str(aside)!r}; nothing was replaced.")
        for name in (SETTINGS_PICKLE, SHARED_FILE, GATE_FILE, PARTS_FILE):
            (aside / name).unlink(missing_ok=True)
        publish(aside, folder, overwrite=True)
    trainer.accelerator.wait_for_everyone()
    return folder


def load_whole(folder: str | Path, **loading: Any) -> Any:
    """Load what `save_whole` saved, whole on every process: a sharded run would load empty shards instead.

    Call it when training is over; it ends the sharding of whatever is loaded afterwards.

    Args:
        loading: Passed to `load_model`.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return load_model(folder, **loading)


def whole_model(trainer: Any, folder: str | Path, **loading: Any) -> Any:
    """The trained model, whole on every process: the trainer's own, or, where that is sharded, saved and loaded again.

    Args:
        folder: Where a sharded model is saved.
        loading: Passed to `load_model`.
    """
    if not is_sharded(accelerator=trainer.accelerator):
        return trainer.accelerator.unwrap_model(trainer.model)
    model = load_whole(save_whole(trainer, folder), **loading)
    return model if getattr(model, "is_quantized", False) else model.to(trainer.args.device)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest *whole* checkpoint of a training folder, or None.

    The Trainer writes `trainer_state.json` last: a checkpoint without a readable one was cut off and is passed over.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match is None:
            continue
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None


def refuse_zero3(advice: str) -> None:
    """Raise a `ValueError` under ZeRO-3 for a job that cuts, trims or copies models.

    Args:
        advice: Which settings to change, in a sentence.
    """
    if _is_zero3():
        raise ValueError(
            "ZeRO-3 shards models while they are loaded, so they cannot be cut, trimmed or copied. Make the model in "
            f"a run of its own. {advice}"
        )


def refuse_sharding(args: Any, advice: str) -> None:
    """Raise a `ValueError` under FSDP and ZeRO-3 for a job that needs the trained weights in one place.

    Args:
        args: A `TrainingArguments`.
        advice: What to do instead, in a sentence.
    """
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if by_launcher or getattr(args, "fsdp", None) or _is_zero3():
        raise ValueError(f"FSDP and ZeRO-3 shard the weights, which this run merges or cuts. {advice}")


def _is_zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())
