"""Plan a merge: from a configuration and opened models to the output tensors, each with its inputs and options.

No architecture is hard-coded. A layer is a number in a tensor's name (`model.layers.3.mlp.up_proj.weight`), and
each stack of layers counts its own depth. The tensors outside the layers belong to the first slice if they are
embeddings and to the last one if they are not.

Every tensor of every input is in the result, or is named in a note, or is an error. Where the models name their
tensors differently (`names.py`), transformers says what belongs together.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hf_transfer_ext.merging.method import MergeMethod
from hf_transfer_ext.merging.methods.passthrough import passthrough
from hf_transfer_ext.merging.planning.compatibility import check_layers_are_there, check_same_kind
from hf_transfer_ext.merging.planning.config import MergeConfig, Module, Slice, Source, evaluate
from hf_transfer_ext.merging.planning.extra import ExtraFiles
from hf_transfer_ext.merging.planning.names import (
    align_names,
    belongs_to,
    check_modules,
    layer_config,
    layer_count,
    layer_keys,
    short_list,
    split_layer,
)
from hf_transfer_ext.merging.planning.vocabulary import Vocabulary, is_rearranged, rearranged
from hf_transfer_ext.weights.checkpoints import TensorSpec
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES, Dtype
from hf_transfer_ext.weights.opened import InputModel, InputTensor, has_token_rows, is_buffer, same_bytes
from hf_transfer_ext.weights.reference import ModelReference

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings|\w*embedding\w*)\.")

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
    dtype: Dtype
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
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        extra = [tensor for tensors in self.extra.values() for tensor in tensors]
        return sum(one.nbytes for one in (*self.models, *([self.base] if self.base is not None else []), *extra))

    def factor_bytes(self, rank: int) -> int:
        """Upper bound on the bytes of this tensor in an adapter of a rank: those of its factors, or of all of it."""
        if len(self.shape) != 2 or is_embedding(self.name):
            return self.spec.nbytes
        return min(rank, *self.shape) * sum(self.shape) * self.dtype.itemsize


def is_embedding(name: str) -> bool:
    """Whether a tensor has one row for each token (or position) and stands before the layers."""
    return _EMBEDDING.search(name) is not None


def plan_tensors(
    config: MergeConfig,
    models: Models,
    vocabulary: Vocabulary | None = None,
    extra: ExtraFiles | None = None,
    notes: list[str] | None = None,
) -> list[TensorJob]:
    """List the tensors of the result: embeddings, layers in order, head.

    Args:
        vocabulary: Of the result, where the configuration asks for one; embeddings and head are rearranged to it.
        extra: The opened files of extra tensors, for methods that read them.
        notes: Gets a sentence for everything that is not merged as the configuration may lead one to expect: tensors
            that are copied or left out, filters that fit nothing.

    Raises:
        ValueError: Tensors that are missing, or differ in shape, or options that are missing; the tensor and the
            models are named.
    """
    notes = notes if notes is not None else []
    merged = _merged_models(config, models)
    align_names(merged)
    check_modules([module.name for module in config.modules], merged)
    jobs: dict[str, TensorJob] = {}
    used: dict[ModelReference, set[str]] = {model.reference: set() for model in merged}
    differing: list[str] = []
    copied: list[str] = []
    for i, module in enumerate(config.modules):
        for job in _Module(config, module, models, vocabulary, extra, used, differing, copied, first=i == 0).jobs():
            if job.name in jobs:
                raise ValueError(
                    f"Tensor {job.name!r} belongs to two modules of the configuration. Name the modules by the parts "
                    "of the model that hold their layers."
                )
            jobs[job.name] = job
    for job in _uncovered(config, merged, used, jobs, notes):
        jobs[job.name] = job
    _note_left_out(config, merged, used, jobs, notes)
    if differing:
        notes.append(
            f"Buffers differ between the models and are those of the base, or of the first model: "
            f"{short_list(differing)}."
        )
    if copied:
        notes.append(
            f"{len(copied)} tensors, which transformers does not load, are not in all models and are copied from the "
            f"first that has them: {short_list(copied)}."
        )
    for text in config.filters():
        if not any(text in name for names in (jobs, *used.values()) for name in names):
            notes.append(f"The filter {text!r} fits no tensor, so its value has no effect.")
    return list(jobs.values())


def _merged_models(config: MergeConfig, models: Models) -> list[InputModel]:
    """The models whose tensors are merged, without those that only give tokens; the base model first."""
    slices = [part for module in config.modules for part in module.slices]
    bases = [config.base_model, *(part.base_model for part in slices)] if config.method.base != "none" else []
    named = [*bases, *(source.model for part in slices for source in part.sources)]
    return [models[one] for one in dict.fromkeys(named) if one is not None]


def _uncovered(
    config: MergeConfig,
    merged: Sequence[InputModel],
    used: Mapping[ModelReference, set[str]],
    jobs: Mapping[str, TensorJob],
    notes: list[str],
) -> list[TensorJob]:
    """Copies of the tensors that belong to no module of the configuration."""
    modules = [module.name for module in config.modules]
    donor = merged[0]
    if any(module == "default" for module in modules):
        return []
    rest = [name for name in donor.tensors if name not in used[donor.reference] and name not in jobs]
    rest = [
        name
        for name in rest
        if split_layer(name) is None or not any(belongs_to(name, module, donor) for module in modules)
    ]
    if not rest:
        return []
    notes.append(
        f"{len(rest)} tensors belong to none of the modules {', '.join(modules)} and are those of "
        f"{str(donor.reference)!r}: {short_list(rest)}."
    )
    copies = []
    for name in rest:
        tensor = donor.tensors[name]
        dtype = config.out_dtype or config.dtype or tensor.dtype
        if tensor.dtype not in FLOAT_DTYPES or is_buffer(name, tensor):
            dtype = tensor.dtype
        copies.append(_copy(name, tensor, dtype))
        used[donor.reference].add(name)
    return copies


def _copy(name: str, tensor: InputTensor, dtype: Dtype) -> TensorJob:
    plain = dtype == tensor.dtype
    return TensorJob(name, tensor.shape, dtype, passthrough, None, (tensor,), {"scale": [1.0]}, is_copy=plain)


def _note_left_out(
    config: MergeConfig,
    merged: Sequence[InputModel],
    used: Mapping[ModelReference, set[str]],
    jobs: Mapping[str, TensorJob],
    notes: list[str],
) -> None:
    """Name the tensors that are in an input and not in the result; those of layers outside the slices are meant."""
    for model in merged:
        stacked = any(
            source.layer_range is not None
            for module in config.modules
            for part in module.slices
            for source in part.sources
            if source.model == model.reference
        )
        rest = [name for name in model.tensors if name not in used[model.reference] and name not in jobs]
        if stacked or any(module.name != "default" for module in config.modules):
            rest = [name for name in rest if split_layer(name) is None or name in model.unloaded]
        if rest:
            notes.append(f"{len(rest)} tensors of {str(model.reference)!r} are left out: {short_list(rest)}.")
        if model.copies:
            notes.append(
                f"{str(model.reference)!r} stores copies of tied tensors, which are left out: "
                f"{short_list(list(model.copies))}."
            )


class _Module:
    """The jobs of one module; a module "default" has all tensors."""

    def __init__(
        self,
        config: MergeConfig,
        module: Module,
        models: Models,
        vocabulary: Vocabulary | None,
        extra: ExtraFiles | None,
        used: Mapping[ModelReference, set[str]],
        differing: list[str],
        copied: list[str],
        *,
        first: bool,
    ) -> None:
        self.config, self.module, self.models, self.first = config, module, models, first
        self.vocabulary, self.extra = vocabulary, extra or ExtraFiles({})
        self.used, self.differing, self.copied = used, differing, copied
        self.method = config.method
        self.slices = [self._resolve(one) for one in module.slices]

    def jobs(self) -> list[TensorJob]:
        outside = [
            name
            for name in self._names(self.slices, lambda name, model, source: split_layer(name) is None)
            if self._is_ours(name)
        ]
        before = [self._outside(name, self.slices[0]) for name in outside if is_embedding(name)]
        after = [self._outside(name, self.slices[-1]) for name in outside if not is_embedding(name)]
        return [*filter(None, before), *self._layers(), *filter(None, after)]

    def _outside(self, name: str, part: Slice) -> TensorJob | None:
        return self._job(name, [name] * len(part.sources), part, 0.0)

    def _names(self, slices: Sequence[Slice], fits: Callable[[str, InputModel, Source], bool]) -> list[str]:
        """The names of tensors of all sources of slices, in the order of the base or first model."""
        found: dict[str, None] = {}
        for part in slices:
            donor = part.base_model if part.base_model is not None and self.method.base != "none" else None
            sources = list(part.sources)
            if donor is not None:
                layers = next((one.layer_range for one in sources if one.model == donor), sources[0].layer_range)
                sources = [Source(donor, layers), *sources]
            for source in {source.model: source for source in sources}.values():
                model = self.models[source.model]
                found.update(dict.fromkeys(name for name in model.tensors if fits(name, model, source)))
        return list(found)

    def _layers(self) -> list[TensorJob]:
        jobs = []
        place = 0
        for part in self.slices:
            start, end = part.sources[0].layer_range or (0, 0)
            donors, lengths = self._layer_names(part)
            for offset in range(end - start):
                for stack, rest in donors.get(offset, {}):
                    length = min(end - start, lengths[stack])
                    depth = offset / (length - 1) if length > 1 else 1.0
                    names = [f"{stack}.{(s.layer_range or (0, 0))[0] + offset}.{rest}" for s in part.sources]
                    job = self._job(f"{stack}.{place + offset}.{rest}", names, part, depth)
                    if job is not None:
                        jobs.append(job)
            place += end - start
        return jobs

    def _layer_names(self, part: Slice) -> tuple[dict[int, dict[tuple[str, str], None]], dict[str, int]]:
        """Place in the slice -> (stack, rest of the name) of the tensors of any source; stack -> its length."""
        found: dict[int, dict[tuple[str, str], None]] = {}
        lengths: dict[str, int] = {}
        sources = list(part.sources)
        if part.base_model is not None and self.method.base != "none":
            sources = [Source(part.base_model, sources[0].layer_range), *sources]
        for source in {(one.model, one.layer_range): one for one in sources}.values():
            model = self.models[source.model]
            start, end = source.layer_range or (0, 0)
            for name in model.tensors:
                split = split_layer(name)
                if split is None or not belongs_to(name, self.module.name, model):
                    continue
                if not start <= split[1] < end:
                    continue
                found.setdefault(split[1] - start, {})[split[0], split[2]] = None
                lengths[split[0]] = max(lengths.get(split[0], 0), split[1] - start + 1)
        if len(lengths) > 1 and not self._is_whole(part):
            numbered = {stack for stack in lengths if not self._is_unloaded(stack)}
            if len(numbered) > 1:
                raise ValueError(
                    f"Slices need one stack of layers, but {str(part.sources[0].model)!r} has {sorted(numbered)}. "
                    "Name one module for each under `modules`."
                )
            found = {i: {key: None for key in names if key[0] in numbered} for i, names in found.items()}
        return found, lengths

    def _is_unloaded(self, stack: str) -> bool:
        """Whether transformers loads nothing of a stack (multi-token prediction)."""
        models = [self.models[source.model] for part in self.slices for source in part.sources]
        own = [(model, name) for model in models for name in model.tensors if name.startswith(f"{stack}.")]
        return bool(own) and all(name in model.unloaded for model, name in own)

    def _is_whole(self, part: Slice) -> bool:
        """Whether all sources give all of their layers."""
        return all(
            one.layer_range == (0, layer_count(self.models[one.model], self.module.name)) for one in part.sources
        )

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
            if self.module.name == "default":
                check_layers_are_there(model)
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
        """Tensors outside the layers go to the module they are named after.

        The others go to the first module, unless some layers belong to none: then they are not merged either.
        """
        modules = [module.name for module in self.config.modules]
        if self.module.name == "default":
            return True
        models = [self.models[source.model] for part in self.slices for source in part.sources]
        owner = [module for module in modules if any(belongs_to(name, module, model) for model in models)]
        if owner:
            return self.module.name in owner
        return self.first and self._all_layers_covered

    @cached_property
    def _all_layers_covered(self) -> bool:
        modules = [module.name for module in self.config.modules]
        models = [self.models[source.model] for part in self.slices for source in part.sources]
        layers = {name for model in models for name in model.tensors if split_layer(name) is not None}
        return all(any(belongs_to(name, module, models[0]) for module in modules) for name in layers)

    def _find(self, reference: ModelReference, name: str) -> InputTensor | None:
        """A tensor of a model; None where it is of no use to transformers and stored in some of the models only."""
        model = self.models[reference]
        try:
            tensor = model[name]
        except ValueError:
            if self._may_be_missing(name):
                return None
            owner = next((one for one in self.used if name in self.models[one].tensors), None)
            if owner is None:
                raise
            raise ValueError(
                f"Model {str(reference)!r} lacks a tensor: {str(owner)!r} has tensor {name!r}, and there is nothing "
                "that transformers would load in its place. Only models of one architecture can be merged."
            ) from None
        if reference in self.used:
            self.used[reference].add(name)
        return tensor

    def _may_be_missing(self, name: str) -> bool:
        models = [self.models[reference] for reference in self.used]
        owners = [model for model in models if name in model.tensors]
        return bool(owners) and all(name in model.unloaded or is_buffer(name, model.tensors[name]) for model in owners)

    def _job(self, name: str, names: list[str], part: Slice, depth: float) -> TensorJob | None:
        base_reference = part.base_model
        takes_base = self.method.base in ("optional", "required") and base_reference is not None
        rearranged = self._rearranged(name, part) if split_layer(name) is None else {}
        base: InputTensor | None = None
        pairs: list[tuple[Source, str, InputTensor]] = []
        missing = False
        for source, source_name in zip(part.sources, names, strict=True):
            tensor = rearranged.get(source.model) or self._find(source.model, source_name)
            if takes_base and source.model == base_reference and base is None:
                if source.parameters:
                    raise ValueError(
                        f"Model {str(source.model)!r} is the base model, so its own options "
                        f"({', '.join(source.parameters)}) have no effect. Take them away, or name another base."
                    )
                base = tensor
                missing = missing or tensor is None
            elif tensor is None:
                missing = True
            else:
                pairs.append((source, source_name, tensor))
        if takes_base and base is None and base_reference is not None and not missing:
            base = rearranged.get(base_reference) or self._find(base_reference, names[0])
            missing = base is None
        if missing:
            return self._carried(name, names, part, base, pairs)
        donor = base if base is not None else pairs[0][2]
        if is_buffer(name, donor) and not (len(pairs) == 1 and base is None):
            return self._buffer(name, donor, [tensor for _, _, tensor in pairs], pairs)
        self._check_count(len(pairs), base_reference)
        self._check_shapes(name, pairs, base, base_reference)
        options = self._options(name, pairs, part, depth)
        tensors = tuple(tensor for _, _, tensor in pairs)
        if donor.dtype not in FLOAT_DTYPES or is_buffer(name, donor):
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

    def _carried(
        self,
        name: str,
        names: Sequence[str],
        part: Slice,
        base: InputTensor | None,
        pairs: Sequence[tuple[Source, str, InputTensor]],
    ) -> TensorJob | None:
        """A tensor that some models lack and transformers does not load, as the first model that has it stores it.

        Layers that were cut out of a stack have no place for it; then it is left out.
        """
        if base is None and part.base_model is not None and self.method.base != "none":
            base = self.models[part.base_model].tensors.get(names[0])
            if base is not None and part.base_model in self.used:
                self.used[part.base_model].add(names[0])
        donor = base if base is not None else next((tensor for _, _, tensor in pairs), None)
        if donor is None:
            return None
        dtype = self.config.out_dtype or self.config.dtype or donor.dtype
        plain = donor.dtype not in FLOAT_DTYPES or is_buffer(name, donor)
        self.copied.append(name)
        return _copy(name, donor, donor.dtype if plain else dtype)

    def _buffer(
        self,
        name: str,
        donor: InputTensor,
        others: Sequence[InputTensor],
        pairs: Sequence[tuple[Source, str, InputTensor]],
    ) -> TensorJob:
        """A buffer of the base or the first model. Whole numbers of a quantized model are its weights."""
        for source, _, _ in pairs:
            if "quantization_config" in self.models[source.model].config and donor.dtype not in FLOAT_DTYPES:
                return self._copied(name, donor, tuple(others), pairs, {})
        if any(not same_bytes(donor, other) for other in others if other is not donor):
            self.differing.append(name)
        return _copy(name, donor, donor.dtype)

    def _rearranged(self, name: str, part: Slice) -> dict[ModelReference, InputTensor]:
        """The inputs of a tensor with one row for each token, where the result has a vocabulary of its own."""
        if self.vocabulary is None or not is_rearranged(name, [self.models[one] for one in self.used]):
            return {}
        for reference in self.used:
            self.used[reference].add(name)
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
            listed = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
            advice = "Only models of one architecture can be merged."
            if is_embedding(name) or has_token_rows(name):
                advice = "The vocabularies differ: say with `tokenizer: {source: union}` (or base, or a model) how."
            raise ValueError(f"Tensor {name!r} has different shapes: {listed}. {advice}")

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
        changed = self.method.__name__ != "passthrough" or options.get("scale") != [1.0]
        is_eight_bit = donor.dtype.is_floating_point and donor.dtype not in FLOAT_DTYPES
        if len(tensors) > 1 or donor is not tensors[0] or (is_eight_bit and changed):
            raise ValueError(
                f"Tensor {name!r} of model {str(pairs[0][0].model)!r} has dtype {donor.dtype}, which "
                f"{self.method.__name__!r} cannot calculate with. Use models that are not quantized."
            )
        return TensorJob(name, donor.shape, donor.dtype, self.method, None, tensors, {}, is_copy=True)


def output_config(config: MergeConfig, models: Models, donor: InputModel) -> dict[str, Any]:
    """config.json of the result: the donor's, with its layers counted anew, their lists stacked, and the dtype.

    The result is not tied if one of the models has a head of its own.
    """
    content = copy.deepcopy(donor.config)
    _stack_layers(content, config, models)
    dtype = config.out_dtype or config.dtype
    if dtype is not None:
        for part in (content, content.get("text_config", {})):
            for key in ("dtype", "torch_dtype"):
                if key in part or (key == "dtype" and part is content and "torch_dtype" not in part):
                    part[key] = str(dtype)
    merged = _merged_models(config, models)
    if any(model.has_head for model in merged) and any(model.is_tied for model in (donor, *merged)):
        for part in (content, content.get("text_config", {})):
            if part is content or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return content


def set_vocabulary_size(content: dict[str, Any], size: int) -> None:
    """Write the number of embedding rows wherever a config.json counts them."""
    for part in (content, content.get("text_config", {})):
        if "vocab_size" in part:
            if part.get("vocab_size_per_layer_input") == part["vocab_size"]:
                part["vocab_size_per_layer_input"] = size
            part["vocab_size"] = size


def _stack_layers(content: dict[str, Any], config: MergeConfig, models: Models) -> None:
    """Count the layers of slices, and take per-layer lists (`layer_types`) from where the layers come from."""
    for module in config.modules:
        if any(source.layer_range is None for part in module.slices for source in part.sources):
            continue
        sources = [part.sources[0] for part in module.slices]
        part = layer_config(content, module.name)
        if part is None:
            continue
        if part.get("is_encoder_decoder") and "num_layers" in part:  # T5 counts a decoder by its encoder otherwise
            part.setdefault("num_decoder_layers", part["num_layers"])
        keys = layer_keys(part, module.name)
        old = part[keys[0]]
        count = sum(end - start for start, end in (source.layer_range or (0, 0) for source in sources))
        for name, value in list(part.items()):
            if not isinstance(value, list) or len(value) != old:
                continue
            stacked: list[Any] = []
            for source in sources:
                own = layer_config(models[source.model].config, module.name)
                start, end = source.layer_range or (0, 0)
                values = own.get(name, value) if own is not None else value
                stacked += values[start:end]
            part[name] = stacked
        for key in keys:
            if part[key] == old:
                part[key] = count
