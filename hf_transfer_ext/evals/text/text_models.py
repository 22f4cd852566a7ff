"""Models that compare texts, for metrics that need one: a sentence encoder and an entailment classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

#: Texts -> one unit vector each.
Encoder = Callable[[Sequence[str]], Float[np.ndarray, "texts hidden"]]
#: (premises, hypotheses) -> whether each premise entails its hypothesis.
Entails = Callable[[Sequence[str], Sequence[str]], list[bool]]


def sentence_encoder(name_or_path: str | Path, *, device: Any = "cpu", batch_size: int = 64) -> Encoder:
    """Mean of the last hidden states over the tokens of a text, normalized to length 1, as sentence encoders expect.

    Source: Sentence-BERT, Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    model = AutoModel.from_pretrained(name_or_path, trust_remote_code=False).eval().to(device)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Float[np.ndarray, "texts hidden"]:
        found = []
        for at in range(0, len(texts), batch_size):
            inputs = _inputs(tokenizer, model, list(texts[at : at + batch_size]))
            hidden, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, model.config.hidden_size), dtype=np.float32)

    return encode


def entailment_classifier(name_or_path: str | Path, *, device: Any = "cpu", batch_size: int = 64) -> Entails:
    """A natural-language-inference model; the label that begins with "entail" counts as entailment.

    Raises:
        ValueError: The model has no such label.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(name_or_path, trust_remote_code=False).eval().to(device)
    labels = [int(i) for i, label in model.config.id2label.items() if str(label).lower().startswith("entail")]
    if len(labels) != 1:
        raise ValueError(
            f"An entailment model needs one label 'entailment'; {str(name_or_path)!r} has "
            f"{', '.join(map(str, model.config.id2label.values()))}."
        )

    @torch.no_grad()
    def entails(premises: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
        found: list[bool] = []
        for at in range(0, len(premises), batch_size):
            both = list(premises[at : at + batch_size]), list(hypotheses[at : at + batch_size])
            logits = model(**_inputs(tokenizer, model, *both)).logits
            found += (logits.argmax(-1) == labels[0]).tolist()
        return found

    return entails


def _inputs(tokenizer: Any, model: Any, *texts: list[str]) -> Any:
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    inputs = tokenizer(*texts, padding=True, truncation=True, max_length=min(limit, 512), return_tensors="pt")
    return inputs.to(model.device)
