"""Convert an adapter to a plain LoRA, which every server and every merge loads, exactly where that is possible; or a
LoRA to a GGUF file for llama.cpp.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.adapters.extract import RESIDUALS_FILE, ExtractionReport, ModuleResidual, print_report
from hf_transfer_ext.adapters.finish import base_of_config, finish_adapter
from hf_transfer_ext.adapters.gguf import export_adapter
from hf_transfer_ext.files import sha256_of, write_text, written_aside
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication, refuse_single_file
from hf_transfer_ext.hub.inputs import Wanted
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.weights.lora import (
    CONVERTIBLE,
    PREFIX,
    LoraAdapter,
    LoraFactors,
    decomposed,
    lora_scale,
    low_rank,
    read_lora,
    save_like,
)
from hf_transfer_ext.weights.opened import InputModel, Scratch, open_model
from hf_transfer_ext.weights.reference import parse_reference
from hf_transfer_ext.weights.repository import file_of, local_folder, no_adapter


def convert_to_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ExtractionReport:
    """Write an adapter as a plain PEFT LoRA with alpha = r.

    | adapter | result | needs |
    |---|---|---|
    | LoRA, rsLoRA, rank and alpha patterns | exact | |
    | LoRA with biases (`lora_bias`) | exact, where the base's layer has a bias to take it | base |
    | DoRA | its change has full rank: cut to `rank`, with the residual energy reported | base, rank |
    | LoHa, LoKr, OFT, VeRA, ... (whatever PEFT can state as a change of a linear layer) | cut to `rank` | base, rank |

    Args:
        adapter: Folder or Hub id of a PEFT adapter.
        out: Folder of the new adapter, written atomically.
        base: The base model; by default the one that the adapter's config names.
        rank: Rank of the factors where the change is cut, >= 1.
        revision: Hub revision of the adapter.
        overwrite: Replace an adapter that is in `out`.

    Returns:
        Rank, norm of the change and residual energy of every module.

    Raises:
        ValueError: A rank is needed and not given, or the adapter is of a kind that is not a change of weights
            (prompt tuning, IA3 on activations, ...).

    Source: DoRA, Liu et al. 2024, equation 5, https://arxiv.org/abs/2402.09353; other types through PEFT's own
    `convert_to_lora`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    began = time.perf_counter()
    path = file_of(adapter, "adapter_config.json", revision=revision)
    if path is None:
        raise no_adapter(adapter)
    config = read_json(path)
    folder = local_folder(adapter, revision=revision)
    base_name = base or config.get("base_model_name_or_path")
    with written_aside(out, overwrite=overwrite, inputs=[adapter, base_name]) as aside:
        if config.get("peft_type", "LORA") != "LORA":
            residuals = _by_peft(folder, aside, config["peft_type"], base_name, rank)
            saved, biases = [], 0
        else:
            found = read_lora(folder, allow=CONVERTIBLE)
            changed = bool(found.magnitudes or found.biases)
            model = open_model(parse_reference(_needed(base_name, adapter), "base")) if changed else None
            try:
                modules, residuals = _low_rank_changes(found, model, rank)
                kept = _biases(found, model)
                save_like(aside, found, modules, biases=kept)
            finally:
                found.checkpoint.close()
                if model is not None:
                    model.close()
            saved, biases = list(found.config.get("modules_to_save") or []), len(kept)
        total = sum(one.change**2 for one in residuals)
        report = ExtractionReport(
            folder=str(out),
            rank=max(one.rank for one in residuals),
            modules=residuals,
            saved_modules=saved,
            saved_biases=biases,
            residual_energy=sum(one.residual_energy * one.change**2 for one in residuals) / total if total else 0.0,
            seconds=time.perf_counter() - began,
        )
        write_text(aside / RESIDUALS_FILE, json.dumps(report.residuals(), indent=2) + "\n")
        own_base: list[Wanted] = [(base, None, "base")] if base is not None else base_of_config(config)
        settings = {"base": base, "rank": rank, "revision": revision}
        finish_adapter(
            aside, "conversion", "convert", settings,
            [(adapter, revision, "adapter"), *own_base], recipe_sha256=sha256_of(__file__),
            seconds=report.seconds, metrics=[report.measurement()],
            call={"adapter": adapter, **settings, "base": base_name},
        )  # fmt: skip
    return report


def _needed(base: Any, adapter: Any) -> Any:
    if not base:
        raise ValueError(f"Converting {str(adapter)!r} needs its base model, which its config does not name: give it.")
    return base


def _low_rank_changes(
    adapter: LoraAdapter, base: InputModel | None, rank: int | None
) -> tuple[dict[str, LoraFactors], list[ModuleResidual]]:
    """Each module's change as factors: as it is, or for DoRA the best approximation of rank `rank`."""
    modules, residuals = {}, []
    for module, factors in adapter.modules.items():
        if module in adapter.magnitudes and base is not None:
            if rank is None:
                raise ValueError("A DoRA changes every row of a weight, which no low rank holds: give `rank`.")
            transposed = bool(adapter.config.get("fan_in_fan_out"))
            weight = _weight(base, f"{module}.weight")
            change = dora_change(weight, factors, adapter.magnitudes[module], transposed=transposed)
            modules[module] = low_rank(change, min(rank, *change.shape))
            residuals.append(_residual(module, change, modules[module]))
        else:
            modules[module] = factors
            norm = float(decomposed(factors)[1].norm())
            residuals.append(ModuleResidual(module, factors.left.shape[1], norm, 0.0))
    return modules, residuals


