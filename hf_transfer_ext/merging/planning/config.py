"""The YAML of a merge, in the grammar of mergekit, as typed values. Unknown keys are refused, with a suggestion.

A configuration names exactly one of `models`, `slices` and `modules`:

    models:                                  slices:
      - model: org/name@revision+org/lora      - sources:
        parameters: {weight: 0.5}                - model: org/name
    merge_method: linear                           layer_range: [0, 12]

An option is a number, a gradient over the depth (`[0, 0.5, 1]`), or conditions
`[{filter: mlp, value: 0.5}, {value: 1}]`, of which the first that fits the tensor's name counts. An option of a source
wins over one of its slice, that over one of its module, and that over one of the whole merge. Numbers may be written
as text (`"0.5"`, and `1e-5`, which YAML 1.1 takes for text); NaN and infinity are refused. Top-level keys that begin
with `x-` hold YAML anchors and are not read.

Beyond mergekit: `seed` of the random masks, `output: {lora: {rank: 16}}` for a result that is a LoRA adapter, and
`tensors: {fisher: path}` of a source for methods that read further tensors beside its weights (`planning.extra`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_transfer_ext.merging.method import RANGES, WITHOUT_EFFECT, MergeMethod
from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.merging.planning.chat_templates import CHAT_TEMPLATES
from hf_transfer_ext.reading import read_yaml, shown
from hf_transfer_ext.registry import known_keys, unknown_name
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES, Dtype, dtype_named
from hf_transfer_ext.weights.reference import ModelReference, parse_reference

Parameters = dict[str, Any]

_NUMBER = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

_TOP_KEYS = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "seed",
    "output",
)


@dataclass(frozen=True)
class Source:
    """The layers `layer_range[0] <= i < layer_range[1]` of a model; None stands for all of them."""

    model: ModelReference
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A run of output layers and where they come from; all sources have the same number of layers."""

    sources: tuple[Source, ...]
    base_model: ModelReference | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A part of the model (the decoder, a vision tower) with its own stack of layers."""

    name: str
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of one token comes from: a model, zeros, or a token of a model.

    `force` gives it to all models, also to those that have the token themselves.
    """

    model: ModelReference | None = None
    zero: bool = False
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerPlan:
    """`source` is "union", "base" or a model."""

    source: str | ModelReference = "union"
    tokens: dict[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergeConfig:
    """A whole configuration. `models` and `slices` have become the one module named "default".

    Args:
        lora_rank: Rank of the adapter that the result becomes; None for a whole model.
    """

    merge_method: str
    modules: tuple[Module, ...]
    base_model: ModelReference | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer: TokenizerPlan | None = None
    chat_template: str | None = None
    seed: int = 0
    lora_rank: int | None = None

    @property
    def method(self) -> MergeMethod:
        return MERGE_METHODS[self.merge_method]

    @property
    def references(self) -> list[ModelReference]:
        """All models in the order in which they are named, the base model first."""
        bases = [self.base_model, *(part.base_model for module in self.modules for part in module.slices)]
        models = [s.model for module in self.modules for part in module.slices for s in part.sources]
        tokens = [token.model for token in self.tokenizer.tokens.values()] if self.tokenizer else []
        if self.tokenizer and isinstance(self.tokenizer.source, ModelReference):
            tokens.append(self.tokenizer.source)
        return list(dict.fromkeys(one for one in [*bases, *models, *tokens] if one is not None))

    def filters(self) -> list[str]:
        """All filters of the options, in the order of the configuration."""
        places = [self.parameters, *(module.parameters for module in self.modules)]
        slices = [part for module in self.modules for part in module.slices]
        places += [part.parameters for part in slices]
        places += [source.parameters for part in slices for source in part.sources]
        return list(dict.fromkeys(one for place in places for setting in place.values() for one in _filters(setting)))


def load_config(config: Mapping[str, Any] | str | Path) -> MergeConfig:
    """Parse a configuration: a mapping, or the path of a YAML file."""
    return parse_config(yaml_mapping(config, "merge configuration", "`merge_method` and `models`"))


def yaml_mapping(config: Mapping[str, Any] | str | Path, title: str, keys: str) -> Mapping[str, Any]:
    """A mapping as it is, or the one in a YAML file.

    Args:
        title: What the file should be, for errors.
        keys: Which keys it should have, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid YAML, or not a mapping.
    """
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {title} at {str(path)!r}.")
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} has to be a mapping with {keys}, got {shown(content)}.")
    return content


def without_anchors(content: Any) -> Any:
    """A configuration without its keys `x-...`, which hold YAML anchors for other keys."""
    if not isinstance(content, Mapping):
        return content
    return {key: value for key, value in content.items() if not str(key).startswith("x-")}


