"""Export a model or an adapter for llama.cpp, Ollama and LM Studio: one GGUF file, through the `gguf` package."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_transfer_ext.adapters.gguf import export_adapter, interleaved
from hf_transfer_ext.data.facts import FACTS_DATASET
from hf_transfer_ext.data.text import load_train_and_test
from hf_transfer_ext.evals.language import measure_language_model
from hf_transfer_ext.files import require_free_space, sha256_of, written_aside
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication, refuse_single_file
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import call_of
from hf_transfer_ext.hub.privacy import public_text
from hf_transfer_ext.hub.record import RunRecord, Stage, describe_dataset, describe_input, last_name, read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging.record import inputs_of
from hf_transfer_ext.models.loading import NO_REMOTE_CODE, checked_adapter, load_model, load_tokenizer
from hf_transfer_ext.reading import field_of, parse_json, read_json
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.weights.opened import InputModel, Scratch, open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference
from hf_transfer_ext.weights.repository import file_of

#: Class in config.json -> architecture in GGUF. Others are refused: llama.cpp stores the weights of many of them in
#: another order, and a file in the wrong order is wrong without an error.
MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
#: Type of the matrices -> its name in `gguf`. Vectors stay float32, as llama.cpp asks for.
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
#: Rule by which text is cut into words before BPE -> llama.cpp's name for it.
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": name
    for digits, name in ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"))
}  # fmt: skip
#: Kinds of tokens in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        file: The GGUF file.
        architecture: Its name in GGUF; "lora" for an adapter.
        tensors: Number of tensors.
        bytes: Size of the file.
        in_f16: Matrices whose rows do not divide into blocks of the chosen type, which are stored as f16 instead.
    """

    file: str
    architecture: str
    tensors: int
    bytes: int
    in_f16: list[str] = field(default_factory=list)


