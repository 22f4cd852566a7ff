"""Closed forms that carry the change of a linear layer to another base model. Each is one file."""

from __future__ import annotations

from hf_transfer_ext.adapters.transfer.method import TransferMethod
from hf_transfer_ext.adapters.transfer.methods.copy import copy
from hf_transfer_ext.adapters.transfer.methods.cross_lora import cross_lora
from hf_transfer_ext.adapters.transfer.methods.lorasuite import lorasuite
from hf_transfer_ext.adapters.transfer.methods.project import project
from hf_transfer_ext.adapters.transfer.methods.ridge import ridge
from hf_transfer_ext.registry import Registry, declared_as

TRANSFER_METHODS: Registry[TransferMethod] = Registry(
    "transfer method",
    [copy, project, cross_lora, lorasuite, ridge],
    check=declared_as(
        TransferMethod, "transfer method", "`@transfer_method(needs=...)` of `adapters.transfer.method`"
    ),
)
