"""One tiny model with random weights of each decoder family whose layers or embeddings are built in another way."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def llama(depth: int, vocab_size: int) -> PreTrainedModel:
    """Head of its own."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=depth, vocab_size=vocab_size))


def qwen2(depth: int, vocab_size: int) -> PreTrainedModel:
    """Biases on queries, keys and values; tied head."""
    config = Qwen2Config(**SHAPE, num_hidden_layers=depth, vocab_size=vocab_size, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config)


def gemma3(depth: int, vocab_size: int) -> PreTrainedModel:
    """Sliding and full attention in turns, scaled embeddings, tied head."""
    config = Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=depth,
        vocab_size=vocab_size,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention" if i % 3 else "full_attention" for i in range(depth)],
    )
    return Gemma3ForCausalLM(config)


def gpt2(depth: int, vocab_size: int) -> PreTrainedModel:
    """Learned positions, Conv1D weights, `n_layer` in the config, tied head."""
    config = GPT2Config(n_embd=32, n_head=4, n_layer=depth, n_positions=128, vocab_size=vocab_size)
    config.initializer_range = 0.2
    return GPT2LMHeadModel(config)


FAMILIES = {"llama": llama, "qwen2": qwen2, "gemma3": gemma3, "gpt2": gpt2}


def tiny_model(family: str, *, depth: int = 4, vocab_size: int = 64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = FAMILIES[family](depth, vocab_size).eval()
    # Norm weights start as ones and biases as zeros, which would hide a layer in another one's place.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, None)
        setattr(model.generation_config, name, None)
    return model


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits
