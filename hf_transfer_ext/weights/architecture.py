"""Which stored tensor becomes which parameter of a model: taken from transformers itself, on the meta device.

The names in a file and the names of a model's modules differ: fused experts, renamed towers of vision-language models,
files saved by older versions. transformers knows all of it, as the conversions that `from_pretrained` applies; this
file applies the same ones to names and shapes alone. transformers is imported only when an `Architecture` is built, so
that a merge of equally named models never pays for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Classes that build a model whose config.json names none, from the most specific to the most general.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


@dataclass(frozen=True)
class Loading:
    """How transformers makes parameters from stored tensors.

    Args:
        sources: Names of the stored tensors, in the order in which a conversion takes them.
        parameters: The parameters that come out.
        converter: The conversion of transformers, or None where the tensor is taken as it is.
        patterns: For each source the pattern by which the converter knows it.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    converter: Any = None
    patterns: tuple[str, ...] = ()


class Architecture:
    """A model of transformers without weights.

    Args:
        folder: Holds config.json. Code of the folder is never run.

    Raises:
        ValueError: This version of transformers does not know the architecture.
    """

    def __init__(self, folder: Path) -> None:
        self.model = _skeleton(folder)
        self.state: dict[str, Tensor] = dict(self.model.state_dict())
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        #: parameter -> the parameter whose tensor it shares, by the config.
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def loadings(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Loading]:
        """How `from_pretrained` would load tensors of these names and shapes, in the natural order of the names.

        Tensors that it would not load are missing from the result.

        Raises:
            ValueError: A conversion does not fit the shapes; the parameter is named.
        """
        from transformers.core_model_loading import dot_natural_key

        groups: dict[str, list[tuple[str, str | None]]] = {}
        rename, converters = self._renaming()
        for name in sorted(shapes, key=dot_natural_key):
            parameter, pattern = rename(name)
            if parameter in self.state:
                groups.setdefault(parameter, []).append((name, pattern))
        found = []
        for parameter, members in groups.items():
            converted = [(name, pattern) for name, pattern in members if pattern is not None]
            if not converted:
                # The last one wins where two names mean one parameter, as in transformers.
                found.append(Loading((members[-1][0],), (parameter,)))
                continue
            sources = tuple(name for name, _ in converted)
            patterns = tuple(str(pattern) for _, pattern in converted)
            loading = Loading(sources, (parameter,), converters[patterns[0]], patterns)
            try:
                made = self.convert(loading, [torch.empty(shapes[one], device="meta") for one in sources])
            except Exception as error:  # operations of transformers raise what they like
                raise ValueError(
                    f"The stored tensors {sources[0]!r} ... ({len(sources)}) cannot be converted to {parameter!r} of "
                    f"{type(self.model).__name__} ({type(error).__name__}: {error})."
                ) from error
            found.append(Loading(sources, tuple(made), loading.converter, patterns))
        return found

    def convert(self, loading: Loading, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The parameters made from the tensors of `loading.sources`: parameter -> tensor.

        All conversions of transformers are rearrangements, and so linear: they hold for changes of tensors too.
        """
        if loading.converter is None:
            return {loading.parameters[0]: tensors[0]}
        converter = copy.deepcopy(loading.converter)
        for name, pattern, tensor in zip(loading.sources, loading.patterns, tensors, strict=True):
            converter.add_tensor(loading.parameters[0], name, pattern, lambda tensor=tensor: tensor)
        made = converter.convert(loading.parameters[0], model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def parameter_of(self, name: str) -> str | None:
        """The parameter for a stored name that needs no conversion, or for the name of a module's tensor."""
        return self.parameters_of([name])[name]

    def parameters_of(self, names: Iterable[str]) -> dict[str, str | None]:
        """`parameter_of` for many names at once."""
        rename, _ = self._renaming()
        found: dict[str, str | None] = {}
        for name in sorted(names):
            parameter, pattern = (name, None) if name in self.state else rename(name)
            found[name] = parameter if parameter in self.state and pattern is None else None
        return found

    def loaded(self, names: Iterable[str]) -> set[str]:
        """Those of the stored names that `from_pretrained` would load."""
        rename, _ = self._renaming()
        return {name for name in sorted(names) if rename(name)[0] in self.state}

    def ties_of(self, parameter: str) -> set[str]:
        """All parameters that share the tensor of this one by the config, this one included."""
        source = self.tied.get(parameter, parameter)
        return {source, parameter, *(target for target, one in self.tied.items() if one == source)}

    def _renaming(self) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
        """A function `stored name -> (parameter, pattern of a converter)`, and pattern -> converter."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        prefix = self.model.base_model_prefix

        def rename(name: str) -> tuple[str, str | None]:
            found = rename_source_key(name, renamings, converters, prefix, self.state)
            if found[0] not in self.state and name in self.state:
                return rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=self.state)
            return found

        return rename, {pattern: one for one in converters for pattern in one.source_patterns}


def _skeleton(folder: Path) -> Any:
    """The model of a folder's config.json on the meta device."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        names = config.architectures or []
        architecture = getattr(transformers, names[0], None) if names else None
        with torch.device("meta"):
            if architecture is not None:
                return architecture._from_config(config)
            for auto in _AUTO_CLASSES:
                if not names and type(config) in getattr(transformers, auto)._model_mapping:
                    return getattr(transformers, auto).from_config(config)
    except Exception as error:  # a config of strangers, read by code of a hundred architectures
        raise ValueError(
            f"transformers {transformers.__version__} cannot build the architecture of {str(folder)!r} from its "
            f"config.json ({type(error).__name__}: {error})."
        ) from error
    raise ValueError(
        f"transformers {transformers.__version__} does not know the architecture {names} of {str(folder)!r}, so which "
        "tensor belongs to which module is unknown."
    )
