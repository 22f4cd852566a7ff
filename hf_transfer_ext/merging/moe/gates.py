"""Gates from prompts: the row of an expert points to where its prompts lie among the hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.moe.plan import Expert, MoeConfig
from hf_transfer_ext.weights.opened import InputModel, Scratch

Gates = Float[Tensor, "layers experts hidden"]

#: Above this condition number the rows of a gate are nearly alike, and some expert will hardly be chosen.
ALIKE_CONDITION = 5.0


def make_gates(config: MoeConfig, base: InputModel, experts: Sequence[Expert], layers: int, hidden: int) -> Gates:
    """One matrix for each layer, one row for each expert.

    - `hidden`: the last token's state before each layer, the mean over the positive prompts minus that over the
      negative ones, with length 1.
    - `hidden_avg`: the same with the mean state of each prompt's tokens.
    - `cheap_embed`: the sum of the embeddings of all tokens, the same for each layer; no model is run.
    - `random`: standard normal. `uniform_random`: uniform between -1 / sqrt(hidden) and +1 / sqrt(hidden).

    Deviations: prompts go through the model one by one in the base's own dtype; mergekit pads them to one batch, takes
    the padding into the mean of `hidden_avg`, and always calculates in bfloat16.
    """
    if config.gate_mode in ("random", "uniform_random"):
        generator = torch.Generator().manual_seed(config.seed)
        shape = (layers, len(experts), hidden)
        if config.gate_mode == "random":
            return torch.randn(shape, generator=generator)
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(hidden)
    states = _embedded(base, layers) if config.gate_mode == "cheap_embed" else _hidden(config, base)
    rows = []
    for expert in experts:
        row = states(expert.positive_prompts)
        if expert.negative_prompts:
            row = row - states(expert.negative_prompts)
        rows.append(_unit(row))
    return torch.stack(rows, dim=1)


def alike_layers(gates: Gates) -> list[int]:
    """The layers in which the rows of the gate are nearly alike."""
    if gates.shape[1] < 2:
        return []
    return [i for i, gate in enumerate(gates) if float(torch.linalg.cond(gate.float())) > ALIKE_CONDITION]


def _hidden(config: MoeConfig, base: InputModel) -> Any:
    """From prompts to states [layers, hidden], by running the base model."""
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(str(base.folder), dtype="auto", trust_remote_code=False).eval()
    average = config.gate_mode == "hidden_avg"

    def states(prompts: Sequence[str]) -> Float[Tensor, "layers hidden"]:
        found = []
        for ids in _token_ids(tokenizer, prompts):
            with torch.no_grad():
                layers = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[:-1]
            stacked = torch.stack(layers)[:, 0].float()
            found.append(stacked.mean(1) if average else stacked[:, -1])
        return torch.stack(found).mean(0)

    return states


def _embedded(base: InputModel, layers: int) -> Any:
    """From prompts to the direction of their summed embeddings, once for each layer."""
    tokenizer = _tokenizer(base)
    table = base["model.embed_tokens.weight"]
    scratch = Scratch()

    def states(prompts: Sequence[str]) -> Float[Tensor, "layers hidden"]:
        total, row = torch.zeros(table.shape[1]), torch.empty(table.shape[1])
        for ids in _token_ids(tokenizer, prompts):
            for token in ids:
                table.read(token * len(row), row, scratch)
                total += row
        return _unit(total).repeat(layers, 1)

    return states


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def _tokenizer(base: InputModel) -> Any:
    from hf_transfer_ext.models.loading import load_tokenizer

    return load_tokenizer(base.folder)


def _token_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt behind the token that begins a text, where there is one."""
    found: list[list[int]] = []
    for prompt in prompts:
        ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"Prompt {prompt!r} has no tokens in the base model's tokenizer.")
        found.append(ids)
    return found
