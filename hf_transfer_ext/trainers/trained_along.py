"""Parameters that are trained beside the student and dropped in the end: projections, auxiliary heads, messages.

The trainer's optimizer holds them, checkpoints store them in `distillation_projections.safetensors`, and the final
model does not have them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_transfer_ext.models.plumbing import is_sharded

#: The parameters that are trained along, in a checkpoint.
PROJECTIONS_FILE = "distillation_projections.safetensors"


class TrainedAlong(nn.Module):
    """A part of the loss with parameters of its own, in `projections`; it may have none.

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

    def train_with(self, accelerator: Accelerator) -> None:
        """Place the projections on the device.

        Raises:
            ValueError: There are some, and weights are sharded.
        """
        if self.projections and (
            is_sharded(accelerator=accelerator) or accelerator.distributed_type == DistributedType.DEEPSPEED
        ):
            raise ValueError(
                f"This `{self.setting}` trains parameters of its own (a projection between different widths, or a "
                f"head); under FSDP and DeepSpeed these cannot be trained beside the sharded student. {self.instead}"
            )
        self.to(accelerator.device)

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Average the projections' gradients over all processes, as DDP does with the student's."""
        for parameter in self.parameters() if accelerator.num_processes > 1 else ():
            if parameter.grad is None:  # no process waits for one whose texts taught nothing
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes

    def save(self, folder: str | Path) -> None:
        """Write the projections to a checkpoint, atomically; without any, write nothing."""
        if self.projections:
            aside = Path(folder) / f".{PROJECTIONS_FILE}.partial"
            save_file({name: value.detach().cpu().contiguous() for name, value in self.projections.items()}, aside)
            os.replace(aside, Path(folder) / PROJECTIONS_FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Read the projections that `save` wrote.

        Raises:
            FileNotFoundError: The checkpoint has none.
            ValueError: They belong to other layers or widths.
        """
        if not self.projections:
            return
        path = Path(folder) / PROJECTIONS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint {str(folder)!r} has no {PROJECTIONS_FILE}: it was not written with this "
                f"`{self.setting}`. Resume with the settings that it was written with, or start anew."
            )
        saved, own = load_file(path), dict(self.projections.items())
        if shapes_of(saved) != shapes_of(own):
            raise ValueError(
                f"The projections in {str(path)!r} are {shapes_of(saved)}, needed are {shapes_of(own)}: the "
                "checkpoint was written with other settings (`layer_map`, options of the loss) or other models."
            )
        for name, value in own.items():
            value.copy_(saved[name])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


class ProjectionCallback(TrainerCallback):
    """Clips the projections' gradients by `max_grad_norm`, apart from the student's; clears them after each step."""

    def __init__(self, along: TrainedAlong) -> None:
        self.along = along

    def on_pre_optimizer_step(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.along.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.along.zero_grad()
