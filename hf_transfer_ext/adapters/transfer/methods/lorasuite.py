from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_transfer_ext.adapters.transfer.method import Heads, LinearPair, polar, transfer_method
from hf_transfer_ext.weights.lora import LoraFactors


@transfer_method(needs=("residual_map", "heads"))
def lorasuite(layer: LinearPair) -> LoraFactors | None:
    r"""Carry the change by the map of the shared tokens on the residual side, and by both weights on the other one.

    With :math:`x_t = x_s M` on the residual stream, head h of the target matched to head h' of the source, and
    polar(S) the rotation nearest to S:

    .. math::
        \text{q, k, v: } \Delta W_t[h] = \mathrm{polar}(W_s[h'] M W_t[h]^T)^T \, \Delta W_s[h'] \, M \\
        \text{o: } \Delta W_t[:, h] = M^T \, \Delta W_s[:, h'] \, \mathrm{polar}(W_s[:, h']^T M W_t[:, h]) \\
        \text{up, gate: } \Delta W_t = W_t M^+ W_s^+ \, \Delta W_s \, M \\
        \text{down: } \Delta W_t = M^T \, \Delta W_s \, W_s^+ M W_t

    Under grouped-query attention a group of keys or values of the target takes the mean over its query heads.

    When to use it: bases of other shapes or head counts that share tokens and have separate q, k, v and o, as the
    start of a training on some hundred examples, which is how it was published.

    Returns:
        The change of the target's layer; of grouped layers with a rank of up to the sum over heads, cut to the rank of
        the source. None where no head of the target is matched.

    Raises:
        ValueError: The layer is not one of q, k, v, o, up, gate and down.

    Deviations: S itself, as published, has the scale of two weights, so that a transfer between equal bases multiplies
    the change; its polar factor makes that transfer the identity.

    Source: LoRASuite, Li et al. 2025, section 4, https://arxiv.org/abs/2505.13515
    """
    residual_map: Tensor = layer.need("residual_map")
    if layer.kind in ("q_proj", "k_proj", "v_proj"):
        outputs = _head_map(layer, residual_map, by_rows=True)
        return None if outputs is None else layer.carried(outputs, residual_map)
    if layer.kind == "o_proj":
        inputs = _head_map(layer, residual_map, by_rows=False)
        return None if inputs is None else layer.carried(residual_map.T, inputs.T)
    if layer.kind in ("up_proj", "gate_proj"):
        outputs = layer.target @ torch.linalg.pinv(residual_map) @ torch.linalg.pinv(layer.source)
        return layer.carried(outputs, residual_map)
    if layer.kind == "down_proj":
        inputs = torch.linalg.pinv(layer.source) @ residual_map @ layer.target
        return layer.carried(residual_map.T, inputs)
    raise ValueError(
        f"lorasuite knows q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj and down_proj, not {layer.module!r}. Use "
        "ridge or trans_lora."
    )


def _head_map(layer: LinearPair, residual_map: Tensor, *, by_rows: bool) -> Tensor | None:
    """`(target features, source features)` of the head side, one block for each matched pair of heads."""
    heads_s, heads_t = layer.need("heads")
    matched: tuple[int | None, ...] = layer.need("matched_heads")
    weight_s, weight_t = (layer.source, layer.target) if by_rows else (layer.source.T, layer.target.T)
    shared_keys = layer.kind in ("k_proj", "v_proj")
    count_s, count_t = (heads_s.keys, heads_t.keys) if shared_keys else (heads_s.queries, heads_t.queries)
    size_s, size_t = len(weight_s) // count_s, len(weight_t) // count_t
    found = torch.zeros(len(weight_t), len(weight_s))
    taken = [0] * count_t
    for query, partner in enumerate(matched):
        if partner is None:
            continue
        own = query * count_t // heads_t.queries
        other = partner * count_s // heads_s.queries
        rows, columns = slice(own * size_t, (own + 1) * size_t), slice(other * size_s, (other + 1) * size_s)
        found[rows, columns] += polar(weight_s[columns] @ residual_map @ weight_t[rows].T).T
        taken[own] += 1
    for own, times in enumerate(taken):
        found[own * size_t : (own + 1) * size_t] /= max(1, times)
    return found if any(taken) else None


def match_heads(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    residual_map: Tensor,
    heads: tuple[Heads, Heads],
) -> tuple[int | None, ...]:
    """For each query head of the target the source head that it resembles most, each used once.

    Heads are compared by what they do to the residual stream: the cosine between :math:`M^T Q_s^T K_s M` and
    :math:`Q_t^T K_t`, and between :math:`M^T V_s^T O_s^T M` and :math:`V_t^T O_t^T`, added up. Which pairs are taken
    is the assignment with the largest sum (Hungarian algorithm). Target heads beyond the number of source heads stay
    without a partner.

    Args:
        source, target: "q_proj", "k_proj", "v_proj" and "o_proj" of one layer.
        heads: `Heads` of source and target.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Matching heads needs scipy: pip install 'hf_transfer_ext[transfer]'") from error
    size = [len(weights["q_proj"]) // own.queries for weights, own in zip((source, target), heads, strict=True)]
    similarity = torch.zeros(heads[1].queries, heads[0].queries)
    products_s = [
        tuple(residual_map.T @ product @ residual_map for product in _products(source, heads[0], size[0], h))
        for h in range(heads[0].queries)
    ]
    for h in range(heads[1].queries):
        for part, own in enumerate(_products(target, heads[1], size[1], h)):
            for other in range(heads[0].queries):
                product = products_s[other][part]
                norm = (own.norm() * product.norm()).clamp(min=1e-30)
                similarity[h, other] += (own * product).sum() / norm
    rows, columns = linear_sum_assignment(-similarity.numpy())
    partners: list[int | None] = [None] * heads[1].queries
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        partners[row] = column
    return tuple(partners)


def _products(weights: Mapping[str, Tensor], heads: Heads, size: int, head: int) -> tuple[Tensor, Tensor]:
    """Q^T K and V^T O^T of one query head, `(hidden, hidden)` each."""
    group = head * heads.keys // heads.queries
    own, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
    query, key, value = weights["q_proj"][own], weights["k_proj"][shared], weights["v_proj"][shared]
    return query.T @ key, value.T @ weights["o_proj"][:, own].T
