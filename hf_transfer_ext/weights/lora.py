"""LoRA adapters as what they do to a weight: a change `left @ right`, exact for all scalings and layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.files import write_text
from hf_transfer_ext.reading import check_patterns, field_of, module_pattern, read_json
from hf_transfer_ext.weights.checkpoints import Checkpoint, StoredTensor, write_checkpoint

#: What PEFT puts before the name of each module.
PREFIX = "base_model.model."

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(\.weight)?$")
_BEYOND = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>magnitude_vector|B\.bias)(\.weight)?$")

#: Options of a LoRA whose change is more than `B A`, but that `adapters.convert` can turn into a plain one.
CONVERTIBLE = ("use_dora", "lora_bias")


@dataclass(frozen=True)
class LoraFactors:
    """The change of one matrix, `left @ right`, in the layout in which the checkpoint stores the matrix.

    The scale of the adapter is contained in `left`.
    """

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def rows(self, first: int, last: int) -> Float[Tensor, "some columns"]:
        """Rows `first` to `last` (excluded) of the change, in float32."""
        return self.left[first:last] @ self.right


@dataclass(frozen=True)
class LoraAdapter:
    """A PEFT LoRA folder.

    Args:
        modules: module name -> change of its weight.
        replaced: tensor name -> stored tensor that takes its place (`modules_to_save`, trained biases).
        magnitudes: module name -> the norm that DoRA gives each row of the weight (column, where it is transposed).
        biases: module name -> the bias that LoRA with biases adds to the module's output, without the scale.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    modules: dict[str, LoraFactors]
    replaced: dict[str, StoredTensor]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def read_lora(folder: str | Path, *, allow: Sequence[str] = ()) -> LoraAdapter:
    """Read an adapter folder.

    Args:
        allow: Options out of `CONVERTIBLE` that the caller deals with.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The adapter is no LoRA, or of a kind whose change is not `B A` alone (DoRA, LoRA with biases).
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"There is no adapter_config.json in {str(folder)!r}; it is no PEFT adapter.")
    config = read_json(path)
    _refuse_other_kinds(config, folder, allow)
    checkpoint = Checkpoint(folder, stem="adapter_model")
    found: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    beyond: dict[str, dict[str, Tensor]] = {"magnitude_vector": {}, "B.bias": {}}
    for name, entry in checkpoint.entries.items():
        match = _FACTOR.match(name.removeprefix(PREFIX))
        more = _BEYOND.match(name.removeprefix(PREFIX)) if allow else None
        if match is not None:
            found.setdefault(match["module"], {})[match["kind"]] = checkpoint.read(name).float()
        elif more is not None:
            beyond[more["kind"]][more["module"]] = checkpoint.read(name).float()
        elif ".lora_" in name:
            raise ValueError(
                f"Adapter {str(folder)!r} holds {name!r}, which is more than a low-rank change. Merge it into its "
                "base model with PEFT, and use the result."
            )
        else:
            replaced[name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = entry
    where = f"adapter_config.json of {str(folder)!r}"
    patterns = field_of(config, "alpha_pattern", dict, where=where, default={})
    check_patterns(patterns, found, where)
    field_of(config, "lora_alpha", float, where=where, default=8)
    for pattern in patterns:
        field_of(patterns, pattern, float, where=f"`alpha_pattern` in {where}")
    modules = {module: _factors(module, factors, config, folder) for module, factors in found.items()}
    return LoraAdapter(checkpoint, config, modules, replaced, beyond["magnitude_vector"], beyond["B.bias"])


def lora_scale(module: str, config: Mapping[str, Any], rank: int) -> float:
    """The factor of `B A` for a module: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(module_pattern(pattern), module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _factors(module: str, found: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> LoraFactors:
    if set(found) == {"A", "B"}:
        down, up = found["A"], found["B"]
        transposed = bool(config.get("fan_in_fan_out"))
    elif set(found) == {"embedding_A", "embedding_B"}:
        down, up = found["embedding_A"], found["embedding_B"]
        transposed = True
    else:
        raise ValueError(f"Adapter {str(folder)!r}: module {module!r} has only {sorted(found)}; it needs A and B.")
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"Adapter {str(folder)!r}: the factors of {module!r} do not fit, B {list(up.shape)} and A "
            f"{list(down.shape)}. Only matrices can be merged."
        )
    if down.shape[0] < 1:
        raise ValueError(f"Adapter {str(folder)!r}: the factors of {module!r} have rank 0, so they change nothing.")
    scale = lora_scale(module, config, down.shape[0])
    if transposed:
        return LoraFactors((down.T * scale).contiguous(), up.T.contiguous())
    return LoraFactors(up * scale, down)


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path, allow: Sequence[str]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"Adapter {str(folder)!r} is of type {kind}; only LORA can be merged as a change of weights.")
    for option in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "target_parameters"):
        if config.get(option) and option not in allow:
            advice = (
                "Convert it to a plain LoRA first (`hf-transfer-ext convert`)"
                if option in CONVERTIBLE
                else "Merge it into its base model with PEFT, and use the result"
            )
            raise ValueError(f"Adapter {str(folder)!r} uses {option}, so its change is not B A alone. {advice}.")


