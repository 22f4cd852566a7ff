"""Concept ablation: damp or blur the value vectors that write given tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.edits.method import Edited, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval

#: Matrices that write the feed-forward part's result, one value vector for each of its neurons.
_VALUES = re.compile(
    r"\.(?P<layer>\d+)\..*((^|\.)down_proj|mlp\.(experts\.\d+\.)?(c_proj|fc2|dense_4h_to_h)|fc2|feed_forward\.w2"
    r"|experts\.\d+\.w2|mlp\.fc_out)\.weight$"
)

#: Rows of the unembedding that are looked at at a time.
_ROWS = 1 << 14


def concept_scores(
    unembedding: Float[Tensor, "vocab hidden"],
    values: Float[Tensor, "hidden neurons"],
    token_ids: Int[Tensor, " tokens"],
) -> Float[Tensor, " neurons"]:
    r"""How far above the rest of the vocabulary each value vector raises the logits of given tokens.

    .. math:: s_d = \frac{\frac{1}{|T|} \sum_{t \in T} e_t \cdot v_d - \mu_d}{\sigma_d}, \quad
        \mu_d, \sigma_d = \text{mean and standard deviation of } e_t \cdot v_d \text{ over the vocabulary}

    Args:
        unembedding: Rows e_t of the head.
        values: Columns v_d.
        token_ids: T.

    Returns:
        Standard deviations, of either sign; 0 for a vector that raises all tokens alike.
    """
    mean, covariance = _moments(unembedding)
    return _scores(unembedding[token_ids].double().mean(0), mean, covariance, values)


def _moments(unembedding: Float[Tensor, "vocab hidden"]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the rows, in float64 and in blocks."""
    hidden = unembedding.shape[1]
    mean, square = torch.zeros(hidden, dtype=torch.float64), torch.zeros(hidden, hidden, dtype=torch.float64)
    for block in unembedding.split(_ROWS):
        mean += block.double().sum(0)
        square += block.double().T @ block.double()
    mean /= len(unembedding)
    return mean, square / len(unembedding) - torch.outer(mean, mean)


def _scores(wanted: Tensor, mean: Tensor, covariance: Tensor, values: Float[Tensor, "hidden neurons"]) -> Tensor:
    vectors = values.double()
    raised = (wanted - mean) @ vectors
    spread = (vectors * (covariance @ vectors)).sum(0).clamp(min=0).sqrt()
    flat = spread <= 1e-12 * vectors.norm(dim=0)
    return torch.where(flat, 0.0, raised / spread.clamp(min=1e-300))


def damped(
    values: Float[Tensor, "hidden neurons"], neurons: Sequence[int], *, strength: float, noise: float, seed: int
) -> Float[Tensor, "hidden neurons"]:
    """`values` with chosen columns multiplied by 1 - strength, and with normal noise of a deviation added to them."""
    chosen = torch.tensor(list(neurons), dtype=torch.int64)
    drawn = torch.randn(len(values), len(chosen), generator=torch.Generator().manual_seed(seed))
    edited = values.clone()
    edited[:, chosen] = (1 - strength) * values[:, chosen] + noise * drawn
    return edited