def export(
    model: str,
    out: str,
    *,
    to: str = "gguf",
    quantize: str = "f16",
    base: str | None = None,
    data: str | None = FACTS_DATASET,
    rows: int = 64,
    name: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model, or a LoRA, as one GGUF file in a folder with card and record, atomically.

    When to use it: to run the result with llama.cpp, Ollama or LM Studio. The file holds weights, tokenizer and chat
    template. It is read back by transformers and measured beside the original, so that the card says what the type
    costs: perplexity of both, KL and agreement of the next token. Tensors are written one at a time; the measurement
    holds both models in float32 in memory.

    Args:
        model: Folder or Hub id of a model (`path[@revision][+lora]`) or of an adapter.
        out: The new folder; a name that ends in .gguf gives the file alone, without card, record and measurements.
        to: "gguf".
        quantize: Type of the matrices: f32, f16, bf16 or q8_0 (8 bits in blocks of 32). Of an adapter: f32 or f16.
        base: Of an adapter: its base model, if it is not the one that its config names.
        data: Texts to measure a model on: file, folder, Hub id, or facts (made from packages). None: no measurement.
        rows: Texts that are measured, at most.
        name: Of the model, in the header of the file; by default the last component of `model`.
        overwrite: Replace a file that is there.

    Raises:
        FileExistsError: `out` exists, and `overwrite` is off.
        ImportError: The package gguf is not installed.
        ValueError: The architecture, a setting of it or the tokenizer is not one that llama.cpp computes as
            transformers does, or the type is unknown.

    Source: the format of llama.cpp's own converter, `convert_hf_to_gguf.py`, https://github.com/ggml-org/llama.cpp
    """
    if to != "gguf":
        raise ValueError(unknown_name("format", to, ["gguf"]))
    if quantize not in TYPES:
        raise ValueError(unknown_name("type", quantize, TYPES))
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}. To measure nothing, set `data` to none.")
    path = Path(out)
    alone = path.suffix == ".gguf"
    if alone and path.is_dir():
        raise ValueError(f"`out` ends in .gguf, and {out!r} is a folder. Name a file, or another folder.")
    if alone and path.exists() and not overwrite:
        raise FileExistsError(f"{out!r} exists. Name another file, or set `overwrite`.")
    reference = parse_reference(model, "model")
    if reference.lora is None and file_of(reference.path, "adapter_config.json", revision=reference.revision):
        return _export_adapter(reference, path, quantize, base, overwrite)
    if base is not None:
        raise ValueError(f"`base` belongs to an adapter, and {model!r} is a model. Leave it out.")
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Writing GGUF files needs the package gguf: pip install gguf") from error
    name = name or public_text(last_name(reference.path))
    if alone:
        return _export_file(reference, path, quantize, name, gguf)
    began = time.perf_counter()
    with written_aside(path, overwrite=overwrite, inputs=[reference.path, reference.lora, data]) as folder:
        file = folder / f"model-{quantize}.gguf"
        report = _export_file(reference, file, quantize, name, gguf)
        settings = {"model": model, "to": to, "quantize": quantize, "data": data, "rows": rows, "name": name}
        wanted = inputs_of([reference], None)
        record = RunRecord("export", "hf-transfer-ext export", settings, recipe_sha256=sha256_of(__file__))
        record.inputs += [describe_input(*one) for one in wanted]
        record.stages.append(Stage("export", round(time.perf_counter() - began, 3)))
        measured = None
        if data is not None:
            wanted.append((data, None, "dataset"))
            record.inputs.append(describe_dataset(data))
            with record.stage("measure"):
                measured = _measured(reference, file, data, rows)
        else:
            record.not_measured.append("What the type of the weights costs: the export had no data.")
        if report.in_f16:
            listed = ", ".join(report.in_f16[:8]) + (", ..." if len(report.in_f16) > 8 else "")
            record.notes["Types"] = [f"Stored as f16, since their rows do not divide into blocks: {listed}."]
        record.call = call_of(settings, wanted)
        finish_run(folder, record, measured, result="exported", quiet=True)
    return replace(report, file=str(path / file.name))


def _export_file(reference: ModelReference, out: Path, quantize: str, name: str, gguf: Any) -> ExportReport:
    opened = open_model(reference)
    try:
        return _write(_Exported(opened, gguf), out, quantize, name, gguf)
    finally:
        opened.close()


def _measured(reference: ModelReference, file: Path, data: str, rows: int) -> dict[str, list[Measurement]]:
    """The original, and what transformers reads back from the file, on the held-out texts of a data set."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator()
    plain = ModelReference(reference.path, reference.revision)
    original: Any = load_model(plain.path, revision=plain.revision, dtype="float32")
    if reference.lora is not None:
        lora = checked_adapter(reference.lora, original, revision=reference.lora_revision)
        original = PeftModel.from_pretrained(original, str(lora)).merge_and_unload()
    again = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **NO_REMOTE_CODE
    )
    original, again = (model.eval().to(accelerator.device) for model in (original, again))
    tokenizer = load_tokenizer(reference.path, revision=reference.revision)
    texts = list(islice(load_train_and_test(data)[1] or (), rows))
    how: Any = {"dataset": last_name(data), "accelerator": accelerator}
    return {
        "original": measure_language_model(original, tokenizer, texts, **how),
        "exported": measure_language_model(again, tokenizer, texts, reference=original, **how),
    }


def _export_adapter(
    reference: ModelReference, out: Path, quantize: str, base: str | None, overwrite: bool
) -> ExportReport:
    names = {"f32": "float32", "f16": "float16"}
    if quantize not in names:
        raise ValueError(f"The factors of an adapter are stored as f32 or f16, not {quantize}.")
    file = export_adapter(
        reference.path, out, base=base, dtype=names[quantize], revision=reference.revision, overwrite=overwrite
    )
    import gguf

    return ExportReport(str(file), "lora", len(gguf.GGUFReader(file).tensors), file.stat().st_size)