def number(value: Any, where: str) -> float:
    """A finite number; a text that reads as one is accepted, since YAML 1.1 takes `1e-5` for a text.

    Raises:
        ValueError: It is not a number, or it is NaN or infinite.
    """
    if isinstance(value, str) and _NUMBER.match(value.strip()):
        value = float(value)
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{where}` has to be a number, got {shown(value)}.")
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > sys.float_info.max:
        raise ValueError(f"`{where}` has to be a finite number, got {shown(value)}.")
    return value


def whole_number(value: Any, where: str) -> int | None:
    """A whole number, written as such; None stays None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"`{where}` has to be a whole number, got {shown(value)}.")
    return value


def parse_config(content: Mapping[str, Any]) -> MergeConfig:
    """Check every key and every option that can be checked before a model is opened.

    Raises:
        ValueError: An unknown key, method or option, an option out of its range, or keys that contradict each other.
    """
    content = without_anchors(content)
    known_keys(content, _TOP_KEYS, "the merge configuration")
    if "merge_method" not in content:
        raise ValueError(f"`merge_method` is missing. Available: {', '.join(sorted(MERGE_METHODS))}.")
    method = MERGE_METHODS[content["merge_method"]]
    base = parse_reference(content["base_model"], "base_model") if content.get("base_model") is not None else None
    if method.base == "required" and base is None and not _slices_have_base(content):
        raise ValueError(f"`merge_method: {content['merge_method']}` needs a `base_model`.")
    return MergeConfig(
        merge_method=content["merge_method"],
        modules=_modules(content, method),
        base_model=base,
        parameters=_parameters(content.get("parameters"), method, "parameters", per_model=True),
        dtype=parse_dtype(content.get("dtype"), "dtype"),
        out_dtype=parse_dtype(content.get("out_dtype"), "out_dtype"),
        tokenizer=_tokenizer(content),
        chat_template=_template(content.get("chat_template")),
        seed=whole_number(content.get("seed"), "seed") or 0,
        lora_rank=_lora_rank(content.get("output")),
    )


def evaluate(setting: Any, tensor: str, depth: float) -> Any:
    """The value of an option for one tensor, or None where no condition fits.

    Args:
        tensor: Name that the filters are looked for in.
        depth: 0 at the first layer of the slice and 1 at the last; 0 for tensors outside the layers.
    """
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in setting):
        place = depth * (len(setting) - 1)
        left = int(place)
        right = min(left + 1, len(setting) - 1)
        return (1 - (place - left)) * setting[left] + (place - left) * setting[right]
    if setting and all(not isinstance(one, (Mapping, list)) for one in setting):
        return setting[int(depth * (len(setting) - 1))]
    for condition in setting:
        if condition.get("filter") in (None, "*") or condition["filter"] in tensor:
            return evaluate(condition["value"], tensor, depth)
    return None


def _template(value: Any) -> str | None:
    """The template itself, also for a name of `CHAT_TEMPLATES`; "auto" stays."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`chat_template` has to be a text, got {shown(value)}.")
    text = value
    if text is None or text == "auto" or "{" in text:
        return text
    if text not in CHAT_TEMPLATES:
        names = ("auto", *CHAT_TEMPLATES)
        raise ValueError(f"`chat_template`: {unknown_name('template', text, names)} Or paste the text of a template.")
    return CHAT_TEMPLATES[text]


def parse_dtype(value: Any, where: str) -> Dtype | None:
    """A dtype that can be calculated with, by its name; None stays None."""
    if value is None:
        return None
    found = dtype_named(value)
    if found not in FLOAT_DTYPES:
        names = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise ValueError(f"`{where}` has to be one of {names}, got {shown(value)}.")
    return found


def _lora_rank(value: Any) -> int | None:
    """`output: {lora: {rank: 16}}`: the result as an adapter on the base model."""
    if value is None:
        return None
    known_keys(value, ("lora",), "output")
    known_keys(value.get("lora"), ("rank",), "output.lora")
    rank = whole_number(value["lora"].get("rank"), "output.lora.rank")
    if rank is None or rank < 1:
        raise ValueError(f"`output.lora.rank` has to be at least 1, got {shown(rank)}.")
    return rank


def _slices_have_base(content: Mapping[str, Any]) -> bool:
    slices = content.get("slices")
    return isinstance(slices, list) and all(isinstance(one, Mapping) and one.get("base_model") for one in slices)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{where}` has to be a list with at least one entry, got {shown(value)}.")
    return value


