"""Pairs of layers for transfer methods: a base with itself, and with one in other coordinates."""

from __future__ import annotations

import dataclasses

import torch

from hf_transfer_ext.adapters.transfer.method import Heads, LinearPair
from hf_transfer_ext.adapters.transfer.methods.lorasuite import match_heads
from hf_transfer_ext.weights.lora import LoraFactors

HIDDEN, WIDE, HEADS = 12, 20, Heads(4, 2)
SIZES = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN // 2, HIDDEN), "v_proj": (HIDDEN // 2, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN), "up_proj": (WIDE, HIDDEN), "gate_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE),
}  # fmt: skip


def rotation(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q


def layer(kind, seed=0):
    """A weight, and a change of rank 3 inside the weight's row and column spaces, where every method carries it."""
    rows, columns = SIZES[kind]
    generator = torch.Generator().manual_seed(seed + sum(map(ord, kind)))
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    left = weight @ torch.randn(columns, 3, generator=generator)
    right = torch.randn(3, rows, generator=generator) @ weight
    return weight, LoraFactors(left, right)


def dense(factors):
    return factors.left @ factors.right


def with_target(pair, weight, residual=None):
    """The pair with another target, whose activations are not known."""
    parts = {"target_inputs": None, "target_outputs": None, "residual_map": residual}
    return dataclasses.replace(pair, target=weight, **parts)


def twin(kind, *, rotated=False, seed=0):
    """A layer beside itself; with `rotated`, the target's residual stream has other coordinates.

    Returns:
        The pair, and the change that a perfect transfer gives.
    """
    basis = rotation(HIDDEN, 5) if rotated else torch.eye(HIDDEN)  # x_target = x_source @ basis
    weights = {name: layer(name, seed)[0] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    source, change = layer(kind, seed)
    expected = dense(change)
    others = {}
    for name, weight in [*weights.items(), (kind, source), ("expected", expected)]:
        writes = kind if name in (kind, "expected") else name
        others[name] = basis.T @ weight if writes in ("o_proj", "down_proj") else weight @ basis
    residual = basis
    inputs = torch.randn(400, source.shape[1], generator=torch.Generator().manual_seed(9))
    target_inputs = inputs @ basis if kind not in ("o_proj", "down_proj") else inputs
    pair = LinearPair(
        f"model.layers.0.self_attn.{kind}",
        f"model.layers.0.self_attn.{kind}",
        source,
        others[kind],
        change,
        residual,
        inputs,
        target_inputs,
        inputs @ source.T,
        target_inputs @ others[kind].T,
        (HEADS, HEADS),
        match_heads(weights, {name: others[name] for name in weights}, residual, (HEADS, HEADS)),
    )
    return pair, others["expected"]