class _Exported:
    """A model as llama.cpp stores it: names, order and values of its tensors, and what the header says."""

    def __init__(self, model: InputModel, gguf: Any) -> None:
        from transformers import AutoConfig

        self.model, self.where = model, f"config.json of {str(model.reference)!r}"
        stated = read_json(model.folder / "config.json")
        classes = field_of(stated, "architectures", list, where=self.where, default=[])
        known = next((one for one in classes if one in MODELS), None)
        if known is None:
            raise ValueError(
                f"{str(model.reference)!r} is a {', '.join(map(str, classes)) or 'model of no stated class'}, and how "
                f"llama.cpp orders its weights is not known here. Supported: {', '.join(MODELS)}."
            )
        self.architecture = MODELS[known]
        self.config: dict[str, Any] = AutoConfig.from_pretrained(str(model.folder), **NO_REMOTE_CODE).to_dict()
        self.layers, self.width, self.heads = (
            self.number("num_hidden_layers"), self.number("hidden_size"), self.number("num_attention_heads")
        )  # fmt: skip
        self.heads_kv = self.config.get("num_key_value_heads") or self.heads
        self.head_dim = self.config.get("head_dim") or self.width // self.heads
        self.rope = self._rope()
        self._refuse_unsupported()
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[self.architecture], self.layers)
        self.names: dict[str, str] = {}
        tied = bool(self.config.get("tie_word_embeddings"))
        for name in model.tensors:
            if name == "lm_head.weight" and tied:
                continue
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ValueError(f"llama.cpp has no name for {name!r} in the architecture {self.architecture!r}.")
            self.names[name] = found

    def number(self, key: str) -> int:
        value: int = field_of(self.config, key, int, where=self.where)
        return value

    def _rope(self) -> dict[str, Any]:
        """Settings of the rotary embedding, for Gemma those of the layers that see everything."""
        found = self.config.get("rope_parameters") or {}
        if isinstance(found.get("full_attention"), Mapping):
            local = found.get("sliding_attention") or {}
            if local.get("rope_type", "default") != "default" or local.get("rope_theta", 10000.0) != 10000.0:
                raise ValueError(f"{self.where}: llama.cpp turns the local layers of Gemma 3 with theta 10000 only.")
            found = found["full_attention"]
        return dict(found)

    def _refuse_unsupported(self) -> None:
        """Settings that llama.cpp does not read for this architecture, or reads as something else."""
        config, reason = self.config, ""
        if config.get("quantization_config"):
            reason = "its weights are quantized already; export the model that it was made from"
        elif config.get("use_sliding_window"):
            reason = "`use_sliding_window`, which llama.cpp does not read"
        elif self.architecture == "llama" and (config.get("sliding_window") or math.inf) < self.number(
            "max_position_embeddings"
        ):
            reason = "`sliding_window`, which llama.cpp does not read for this architecture"
        elif self.architecture in ("llama", "qwen3") and config.get("attention_bias"):
            reason = "`attention_bias`, which is not converted"
        elif config.get("mlp_bias"):
            reason = "`mlp_bias`, which is not converted"
        elif self.rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
            reason = f"the rotary embedding {self.rope.get('rope_type')!r}, which is not converted"
        elif self.rope.get("partial_rotary_factor", 1.0) != 1.0:
            reason = "`partial_rotary_factor`, which is not converted"
        elif self.architecture in ("gemma2", "gemma3"):
            every = 2 if self.architecture == "gemma2" else 6
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(self.layers)]
            caps = (config.get("final_logit_softcapping"), config.get("attn_logit_softcapping"))
            if config.get("layer_types", kinds) != kinds:
                reason = f"`layer_types` other than {every - 1} local layers and one that sees everything in turn"
            elif config.get("query_pre_attn_scalar", self.head_dim) != self.head_dim:
                reason = "`query_pre_attn_scalar` other than `head_dim`"
            elif self.architecture == "gemma3" and any(caps):
                reason = "soft caps of logits"
            elif self.architecture == "gemma2" and not all(caps):
                reason = "no soft caps of logits, which llama.cpp applies to every Gemma 2"
        if reason:
            raise ValueError(f"{str(self.model.reference)!r} is not exported: {reason}.")

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, in llama.cpp's order and form."""
        stored = self.model[name]
        values = torch.empty(stored.shape)
        stored.read(0, values.view(-1), Scratch())
        if self.architecture == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            values = interleaved(values, self.heads if ".q_proj." in name else self.heads_kv)
        if self.architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + 1  # transformers adds it in each forward pass, llama.cpp in the file
        if not torch.isfinite(values).all():
            raise ValueError(f"{name!r} of {str(self.model.reference)!r} holds NaN or infinity.")
        return values.contiguous()

    def rope_factors(self) -> Tensor | None:
        """Per-frequency factors of Llama 3's rotary embedding, which llama.cpp reads as a tensor."""
        if self.rope.get("rope_type") != "llama3":
            return None
        where = "`rope_parameters`"
        factor, low, high, old = (
            float(field_of(self.rope, key, float, where=where))
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        base = float(field_of(self.rope, "rope_theta", float, where=where))
        found = []
        for i in range(0, self.head_dim, 2):
            wavelength = 2 * math.pi * base ** (i / self.head_dim)
            if wavelength < old / high:
                found.append(1.0)
            elif wavelength > old / low:
                found.append(factor)
            else:
                smooth = (old / wavelength - low) / (high - low)
                found.append(1 / ((1 - smooth) / factor + smooth))
        return torch.tensor(found)

    def describe(self, writer: Any, quantize: str, name: str, gguf: Any) -> None:
        """Write the header: sizes, rotary embedding, tokenizer."""
        config = self.config
        writer.add_name(name)
        writer.add_file_type(
            getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(quantize, f"MOSTLY_{TYPES[quantize]}"))
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(self.number("max_position_embeddings"))
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.number("intermediate_size"))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.heads_kv)
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
        writer.add_rope_freq_base(float(self.rope.get("rope_theta", 10000.0)))
        writer.add_vocab_size(self.number("vocab_size"))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        if self.architecture == "llama":
            writer.add_rope_dimension_count(self.head_dim)
        if self.architecture == "gemma2":
            writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
            writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
        if self.architecture in ("gemma2", "gemma3"):
            writer.add_sliding_window(self.number("sliding_window"))
        if self.rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(field_of(self.rope, "factor", float, where="`rope_parameters`")))
        _describe_tokenizer(writer, load_tokenizer(self.model.folder), self.number("vocab_size"))


