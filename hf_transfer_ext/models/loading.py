"""Models and tokenizers by local path or Hub id: safetensors only unless asked, and no code from a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_transfer_ext.tensors import dtype_by_name
from hf_transfer_ext.weights.repository import file_of, local_folder


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | str:
    """`"bfloat16"` -> `torch.bfloat16`; None and "auto" keep the dtype of the checkpoint."""
    if name is None or name == "auto":
        return "auto"
    found = dtype_by_name(name)
    if found is None:
        raise ValueError(f"`dtype` has to be auto, float32, bfloat16 or float16, got {name!r}.")
    return found


def load_model(
    name: str | Path, *, revision: str | None = None, dtype: str | torch.dtype | None = "auto", **kwargs: Any
) -> PreTrainedModel | Any:
    """Load a causal language model; a folder with `adapter_config.json` gives a `PeftModel` on its own base.

    Args:
        dtype: "auto" (of the checkpoint), "float32", "bfloat16" or "float16".
        kwargs: Passed to `from_pretrained` (`device_map`, `attn_implementation`, `quantization_config`, ...).
    """
    kwargs = {"use_safetensors": True, **kwargs}
    adapter_config = file_of(name, "adapter_config.json", revision=revision)
    if adapter_config is not None:
        return _load_adapter(name, adapter_config, revision, dtype, kwargs)
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(name), revision=revision or "main", dtype=dtype_of(dtype), **kwargs
        )
    except OSError as error:
        raise FileNotFoundError(
            f"Model {str(name)!r} cannot be loaded: it has to be a folder or Hub repository with config.json and "
            f"safetensors weights. {str(error).splitlines()[0]}"
        ) from error


def _load_adapter(name: str | Path, adapter_config: Path, revision: str | None, dtype: Any, kwargs: Any) -> Any:
    """The adapter `name` as a `PeftModel` on the base that its config names."""
    from peft import PeftModel

    adapter = json.loads(adapter_config.read_text(encoding="utf-8"))
    base_name = adapter.get("base_model_name_or_path")
    if not base_name:
        raise ValueError(f"Adapter {str(name)!r} names no base: fill in `base_model_name_or_path` of its config.")
    if file_of(base_name, "adapter_config.json", revision=adapter.get("revision")) is not None:
        raise ValueError(
            f"Adapter {str(name)!r} names {base_name!r} as its base, which is an adapter too. Merge that one into "
            "its base first."
        )
    folder = local_folder(name, revision=revision)
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"Adapter {str(name)!r} has no adapter_model.safetensors. Pickles are not read: convert it first."
        )
    return PeftModel.from_pretrained(
        load_model(base_name, revision=adapter.get("revision"), dtype=dtype, **kwargs), folder
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end-of-sequence token (masked by attention).

    Raises:
        FileNotFoundError: There is no tokenizer at `name`. For some model types transformers makes one without a
            vocabulary instead, which turns every text into nothing; that is refused here too.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision or "main", **kwargs)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Tokenizer {str(name)!r} cannot be loaded: {str(error).splitlines()[0]} Mend the path or the Hub id; "
            "tokenizer.json and tokenizer_config.json have to lie there."
        ) from error
    if len(tokenizer) < 100 and set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise FileNotFoundError(
            f"Tokenizer {str(name)!r} cannot be loaded: its vocabulary is empty, so there is probably no "
            "tokenizer.json. Save the tokenizer there, or name the folder or repository that has it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(model_or_config: Any) -> int | None:
    """The longest sequence that a model was built for, or None where its config does not say."""
    config = getattr(model_or_config, "config", model_or_config)
    if isinstance(config, (str, Path)):
        config = AutoConfig.from_pretrained(str(config))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
