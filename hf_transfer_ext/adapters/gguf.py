"""Convert a LoRA to a GGUF adapter for llama.cpp (`--lora FILE`), through the `gguf` package."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.adapters.finish import finish_adapter
from hf_transfer_ext.adapters.transfer.method import product_norm
from hf_transfer_ext.files import sha256_of, written_aside
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.tensors import dtype_by_name
from hf_transfer_ext.weights.lora import LoraAdapter, LoraFactors, read_lora
from hf_transfer_ext.weights.reference import parse_reference
from hf_transfer_ext.weights.repository import file_of, local_folder

#: Class in a base's config.json -> name of the architecture in GGUF. Others are refused: llama.cpp stores the weights
#: of many of them in another order, and an adapter in the wrong order is wrong without an error.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
#: Architectures whose queries and keys llama.cpp stores with the two halves of each rotary pair next to each other.
INTERLEAVED = ("llama",)
#: Types in which the factors can be stored.
DTYPES = ("float32", "float16")


def convert_to_gguf(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA as one GGUF file that llama.cpp applies to a GGUF of the same base.

    The file holds `general.type = adapter`, `adapter.type = lora`, `adapter.lora.alpha`, `general.architecture`, and
    for each module the tensors `<name>.lora_a` and `<name>.lora_b` under llama.cpp's names. llama.cpp multiplies a
    module's product by alpha over the rank of its own factors; the factors are scaled such that this gives the exact
    change for any rank and alpha pattern, rsLoRA included.

    When to use it: to run an adapter with llama.cpp, Ollama or LM Studio without merging it.

    Args:
        adapter: Folder or Hub id of a PEFT LoRA whose change is B A (`convert_to_lora` makes one of other types).
        out: The new file, written atomically.
        base: The base model, of which config.json alone is read; by default the one that the adapter's config names.
        dtype: Of the factors: "float32" or "float16".
        revision: Hub revision of the adapter.
        overwrite: Replace a file that is there.

    Raises:
        FileExistsError: `out` exists, and `overwrite` is off.
        ImportError: The package gguf is not installed.
        ValueError: The base's architecture is not one of `ARCHITECTURES`; the adapter changes embeddings, stores whole
            modules or biases, or a module that llama.cpp has no name for; `dtype` is not one of `DTYPES`.

    Source: the format of llama.cpp's own converter, `convert_lora_to_gguf.py`,
    https://github.com/ggml-org/llama.cpp
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Writing GGUF files needs the package gguf: pip install 'hf_transfer_ext[gguf]'") from error
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"`out` must be a file, and {str(out)!r} is a folder. Name a file that ends in .gguf.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} exists. Name another file, or set `overwrite`.")
    found = read_lora(local_folder(adapter, revision=revision))
    try:
        config, architecture = _base_config(found, adapter, base)
        tensors = _renamed(found, config, architecture, gguf)
    finally:
        found.checkpoint.close()
    alpha = float(max(up.shape[1] for _, up in tensors.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{out.name}.partial-", dir=out.parent)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (down, up) in tensors.items():
            # llama.cpp scales by alpha / rank; `up` holds the whole scale already.
            scaled = up * (up.shape[1] / alpha)
            for ending, tensor in (("lora_a", down), ("lora_b", scaled)):
                writer.add_tensor(f"{name}.{ending}", _stored(tensor, dtype, name).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(partial, 0o644)
        os.replace(partial, out)
    finally:
        Path(partial).unlink(missing_ok=True)
    return out


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """`convert_to_gguf` into a folder with a card and a record, or into a single file if `out` ends in `.gguf`.

    The card says how far the stored change is from the adapter's own.

    Returns:
        The GGUF file.
    """
    out = Path(out)
    if out.suffix == ".gguf":
        return convert_to_gguf(adapter, out, base=base, dtype=dtype, revision=revision, overwrite=overwrite)
    began = time.perf_counter()
    name = f"adapter-{'f32' if dtype == 'float32' else 'f16'}.gguf"
    with written_aside(out, overwrite=overwrite, inputs=[adapter, base]) as folder:
        file = convert_to_gguf(adapter, folder / name, base=base, dtype=dtype, revision=revision)
        found = read_lora(local_folder(adapter, revision=revision))
        try:
            named = base or found.config["base_model_name_or_path"]
            config, architecture = _base_config(found, adapter, base)
            error = _relative_error(file, found, config, architecture)
            modules = len(found.modules)
        finally:
            found.checkpoint.close()
        reference = parse_reference(named, "base")
        settings = {"model": adapter, "quantize": name[8:-5], "base": named}
        finish_adapter(
            folder, "export", "export", settings,
            [(adapter, revision, "adapter"), (reference.path, reference.revision, "base")],
            recipe_sha256=sha256_of(__file__), seconds=time.perf_counter() - began, call=settings,
            metrics=[Measurement("relative_error_of_change", error, "share of the change's norm", False, modules)],
            not_measured=["What the adapter does on its base: llama.cpp was not run."],
        )  # fmt: skip
    return out / name


def _relative_error(file: Path, adapter: LoraAdapter, config: dict[str, Any], architecture: str) -> float:
    """||B'A' - BA|| / ||BA|| over all modules, of the factors in a file against the adapter's own."""
    import gguf

    reader = gguf.GGUFReader(file)
    stated: Any = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = float(stated.contents())
    stored = {str(one.name): torch.from_numpy(one.data.astype("float32")) for one in reader.tensors}
    wrong = whole = 0.0
    for name, (down, up) in _renamed(adapter, config, architecture, gguf).items():
        own_down, own_up = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"] * (alpha / up.shape[1])
        both = LoraFactors(torch.cat([own_up, -up.float()], 1).double(), torch.cat([own_down, down.float()]).double())
        wrong += product_norm(both) ** 2
        whole += product_norm(LoraFactors(up.double(), down.double())) ** 2
    return (wrong / whole) ** 0.5 if whole else 0.0