def _write(model: _Exported, out: Path, quantize: str, name: str, gguf: Any) -> ExportReport:
    types: dict[str, Any] = {}
    in_f16: list[str] = []
    chosen = gguf.GGMLQuantizationType[TYPES[quantize]]
    block = gguf.GGML_QUANT_SIZES[chosen][0]
    for name, new in model.names.items():
        shape = tuple(model.model[name].shape)
        types[name] = chosen if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        if len(shape) > 1 and shape[-1] % block:
            types[name] = gguf.GGMLQuantizationType.F16
            in_f16.append(new)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    writer = gguf.GGUFWriter(partial, model.architecture)
    try:
        model.describe(writer, quantize, name, gguf)
        factors = model.rope_factors()
        total = 0
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.numpy().nbytes)
        for name, new in model.names.items():
            shape = tuple(model.model[name].shape)
            size, count = gguf.GGML_QUANT_SIZES[types[name]], math.prod(shape)
            total += count // size[0] * size[1]
            writer.add_tensor_info(new, shape, _numpy_type(types[name], gguf), count // size[0] * size[1], types[name])
        require_free_space(out, total)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for name in model.names:
            writer.write_tensor_data(gguf.quants.quantize(model.tensor(name).numpy(), types[name]))
        writer.close()
        os.replace(partial, out)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return ExportReport(str(out), model.architecture, len(model.names), out.stat().st_size, in_f16)


def _numpy_type(kind: Any, gguf: Any) -> Any:
    """A type that makes the writer take shapes as they are, in elements and not in bytes."""
    import numpy as np

    return np.dtype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32)


