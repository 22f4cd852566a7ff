"""LoRA adapters as what they do to a weight: a change `left @ right`, exact for all scalings and layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.files import write_text
from hf_transfer_ext.reading import check_patterns, field_of, module_pattern, read_json
from hf_transfer_ext.weights.checkpoints import Checkpoint, StoredTensor, write_checkpoint
from hf_transfer_ext.weights.repository import no_adapter

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.weights.architecture import Architecture

#: What PEFT puts before the name of each module.
PREFIX = "base_model.model."

#: Modules of PEFT that wrap those of the model.
_WRAPPERS = re.compile(r"\.(?:(?:base_layer|modules_to_save)\.)+")

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
        stacks: module name -> factors A and B of its own parameters (`target_parameters`), in the module's order.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    modules: dict[str, LoraFactors]
    replaced: dict[str, StoredTensor]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    stacks: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


def read_lora(folder: str | Path, *, allow: Sequence[str] = ()) -> LoraAdapter:
    """Read an adapter folder.

    Args:
        allow: Options out of `CONVERTIBLE` that the caller deals with.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The adapter is not a LoRA, or of a kind whose change is not `B A` alone (DoRA, LoRA with biases).
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not path.exists():
        raise no_adapter(folder)
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
            replaced[_WRAPPERS.sub(".", name.removeprefix(PREFIX))] = entry
    where = f"adapter_config.json of {str(folder)!r}"
    patterns = field_of(config, "alpha_pattern", dict, where=where, default={})
    check_patterns(patterns, found, where)
    field_of(config, "lora_alpha", float, where=where, default=8)
    for pattern in patterns:
        field_of(patterns, pattern, float, where=f"`alpha_pattern` in {where}")
    stacks = _stacks(found, config, folder) if config.get("target_parameters") else {}
    modules = {module: _factors(module, factors, config, folder) for module, factors in found.items()}
    return LoraAdapter(checkpoint, config, modules, replaced, beyond["magnitude_vector"], beyond["B.bias"], stacks)