def low_rank(
    change: Float[Tensor, "rows columns"], rank: int, *, generator: torch.Generator | None = None
) -> LoraFactors:
    """The best approximation of a matrix by a product of rank `rank`, with the singular values shared out evenly.

    Small matrices, and ranks near the full one, are decomposed exactly. The others by a randomised range finder
    (Halko et al., algorithm 4.4) with 16 further directions and 4 power iterations, which costs no more than ten
    products of the matrix with `rank + 16` vectors.

    Args:
        rank: 1 .. min(rows, columns).
        generator: Of the random directions; a fixed one if None, so that the result reproduces.

    Returns:
        Factors with `left = U sqrt(S)` and `right = sqrt(S) V^T`.

    Source: Finding structure with randomness, Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061
    """
    smaller, sketch = min(change.shape), rank + 16
    if not 1 <= rank <= smaller:
        raise ValueError(f"A matrix of shape {list(change.shape)} has ranks from 1 to {smaller}, got {rank}.")
    if smaller <= 256 or sketch >= smaller // 2:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = generator or torch.Generator().manual_seed(0)
        directions = torch.randn(change.shape[1], sketch, generator=generator, dtype=change.dtype)
        basis = torch.linalg.qr(change @ directions).Q
        for _ in range(4):
            basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
        left = basis @ inner
    root = values[:rank].sqrt()
    return LoraFactors((left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous())


def decomposed(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a product of factors, without ever building the product.

    Both factors are cut into an orthonormal and a small triangular part; the singular values of the product are those
    of the small parts' product. All of it in float64.

    Returns:
        `(rows, k)` left singular vectors, `(k,)` singular values from the largest to the smallest, and `(k, columns)`
        right singular vectors, with k the rank of the factors.
    """
    outer, upper = torch.linalg.qr(factors.left.double())
    inner, lower = torch.linalg.qr(factors.right.double().T)
    left, values, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return outer @ left, values, right @ inner.T


def truncated(factors: LoraFactors, rank: int) -> tuple[LoraFactors, float, float]:
    """The best approximation of a product of factors by one of rank `rank`, without ever building the product.

    Args:
        rank: At least 1; no more than the factors' own rank is used.

    Returns:
        The factors, with the singular values split evenly between them; the Frobenius norm of the product; that of
        the part which the new factors leave out.
    """
    left, values, right = decomposed(factors)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    new = LoraFactors((left[:, :kept] * root).float(), (root[:, None] * right[:kept]).float())
    return new, float(values.norm()), float(values[kept:].norm())


def save_lora(
    folder: Path,
    modules: Mapping[str, LoraFactors],
    *,
    base_model: str,
    revision: str | None,
    target_modules: list[str],
    rank: int,
    replaced: Mapping[str, Tensor],
    modules_to_save: list[str],
    fan_in_fan_out: bool,
    dtype: torch.dtype,
) -> None:
    """Write a plain PEFT LoRA folder with alpha = r, so that the change is B A itself.

    Args:
        folder: Existing folder, written aside by the caller.
        base_model: `base_model_name_or_path` of the adapter, at `revision` where it is a Hub repository.
        target_modules: The names of the modules, or endings of names that fit these modules only.
        rank: The usual rank; modules with fewer columns in `left` are named in rank_pattern.
        replaced: tensor name -> tensor of `modules_to_save`, and trained biases.
        fan_in_fan_out: The base stores its matrices transposed (GPT-2).
    """
    tensors: dict[str, Tensor] = {}
    smaller: dict[str, int] = {}
    for module, factors in modules.items():
        own = factors.left.shape[1]
        if own != rank:
            smaller[module] = own
        up, down = (factors.right.T, factors.left.T) if fan_in_fan_out else (factors.left, factors.right)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.to(dtype).contiguous()
    biases = False
    for name, tensor in replaced.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and owner not in modules_to_save:
            biases = True
            name = f"{owner}.base_layer.bias" if owner in modules else name
        tensors[PREFIX + name] = tensor.contiguous()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Tensor {name!r} of the adapter would hold NaN or infinity in {tensor.dtype}. Choose a wider "
                "`dtype`, or fix the model."
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "target_modules": target_modules,
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": {re.escape(module): own for module, own in smaller.items()},
        "alpha_pattern": {re.escape(module): own for module, own in smaller.items()},
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    write_checkpoint(folder, tensors, stem="adapter_model")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def save_like(
    folder: Path,
    adapter: LoraAdapter,
    modules: Mapping[str, LoraFactors],
    *,
    dtype: torch.dtype | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a plain PEFT LoRA folder with the modules of `adapter`, their factors replaced by `modules`.

    Target modules, task type, base model and whatever is stored beside the factors (`modules_to_save`, biases) stay
    as they are; scalings go into the factors, so that alpha = r in every module.

    Args:
        folder: Existing folder, whose writing the caller makes atomic.
        modules: The same module names as in `adapter.modules`.
        dtype: Of the factors; that of the adapter's own if None.
        biases: module name -> bias that takes the place of the module's own.
    """
    tensors: dict[str, Tensor] = {}
    ranks = {module: factors.left.shape[1] for module, factors in modules.items()}
    usual = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    for name, entry in adapter.checkpoint.entries.items():
        match = _FACTOR.match(name.removeprefix(PREFIX))
        if match is None:
            if ".lora_" not in name:  # magnitudes and biases of a converted adapter are in its factors now
                tensors[name] = adapter.checkpoint.read(name)
            continue
        factors, kind = modules[match["module"]], match["kind"]
        transposed = kind.startswith("embedding") or bool(adapter.config.get("fan_in_fan_out"))
        left, right = (factors.right.T, factors.left.T) if transposed else (factors.left, factors.right)
        tensors[name] = (right if kind.endswith("A") else left).to(dtype or entry.dtype).contiguous()
    for module, bias in (biases or {}).items():
        tensors[f"{PREFIX}{module}.base_layer.bias"] = bias.to(dtype or bias.dtype).contiguous()
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    config = {
        **adapter.config,
        "bias": "all" if biases else adapter.config.get("bias", "none"),
        "use_dora": False,
        "lora_bias": False,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "inference_mode": True,
    }
    write_checkpoint(folder, tensors, stem="adapter_model")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
