"""Models with shared layers (`auxiliary_model` of TLEG, `stage_shared_model` of SWS) on disk.

What is saved is the expansion, a plain model of the same depth that computes the same; the shared parameters lie
beside it in a checkpoint, so that training can go on with them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_transfer_ext.students.inits.linear_expansion import linear_expansion
from hf_transfer_ext.students.layers import layer_stack, layer_tensors, with_layers
from hf_transfer_ext.students.shape import StudentShape

#: The shared parameters in a checkpoint.
SHARED_FILE = "shared_parameters.safetensors"


@torch.no_grad()
def expanded(auxiliary: PreTrainedModel) -> PreTrainedModel:
    """The plain model of the same depth that computes what the auxiliary model does; it shares no memory with it."""
    if any(name.endswith(".0.slope") for name in layer_stack(auxiliary)[1][0].state_dict()):
        return linear_expansion(auxiliary, StudentShape())
    layers = layer_tensors(auxiliary)
    return with_layers(auxiliary, layers, range(len(layers)))


def save_shared(auxiliary: PreTrainedModel, folder: str | Path) -> None:
    """Write the shared parameters to `folder`."""
    save_file({name: tensor.contiguous() for name, tensor in _own(auxiliary).items()}, Path(folder) / SHARED_FILE)


@torch.no_grad()
def load_shared(auxiliary: PreTrainedModel, folder: str | Path) -> None:
    """Put the shared parameters that `save_shared` wrote to `folder` into an auxiliary model.

    Raises:
        FileNotFoundError: `folder` has none.
        ValueError: They belong to a model of another shape.
    """
    path = Path(folder) / SHARED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {SHARED_FILE}: it is not a checkpoint of an auxiliary model.")
    saved, own = load_file(path), _own(auxiliary)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"The shared parameters in {str(path)!r} belong to a model of another shape.")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _own(auxiliary: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter once, by the first of its names."""
    return {name: parameter.detach() for name, parameter in auxiliary.named_parameters()}