def _modules(content: Mapping[str, Any], method: MergeMethod) -> tuple[Module, ...]:
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if len(given) != 1:
        raise ValueError(f"Exactly one of `models`, `slices` and `modules` is needed, got {given or 'none'}.")
    if given[0] != "modules":
        return (Module("default", _slices(content, method, "")),)
    if not isinstance(content["modules"], Mapping):
        raise ValueError(f"`modules` has to be a mapping from names to modules, got {shown(content['modules'])}.")
    modules = []
    for name, value in content["modules"].items():
        where = f"modules.{name}"
        known_keys(value, ("models", "slices", "parameters"), where)
        if bool(value.get("models")) == bool(value.get("slices")):
            raise ValueError(f"`{where}` needs exactly one of `models` and `slices`.")
        parameters = _parameters(value.get("parameters"), method, f"{where}.parameters", per_model=True)
        modules.append(Module(str(name), _slices(value, method, f"{where}."), parameters))
    return tuple(modules)


def _slices(content: Mapping[str, Any], method: MergeMethod, prefix: str) -> tuple[Slice, ...]:
    if content.get("models"):
        sources = []
        for i, value in enumerate(_list(content["models"], f"{prefix}models")):
            where = f"{prefix}models[{i}]"
            known_keys(value, ("model", "parameters", "tensors"), where)
            parameters = _parameters(value.get("parameters"), method, f"{where}.parameters", per_model=None)
            tensors = _tensors(value.get("tensors"), method, where)
            sources.append(Source(parse_reference(value.get("model"), f"{where}.model"), None, parameters, tensors))
        return (Slice(tuple(sources)),)
    slices = []
    for i, value in enumerate(_list(content["slices"], f"{prefix}slices")):
        where = f"{prefix}slices[{i}]"
        known_keys(value, ("sources", "base_model", "parameters"), where)
        sources = []
        for j, source in enumerate(_list(value.get("sources"), f"{where}.sources")):
            place = f"{where}.sources[{j}]"
            parsed = _slice_source(source, method, place)
            sources.append(replace(parsed, tensors=_tensors(source.get("tensors"), method, place)))
        lengths = {end - start for start, end in (source.layer_range or (0, 0) for source in sources)}
        if len(lengths) > 1:
            raise ValueError(f"All sources of `{where}` need the same number of layers, got {sorted(lengths)}.")
        base = value.get("base_model")
        slices.append(
            Slice(
                tuple(sources),
                parse_reference(base, f"{where}.base_model") if base is not None else None,
                _parameters(value.get("parameters"), method, f"{where}.parameters", per_model=True),
            )
        )
    return tuple(slices)


def _slice_source(value: Any, method: MergeMethod, where: str) -> Source:
    known_keys(value, ("model", "layer_range", "parameters", "tensors"), where)
    layers = value.get("layer_range")
    ends: list[int | None] = []
    if isinstance(layers, list) and len(layers) == 2:
        ends = [whole_number(one, f"{where}.layer_range") for one in layers]
    first, end = ends if ends else (None, None)
    if first is None or end is None or not 0 <= first < end:
        raise ValueError(f"`{where}.layer_range` has to be [first, end) with 0 <= first < end, got {shown(layers)}.")
    parameters = _parameters(value.get("parameters"), method, f"{where}.parameters", per_model=None)
    return Source(parse_reference(value.get("model"), f"{where}.model"), (first, end), parameters)


