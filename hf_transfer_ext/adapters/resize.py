"""Resize a LoRA adapter: the best adapter of another rank, from its factors alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from hf_transfer_ext.adapters.extract import RESIDUALS_FILE, ExtractionReport, ModuleResidual, print_report
from hf_transfer_ext.adapters.finish import base_of_config, finish_adapter
from hf_transfer_ext.files import sha256_of, write_text, written_aside
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.weights.lora import LoraFactors, decomposed, read_lora, save_like
from hf_transfer_ext.weights.repository import local_folder


def resize_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ExtractionReport:
    """Write the best approximation of a LoRA adapter by one of another rank, module by module.

    The singular values of each change come from its factors by two QR decompositions and the SVD of a small core, so
    that no matrix of the model's size is ever built. Each of the three criteria can stand alone; of several, the
    strictest one counts in each module. At least one singular value is kept everywhere.

    Args:
        adapter: Folder or Hub id of a PEFT LoRA. rsLoRA, rank and alpha patterns, embeddings and Conv1D are exact.
        out: Folder of the new adapter, written atomically, in plain LoRA with alpha = r.
        rank: Largest rank of a module, >= 1.
        energy: Share of the squared Frobenius norm that is kept at least, in (0, 1].
        ratio: Keep the singular values that are at least the largest one divided by this, > 1.
        revision: Hub revision of the adapter.
        overwrite: Replace an adapter that is in `out`.

    Returns:
        Rank, norm of the change and residual energy of every module.

    Raises:
        ValueError: No criterion, one out of its range, or an adapter whose change is not B A alone (convert it first).

    Source: the best approximation in the Frobenius norm is the truncated SVD (Eckart and Young 1936,
    https://doi.org/10.1007/BF02288367); criteria as in kohya-ss/sd-scripts `resize_lora`.
    """
    if rank is None and energy is None and ratio is None:
        raise ValueError("Resizing needs a criterion: give `rank`, `energy` or `ratio`.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
    if ratio is not None and not ratio > 1:
        raise ValueError(f"`ratio` must be greater than 1, got {ratio}.")
    began = time.perf_counter()
    with written_aside(out, overwrite=overwrite, inputs=[adapter]) as folder:
        found = read_lora(local_folder(adapter, revision=revision))
        modules: dict[str, LoraFactors] = {}
        residuals: list[ModuleResidual] = []
        for module, factors in found.modules.items():
            left, values, right = decomposed(factors)
            kept = kept_rank(values, rank=rank, energy=energy, ratio=ratio)
            root = values[:kept].sqrt()
            modules[module] = LoraFactors((left[:, :kept] * root).float(), (root[:, None] * right[:kept]).float())
            norm, lost = float(values.norm()), float(values[kept:].norm())
            residuals.append(ModuleResidual(module, kept, norm, (lost / norm) ** 2 if norm else 0.0))
        save_like(folder, found, modules)
        total = sum(one.change**2 for one in residuals)
        report = ExtractionReport(
            folder=str(out),
            rank=max(one.rank for one in residuals),
            modules=residuals,
            saved_modules=list(found.config.get("modules_to_save") or []),
            saved_biases=sum(name.endswith(".bias") for name in found.replaced),
            residual_energy=sum(one.residual_energy * one.change**2 for one in residuals) / total if total else 0.0,
            seconds=time.perf_counter() - began,
        )
        found.checkpoint.close()
        write_text(folder / RESIDUALS_FILE, json.dumps(report.residuals(), indent=2) + "\n")
        settings = {"rank": rank, "energy": energy, "ratio": ratio, "revision": revision}
        finish_adapter(
            folder, "resizing", "resize", settings,
            [(adapter, revision, "adapter"), *base_of_config(found.config)], recipe_sha256=sha256_of(__file__),
            seconds=report.seconds, metrics=[report.measurement()], call={"adapter": adapter, **settings},
        )  # fmt: skip
    return report


def kept_rank(
    values: Tensor, *, rank: int | None = None, energy: float | None = None, ratio: float | None = None
) -> int:
    """How many of the singular values (largest first) the criteria keep: at least one, and at most all."""
    kept = len(values) if rank is None else min(rank, len(values))
    if energy is not None and values[0] > 0:
        shares = values.square().cumsum(0) / values.square().sum()
        # Rounding may keep the last share just below 1; the search then ends past the last value.
        kept = min(kept, int(torch.searchsorted(shares, energy * (1 - 1e-12))) + 1)
    if ratio is not None:
        kept = min(kept, int((values >= values[0] / ratio).sum()))
    return max(1, kept)


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext resize ADAPTER OUT --rank R`."""
    about = "Write the best approximation of a LoRA adapter at another rank: --rank, --energy or --ratio."
    arguments = arguments_for(resize_lora, argv, program="hf-transfer-ext resize", about=about)
    print_report(resize_lora(**arguments))
    return 0
