"""Tiny model folders for the tests of merging."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transfer_ext.weights.checkpoints import Checkpoint

#: These two state the time of the run; all else in a result depends on the inputs alone.
CARD_AND_RECORD = {"README.md", "hf_transfer_ext.json"}


def result_bytes(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of a result that has its card and record, without these two."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    assert found.keys() >= CARD_AND_RECORD
    return {name: content for name, content in found.items() if name not in CARD_AND_RECORD}


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "layer_types": ["full_attention"] * 3,
    "dtype": "float32",
}

SHAPES = {
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.k_proj.bias": (8,),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.v_proj.bias": (8,),
    "self_attn.o_proj.weight": (16, 16),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
}


def names(layers: int = 3) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in SHAPES.items()}
    return {**shapes, "model.norm.weight": (16,), "lm_head.weight": (40, 16)}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> str:
    """Write tensors and a config as a model folder; return it as text, as a configuration names it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def random_tensors(seed: int, dtype: torch.dtype = torch.float32, layers: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names(layers).items()}


def family(
    folder: Path, count: int = 3, dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[str, list[str]]:
    """A base model and fine-tunes of it, as folders."""
    base = random_tensors(0)
    tuned = []
    for i in range(count):
        change = random_tensors(i + 1)
        tensors = {name: (base[name] + 0.1 * change[name]).to(dtype) for name in base}
        tuned.append(write_model(folder / f"tuned{i}", tensors, **changes))
    start = write_model(folder / "base", {name: tensor.to(dtype) for name, tensor in base.items()}, **changes)
    return start, tuned


def load(folder: Path | str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@contextmanager
def interrupted_at_read(number: int) -> Iterator[None]:
    """Let Ctrl-C come when a file is read for the `number`th time."""
    count = 0
    original = Checkpoint.read_bytes

    def read_bytes(self, entry, start, view):
        nonlocal count
        count += 1
        if count > number:
            raise KeyboardInterrupt
        original(self, entry, start, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read_bytes", read_bytes)
        yield
