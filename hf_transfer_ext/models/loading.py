"""Load models and tokenizers by local path or Hub id: safetensors only, and no code from a repository by default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_transfer_ext.models.chat_template import guard_chat_templates
from hf_transfer_ext.reading import check_patterns, field_of, one_line, read_json
from hf_transfer_ext.tensors import dtype_by_name
from hf_transfer_ext.weights.repository import adapters_in, base_of_adapter, commit_of, file_of, local_folder, place_of


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | str:
    """`"bfloat16"` -> `torch.bfloat16`; None and "auto" keep the dtype of the checkpoint."""
    if name is None or name == "auto":
        return "auto"
    found = dtype_by_name(name)
    if found is None:
        raise ValueError(f"`dtype` must be auto, float32, bfloat16 or float16, got {name!r}.")
    return found


def four_bit(compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """The `quantization_config` of QLoRA: weights in nf4 with quantized scales, products in `compute_dtype`.

    Raises:
        ValueError: bitsandbytes is not installed.

    Source: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "A model in 4 bits needs bitsandbytes, which is not installed: pip install 'hf_transfer_ext[gpu]'. Or "
            "leave `four_bit` off."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


#: One of these is beside every tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: For every `from_pretrained`: without it transformers prompts on the terminal, and a piped `y` would run the code.
NO_REMOTE_CODE = {"trust_remote_code": False}


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "auto",
    auto_class: str = "AutoModelForCausalLM",
    **kwargs: Any,
) -> PreTrainedModel | Any:
    """Load a model, by default a causal language model; an adapter (`adapter_config.json`) gives a `PeftModel`.

    A folder of several adapters of one base, as PEFT saves them, gives a `PeftModel` with all of them under the names
    of their folders; the first by name is active.

    Args:
        name: A folder, or `repo[@revision][:subfolder]` on the Hub.
        dtype: "auto" (of the checkpoint), "float32", "bfloat16" or "float16".
        auto_class: The class of transformers that loads it (`weights.kinds`).
        kwargs: Passed to `from_pretrained` (`device_map`, `attn_implementation`, `quantization_config`, ...).
            Code from a repository runs only with `trust_remote_code=True`, and there is no prompt on the terminal.

    Raises:
        FileNotFoundError: There is no model at `name`.
        ValueError: Its config or adapter config cannot be read, or it needs code from its repository.
    """
    kwargs = {"use_safetensors": True, **NO_REMOTE_CODE, **kwargs}
    adapter_config = file_of(name, "adapter_config.json", revision=revision)
    if adapter_config is not None:
        return _load_adapter(name, adapter_config, revision, dtype, {**kwargs, "auto_class": auto_class})
    several = adapters_in(name)
    if several:
        return _load_adapters(several, dtype, {**kwargs, "auto_class": auto_class})
    place, commit = place_of(name, revision), commit_of(name, revision=revision)
    inside = {"subfolder": place.subfolder} if place.subfolder else {}
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            place.path, revision=commit or place.revision or "main", dtype=dtype_of(dtype), **inside, **kwargs
        )
        model.config._commit_hash = commit
        return model
    except RecursionError as error:
        raise ValueError(f"The config.json of model {str(name)!r} is nested too deeply.") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(_needs_code("Model", name)) from error
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"Model {str(name)!r} cannot be loaded: it must be a folder or Hub repository with config.json and "
            f"safetensors weights. {str(error).splitlines()[0]}"
        ) from error


def _load_adapter(name: str | Path, adapter_config: Path, revision: str | None, dtype: Any, kwargs: Any) -> Any:
    """The adapter `name` as a `PeftModel` on the base model named in its config."""
    from peft import PeftModel

    base_name, base_revision = base_of_adapter(adapter_config)
    if file_of(base_name, "adapter_config.json", revision=base_revision) is not None:
        raise ValueError(
            f"Adapter {str(name)!r} names {base_name!r} as its base model, which is also an adapter. Merge that one "
            "into its base first."
        )
    base = load_model(base_name, revision=base_revision, dtype=dtype, **kwargs)
    folder = checked_adapter(name, base, revision=revision)
    try:
        return PeftModel.from_pretrained(base, folder)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"Adapter {str(name)!r} does not fit {base_name!r}: {one_line(error)}") from error


def _load_adapters(folders: Sequence[Path], dtype: Any, kwargs: Any) -> Any:
    """Several adapters of one base model, under the names of their folders."""
    from peft import PeftModel

    bases = {base_of_adapter(folder / "adapter_config.json") for folder in folders}
    if len(bases) > 1:
        raise ValueError(
            f"The adapters in {str(folders[0].parent)!r} have different base models "
            f"({', '.join(sorted(base for base, _ in bases))}). Load them one by one."
        )
    ((base_name, base_revision),) = bases
    model = load_model(base_name, revision=base_revision, dtype=dtype, **kwargs)
    for folder in folders:
        name = folder.name.replace(".", "-")
        try:
            checked = str(checked_adapter(folder, model))
            if folder is folders[0]:
                model = PeftModel.from_pretrained(model, checked, adapter_name=name)
            else:
                model.load_adapter(checked, adapter_name=name)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"Adapter {str(folder)!r} does not fit {base_name!r}: {one_line(error)}") from error
    return model


