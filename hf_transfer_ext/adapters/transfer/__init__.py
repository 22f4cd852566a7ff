"""Carry a LoRA adapter to another base model. Each method is one file."""

from __future__ import annotations

from hf_transfer_ext.adapters.transfer.copy import copy
from hf_transfer_ext.adapters.transfer.cross_lora import cross_lora
from hf_transfer_ext.adapters.transfer.lorasuite import lorasuite
from hf_transfer_ext.adapters.transfer.method import TransferMethod
from hf_transfer_ext.adapters.transfer.project import project
from hf_transfer_ext.adapters.transfer.ridge import ridge
from hf_transfer_ext.registry import Registry

TRANSFER_METHODS: Registry[TransferMethod] = Registry("transfer method", [copy, project, cross_lora, lorasuite, ridge])
