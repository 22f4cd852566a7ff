"""From a configuration and opened models to the list of tensors that will be written, each with all it needs.

Nothing here knows an architecture. A layer is a number in a tensor's name (`model.layers.3.mlp.up_proj.weight`); the
tensors outside the layers count to the first slice if they are embeddings and to the last one if they are not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hf_transfer_ext.merging.method import MergeMethod
from hf_transfer_ext.merging.planning.compatibility import check_layers_are_there, check_same_kind
from hf_transfer_ext.merging.planning.config import MergeConfig, Module, Slice, Source, evaluate
from hf_transfer_ext.merging.planning.extra import ExtraFiles
from hf_transfer_ext.merging.planning.vocabulary import TOKEN_TENSORS, Vocabulary, rearranged
from hf_transfer_ext.weights.checkpoints import FLOAT_DTYPES, TensorSpec
from hf_transfer_ext.weights.opened import InputModel, InputTensor
from hf_transfer_ext.weights.reference import ModelReference

_LAYER = re.compile(r"^(?P<stack>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<index>\d+)\.(?P<rest>.+)$")

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings|\w*embedding\w*)\.")

#: The keys under which configs write the number of layers.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

Models = Mapping[ModelReference, InputModel]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result.

    Args:
        base: Tensor of the base model, for the methods that work on changes.
        models: Tensors of the models, in the order of the configuration.
        options: Keyword arguments of the method.
        is_copy: The bytes of `models[0]` are the result.
        extra: Further tensors of the models, in the same order, that the method declares.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: MergeMethod
    base: InputTensor | None
    models: tuple[InputTensor, ...]
    options: dict[str, Any]
    is_copy: bool = False
    extra: Mapping[str, tuple[InputTensor, ...]] = field(default_factory=dict)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def input_bytes(self) -> int:
        extra = [tensor for tensors in self.extra.values() for tensor in tensors]
        return sum(one.nbytes for one in (*self.models, *([self.base] if self.base is not None else []), *extra))

    def factor_bytes(self, rank: int) -> int:
        """At most so many bytes of an adapter of a rank, were this tensor changed: factors, or all of it."""
        if len(self.shape) != 2 or is_embedding(self.name):
            return self.spec.nbytes
        return min(rank, *self.shape) * sum(self.shape) * self.dtype.itemsize


def split_layer(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.weight` -> `("model.layers", 3, "mlp.weight")`; None for a tensor outside the layers."""
    match = _LAYER.match(name)
    return (match["stack"], int(match["index"]), match["rest"]) if match else None


def layer_count(model: InputModel, module: str = "default") -> int:
    """Number of layers of a model, 0 where it has none."""
    return max(
        (split[1] + 1 for split in map(split_layer, model.tensors) if split and _in_module(split[0], module)),
        default=0,
    )


def is_embedding(name: str) -> bool:
    """Whether a tensor has one row for each token (or position) and stands before the layers."""
    return _EMBEDDING.search(name) is not None


def plan_tensors(
    config: MergeConfig, models: Models, vocabulary: Vocabulary | None = None, extra: ExtraFiles | None = None
) -> list[TensorJob]:
    """List the tensors of the result: embeddings, layers in order, head.

    Args:
        vocabulary: Of the result, where the configuration asks for one; embeddings and head are rearranged to it.
        extra: The opened files of extra tensors, for methods that read them.

    Raises:
        ValueError: Tensors that are missing, or differ in shape, or options that are missing; the tensor and the
            models are named.
    """
    jobs: dict[str, TensorJob] = {}
    for i, module in enumerate(config.modules):
        for job in _Module(config, module, models, vocabulary, extra, first=i == 0).jobs():
            if job.name in jobs:
                raise ValueError(
                    f"Tensor {job.name!r} belongs to two modules of the configuration. Name the modules by the parts "
                    "of the model that hold their layers."
                )
            jobs[job.name] = job
    return list(jobs.values())