def _residual(module: str, change: Tensor, factors: LoraFactors) -> ModuleResidual:
    norm, lost = float(change.norm()), float((change - factors.rows(0, len(change))).norm())
    return ModuleResidual(module, factors.left.shape[1], norm, (lost / norm) ** 2 if norm else 0.0)


def dora_change(weight: Tensor, factors: LoraFactors, magnitude: Tensor, *, transposed: bool = False) -> Tensor:
    r"""The change that a DoRA makes to a weight.

    .. math:: \Delta W = \frac{m}{\lVert W + s B A \rVert_{row}} (W + s B A) - W

    Args:
        weight: `(out, in)`, or `(in, out)` with `transposed` (Conv1D).
        factors: The scaled change s B A, in the layout of the weight.
        magnitude: m, one number for each output feature.

    Source: DoRA, Liu et al. 2024, equation 5, https://arxiv.org/abs/2402.09353
    """
    adapted = weight + factors.rows(0, len(weight))
    over = 0 if transposed else 1
    return adapted * (magnitude.reshape(-1) / adapted.norm(dim=over)).unsqueeze(over) - weight


def _biases(adapter: LoraAdapter, base: InputModel | None) -> dict[str, Tensor]:
    """The biases of a LoRA with biases, added to the base's own."""
    if base is None:
        return {}
    found = {}
    for module, bias in adapter.biases.items():
        if f"{module}.bias" not in base.tensors:
            raise ValueError(
                f"The adapter gives {module!r} a bias, and the base's layer has none to add it to. A plain LoRA "
                "cannot hold it: merge the adapter into its base with PEFT."
            )
        scale = lora_scale(module, adapter.config, adapter.modules[module].left.shape[1])
        found[module] = _weight(base, f"{module}.bias") + scale * bias
    return found


def _weight(model: InputModel, name: str) -> Tensor:
    tensor = model[name]
    values = torch.empty(tensor.shape)
    tensor.read(0, values.view(-1), Scratch())
    return values


def _by_peft(folder: Path, out: Path, kind: str, base: Any, rank: int | None) -> list[ModuleResidual]:
    """Other types of adapter, by the conversion that PEFT brings."""
    from peft import PeftModel
    from peft.tuners.lora.conversion import convert_to_lora as peft_conversion
    from safetensors.torch import save_file

    from hf_transfer_ext.models.loading import load_model

    if rank is None:
        raise ValueError(f"A {kind} adapter is converted by cutting its changes to a rank: give `rank`.")
    model = PeftModel.from_pretrained(load_model(_needed(base, folder), dtype="float32"), folder)
    try:
        config, tensors = peft_conversion(model, rank)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A {kind} adapter cannot be written as a LoRA: {error}") from error
    residuals = []
    for module, change in _dense_changes(model).items():
        up, down = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].float() for factor in ("B", "A"))
        residuals.append(_residual(module, change, LoraFactors(up, down)))
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    config.save_pretrained(str(out))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    return residuals


def _dense_changes(model: Any) -> Mapping[str, Tensor]:
    """module name -> its change `(out, in)`, from the layers of a PEFT model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PREFIX): change.T if type(layer.get_base_layer()).__name__ == "Conv1D" else change
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "get_delta_weight")
        for change in [layer.get_delta_weight("default").detach().float()]
    }


#: What an adapter can be converted to.
FORMATS = ("lora", "gguf")


def convert(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "lora",
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    overwrite: bool = False,
) -> ExtractionReport | Path:
    """`convert_to_lora` or `export_adapter`, by name.

    Args:
        adapter: Folder or Hub id of a PEFT adapter.
        out: Folder of the new adapter; to gguf, a name that ends in .gguf gives the file alone, without a card.
        to: lora or gguf.
        base: The base model; by default the one that the adapter's config names.
        rank: Rank of the factors where the change is cut (DoRA, LoKr, ...), to lora only.
        dtype: Of the factors in a GGUF file: float32 or float16.
        revision: Hub revision of the adapter.
        overwrite: Replace what is in `out`.

    Raises:
        ValueError: An unknown format, or an argument of the other one.
    """
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}, got {to!r}.")
    if to == "lora":
        if dtype != "float32":
            raise ValueError(f"`dtype` is for `to: gguf`; factors of a LoRA are written in float32, got {dtype!r}.")
        return convert_to_lora(adapter, out, base=base, rank=rank, revision=revision, overwrite=overwrite)
    if rank is not None:
        raise ValueError("A GGUF file has the ranks of its LoRA: convert to a LoRA of that `rank` first.")
    return export_adapter(adapter, out, base=base, dtype=dtype, revision=revision, overwrite=overwrite)


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext convert ADAPTER OUT`."""
    about = "Write a DoRA, LoKr, LoHa or other PEFT adapter as a plain LoRA, or a LoRA as a GGUF file (--to gguf)."
    arguments = arguments_for(convert, argv, program="hf-transfer-ext convert", about=about, extra=PUSH_OPTIONS)
    publication = Publication.taken_from(arguments)
    if publication.repo is not None:
        refuse_single_file(arguments["out"])
    found = convert(**arguments)
    if isinstance(found, ExtractionReport):
        print_report(found)
        publication.publish(found.folder)
    else:
        print(f"{found}: {found.stat().st_size / 1e6:.1f} MB; llama.cpp loads it, started with --lora {found.name}.")
        publication.publish(found.parent)
    return 0