def _describe_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write tokens, merges or scores, special tokens and chat template.

    Raises:
        ValueError: A tokenizer of another kind than byte-level BPE or SentencePiece's BPE, or one that llama.cpp would
            cut into other tokens without an error.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "The tokenizer has no tokenizer.json, from which it is exported. Save it as a fast tokenizer."
        )
    stated = parse_json(tokenizer.backend_tokenizer.to_str(), "tokenizer.json")
    model = field_of(stated, "model", dict, where="tokenizer.json")
    if model.get("type") != "BPE":
        raise ValueError(f"The tokenizer is a {model.get('type')} model; only BPE tokenizers are exported.")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise ValueError(f"The tokenizer has ids up to {max(vocabulary.values())}, and the model {size} embeddings.")
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [_UNUSED] * size
    for text, number in vocabulary.items():
        tokens[number], kinds[number] = text, _NORMAL
    for added in stated.get("added_tokens") or []:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    merges = [tuple(one) if isinstance(one, list) else tuple(one.split(" ")) for one in model.get("merges") or []]
    if _is_byte_level(stated):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(stated))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(one) for one in merges])
    else:
        for number, text in enumerate(tokens):
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">") and kinds[number] == _NORMAL:
                kinds[number] = _BYTE
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = _UNKNOWN
        scores = _scores(model["vocab"], merges)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(text, 0.0) for text in tokens])
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(tokenizer.tokenize("a")[:1] != ["a"])
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _parts(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, one after the other."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    return list(pre_tokenizer.get("pretokenizers") or [pre_tokenizer])


def _is_byte_level(stated: Mapping[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _parts(stated.get("pre_tokenizer")))


def _pre_tokenizer(stated: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule by which text is cut into words."""
    splits = [part for part in _parts(stated.get("pre_tokenizer")) if part.get("type") != "ByteLevel"]
    byte_level = next(part for part in _parts(stated.get("pre_tokenizer")) if part.get("type") == "ByteLevel")
    if not splits and byte_level.get("use_regex", True) and not byte_level.get("add_prefix_space"):
        return "gpt-2"
    pattern = splits[0].get("pattern") if len(splits) == 1 and splits[0].get("type") == "Split" else None
    name = PRE_TOKENIZERS.get(str((pattern or {}).get("Regex")))
    if name is None or byte_level.get("use_regex", True) or byte_level.get("add_prefix_space"):
        raise ValueError(
            "The tokenizer cuts text into words by a rule that llama.cpp has no name for here, so it would give other "
            f"tokens. Known: those of GPT-2, {', '.join(PRE_TOKENIZERS.values())}."
        )
    return name


def _scores(vocabulary: Mapping[str, int], merges: list[tuple[str, ...]]) -> dict[str, float]:
    """Token -> score, such that SentencePiece's algorithm, which llama.cpp runs, merges in the order of `merges`.

    Raises:
        ValueError: The merges are not those of a SentencePiece model: some way to put a token together is missing, or
            those of one token do not have the same rank.
    """
    ranks: dict[str, int] = {}
    pairs: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        ranks.setdefault(token, rank)
        pairs[token] = pairs.get(token, 0) + 1
    order = [ranks["".join(pair)] for pair in merges]
    whole = all(
        pairs[token] == sum(token[:i] in vocabulary and token[i:] in vocabulary for i in range(1, len(token)))
        for token in ranks
    )
    if not whole or order != sorted(order):
        raise ValueError(
            "The tokenizer's merges are not those of a SentencePiece model, so llama.cpp would give other tokens. "
            "Only byte-level BPE and SentencePiece's BPE (Llama 2, Gemma) are exported."
        )
    return {token: -float(rank) for token, rank in ranks.items()}


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext export FOLDER OUT --to gguf`."""
    about = "Write a model or a LoRA as one GGUF file, for llama.cpp, Ollama and LM Studio."
    arguments = arguments_for(export, argv, program="hf-transfer-ext export", about=about, extra=PUSH_OPTIONS)
    publication = Publication.taken_from(arguments)
    if publication.repo is not None:
        refuse_single_file(arguments["out"])
    report = export(**arguments)
    print(f"{report.file}: {report.architecture}, {report.tensors} tensors, {report.bytes / 1e6:.1f} MB")
    if report.in_f16:
        print(f"stored as f16, since their rows do not divide into blocks: {', '.join(report.in_f16)}")
    folder = Path(report.file).parent
    for m in read_record(folder).metrics if arguments["out"] != report.file else ():
        print(f"{m.name}: {m.value:.4g} {m.unit}")
    publication.publish(folder)
    return 0