def checked_adapter(name: str | Path, base: Any, *, revision: str | None = None) -> Path:
    """The folder of an adapter for `base`, refused if PEFT would load a pickle, import a module or run forever.

    Raises:
        FileNotFoundError: It has no safetensors weights.
        ValueError: Its adapter_config.json requests imports, or its module patterns are invalid or too slow.
    """
    folder, where = local_folder(name, revision=revision), f"adapter {str(name)!r}"
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"Adapter {str(name)!r} has no adapter_model.safetensors. Pickles are not loaded: convert it first."
        )
    settings = read_json(folder / "adapter_config.json")
    for key in ("megatron_config", "tokenizer_kwargs"):
        if settings.get(key):
            raise ValueError(
                f"The adapter_config.json of {where} sets `{key}`, which lets PEFT import modules or load a "
                "tokenizer as the adapter's author chose. Remove it from the file."
            )
    modules = [module for module, _ in base.named_modules()]
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(settings.get(key), str):
            check_patterns([settings[key]], modules, where, whole=True)
    for key in ("rank_pattern", "alpha_pattern"):
        check_patterns(field_of(settings, key, dict, where=where, default={}), modules, where)
    return folder


def load_tokenizer(name: str | Path, *, revision: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end-of-sequence token (masked by attention).

    Args:
        name: As of `load_model`. For an adapter without tokenizer files, that of its base model is loaded.

    Raises:
        FileNotFoundError: There is no tokenizer at `name`. For some model types transformers would create one with an
            empty vocabulary instead, which tokenizes every text to nothing; this is refused as well.
    """
    place = place_of(name, revision)
    inside = {"subfolder": place.subfolder} if place.subfolder else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place.path, revision=place.revision or "main", **inside, **{**NO_REMOTE_CODE, **kwargs}
        )
    except Exception as error:  # the tokenizers library raises bare exceptions for a damaged tokenizer.json
        if "trust_remote_code" in str(error):
            raise ValueError(_needs_code("Tokenizer", name)) from error
        base = None if kwargs.get("local_files_only") else _base_with_tokenizer(name, revision)
        if base is not None:
            return load_tokenizer(base[0], revision=base[1], **kwargs)
        raise FileNotFoundError(
            f"Tokenizer {str(name)!r} cannot be loaded: {one_line(error)} Fix the path or the Hub id; "
            "it must contain tokenizer.json and tokenizer_config.json."
        ) from error
    if len(tokenizer) < 100 and set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise FileNotFoundError(
            f"Tokenizer {str(name)!r} cannot be loaded: its vocabulary is empty, so there is probably no "
            "tokenizer.json. Save the tokenizer there, or name the folder or repository that has it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    guard_chat_templates(tokenizer, str(name))
    return tokenizer


def _base_with_tokenizer(name: str | Path, revision: str | None) -> tuple[str, str | None] | None:
    """The base model of an adapter that has no tokenizer files of its own, and the base's revision; else None."""
    adapter_config = file_of(name, "adapter_config.json", revision=revision)
    if adapter_config is None or any(file_of(name, one, revision=revision) for one in TOKENIZER_FILES):
        return None
    base, base_revision = base_of_adapter(adapter_config)
    is_adapter = file_of(base, "adapter_config.json", revision=base_revision) is not None  # might lead in circles
    return None if is_adapter else (base, base_revision)


def load_processor(name: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Load the processor of a vision-language model: its tokenizer and what turns images into tensors.

    Raises:
        FileNotFoundError: There is no processor at `name`, or one that needs a package that is not installed.
        ValueError: What is there does not process images, or needs code from its repository.
    """
    place = place_of(name, revision)
    inside = {"subfolder": place.subfolder} if place.subfolder else {}
    try:
        processor = AutoProcessor.from_pretrained(
            place.path, revision=place.revision or "main", **inside, **{**NO_REMOTE_CODE, **kwargs}
        )
    except Exception as error:  # processors of some families raise whatever their missing parts raise
        if "trust_remote_code" in str(error):
            raise ValueError(_needs_code("Processor", name)) from error
        advice = "It must contain processor_config.json or preprocessor_config.json, and the tokenizer."
        missing = [one for one in ("torchvision", "num2words") if one in str(error).lower() and find_spec(one) is None]
        if missing:  # processors of videos, which those of Qwen-VL and SmolVLM2 have
            advice = f"Install what it needs: pip install {' '.join(missing)}."
        raise FileNotFoundError(f"Processor {str(name)!r} cannot be loaded: {one_line(error)} {advice}") from error
    require_processor(processor)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    for one in (processor, processor.tokenizer):
        guard_chat_templates(one, str(name))
    return processor


def require_processor(processor: Any) -> None:
    """Refuse what does not turn both texts and images into a model's inputs.

    Raises:
        ValueError: It has no tokenizer, or no image processor.
    """
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"A processor of texts and images is needed (`AutoProcessor.from_pretrained`), but "
                f"{type(processor).__name__} has no {part.replace('_', ' ')}."
            )


def tokenizer_in(reader: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself, and None, are returned as they are."""
    return getattr(reader, "tokenizer", reader)


@contextmanager
def call_settings_restored(reader: Any) -> Iterator[None]:
    """Truncation and padding that calls within the block set on a fast tokenizer are restored afterward.

    A fast tokenizer keeps them from one call to the next, and writes them to its `tokenizer.json`: a result would
    otherwise depend on whether its rows were tokenized or read from a cache.
    """
    backend = getattr(tokenizer_in(reader), "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if backend.truncation != truncation:
            backend.enable_truncation(**truncation) if truncation is not None else backend.no_truncation()
        if backend.padding != padding:
            backend.enable_padding(**padding) if padding is not None else backend.no_padding()


def _needs_code(what: str, name: str | Path) -> str:
    return (
        f"{what} {str(name)!r} needs Python code from its repository, which is not run by default. Read it; if you "
        "trust it, pass `trust_remote_code=True`."
    )


def context_length(model_or_config: Any) -> int | None:
    """The maximum sequence length of a model, or None if its config does not specify one."""
    config = getattr(model_or_config, "config", model_or_config)
    if isinstance(config, (str, Path)):
        config = AutoConfig.from_pretrained(str(config), **NO_REMOTE_CODE)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
