"""Which options of transformers' `GenerationConfig` the texts of on-policy distillation are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import require_numbers


@dataclass(frozen=True)
class Sampling:
    """Numbers that change the distribution that tokens are drawn from, each at the value that does not."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


_NEUTRAL = asdict(Sampling())
_Range = tuple[Callable[[float], bool], str]
_SHARE: _Range = (lambda value: 0 < value <= 1, "in (0, 1]")
_CUTOFF: _Range = (lambda value: 0 <= value < 1, "in [0, 1)")
_POSITIVE: _Range = (lambda value: value > 0, "> 0")
_NOT_NEGATIVE: _Range = (lambda value: value >= 0, ">= 0")
#: Option -> its range; all others have to be >= 0.
_RANGES: dict[str, _Range] = {
    "top_p": _SHARE,
    "top_h": _SHARE,
    "typical_p": _SHARE,
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _POSITIVE,
    "encoder_repetition_penalty": _POSITIVE,
}
#: Options that exclude tokens, by their ids.
_EXCLUDED = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
#: Options that end a text, in place of the stop tokens of the model and its tokenizer, or beside them.
_STOPS = ("eos_token_id", "stop_strings")
#: Options that change how the same texts are computed, with their types.
_COMPUTED = {"use_cache": bool, "disable_compile": bool, "cache_implementation": str, "cache_config": dict}
#: Every option that is obeyed.
OBEYED = (*_NEUTRAL, *_EXCLUDED, *_STOPS, *_COMPUTED)
#: Options that are settings of their own, or would return something else than one text for a prompt.
_REFUSED = {
    "max_new_tokens": "set `max_new_tokens` itself",
    "max_length": "set `max_new_tokens`",
    "min_length": "it counts the prompt and its padding; set `min_new_tokens`",
    "max_time": "texts would depend on the speed of the machine, and a resumed run would write others",
    "temperature": "set `sampling_temperature`",
    "do_sample": "texts are sampled, as the methods assume",
    "num_beams": "texts are sampled, as the methods assume",
    "num_return_sequences": "repeat the prompts in the data",
    "pad_token_id": "what follows the end of a text is cut off",
    "return_dict_in_generate": "it is for callers of `generate`",
    "output_scores": "it is for callers of `generate`",
}


def checked_options(options: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The options without those that are None, in the types that `generate` needs.

    Raises:
        ValueError: An unknown option, one that cannot be obeyed, or a value that is not of its type or range.
    """
    known = vars(GenerationConfig())
    for name in options:
        if name in _REFUSED:
            raise ValueError(f"`generation_options` has {name!r}, which is not taken: {_REFUSED[name]}.")
        if name not in OBEYED and name in known:
            raise ValueError(
                f"`generation_options` has {name!r}, which texts written in training do not take. They take "
                f"{', '.join(OBEYED)}."
            )
        if name not in OBEYED:
            raise ValueError(unknown_name("option of generation in `generation_options`", name, OBEYED))
    found = {name: value for name, value in options.items() if value is not None}
    try:
        found |= require_numbers(found, Sampling)
    except ValueError as error:
        raise ValueError(f"In `generation_options`: {error}") from None
    for name in [name for name in found if name in _NEUTRAL]:
        fits, span = _RANGES.get(name, _NOT_NEGATIVE)
        if not fits(found[name]):
            raise ValueError(f"`{name}` of `generation_options` has to be {span}, got {found[name]}.")
        if isinstance(_NEUTRAL[name], float):
            found[name] = float(found[name])  # transformers refuses a penalty of 2
    for name in ("eos_token_id", *_EXCLUDED):
        if name in found:
            found[name] = _token_ids(name, found[name])
    if "stop_strings" in found:
        found["stop_strings"] = _stop_strings(found["stop_strings"])
    for name, kind in _COMPUTED.items():
        if not isinstance(found.get(name, kind()), kind):
            raise ValueError(f"`{name}` of `generation_options` has to be a {kind.__name__}, got {found[name]!r}.")
    _check_together(found, max_new_tokens)
    GenerationConfig(do_sample=True, max_new_tokens=max_new_tokens, **found)  # refuses an unknown cache
    return found


def effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those at a value that changes nothing."""
    neutral = {**_NEUTRAL, **{name: [] for name in _EXCLUDED}}
    return {name: value for name, value in options.items() if name not in neutral or value != neutral[name]}


def distorting(options: Mapping[str, Any]) -> list[str]:
    """The names of those that change the distribution which tokens are drawn from."""
    return [name for name in effective(options) if name in (*_NEUTRAL, *_EXCLUDED)]


def check_vocabulary(options: Mapping[str, Any], size: int) -> None:
    """Refuse ids of tokens that a vocabulary of `size` does not have.

    Raises:
        ValueError: With the option.
    """
    for name in ("eos_token_id", *_EXCLUDED):
        for one in options.get(name, ()):
            for token in one if isinstance(one, list) else [one]:
                if token >= size:
                    raise ValueError(
                        f"`{name}` of `generation_options` has token {token}, but the student has {size} vocabulary "
                        f"entries, from 0 to {size - 1}."
                    )


def _token_ids(name: str, value: Any) -> list[Any]:
    """The ids of an option; `eos_token_id` may be a single one, and may not be empty."""
    sequences = name == "bad_words_ids"
    given = [value] if name == "eos_token_id" and type(value) is int else value
    parts = given if sequences else [given]
    right = isinstance(parts, list) and all(
        isinstance(part, list) and all(type(token) is int and token >= 0 for token in part) for part in parts
    )
    if not right or (sequences and not all(parts)) or (name == "eos_token_id" and not given):
        needed = "a list of lists of token ids" if sequences else "a list of token ids"
        raise ValueError(f"`{name}` of `generation_options` has to be {needed} (>= 0), got {value!r}.")
    return given


def _stop_strings(value: Any) -> list[str]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not given or not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"`stop_strings` of `generation_options` has to be a text or a list of them, got {value!r}.")
    return given


def _check_together(options: Mapping[str, Any], max_new_tokens: int) -> None:
    if options.get("min_new_tokens", 0) > max_new_tokens:
        raise ValueError(
            f"`min_new_tokens` of `generation_options` is {options['min_new_tokens']}, more than `max_new_tokens` "
            f"({max_new_tokens})."
        )
    if options.get("min_new_tokens", 0) and "stop_strings" in options:
        raise ValueError(
            "`generation_options` has `min_new_tokens` and `stop_strings`, but only stop tokens are held back until "
            "a text is long enough. Leave one of them out, or end texts by `eos_token_id`."
        )