def interleaved(rows: Float[Tensor, "out rank"], heads: int) -> Float[Tensor, "out rank"]:
    """Rows of queries or keys in llama.cpp's order: the halves of each head's rotary pairs taken in turn.

    transformers rotates feature i of a head with feature i + size / 2, llama.cpp feature 2 i with 2 i + 1.
    """
    size = len(rows) // heads
    return rows.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _renamed(
    adapter: LoraAdapter, config: dict[str, Any], architecture: str, gguf: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """llama.cpp's name of each weight -> A and B in llama.cpp's order, with the scale in B."""
    embedded = next((module for module in adapter.modules if module.endswith("embed_tokens")), None)
    if embedded is not None:
        raise ValueError(
            f"The adapter changes the embeddings {embedded!r}, which are not converted: llama.cpp applies adapters to "
            "matrix products. Merge it into its base and convert the model."
        )
    if adapter.replaced:
        raise ValueError(
            f"The adapter stores {next(iter(adapter.replaced))!r} whole, which a GGUF adapter cannot hold. Merge it "
            "into its base and convert the model, or extract it again without whole modules."
        )
    if adapter.config.get("fan_in_fan_out"):
        raise ValueError("The adapter changes transposed layers (Conv1D), which are not converted. Merge it instead.")
    where = "config.json of the base"
    text = field_of(config, "text_config", dict, where=where, default=config)
    layers = field_of(text, "num_hidden_layers", int, where=where)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], layers)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module, factors in adapter.modules.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"llama.cpp has no name for {module!r} in the architecture {architecture!r}.")
        up = factors.left
        kind = module.rpartition(".")[2]
        if architecture in INTERLEAVED and kind in ("q_proj", "k_proj"):
            heads = field_of(text, "num_attention_heads", int, where=where)
            if kind == "k_proj":
                heads = field_of(text, "num_key_value_heads", int, where=where, default=heads)
            up = interleaved(up, heads)
        found[name] = factors.right.contiguous(), up.contiguous()
    return found


def _base_config(adapter: LoraAdapter, named: str | Path, base: str | Path | None) -> tuple[dict[str, Any], str]:
    """The base's config.json, and the architecture that it means in GGUF."""
    base = base or adapter.config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"Adapter {str(named)!r} names no base model in its config: give `base`.")
    reference = parse_reference(base, "base")
    path = file_of(reference.path, "config.json", revision=reference.revision)
    if path is None:
        raise FileNotFoundError(f"The base {str(base)!r} has no config.json. Name its folder or Hub id as `base`.")
    config = read_json(path)
    classes = field_of(config, "architectures", list, where=f"config.json of {str(base)!r}", default=[])
    known = next((one for one in classes if one in ARCHITECTURES), None)
    if known is None:
        raise ValueError(
            f"The base {str(base)!r} is a {', '.join(map(str, classes)) or 'model of no stated class'}, and how "
            f"llama.cpp orders its weights is not known here. Supported: {', '.join(ARCHITECTURES)}."
        )
    return config, ARCHITECTURES[known]


def _stored(tensor: Tensor, dtype: str, name: str) -> Tensor:
    found = tensor.to(dtype_by_name(dtype)).contiguous()
    if not torch.isfinite(found).all():
        raise ValueError(f"Factors of {name!r} would hold NaN or infinity in {dtype}. Choose float32.")
    return found
