"""The device a merge runs on: the CPU, or a GPU that receives the tensors in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def resolve_device(name: str | torch.device) -> str:
    """The full name of a device (`cpu`, `cuda`, `cuda:1`); `auto` is a GPU if there is one, else the CPU.

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        ValueError: The device does not exist, or torch cannot use it.
    """
    if str(name) == "cpu":
        return "cpu"
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be cpu, cuda, cuda:N or auto, got {str(name)!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu, cuda, cuda:N or auto, got {str(name)!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(
                f"`device: {name}` needs a GPU that torch can use, but torch sees {count}. Choose cpu or auto."
            )
        return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
    return "cpu"


def on_host(tensor: Tensor) -> bool:
    """Whether numpy can access the tensor's memory. Some steps have one version for numpy and one for GPUs."""
    return tensor.device.type == "cpu"
