"""The transfers of an adapter that train, by name; those in closed form are in `methods/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_transfer_ext.adapters.transfer.by_training import transfer_by_training
from hf_transfer_ext.adapters.transfer.muscle import train_compatible

TRAINED_TRANSFERS: Mapping[str, Callable[..., Any]] = {"trans_lora": transfer_by_training, "muscle": train_compatible}
