"""Encoders and classifiers that are made on the spot: two layers, random weights, no network."""

from __future__ import annotations

from functools import lru_cache

import torch
from tiny_tokenizers import TOKENIZERS
from transformers import BertConfig

from hf_transfer_ext.trainers.distillation_config import DistillationConfig

SETTINGS = {
    "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1,
    "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1, "max_length": 64, "max_steps": 2, "seed": 1,
}  # fmt: skip


@lru_cache
def tokenizer_of(kind="wordpiece"):
    """A tokenizer of `tiny_tokenizers`, the same one each time."""
    return TOKENIZERS[kind]()


def config(folder, task, **options):
    return DistillationConfig(str(folder), task=task, **{**SETTINGS, **options})


def tiny_bert(kind, tokenizer, seed=0, *, labels=None, **more):
    """A model of the class `kind` (BertForSequenceClassification, ...) for a tokenizer, with named labels."""
    torch.manual_seed(seed)
    names = {} if labels is None else {
        "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}
    }  # fmt: skip
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return kind(BertConfig(**{**settings, **names, **more})).eval()
