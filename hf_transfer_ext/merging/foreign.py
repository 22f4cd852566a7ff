"""The flags of mergekit's commands, so that they can be pasted: each is translated, ignored, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_transfer_ext.settings import ForeignFlag

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_NO_CODE = "code from repositories is never run, and not needed. Remove the flag."
_STREAMED = "tensors are always streamed, so memory does not grow with the model."


def _shard_gigabytes(text: str) -> Mapping[str, Any]:
    """mergekit's largest size of a shard, in GB."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"--max-shard-gb must be a number of gigabytes above 0, got {text!r}.")
    return {"max_shard_bytes": f"{text}GB"}


def _shard_bytes(text: str) -> Mapping[str, Any]:
    """Convert mergekit's number of parameters ("5B") to bytes, at two bytes each, as in bfloat16."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        count = float(text.removesuffix(text[-1:]) if unit else text) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(f"--out-shard-size must be a number of parameters such as 5B, got {text!r}.") from None
    return {"max_shard_bytes": int(2 * count)}


#: Flags of mergekit-yaml and mergekit-moe without their dashes.
MERGEKIT_FLAGS = {
    "max-shard-gb": ForeignFlag(_shard_gigabytes, takes_value=True),
    "out-shard-size": ForeignFlag(_shard_bytes, takes_value=True),
    "num-threads": ForeignFlag(lambda text: {"threads": text}, takes_value=True),
    "copy-tokenizer": ForeignFlag(note="the tokenizer is always copied."),
    "write-model-card": ForeignFlag(note="the model card is always written."),
    "safe-serialization": ForeignFlag(note="the result is always safetensors."),
    "low-cpu-memory": ForeignFlag(note=_STREAMED),
    "clone-tensors": ForeignFlag(note="every tensor is always written separately."),
    "async-write": ForeignFlag(note="files are always written while others are read."),
    "lazy-unpickle": ForeignFlag(note="tensors are always read lazily; pickles need --allow-pickle."),
    "lora-merge-cache": ForeignFlag(takes_value=True, note="adapters are applied while streaming; nothing is cached."),
    "verbose": ForeignFlag(note="the progress bar is on unless --quiet is given."),
    "allow-crimes": ForeignFlag(
        refused="models of different architectures are never merged, and those of one architecture need no flag. "
        "Remove the flag."
    ),
    "trust-remote-code": ForeignFlag(refused=_NO_CODE),
    "lora-merge-dtype": ForeignFlag(takes_value=True, refused="adapters are applied in float32. Remove the flag."),
    "random-seed": ForeignFlag(takes_value=True, refused="set `seed: N` in the configuration, which is recorded."),
    "transformers-cache": ForeignFlag(takes_value=True, refused="set HF_HUB_CACHE to that folder instead."),
}

#: Flags of mergekit-yaml only.
MERGE_FLAGS = {
    **MERGEKIT_FLAGS,
    "cuda": ForeignFlag({"device": "cuda"}),
    "gpu-rich": ForeignFlag({"device": "cuda"}),
    "read-to-gpu": ForeignFlag({"device": "cuda"}),
    "multi-gpu": ForeignFlag(
        refused="start `accelerate launch -m hf_transfer_ext merge ...`: one process for each GPU."
    ),
}

_GATES = "gates are computed from the base model in its dtype on the CPU. Remove the flag."

#: Flags of mergekit-moe only.
MOE_FLAGS = {
    **MERGEKIT_FLAGS,
    "i-understand-this-is-not-useful-without-training": ForeignFlag({"allow_same_experts": True}),
    "cuda": ForeignFlag(refused=_GATES),
    "device": ForeignFlag(takes_value=True, refused=_GATES),
    "load-in-4bit": ForeignFlag(refused=_GATES),
    "load-in-8bit": ForeignFlag(refused=_GATES),
}
