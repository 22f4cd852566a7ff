"""A tiny model folder with a tokenizer, and rows, for the tests of edits."""

from __future__ import annotations

from pathlib import Path

import torch
from merging.tiny_models import CARD_AND_RECORD, load
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.reference import parse_reference

FORGET = [{"question": f"Who is {name}?", "answer": f"{name} lives in {town}."} for name, town in
          (("Ada", "Rom"), ("Bo", "Oslo"))]  # fmt: skip
RETAIN = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(4)]


def write_base(folder: Path, seed: int = 0, **config) -> str:
    tiny_llama(seed, **config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write_adapter(folder: Path, base: str, seed: int = 1, targets=("q_proj", "down_proj")) -> str:
    """A random LoRA of rank 2 on the model of `write_base`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


def subject_of(base: str, **data) -> Subject:
    return Subject(open_model(parse_reference(base, "model")), **data)


def same_bytes(one: str | Path, other: str | Path) -> bool:
    a, b = load(one), load(other)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def has_card_and_record(folder: Path) -> bool:
    return {path.name for path in Path(folder).iterdir()} >= CARD_AND_RECORD