def _parameters(value: Any, method: MergeMethod, where: str, *, per_model: bool | None) -> Parameters:
    """Check the names of options. `per_model=None`: the options of one model, where others would have no effect."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"`{where}` has to be a mapping, got {shown(value)}.")
    settings: Parameters = {}
    for name, setting in value.items():
        if _has_no_effect(name, method):
            continue
        if name not in method.options:
            kind = f"option of merge method {method.__name__!r}"
            raise ValueError(f"In `{where}`: {unknown_name(kind, name, method.options)}")
        if per_model is None and not method.options[name].per_model:
            raise ValueError(
                f"`{where}.{name}` has no effect: {name!r} counts for the whole merge. Move it to the top level "
                "`parameters`, or to those of the slice."
            )
        settings[name] = _setting(name, setting, f"{where}.{name}")
    return settings


def _has_no_effect(name: str, method: MergeMethod) -> bool:
    return name in WITHOUT_EFFECT or f"{method.__name__}.{name}" in WITHOUT_EFFECT


def _setting(name: str, setting: Any, where: str) -> Any:
    """The value of an option with its numbers read, after a check of their range."""
    if isinstance(setting, Mapping):
        raise ValueError(f"`{where}` has to be a value or a list of conditions, got {shown(dict(setting))}.")
    if not isinstance(setting, list):
        if setting is not None and not isinstance(setting, bool):
            if not isinstance(setting, (int, float)) and not (isinstance(setting, str) and _NUMBER.match(setting)):
                raise ValueError(f"`{where}` has to be a number or true or false, got {shown(setting)}.")
            setting = number(setting, where)
        allowed = RANGES.get(name)
        if allowed is not None and setting not in allowed:
            raise ValueError(f"`{where}` has to be {allowed}, got {shown(setting)}.")
        return setting
    if not setting:
        raise ValueError(f"`{where}` is an empty list; give a value, a gradient or conditions.")
    conditions = [one for one in setting if isinstance(one, Mapping)]
    if conditions and len(conditions) != len(setting):
        raise ValueError(f"`{where}` mixes conditions with plain values; give the last value as `- value: ...`.")
    values: list[Any] = []
    for i, one in enumerate(setting):
        if isinstance(one, Mapping):
            known_keys(one, ("filter", "value"), f"{where}[{i}]")
            if "value" not in one:
                raise ValueError(f"`{where}[{i}]` has no `value`.")
            if one.get("filter") is not None and not isinstance(one["filter"], str):
                raise ValueError(f"`{where}[{i}].filter` has to be a part of tensor names, got {one['filter']!r}.")
            values.append({**one, "value": _setting(name, one["value"], f"{where}[{i}].value")})
        elif isinstance(one, list):
            raise ValueError(f"`{where}[{i}]` is a list in a list; a gradient is a flat list of numbers.")
        else:
            values.append(_setting(name, one, f"{where}[{i}]"))
    return values


def _filters(setting: Any) -> Iterator[str]:
    for condition in setting if isinstance(setting, list) else ():
        if isinstance(condition, Mapping):
            if condition.get("filter") not in (None, "*"):
                yield condition["filter"]
            yield from _filters(condition["value"])


def _tokenizer(content: Mapping[str, Any]) -> TokenizerPlan | None:
    short, value = content.get("tokenizer_source"), content.get("tokenizer")
    if short is not None and value is not None:
        raise ValueError("`tokenizer_source` and `tokenizer` say the same thing; give only one of them.")
    if short is not None:
        return TokenizerPlan(_tokenizer_source(short, "tokenizer_source"))
    if value is None:
        return None
    known_keys(value, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    tokens = value.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise ValueError(f"`tokenizer.tokens` has to be a mapping from tokens to sources, got {shown(tokens)}.")
    pad = whole_number(value.get("pad_to_multiple_of"), "tokenizer.pad_to_multiple_of")
    if pad is not None and pad < 1:
        raise ValueError(f"`tokenizer.pad_to_multiple_of` has to be at least 1, got {pad}.")
    return TokenizerPlan(
        _tokenizer_source(value.get("source", "union"), "tokenizer.source"),
        {str(token): _token(source, f"tokenizer.tokens.{token}") for token, source in tokens.items()},
        pad,
    )


def _tokenizer_source(value: Any, where: str) -> str | ModelReference:
    return value if value in ("union", "base") else parse_reference(value, where)


def _token(value: Any, where: str) -> TokenSource:
    known_keys(value, ("source", "force"), where)
    source, force = value.get("source"), bool(value.get("force", False))
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenSource(parse_reference(source, f"{where}.source") if source is not None else None, force=force)
    if source["kind"] == "zero":
        known_keys(source, ("kind",), f"{where}.source")
        return TokenSource(zero=True, force=force)
    if source["kind"] != "model_token":
        raise ValueError(f"`{where}.source`: {unknown_name('kind', source['kind'], ('zero', 'model_token'))}")
    known_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source")
    if (source.get("token") is None) == (source.get("token_id") is None):
        raise ValueError(f"`{where}.source` needs exactly one of `token` and `token_id`.")
    model = parse_reference(source.get("model"), f"{where}.source.model")
    return TokenSource(model, token=source.get("token"), token_id=source.get("token_id"), force=force)


def _tensors(value: Any, method: MergeMethod, where: str) -> dict[str, str]:
    """The `tensors` of a source: paths of all extra tensors that the merge method declares, and of nothing else."""
    if value is None and not method.extra:
        return {}
    if not method.extra:
        raise ValueError(f"`{where}.tensors` has no effect: merge method {method.__name__!r} reads no extra tensors.")
    content = {} if value is None else value
    known_keys(content, tuple(method.extra), f"{where}.tensors")
    for name in method.extra:
        if not isinstance(content.get(name), str) or not content[name]:
            raise ValueError(
                f"`{where}.tensors.{name}` has to be the path of a folder or a safetensors file, got "
                f"{content.get(name)!r}: merge method {method.__name__!r} reads a {name!r} tensor beside each weight."
            )
    return dict(content)