def _stacks(
    found: dict[str, dict[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Take the factors of parameters out of `found`: PEFT nests those of one module, the first one innermost."""
    nested: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name in list(found):
        module = _WRAPPERS.sub(".", name + ".").removesuffix(".")
        depth = name.split(".").count("base_layer")
        if depth == 0 and _is_targeted(module, config.get("target_modules")):
            continue
        factors = found.pop(name)
        if set(factors) != {"A", "B"}:
            raise ValueError(f"Adapter {str(folder)!r}: {name!r} has only {sorted(factors)}; it needs A and B.")
        nested.setdefault(module, {})[depth] = (factors["A"], factors["B"])
    return {module: [pairs[depth] for depth in sorted(pairs, reverse=True)] for module, pairs in nested.items()}


def _is_targeted(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in targets or ())


def expert_factors(
    parameter: str,
    down: Float[Tensor, "experts_and_rank columns"],
    up: Float[Tensor, "rows experts_and_rank"],
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    *,
    transposed: bool,
) -> list[LoraFactors]:
    """The changes of the matrices of a parameter, as PEFT calculates them for `target_parameters`.

    Args:
        shape: Of the parameter: a matrix, or a stack of one matrix for each expert.
        transposed: The experts' matrices are stored as `[in, out]`.

    Raises:
        ValueError: The factors do not fit the shape.
    """
    experts = shape[0] if len(shape) == 3 else 1
    wanted = shape[-2:] if len(shape) == 2 or not transposed else shape[:-3:-1]
    if len(shape) not in (2, 3) or down.shape[0] % experts or (up.shape[0], down.shape[1]) != tuple(wanted):
        raise ValueError(
            f"The factors B {list(up.shape)} and A {list(down.shape)} do not fit parameter {parameter!r} of shape "
            f"{list(shape)}. The adapter belongs to another model."
        )
    rank = down.shape[0] // experts
    scale = lora_scale(parameter, config, rank)
    rights = down.reshape(experts, rank, -1)
    lefts = up.reshape(up.shape[0], rank, experts).permute(2, 0, 1) * scale
    if len(shape) == 3 and transposed:
        return [
            LoraFactors(right.T.contiguous(), left.T.contiguous()) for left, right in zip(lefts, rights, strict=True)
        ]
    return [LoraFactors(left.contiguous(), right.contiguous()) for left, right in zip(lefts, rights, strict=True)]


def packed_experts(factors: Sequence[LoraFactors], *, transposed: bool) -> tuple[Tensor, Tensor]:
    """A and B of `target_parameters` for changes of equal rank with alpha = r; the inverse of `expert_factors`."""
    import torch

    lefts = [one.right.T if transposed else one.left for one in factors]
    rights = [one.left.T if transposed else one.right for one in factors]
    up = torch.stack(lefts).permute(1, 2, 0)
    return torch.cat(rights), up.reshape(up.shape[0], -1)


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
    for option in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens"):
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

    Small matrices, and ranks above a third of the full one, are decomposed exactly. The others by block Golub-Kahan
    bidiagonalization from random directions: four blocks of `rank` (at least 24) directions, each orthogonal to those
    before, span the space in which the best approximation is found. It costs eight products of the matrix with `rank`
    vectors, fewer than power iterations of one block need for the same residual.

    Args:
        rank: 1 .. min(rows, columns).
        generator: Of the random directions; a fixed one if None, so that the result reproduces.

    Returns:
        Factors with `left = U sqrt(S)` and `right = sqrt(S) V^T`.

    Source: Randomized block Krylov methods for stronger and faster approximate singular value decomposition, Musco and
    Musco 2015, https://arxiv.org/abs/1504.05477
    """
    import torch

    smaller, width = min(change.shape), max(rank, 24)
    if not 1 <= rank <= smaller:
        raise ValueError(f"A matrix of shape {list(change.shape)} has ranks from 1 to {smaller}, got {rank}.")
    if smaller <= 256 or 3 * width > smaller:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = generator or torch.Generator().manual_seed(0)
        directions = torch.randn(change.shape[1], width, generator=generator, dtype=change.dtype)
        basis, images = _krylov_basis(change, directions, blocks=min(4, smaller // width))
        outer, upper = torch.linalg.qr(images)
        inner, values, turned = torch.linalg.svd(upper.T, full_matrices=False)
        left, right = basis @ inner[:, :rank], turned[:rank] @ outer.T
    root = values[:rank].sqrt()
    return LoraFactors((left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous())


def _krylov_basis(
    change: Float[Tensor, "rows columns"], directions: Float[Tensor, "columns width"], *, blocks: int
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `U` of a block Krylov space of `change @ change.T`, and `change.T @ U`.

    It has fewer blocks where the space is exhausted: further ones would be directions of rounding errors.
    """
    import torch

    basis, images = change.new_empty(change.shape[0], 0), change.new_empty(change.shape[1], 0)
    for block in range(blocks):
        if block:
            directions = torch.linalg.qr(images[:, -directions.shape[1] :]).Q
        mapped = change @ directions
        found = mapped - basis @ (basis.T @ mapped)
        if block and float(found.norm()) <= 1e-5 * float(mapped.norm()):
            break
        found = torch.linalg.qr(found).Q
        if block:  # once more: orthogonal to rounding, and so are the columns that QR made up
            found = torch.linalg.qr(found - basis @ (basis.T @ found)).Q
        basis, images = torch.cat([basis, found], 1), torch.cat([images, change.T @ found], 1)
    return basis, images


def decomposed(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a product of factors, without ever building the product.

    Both factors are cut into an orthonormal and a small triangular part; the singular values of the product are those
    of the small parts' product. All of it in float64.

    Returns:
        `(rows, k)` left singular vectors, `(k,)` singular values from the largest to the smallest, and `(k, columns)`
        right singular vectors, with k the rank of the factors.
    """
    import torch

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
    task_type: str | None = "CAUSAL_LM",
    architecture: Architecture | None = None,
    stacks: Mapping[str, Sequence[LoraFactors]] | None = None,
) -> None:
    """Write a plain PEFT LoRA folder with alpha = r, so that the change is B A itself.

    Args:
        folder: Existing folder, written aside by the caller.
        base_model: `base_model_name_or_path` of the adapter, at `revision` where it is a Hub repository.
        target_modules: The names of the modules, or endings of names that fit these modules only.
        rank: The usual rank; modules with fewer columns in `left` are named in rank_pattern.
        replaced: tensor name -> tensor of `modules_to_save`, trained biases, and parameters of larger modules.
        fan_in_fan_out: The base stores its matrices transposed (GPT-2).
        task_type: Of PEFT; None for its plain wrapper.
        architecture: Of the base; says how PEFT nests the parameters of one module.
        stacks: parameter -> factors of the matrices in it, for parameters that are no module's weight.
    """
    import torch

    wrapped = {parameter: list(factors) for parameter, factors in (stacks or {}).items()}
    own_modules = dict(modules)
    if architecture is not None:
        for module in [name for name in modules if _is_renamed_by_peft(name, architecture)]:
            wrapped[f"{module}.weight"] = [own_modules.pop(module)]
            target_modules = [one for one in target_modules if not module.endswith(one)]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, factors in own_modules.items():
        ranks[module] = factors.left.shape[1]
        up, down = (factors.right.T, factors.left.T) if fan_in_fan_out else (factors.left, factors.right)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.to(dtype).contiguous()
    nested: dict[str, list[str]] = {}  # module -> its parameters that are wrapped, the innermost first
    for parameter in wrapped:
        nested.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    for module, parameters in nested.items():
        part = architecture.modules[module] if architecture is not None else None
        order = [f"{module}.{leaf}" for leaf, _ in part.named_parameters(recurse=False)] if part is not None else []
        nested[module] = sorted(parameters, key=order.index)
        for place, parameter in enumerate(nested[module]):
            ranks[parameter] = wrapped[parameter][0].left.shape[1]
            transposed = len(wrapped[parameter]) > 1 and bool(getattr(part, "is_transposed", False))
            down, up = packed_experts(wrapped[parameter], transposed=transposed)
            prefix = f"{PREFIX}{module}{'.base_layer' * (len(parameters) - 1 - place)}"
            tensors[f"{prefix}.lora_A.weight"] = down.to(dtype).contiguous()
            tensors[f"{prefix}.lora_B.weight"] = up.to(dtype).contiguous()
    biases = False
    for name, tensor in replaced.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and owner not in modules_to_save:
            biases = True
            name = f"{owner}.base_layer.bias" if owner in own_modules else name
        for module, parameters in nested.items():
            if name.startswith(f"{module}."):
                name = f"{module}{'.base_layer' * len(parameters)}{name.removeprefix(module)}"
        tensors[PREFIX + name] = tensor.contiguous()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Tensor {name!r} of the adapter would hold NaN or infinity in {tensor.dtype}. Choose a wider "
                "`dtype`, or fix the model."
            )
    smaller = {re.escape(name): own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "target_modules": target_modules,
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    if wrapped:
        config["target_parameters"] = sorted(wrapped)
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
        tensors[name] = (right if kind.endswith("A") else left).to(dtype or entry.dtype.torch).contiguous()
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


def _is_renamed_by_peft(module: str, architecture: Architecture) -> bool:
    """Whether PEFT takes a module for an expert that transformers 5 has fused, by the ending of its name.

    PEFT rewrites `target_modules` of adapters for old mixtures of experts, and meets other layers of these names too
    (shared experts, dense layers). As `target_parameters` they stay what they are.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(architecture.model.config.model_type) is None:
        return False
    try:
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    except ImportError:  # a version of PEFT that does not rewrite
        return False
    kind = _MODEL_TO_CONVERSION_PATTERN.get(architecture.model.config.model_type)
    return module.rpartition(".")[2] in _MOE_TARGET_MODULE_MAPPING.get(str(kind), {})
