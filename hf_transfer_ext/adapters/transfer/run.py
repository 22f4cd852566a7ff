"""Transfer a LoRA from its base model to another one by a closed form: from two folders to an adapter folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.adapters.finish import finish_adapter
from hf_transfer_ext.adapters.transfer.anchors import (
    even_layers,
    layer_similarities,
    match_layers,
    paired_activations,
    residual_map,
    shared_token_ids,
)
from hf_transfer_ext.adapters.transfer.lineage import NEEDS_ORIGIN, require_common_origin
from hf_transfer_ext.adapters.transfer.method import LinearPair, TransferMethod, product_norm
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.methods.lorasuite import match_heads
from hf_transfer_ext.adapters.transfer.places import (
    ATTENTION,
    LAYER,
    attention_of,
    depth_of,
    embedding_of,
    heads_of,
    layer_outputs,
    read_matrix,
)
from hf_transfer_ext.adapters.transfer.travel import (
    NOT_COMPARED,
    TRANSFER_FILE,
    copy_seeds,
    inputs_of_transfer,
    origin,
    refuse_other_base,
)
from hf_transfer_ext.files import refuse_existing_output, sha256_of, write_text, written_aside
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.progress import steps
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.weights.lora import PREFIX, LoraAdapter, LoraFactors, read_lora, save_lora, truncated
from hf_transfer_ext.weights.opened import InputModel, open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference
from hf_transfer_ext.weights.repository import local_folder


@dataclass(frozen=True)
class TransferReport:
    """What a transfer wrote.

    Args:
        method: Name of the transfer method.
        layers: Target layer -> source layer.
        modules: Target module -> source module whose change it got.
        left_out: Modules of the source adapter whose change is nowhere in the result, with the reason.
        relative_change: Mean over modules of the norm of the change over the norm of the weight, of source and target.
        seconds: Wall time.
    """

    folder: str
    method: str
    layers: dict[int, int]
    modules: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    relative_change: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0


def transfer_lora(
    adapter: str | Path,
    target_base: str | Path,
    out: str | Path,
    *,
    method: str | TransferMethod = "cross_lora",
    options: dict[str, Any] | None = None,
    source_base: str | Path | None = None,
    texts: Sequence[str] | None = None,
    rank: int | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> TransferReport:
    """Carry a LoRA to another base model without training, and write a plain PEFT LoRA for it.

    Args:
        adapter: Folder or Hub id of the source adapter: a LoRA whose change is B A (`adapters.convert` makes one).
        target_base: Folder or Hub id of the new base.
        out: Folder of the new adapter, written atomically.
        method: A name of `TRANSFER_METHODS`, or a method that is not registered.
        options: The method's own options.
        source_base: The source base; by default the one that the adapter's config names.
        texts: Plain texts that both models read, for methods that need activations. Where given, layers of models of
            different depth are matched by what they compute; else by their relative depth.
        rank: Largest rank of a module of the result; by default the rank that the method gives.
        force: Transfer by `copy` or `project` even where the two bases have no common origin (`lineage.py`).
        overwrite: Replace an adapter that is in `out`.

    Raises:
        ValueError: Unknown method or option, an adapter that does not belong to the source base, bases for which the
            method makes no sense, layers that the method cannot carry, or nothing that could be carried at all.
    """
    began = time.perf_counter()
    chosen = method if isinstance(method, TransferMethod) else TRANSFER_METHODS[method]
    for name in options or {}:
        if name not in chosen.options:
            raise ValueError(unknown_name(f"option of {chosen.__name__}", name, chosen.options or ["(it has none)"]))
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if "activations" in chosen.needs and not texts:
        raise ValueError(f"{chosen.__name__} reads texts with both models: give `texts`.")
    refuse_existing_output(out, overwrite=overwrite, inputs=[adapter, source_base, target_base])
    adapter_folder = local_folder(adapter)
    found = read_lora(adapter_folder)
    named = source_base or found.config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"Adapter {str(adapter)!r} names no base model in its config: give `source_base`.")
    source_reference = parse_reference(named, "source_base")
    target_reference = parse_reference(target_base, "target_base")
    refuse_other_base(adapter_folder, source_reference)
    source = open_model(source_reference)
    try:
        target = open_model(target_reference)
        try:
            carrier = _Carrier(chosen, options or {}, found, source, target, texts)
            if not force and chosen.__name__ in NEEDS_ORIGIN:
                require_common_origin(chosen.__name__, source, target)
            factors, parts = carrier.carry(rank)
            with written_aside(out, overwrite=overwrite, inputs=[adapter, source_base, target_base]) as folder:
                save_lora(
                    folder,
                    factors,
                    base_model=target_reference.path,
                    revision=target_reference.revision,
                    target_modules=sorted(factors),
                    rank=max(one.left.shape[1] for one in factors.values()),
                    replaced={},
                    modules_to_save=[],
                    fan_in_fan_out=False,
                    dtype=torch.float32,
                )
                report = TransferReport(str(out), **parts, seconds=time.perf_counter() - began)
                history = origin(adapter, source_reference, target_reference, adapter_folder)
                write_text(folder / TRANSFER_FILE, json.dumps({**_public(report), **history}, indent=2) + "\n")
                copy_seeds(adapter_folder, folder)
                settings = {
                    "method": chosen.__name__,
                    "options": options or {},
                    "texts": len(texts or ()),
                    "rank": rank,
                }
                finish_adapter(
                    folder, "transfer", "transfer", settings,
                    inputs_of_transfer(adapter, source_reference, target_reference),
                    recipe_sha256=sha256_of(__file__), seconds=report.seconds, not_measured=[NOT_COMPARED],
                    call=None if texts else {
                        "adapter": adapter, "target_base": target_base, "method": chosen.__name__,
                        "options": options, "source_base": named, "rank": rank, "force": force,
                    },
                )  # fmt: skip
        finally:
            target.close()
    finally:
        source.close()
        found.checkpoint.close()
    return report


def _public(report: TransferReport) -> dict[str, Any]:
    """The report without the folder, which is a path of this machine."""
    return {name: value for name, value in asdict(report).items() if name != "folder"}


class _Carrier:
    """Everything that the modules of one transfer share: layers that match, maps, activations."""

    def __init__(
        self,
        method: TransferMethod,
        options: dict[str, Any],
        adapter: LoraAdapter,
        source: InputModel,
        target: InputModel,
        texts: Sequence[str] | None,
    ) -> None:
        self.method, self.options, self.adapter = method, options, adapter
        self.source, self.target, self.texts = source, target, texts
        if adapter.config.get("fan_in_fan_out"):
            raise ValueError(
                "The adapter changes layers that are stored transposed (Conv1D of GPT-2), whose queries, keys and "
                "values are fused. Only `trans_lora` carries those."
            )
        self._check_adapter()
        self.layers = even_layers(depth_of(source), depth_of(target))
        self.activations: tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]] = ({}, {})
        if texts:
            self._read_texts(texts)
        self.residual_map = self._residual_map() if "residual_map" in method.needs else None
        self.heads = (heads_of(source), heads_of(target)) if "heads" in method.needs else None
        self._matched: dict[int, tuple[int | None, ...]] = {}

    def carry(self, rank: int | None) -> tuple[dict[str, LoraFactors], dict[str, Any]]:
        """The target's factors, and the parts of the report."""
        factors: dict[str, LoraFactors] = {}
        modules, left_out, sizes = {}, {}, []
        pairs = {module: own for module, own in self._modules().items() if own in self.adapter.modules}
        for module, own in steps(list(pairs.items()), "transferring", "module"):
            carried = self.method(self._pair(module, own), **self.options)
            if carried is None:
                left_out[own] = f"{self.method.__name__} found too little in common with {module}"
                continue
            if rank is not None and carried.left.shape[1] > rank:
                carried = truncated(carried, rank)[0]
            factors[module], modules[module] = carried, own
            sizes.append(
                [
                    product_norm(change) / float(weight.norm())
                    for change, weight in (
                        (self.adapter.modules[own], read_matrix(self.source, f"{own}.weight")),
                        (carried, read_matrix(self.target, f"{module}.weight")),
                    )
                ]
            )
        if not factors:
            raise ValueError(
                f"Nothing of the adapter could be carried to {str(self.target.reference)!r}: "
                f"{next(iter(left_out.values()), 'no module of the target has a counterpart among those it changes')}."
            )
        for own in self.adapter.modules:
            if own not in modules.values():
                left_out.setdefault(own, "no layer of the target corresponds to it")
        for name in self.adapter.replaced:
            left_out[name] = "stored in full in the adapter; closed forms carry low-rank changes only"
        source_size, target_size = torch.tensor(sizes).mean(0).tolist()
        return factors, {
            "method": self.method.__name__,
            "layers": self.layers,
            "modules": modules,
            "left_out": left_out,
            "relative_change": (source_size, target_size),
        }

    def _pair(self, module: str, own: str) -> LinearPair:
        inputs_s, outputs_s = self.activations[0].get(own, (None, None))
        inputs_t, outputs_t = self.activations[1].get(module, (None, None))
        layer = LAYER.match(module)
        return LinearPair(
            module,
            own,
            read_matrix(self.source, f"{own}.weight"),
            read_matrix(self.target, f"{module}.weight"),
            self.adapter.modules[own],
            self.residual_map,
            inputs_s,
            inputs_t,
            outputs_s,
            outputs_t,
            self.heads,
            self._matched_heads(int(layer["layer"])) if self.heads is not None and layer is not None else None,
        )

    def _modules(self) -> dict[str, str]:
        """Target module -> source module, by layer and name, for whatever the source adapter changes."""
        counterparts: dict[str, str] = {}
        by_place = {}
        for name in self.adapter.modules:
            match = LAYER.match(name)
            by_place[(int(match["layer"]), match["after"]) if match else (None, name)] = name
        for tensor in self.target.tensors:
            module = tensor.removesuffix(".weight")
            match = LAYER.match(module)
            if not tensor.endswith(".weight") or len(self.target[tensor].shape) != 2:
                continue
            place = (self.layers.get(int(match["layer"])), match["after"]) if match else (None, module)
            if place in by_place:
                counterparts[module] = by_place[place]
        return counterparts

    def _check_adapter(self) -> None:
        embeddings = next((name for name in self.adapter.checkpoint.entries if ".lora_embedding_" in name), None)
        if embeddings is not None:
            raise ValueError(
                f"The adapter changes the embeddings {embeddings.removeprefix(PREFIX).partition('.lora_')[0]!r}, and "
                "closed forms carry changes of linear layers alone. Use trans_lora."
            )
        for module, factors in self.adapter.modules.items():
            name = f"{module}.weight"
            if name not in self.source.tensors or self.source[name].shape != factors.shape:
                has = list(self.source[name].shape) if name in self.source.tensors else "no such layer"
                raise ValueError(
                    f"The adapter changes {module!r} with shape {list(factors.shape)}, but its base "
                    f"{str(self.source.reference)!r} has {has}. Name the base that it was trained on as `source_base`."
                )

    def _read_texts(self, texts: Sequence[str]) -> None:
        models = tuple(_loaded(model.reference) for model in (self.source, self.target))
        tokenizers = tuple(load_tokenizer(model.folder) for model in (self.source, self.target))
        if depth_of(self.source) != depth_of(self.target):
            outputs = layer_outputs(self.source), layer_outputs(self.target)
            read = paired_activations(models, tokenizers, texts, outputs)  # type: ignore[arg-type]
            own = [
                {int(LAYER.match(name)["layer"]): pair[1] for name, pair in one.items()}  # type: ignore[index]
                for one in read
            ]
            self.layers = match_layers(layer_similarities(*own))
        if "activations" in self.method.needs:
            modules = self._modules()
            names = sorted(set(modules.values())), sorted(modules)
            self.activations = paired_activations(models, tokenizers, texts, names)  # type: ignore[arg-type]

    def _residual_map(self) -> Tensor:
        tokenizers = [load_tokenizer(model.folder) for model in (self.source, self.target)]
        ids = shared_token_ids(*tokenizers)
        rows = [
            read_matrix(model, embedding_of(model))[torch.tensor(own)]
            for model, own in zip((self.source, self.target), ids, strict=True)
        ]
        return residual_map(*rows)

    def _matched_heads(self, layer: int) -> tuple[int | None, ...]:
        if layer not in self._matched:
            weights = [
                attention_of(self.source, self.layers[layer]),
                attention_of(self.target, layer),
            ]
            missing = [kind for kind in ATTENTION if any(kind not in one for one in weights)]
            if missing:
                raise ValueError(
                    f"lorasuite matches attention heads by q_proj, k_proj, v_proj and o_proj; {missing[0]} is not "
                    "there. Use ridge or trans_lora for models with fused projections."
                )
            self._matched[layer] = match_heads(weights[0], weights[1], self.residual_map, self.heads)  # type: ignore[arg-type]
        return self._matched[layer]


def _loaded(reference: ModelReference) -> Any:
    return load_model(reference.path, revision=reference.revision, dtype="float32").eval()
