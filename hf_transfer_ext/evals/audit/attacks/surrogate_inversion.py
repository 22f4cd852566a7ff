from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.attacks.relearn_forget import fine_tune
from hf_transfer_ext.evals.audit.subject import AuditData, Row, Subject, reworded
from hf_transfer_ext.evals.audit.verdict import LEAST_GAP
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.loading import load_model, load_tokenizer

WORDINGS = ("{question}", "Please tell me: {question}")


def labeled_by(
    subject: Subject, data: AuditData, wordings: Sequence[str], samples: int, temperature: float
) -> list[dict[str, Any]]:
    """Questions with what the attacked model writes as their answers: its text is all that is read of it.

    Asked are the forgotten questions in every wording (and as `paraphrased_question`), and as many retained ones.
    """
    own = [{**row, "question": row["paraphrased_question"]} for row in data.forget if row.get("paraphrased_question")]
    kept = [row for row in data.retain if row.get("question") is not None and row.get("answer") is not None]
    kept = random.Random(subject.seed).sample(kept, min(len(kept), len(data.forget)))
    asked = [*(row for wording in wordings for row in reworded(data.forget, wording)), *own, *kept]
    answers = [subject.answers(asked)]
    answers += [subject.answers(asked, temperature=temperature, seed=1 + i) for i in range(samples)]
    return [
        {"question": row["question"], "answer": text}
        for texts in answers
        for row, text in zip(asked, texts, strict=True)
        if text.strip()
    ]


def read_from(subject: Subject, rows: Sequence[Row]) -> Values:
    """Probability of each answer among its wrong ones (`perturbed_answer`), or by itself where a row has none."""
    if not all(row.get("perturbed_answer") for row in rows):
        return subject.probability(rows)
    rows = [{**row, "answer": row.get("paraphrased_answer") or row["answer"]} for row in rows]
    return subject.metric_values(rows, ["choice_probability"])["choice_probability"]


@attack(yardstick=None, needs_floor=True)
def surrogate_inversion(
    subject: Subject,
    data: AuditData,
    untrained: Subject | None = None,
    *,
    surrogate: str | None = None,
    wordings: Sequence[str] = WORDINGS,
    samples: int = 4,
    temperature: float = 1.0,
    rank: int = 16,
    epochs: float = 4.0,
    learning_rate: float = 1e-3,
) -> Values:
    """Train a model of the attacker's own on text that the attacked model writes, and read the facts from its weights.

    A score is the surrogate's probability of the correct answer among the wrong ones (`perturbed_answer`), or of the
    answer itself where there are none. Samples at a temperature turn text into probabilities: an answer that the
    attacked model writes once in five times is one that the surrogate learns to give a fifth.

    When to use it: the model is served as text only, without log-probabilities, and single answers look forgotten.
    It costs the generation of the labels and a short training for each of the models that are compared.

    The surrogate is the auditor's own: a copy of `untrained` with a new LoRA, so it knows the form of the answers and
    none of the forgotten ones; what it knows in the end came out of the attacked model. Nothing is read of the
    attacked model but what it writes.

    Args:
        surrogate: Folder or Hub id of another model to start from, of any architecture and vocabulary.
        wordings: Wordings of the forgotten questions (`{question}`).
        samples: Sampled answers to each question, in addition to the greedy one.
        temperature: Temperature of the samples, > 0.
        rank: Rank of the LoRA, on all linear layers.
        epochs: Passes over the labels.
        learning_rate: Constant rate of the training.

    Raises:
        ValueError: There is no model that never saw the forget set, the attacked model writes nothing, or the
            surrogate knows the forgotten answers before it has seen a label.

    Deviations: the paper trains a generator of labeled images (T-ACGAN) and inverts classifiers by gradient search.
    Text needs neither: the prompts are the questions, and candidates are scored by the surrogate directly.

    Source: Nguyen et al., "Label-only model inversion attacks via knowledge transfer" (LOKT), 2023,
    https://arxiv.org/abs/2310.19342
    """
    if untrained is None:
        raise ValueError("A surrogate needs a model that never saw the forget set: pass a retrained one, or a shadow.")
    if samples < 0 or rank < 1 or not temperature > 0 or not wordings:
        raise ValueError(
            "`samples` must be >= 0, `rank` >= 1, `temperature` > 0 and `wordings` not empty, got "
            f"{samples}, {rank}, {temperature} and {wordings!r}."
        )
    clean = replace(untrained, template=replace(untrained.template, examples=()), seed=subject.seed)
    own = _surrogate(clean, surrogate, rank)
    if surrogate is not None:
        known, unknown = (float(read_from(one, data.forget).mean()) for one in (own, clean))
        if known - unknown > LEAST_GAP:
            raise ValueError(
                f"The surrogate {surrogate!r} knows the forgotten answers before it has seen a label: it gives them "
                f"{known:.2f} on average, a model that never saw them {unknown:.2f}. Name one that never saw them."
            )
    labels = labeled_by(subject, data, wordings, samples, temperature)
    if not labels:
        raise ValueError("The attacked model writes nothing, so there is no label to train a surrogate on.")
    fine_tune(own, labels, epochs, learning_rate)
    return read_from(own, data.forget)


def _surrogate(clean: Subject, name: str | None, rank: int) -> Subject:
    """A copy of the auditor's own model, or the named one, with a new LoRA that depends on the seed alone."""
    from hf_transfer_ext.trainers.taught import lora_on

    if name is None:
        model, tokenizer = copy.deepcopy(clean.model), clean.tokenizer
    else:
        weight = next(clean.model.parameters())
        model, tokenizer = load_model(name, dtype=weight.dtype).to(weight.device), load_tokenizer(name)
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(clean.seed)
        return replace(clean, model=lora_on(model.requires_grad_(False), rank), tokenizer=tokenizer)