class _Module:
    """The jobs of one module; a module "default" has all tensors."""

    def __init__(
        self,
        config: MergeConfig,
        module: Module,
        models: Models,
        vocabulary: Vocabulary | None,
        extra: ExtraFiles | None,
        *,
        first: bool,
    ) -> None:
        self.config, self.module, self.models, self.first = config, module, models, first
        self.vocabulary, self.extra = vocabulary, extra or ExtraFiles({})
        self.method = config.method
        self.slices = [self._resolve(one) for one in module.slices]

    def jobs(self) -> list[TensorJob]:
        before, after = [], []
        for name in self._names(self.slices[0]):
            if split_layer(name) is None and self._is_ours(name) and is_embedding(name):
                before.append(self._job(name, [name] * len(self.slices[0].sources), self.slices[0], 0.0))
        last = self.slices[-1]
        for name in self._names(last):
            if split_layer(name) is None and self._is_ours(name) and not is_embedding(name):
                after.append(self._job(name, [name] * len(last.sources), last, 0.0))
        return [*before, *self._layers(), *after]

    def _layers(self) -> list[TensorJob]:
        jobs = []
        place = 0
        for part in self.slices:
            start, end = part.sources[0].layer_range or (0, 0)
            donors = self._layer_names(part, start)
            for offset in range(end - start):
                depth = offset / (end - start - 1) if end - start > 1 else 1.0
                for stack, rest in donors.get(start + offset, []):
                    names = [f"{stack}.{(s.layer_range or (0, 0))[0] + offset}.{rest}" for s in part.sources]
                    jobs.append(self._job(f"{stack}.{place + offset}.{rest}", names, part, depth))
            place += end - start
        return jobs

    def _layer_names(self, part: Slice, start: int) -> dict[int, list[tuple[str, str]]]:
        """layer of the first source -> (stack, rest of the name) of its tensors, in the order of the donor."""
        found: dict[int, list[tuple[str, str]]] = {}
        for name in self.models[part.sources[0].model].tensors:
            split = split_layer(name)
            if split is not None and _in_module(split[0], self.module.name):
                found.setdefault(split[1], []).append((split[0], split[2]))
        stacks = {stack for entries in found.values() for stack, _ in entries}
        if len(stacks) > 1 and any(source.layer_range != (0, len(found)) for source in part.sources):
            raise ValueError(
                f"Slices need one stack of layers, but {str(part.sources[0].model)!r} has {sorted(stacks)}. Name one "
                "module for each under `modules`."
            )
        return found

    def _resolve(self, part: Slice) -> Slice:
        """Give every source its layers, take a base model in where the method counts it as one more model."""
        base = part.base_model or self.config.base_model
        sources = list(part.sources)
        if self.method.base == "member" and base is not None and all(one.model != base for one in sources):
            sources.append(Source(base, sources[0].layer_range))
        resolved = []
        for source in sources:
            model = self.models[source.model]
            count = layer_count(model, self.module.name)
            counted = _layer_config(model.config, self.module.name)
            if counted is not None and self.module.name == "default":
                check_layers_are_there(model, count, counted[1][counted[0]])
            layers = source.layer_range or (0, count)
            if layers[1] > count:
                raise ValueError(
                    f"`layer_range: {list(layers)}` of {str(source.model)!r}: it has only {count} layers."
                )
            resolved.append(replace(source, layer_range=layers))
        lengths = {layers[1] - layers[0] for layers in (s.layer_range or (0, 0) for s in resolved)}
        if len(lengths) > 1:
            counts = {str(s.model): (s.layer_range or (0, 0))[1] for s in resolved}
            raise ValueError(f"The models have different numbers of layers: {counts}. Choose layers with `slices`.")
        taking_part = list(resolved)
        if base is not None and self.method.base in ("optional", "required"):
            taking_part.append(Source(base, resolved[0].layer_range))
        check_same_kind(taking_part, self.models)
        return Slice(tuple(resolved), base, part.parameters)

    def _is_ours(self, name: str) -> bool:
        """Tensors outside the layers go to the module they are named after, else to the first one."""
        modules = [module.name for module in self.config.modules]
        if len(modules) == 1:
            return True
        owner = [module for module in modules if module in name.split(".")]
        return self.module.name in owner if owner else self.first

    def _names(self, part: Slice) -> list[str]:
        donor = part.base_model if part.base_model is not None and self.method.base != "none" else None
        names = list(self.models[donor or part.sources[0].model].tensors)
        for source in part.sources:
            if all(one.layer_range == (0, layer_count(self.models[one.model])) for one in part.sources):
                self._refuse_extra(source.model, names, donor or part.sources[0].model)
        return names

    def _refuse_extra(self, reference: ModelReference, names: list[str], donor: ModelReference) -> None:
        known = set(names)
        extra = [name for name in self.models[reference].tensors if name not in known]
        if extra and not (extra == ["lm_head.weight"] and self.models[donor].is_tied):
            raise ValueError(
                f"Model {str(reference)!r} has tensor {extra[0]!r} ({len(extra)} such tensors), which {str(donor)!r} "
                "has not. Only models of one architecture can be merged."
            )

    def _job(self, name: str, names: list[str], part: Slice, depth: float) -> TensorJob:
        base_reference = part.base_model
        takes_base = self.method.base in ("optional", "required") and base_reference is not None
        rearranged = self._rearranged(name, part) if split_layer(name) is None else {}
        base: InputTensor | None = None
        pairs: list[tuple[Source, str, InputTensor]] = []
        for source, source_name in zip(part.sources, names, strict=True):
            tensor = rearranged.get(source.model) or self.models[source.model][source_name]
            if takes_base and source.model == base_reference and base is None:
                if source.parameters:
                    raise ValueError(
                        f"Model {str(source.model)!r} is the base model, so its own options "
                        f"({', '.join(source.parameters)}) have no effect. Take them away, or name another base."
                    )
                base = tensor
            else:
                pairs.append((source, source_name, tensor))
        if takes_base and base is None and base_reference is not None:
            base = rearranged.get(base_reference) or self.models[base_reference][names[0]]
        self._check_count(len(pairs), base_reference)
        self._check_shapes(name, pairs, base, base_reference)
        options = self._options(name, pairs, part, depth)
        tensors = tuple(tensor for _, _, tensor in pairs)
        donor = base if base is not None else tensors[0]
        if donor.dtype not in FLOAT_DTYPES:
            return self._copied(name, donor, tensors, pairs, options)
        for source, source_name, tensor in pairs:
            if tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"Tensor {source_name!r} of model {str(source.model)!r} has dtype {tensor.dtype}, but "
                    f"{donor.dtype} in another one. Use models that are not quantized."
                )
        dtype = self.config.out_dtype or self.config.dtype or donor.dtype
        is_copy = self.method.__name__ == "passthrough" and options["scale"] == [1.0] and dtype == donor.dtype
        extra = self.extra.of(self.method, [(source, own_name) for source, own_name, _ in pairs], donor.shape)
        return TensorJob(name, donor.shape, dtype, self.method, base, tensors, options, is_copy, extra)

    def _rearranged(self, name: str, part: Slice) -> dict[ModelReference, InputTensor]:
        """The inputs of a tensor with one row for each token, where the result has a vocabulary of its own."""
        if self.vocabulary is None or not name.endswith(TOKEN_TENSORS):
            return {}
        takes_base = self.method.base in ("optional", "required") and part.base_model is not None
        members = dict.fromkeys([source.model for source in part.sources] + ([part.base_model] if takes_base else []))
        return rearranged(self.config, self.vocabulary, self.models, name, [one for one in members if one is not None])

    def _check_count(self, count: int, base: ModelReference | None) -> None:
        least, most = self.method.count
        if self.method.base == "required" and base is None:
            raise ValueError(f"`merge_method: {self.method.__name__}` needs a `base_model`.")
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
            beside = " beside the base model" if base is not None and self.method.base != "none" else ""
            hint = " (the base model is listed as a model; it counts as the base only)" if beside and not count else ""
            raise ValueError(
                f"`merge_method: {self.method.__name__}` merges {wanted} models{beside}, got {count}{hint}."
            )

    def _check_shapes(
        self,
        name: str,
        pairs: Sequence[tuple[Source, str, InputTensor]],
        base: InputTensor | None,
        base_reference: ModelReference | None,
    ) -> None:
        shapes = {str(source.model): tensor.shape for source, _, tensor in pairs}
        if base is not None:
            shapes[str(base_reference)] = base.shape
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
            advice = "Only models of one architecture can be merged."
            if is_embedding(name) or name.endswith("lm_head.weight"):
                advice = "The vocabularies differ: say with `tokenizer: {source: union}` (or base, or a model) how."
            raise ValueError(f"Tensor {name!r} has different shapes: {told}. {advice}")

    def _options(
        self, name: str, pairs: Sequence[tuple[Source, str, InputTensor]], part: Slice, depth: float
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for key, option in self.method.options.items():
            if option.per_model:
                options[option.name] = [
                    self._value(key, source_name, part, depth, source, name) for source, source_name, _ in pairs
                ]
            else:
                options[option.name] = self._value(key, name, part, depth, None, name)
        if self.method.check is not None:
            try:
                self.method.check(**options)
            except ValueError as error:
                raise ValueError(f"Tensor {name!r}: {error}") from error
        return options

    def _value(self, key: str, name: str, part: Slice, depth: float, source: Source | None, output: str) -> Any:
        option = self.method.options[key]
        settings = [source.parameters] if source is not None else []
        for parameters in (*settings, part.parameters, self.module.parameters, self.config.parameters):
            value = evaluate(parameters[key], name, depth) if key in parameters else None
            if value is not None:
                return value
        if option.required:
            whose = f" of model {str(source.model)!r}" if source is not None else ""
            raise ValueError(f"Option {key!r}{whose} has no value for tensor {output!r}. Give one under `parameters`.")
        return option.default

    def _copied(
        self,
        name: str,
        donor: InputTensor,
        tensors: tuple[InputTensor, ...],
        pairs: Sequence[tuple[Source, str, InputTensor]],
        options: Mapping[str, Any],
    ) -> TensorJob:
        """Whole numbers (and eight-bit floats) cannot be averaged; a stack of layers may carry them along."""
        unchanged = self.method.__name__ == "passthrough" and options["scale"] == [1.0]
        if len(tensors) > 1 or donor is not tensors[0] or (donor.dtype.is_floating_point and not unchanged):
            raise ValueError(
                f"Tensor {name!r} of model {str(pairs[0][0].model)!r} has dtype {donor.dtype}, which "
                f"{self.method.__name__!r} cannot calculate with. Use models that are not quantized."
            )
        return TensorJob(name, donor.shape, donor.dtype, self.method, None, tensors, {}, is_copy=True)


def _in_module(stack: str, module: str) -> bool:
    return module == "default" or module in stack.split(".")


def output_config(config: MergeConfig, models: Models, donor: InputModel) -> dict[str, Any]:
    """config.json of the result: the donor's, with its layers counted anew, their lists stacked, and the dtype."""
    content = copy.deepcopy(donor.config)
    _stack_layers(content, config, models)
    dtype = config.out_dtype or config.dtype
    if dtype is not None:
        for part in (content, content.get("text_config", {})):
            for key in ("dtype", "torch_dtype"):
                if key in part or (key == "dtype" and part is content and "torch_dtype" not in part):
                    part[key] = str(dtype).removeprefix("torch.")
    return content


def set_vocabulary_size(content: dict[str, Any], size: int) -> None:
    """Write the number of embedding rows wherever a config.json counts them."""
    for part in (content, content.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = size


def _stack_layers(content: dict[str, Any], config: MergeConfig, models: Models) -> None:
    """Count the layers of slices, and take per-layer lists (`layer_types`) from where the layers come from."""
    for module in config.modules:
        if any(source.layer_range is None for part in module.slices for source in part.sources):
            continue
        sources = [part.sources[0] for part in module.slices]
        part = _layer_config(content, module.name)
        if part is None:
            continue
        key, old = part
        count = sum(end - start for start, end in (source.layer_range or (0, 0) for source in sources))
        for name, value in list(old.items()):
            if not isinstance(value, list) or len(value) != old[key]:
                continue
            stacked: list[Any] = []
            for source in sources:
                own = _layer_config(models[source.model].config, module.name)
                start, end = source.layer_range or (0, 0)
                values = own[1].get(name, value) if own is not None else value
                stacked += values[start:end]
            old[name] = stacked
        old[key] = count


def _layer_config(content: dict[str, Any], module: str) -> tuple[str, dict[str, Any]] | None:
    """The (part of the) config that counts the layers of a module, and the key that counts them."""
    parts = [content.get(f"{module}_config"), content.get(module), content, content.get("text_config")]
    for part in parts:
        if isinstance(part, dict):
            for key in LAYER_COUNT_KEYS:
                if isinstance(part.get(key), int):
                    return key, part
    return None
