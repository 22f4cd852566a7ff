"""What two models have in common: tokens of both vocabularies, positions of both tokenizations, layers that match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

#: Shared tokens below which a map between two residual streams means nothing.
FEWEST_SHARED_TOKENS = 16


def shared_tokens(source: Any, target: Any) -> list[tuple[int, int]]:
    """Pairs of ids of the tokens that two tokenizers write alike; see `shared_token_ids`."""
    special = {*source.all_special_tokens, *target.all_special_tokens}
    theirs = {token.replace("▁", "Ġ"): i for token, i in target.get_vocab().items() if token not in special}
    return [
        (i, theirs[token.replace("▁", "Ġ")])
        for token, i in sorted(source.get_vocab().items(), key=lambda item: item[1])
        if token not in special and token.replace("▁", "Ġ") in theirs
    ]


def shared_token_ids(source: Any, target: Any) -> tuple[list[int], list[int]]:
    """Ids of the tokens that two tokenizers write alike, in the order of the source's ids.

    Special tokens are left out: each model uses its own. The marks of a leading space (`Ġ` and `▁`) count as equal.
    """
    found = shared_tokens(source, target)
    if len(found) < FEWEST_SHARED_TOKENS:
        raise ValueError(
            f"The two vocabularies share {len(found)} tokens; at least {FEWEST_SHARED_TOKENS} are needed to align the "
            "models by them. Use ridge (with texts) or trans_lora."
        )
    return [pair[0] for pair in found], [pair[1] for pair in found]


def residual_map(
    source: Float[Tensor, "shared source_hidden"], target: Float[Tensor, "shared target_hidden"]
) -> Float[Tensor, "source_hidden target_hidden"]:
    """M with the least squared error of `source @ M = target`: pinv(E_s) E_t, on embeddings of shared tokens."""
    return torch.linalg.lstsq(source.double(), target.double(), driver="gelsd").solution.float()


def shared_positions(source_ends: Sequence[int], target_ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of two tokenizations of one text at which a token ends after the same number of characters.

    Args:
        source_ends, target_ends: Character at which each token ends, rising; tokens of no characters repeat the last.
    """
    last = {end: place for place, end in enumerate(target_ends)}  # the last token that ends there has read it all
    own = {end: place for place, end in enumerate(source_ends)}
    shared = sorted(end for end in own if end in last and end > 0)
    return [own[end] for end in shared], [last[end] for end in shared]


@torch.no_grad()
def paired_activations(
    models: tuple[Any, Any],
    tokenizers: tuple[Any, Any],
    texts: Sequence[str],
    modules: tuple[Sequence[str], Sequence[str]],
    *,
    max_tokens: int = 4096,
    max_length: int = 512,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of linear layers of two models, at the positions that their tokenizations share.

    Args:
        modules: Names of the layers of the source and of the target.
        max_tokens: Largest number of positions, over all texts.
        max_length: Tokens of a text that are read.

    Returns:
        For each model: module -> `(tokens, in)` inputs and `(tokens, out)` outputs, rows in the same order.

    Raises:
        ValueError: A tokenizer without character offsets (a slow one), or texts without a shared position.
    """
    kept: tuple[dict[str, list], dict[str, list]] = ({}, {})
    found = 0
    for text in texts:
        if found >= max_tokens:
            break
        encoded = [_encoded(tokenizer, text, max_length) for tokenizer in tokenizers]
        places = shared_positions(encoded[0][1], encoded[1][1])
        for model, names, (ids, _), own, into in zip(models, modules, encoded, places, kept, strict=True):
            for name, pair in _captured(model, names, ids, own[: max_tokens - found]).items():
                into.setdefault(name, []).append(pair)
        found += len(places[0])
    if found == 0:
        raise ValueError(
            f"No position of the {len(texts)} texts is shared by the two tokenizations. Give other texts."
        )
    return tuple(  # type: ignore[return-value]
        {name: tuple(torch.cat(part) for part in zip(*pairs, strict=True)) for name, pairs in one.items()}
        for one in kept
    )


def _encoded(tokenizer: Any, text: str, max_length: int) -> tuple[Tensor, list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed.")
    batch = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_length)
    return torch.tensor([batch["input_ids"]]), [end for _, end in batch["offset_mapping"]]


def _captured(
    model: Any, names: Sequence[str], ids: Tensor, places: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward pass, in which the named layers leave their inputs and outputs at some positions."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = inputs[0][0, places].float().cpu(), output[0, places].float().cpu()

        return hook

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            hooks.callback(handle.remove)
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    return found


def linear_cka(x: Float[Tensor, "tokens features"], y: Float[Tensor, "tokens others"]) -> float:
    r"""Centered kernel alignment of two sets of features, in [0, 1]; blind to rotations and scale.

    .. math:: \lVert Y^T X \rVert_F^2 / (\lVert X^T X \rVert_F \lVert Y^T Y \rVert_F)

    Source: Kornblith et al. 2019, equation 4, https://arxiv.org/abs/1905.00414
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale) if scale > 0 else 0.0


def match_layers(similarity: Float[Tensor, "source_layers target_layers"]) -> dict[int, int]:
    """Target layer -> source layer, in rising order on both sides, with the largest sum of similarities.

    As many pairs as the shallower model has layers; each layer is used at most once.

    Source: LoRASuite, Li et al. 2025, section 4.2, https://arxiv.org/abs/2505.13515
    """
    rows, columns = similarity.shape
    if rows > columns:
        return {target: source for source, target in match_layers(similarity.T).items()}
    # best[i, j]: the largest sum over the first i source layers, all of them matched, to the first j target layers.
    best = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)
    best[1:, 0] = -torch.inf
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            best[i, j] = max(best[i, j - 1], best[i - 1, j - 1] + float(similarity[i - 1, j - 1]))
    pairs, i, j = {}, rows, columns
    while i > 0:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            pairs[j - 1], i, j = i - 1, i - 1, j - 1
    return dict(sorted(pairs.items()))


def even_layers(source_layers: int, target_layers: int) -> dict[int, int]:
    """Target layer -> source layer by relative depth, each layer at most once: the map without any text."""
    few, many = sorted((source_layers, target_layers))
    places = [round(i * (many - 1) / max(1, few - 1)) for i in range(few)]
    return dict(zip(places, range(few), strict=True)) if target_layers >= source_layers else dict(enumerate(places))


def layer_similarities(
    source: Mapping[int, Tensor], target: Mapping[int, Tensor]
) -> Float[Tensor, "source_layers target_layers"]:
    """Linear CKA of every two layers."""
    xs, ys = ([one[i].double() - one[i].double().mean(0) for i in sorted(one)] for one in (source, target))
    norms = [[(x.T @ x).norm() for x in one] for one in (xs, ys)]  # once for each layer, not for each pair
    found = [
        [
            (y.T @ x).square().sum() / (a * b).clamp(min=torch.finfo(torch.float64).tiny)
            for y, b in zip(ys, norms[1], strict=True)
        ]
        for x, a in zip(xs, norms[0], strict=True)
    ]
    return torch.tensor(found)