@edit_method(
    ranges={"strength": Interval(0, 1), "noise": Interval(0), "count": Interval(1), "threshold": Interval(0)},
    private=("words",),
)
def concept_ablation(
    subject: Subject,
    *,
    words: Sequence[str],
    count: int = 10,
    threshold: float = 0.0,
    strength: float = 1.0,
    noise: float = 0.0,
) -> Edited:
    r"""Find the value vectors of feed-forward layers that promote the tokens of given words, and zero or blur them.

    A column v_d of a layer's `down_proj` is what neuron d adds to the residual stream; through the head's rows it
    raises some tokens. The `count` vectors of the whole model that raise the words' tokens most, in standard
    deviations over the vocabulary (`concept_scores`), become

    .. math:: v_d' = (1 - \lambda) v_d + \epsilon, \quad \epsilon \sim N(0, \sigma^2)

    The paper knows the vector of each concept from an annotated set and adds noise with sigma = 0.1; here the vectors
    are found by the score, which needs no data. No activations are read, and no more than the head and one matrix is
    in memory.

    When to use it: one concept with words of its own, which a single layer writes; the edit is local and cheap. Do
    not use it for whole texts or for facts about people who share common words: it removes the words' promotion, not
    the association in attention.

    Args:
        words: What to forget, in words. Every token of a word counts, written with and without a space before it.
        count: How many vectors are edited, at least 1.
        threshold: Standard deviations that a vector has to reach to be edited, from 0.
        strength: lambda, 0 (the vector stays) to 1 (it is zeroed).
        noise: sigma, in the unit of the weights, from 0.

    Returns:
        Jobs for the matrices with a chosen vector. `found` names the vectors with their scores.

    Raises:
        ValueError: No word has a token, no layer is known, or no vector reaches the threshold.

    Source: Intrinsic evaluation of unlearning using parametric knowledge traces (ConceptVectors), Hong et al. 2024,
    https://arxiv.org/abs/2406.11614
    """
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"`words` has to be a list of words, got {words!r:.100}.")
    if strength == 0 and noise == 0:
        return Edited()
    token_ids = word_tokens(subject, words)
    layers = {name: match for name in subject.model.tensors if (match := _VALUES.search(name))}
    if not layers:
        raise ValueError(
            f"{str(subject.model.reference)!r} has no feed-forward layers whose value vectors are known by name "
            "(down_proj, fc2, c_proj, dense_4h_to_h, w2)."
        )
    unembedding = subject.read(_head_name(subject))
    mean, covariance = _moments(unembedding)
    wanted = unembedding[token_ids].double().mean(0)
    hidden = unembedding.shape[1]
    del unembedding
    scored: list[tuple[float, str, int]] = []
    transposed = {}
    for name in layers:
        values = subject.read(name)
        transposed[name] = _is_transposed(subject, name, values, hidden)
        scores = _scores(wanted, mean, covariance, values.T if transposed[name] else values)
        best = torch.topk(scores, min(count, len(scores)))
        scored += [(float(s), name, int(d)) for s, d in zip(best.values, best.indices, strict=True)]
    scored = [one for one in sorted(scored, key=lambda one: (-one[0], one[1], one[2])) if one[0] >= threshold][:count]
    if not scored:
        raise ValueError(f"No value vector raises the tokens of {list(words)} by {threshold} standard deviations.")
    jobs = {}
    for name in sorted({name for _, name, _ in scored}):
        neurons = sorted(d for _, other, d in scored if other == name)
        seed = subject.seed * 100_003 + int(layers[name]["layer"])
        edit = partial(damped, neurons=neurons, strength=strength, noise=noise, seed=seed)
        jobs[name] = subject.edit(name, partial(_of_transposed, edit) if transposed[name] else edit)
    vectors = [{"tensor": name, "neuron": d, "deviations": round(s, 4)} for s, name, d in scored]
    return Edited(jobs, found={"vectors": vectors})


def _of_transposed(edit: partial, weight: Tensor) -> Tensor:
    return edit(weight.T).T


def word_tokens(subject: Subject, words: Sequence[str]) -> Int[Tensor, " tokens"]:
    """Ids of all tokens of the words, each once; special and unknown tokens are left out."""
    special = {*subject.tokenizer.all_special_ids}
    ids: set[int] = set()
    for word in words:
        for text in (word.strip(), f" {word.strip()}"):
            ids |= {*subject.tokenizer(text, add_special_tokens=False)["input_ids"]}
    own = sorted(ids - special)
    if not own:
        raise ValueError(f"The tokenizer has no token for {list(words)}.")
    return torch.tensor(own)


def _head_name(subject: Subject) -> str:
    model = subject.model
    for name in ("lm_head.weight", "embed_out.weight", "output.weight"):
        try:
            stored = model.stored_for(name)
        except ValueError:
            stored = None
        if stored is not None:
            return stored
    raise ValueError(f"{str(model.reference)!r} has no head that is known by name (lm_head, embed_out).")


def _is_transposed(subject: Subject, name: str, values: Tensor, hidden: int) -> bool:
    """Whether value vectors are rows: by the shape, or by the module where the matrix is square."""
    if values.dim() != 2 or hidden not in values.shape:
        raise ValueError(
            f"Tensor {name!r} of shape {list(values.shape)} has no value vectors of the head's width {hidden}. "
            "Experts that are stored in one tensor cannot be edited by this method."
        )
    if values.shape[0] != values.shape[1]:
        return values.shape[0] != hidden
    module = subject.model.architecture.modules.get(name.removesuffix(".weight"))
    return type(module).__name__ == "Conv1D"
