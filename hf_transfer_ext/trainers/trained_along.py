"""Parts with weights or state of their own that are trained along beside the student and left out of the result.

They are projections, auxiliary heads, messages, prototypes. The trainer's optimizer trains them, checkpoints hold
them, and the final model does not have them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_transfer_ext.models.plumbing import is_sharded

#: These parts in a checkpoint.
PARTS_FILE = "distillation_parts.safetensors"


class TrainedAlong(nn.Module):
    """A part of a loss with parameters of its own, in `projections`; it may have none.

    Args:
        setting: The setting that asks for it, as error messages name it.
        instead: What to choose where its parameters cannot be trained.
    """

    def __init__(self, setting: str, instead: str) -> None:
        super().__init__()
        self.setting, self.instead = setting, instead
        self.projections = nn.ParameterDict()

    def start(self, name: str, rows: int, columns: int, generator: torch.Generator) -> None:
        """Add a projection `(rows, columns)` that starts at random."""
        start = torch.randn(rows, columns, generator=generator) / columns**0.5
        self.projections[name] = nn.Parameter(start)


class TrainsAlong:
    """Mixin for `Trainer` subclasses: the optimizer, checkpoints and all processes share the parts in `parts`.

    Call `train_along(parts)` once, at the end of `__init__`.
    """

    parts: nn.ModuleList | None = None
    args: Any
    accelerator: Any
    optimizer: Any

    def train_along(self, parts: Sequence[nn.Module]) -> None:
        """Place the parts on the device; their gradients are clipped by `max_grad_norm`, apart from the student's.

        Raises:
            ValueError: They have weights, and those of the student are sharded or another optimizer is given.
        """
        self.parts = nn.ModuleList(parts)
        learning = [part for part in parts if any(True for _ in part.parameters())]
        sharded = is_sharded(accelerator=self.accelerator)
        if learning and (sharded or self.accelerator.distributed_type == DistributedType.DEEPSPEED):
            raise ValueError(
                f"This `{_setting_of(learning[0])}` trains parameters of its own (a projection between different "
                "widths, or a head); under FSDP and DeepSpeed these cannot be trained beside the sharded student. "
                f"{getattr(learning[0], 'instead', 'Use plain DDP, or a loss that needs none.')}"
            )
        if learning and self.optimizer is not None:
            raise ValueError(
                f"`optimizers` are given, but this `{_setting_of(learning[0])}` trains projections, which only an "
                "optimizer that the trainer makes knows. Name it by `optim`, or use `optimizer_cls_and_kwargs`."
            )
        self.parts.to(self.accelerator.device)
        if learning:
            self.add_callback(_ClipParts(self.parts))  # type: ignore[attr-defined]

    def create_optimizer(self, model: Any = None) -> Any:
        """As in `Trainer`; the parts are a group of parameters of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        weights = list(self.parts.parameters()) if self.parts is not None else []
        if is_new and weights:
            optimizer.add_param_group({"params": weights, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; at the end of a step, the parts' gradients are averaged over all processes, as by DDP."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.parts is not None and self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self.parts.parameters():
                if parameter.grad is None:  # no process waits for one whose texts taught nothing
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `SavesResults`; a checkpoint holds the parts, too."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        state = self._state()
        if _internal_call and self.args.should_save and state:
            folder = Path(output_dir or self.args.output_dir)
            aside = folder / f".{PARTS_FILE}.partial"
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, aside)
            os.replace(aside, folder / PARTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        state = self._state()
        if not state:
            return
        path = Path(resume_from_checkpoint) / PARTS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint {str(resume_from_checkpoint)!r} has no {PARTS_FILE}: it was not written with these "
                "settings. Resume with the settings that it was written with, or start anew."
            )
        saved = load_file(path)
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (saved, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The parts in {str(path)!r} are {shapes[0]}, needed are {shapes[1]}: the checkpoint was written with "
                "other settings (`layer_map`, options of the loss) or other models."
            )
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(saved[name])

    def _state(self) -> dict[str, Tensor]:
        return {} if self.parts is None else dict(self.parts.state_dict(keep_vars=True))


def _setting_of(part: nn.Module) -> str:
    return str(getattr(part, "setting", "loss"))


class _ClipParts(TrainerCallback):
    """Clips the parts' gradients before each step, and clears them after it."""

    def __init__(self, parts: nn.Module) -> None:
        self.parts = parts

    def on_pre_optimizer_step(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parts.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.parts.zero_grad()
