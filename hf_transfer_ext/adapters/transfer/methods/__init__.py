"""Closed forms that carry the change of a linear layer to another base model. Each is one file."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.adapters.transfer.method import TransferMethod
from hf_transfer_ext.adapters.transfer.methods.copy import copy
from hf_transfer_ext.adapters.transfer.methods.cross_lora import cross_lora
from hf_transfer_ext.adapters.transfer.methods.lorasuite import lorasuite
from hf_transfer_ext.adapters.transfer.methods.project import project
from hf_transfer_ext.adapters.transfer.methods.ridge import ridge
from hf_transfer_ext.registry import Registry


def check(method: Any) -> None:
    """Refuse a plain function: the transfer has to know what the method needs."""
    if not isinstance(method, TransferMethod):
        raise ValueError(
            f"{getattr(method, '__name__', method)!r} is not a transfer method. Declare what it needs with "
            "`@transfer_method(needs=...)` of `adapters.transfer.method`."
        )


TRANSFER_METHODS: Registry[TransferMethod] = Registry(
    "transfer method", [copy, project, cross_lora, lorasuite, ridge], check=check
)
