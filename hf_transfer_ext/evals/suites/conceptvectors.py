"""ConceptVectors: is a concept removed from the weights, or does the model only answer differently?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.metrics import concept_vector_distance
from hf_transfer_ext.evals.suite import Part, Rows, SuiteResult, evaluate_parts, load_json, require_columns, suite
from hf_transfer_ext.evals.text.rouge import rouge_l
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.models.heads import head_module
from hf_transfer_ext.models.plumbing import active_adapter

COLUMNS = ("Concept", "Layer", "Dim", "QA", "unrelated_QA")
QUESTIONS = QuestionAnswerFormat(template="plain", prompt="Question: {question}\nAnswer:")
COMPLETIONS = QuestionAnswerFormat(template="plain", prompt="Please complete the following paragraph: {question}")


@dataclass
class ConceptVectorsResult(SuiteResult):
    """The result of one model on ConceptVectors; pass that of the model before unlearning as `before`.

    Args:
        vectors: Concept -> its value vector, `(hidden,)`.
        unembedding: The model's output embedding, on the CPU.
    """

    vectors: dict[str, Float[Tensor, " hidden"]] = field(default_factory=dict)
    unembedding: Float[Tensor, "vocab hidden"] | None = None


def load_conceptvectors(
    source: str | Path = "YihuaiHong/ConceptVectors", file: str = "llama2-7b_concepts_test"
) -> dict[str, list[dict[str, Any]]]:
    """Load the concepts in the file of one model, from the Hub or a local folder.

    A row has Concept, Layer and Dim (the position of the vector), QA and unrelated_QA (lists of questions) and,
    optionally, text_completion (a list of First_half and Second_half).

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A concept lacks a column.
    """
    rows = load_json(source, "the concepts", files=[file, f"ConceptVectors_data/{file}"])
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"ConceptVectors: {file}.json must be a list of concepts.")
    require_columns("ConceptVectors", rows, COLUMNS)
    return {"concepts": rows}


@suite(load=load_conceptvectors, source="YihuaiHong/ConceptVectors", compares_with="before")
def conceptvectors(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    before: ConceptVectorsResult | None = None,
    limit: int | None = None,
    top: int = 200,
    **options: Any,
) -> ConceptVectorsResult:
    """Evaluate a model on the concepts of `load_conceptvectors`.

    Without `before`: the vectors, and the fluency of the generations. With it, also the mean over concepts of
    `concept_jaccard`, `concept_cosine` and `concept_l2`, and of the ROUGE-L F1 between the answers of both models (100
    tokens, greedy): `questions rouge` and `completions rouge` of the concept should fall, but not `unrelated rouge`.

    Args:
        before: Result of the model before unlearning, on the same concepts.
        limit: Maximum number of concepts.
        top: Number of tokens of the vocabulary projection to compare.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: There are no concepts, a concept's layer or dimension does not exist in this model (with its
            index), or `before` has other concepts or another shape.

    Vocabularies are compared through the output embedding of the model before unlearning. The authors also report
    BLEU, which is left out.

    Source: ConceptVectors, Hong et al., "Intrinsic evaluation of unlearning using parametric knowledge traces", 2024,
    https://arxiv.org/abs/2406.11614
    """
    concepts = list(sets.get("concepts", ()))[:limit]
    if not concepts:
        raise ValueError("ConceptVectors needs the set 'concepts', which is missing or empty.")
    require_columns("ConceptVectors", concepts, COLUMNS)
    names = [str(row["Concept"]) for row in concepts]
    if len(set(names)) < len(names):
        raise ValueError(f"ConceptVectors: concepts must differ, got {', '.join(names)}.")
    if before is not None and list(before.vectors) != names:
        raise ValueError(
            f"`before` was measured on {len(before.vectors)} concepts and this model on {len(names)}, or their order "
            "differs: run both on the same concepts with the same limit."
        )
    vectors = {}
    with active_adapter(model, options.get("adapter")), torch.no_grad():
        for index, (name, row) in enumerate(zip(names, concepts, strict=True)):
            try:
                vectors[name] = value_vector(model, int(row["Layer"]), int(row["Dim"]))
            except ValueError as error:
                raise ValueError(f"ConceptVectors: example {index} ({name!r}): {error}") from error
    for option in ("template", "generation"):
        options.pop(option, None)
    settings = GenerationSettings(100)
    asked = {
        "questions": [(name, q) for name, row in zip(names, concepts, strict=True) for q in row["QA"]],
        "unrelated": [(name, q) for name, row in zip(names, concepts, strict=True) for q in row["unrelated_QA"]],
        "completions": [
            (name, text["First_half"])
            for name, row in zip(names, concepts, strict=True)
            for text in row.get("text_completion") or ()
        ],
    }
    parts = {
        title: Part(
            [{"concept": name, "question": text.strip()} for name, text in rows],
            ["fluency_entropy"],
            COMPLETIONS if title == "completions" else QUESTIONS,
            settings,
        )
        for title, rows in asked.items()
        if rows
    }
    results = evaluate_parts("ConceptVectors", model, tokenizer, parts, **options)
    fluency = [
        replace(m, name=f"{title} fluency_entropy") for title, result in results.items() for m in result.measurements
    ]
    unembedding = head_module(model).weight.detach().float().cpu()
    found = ConceptVectorsResult(fluency, results, vectors=vectors, unembedding=unembedding)
    if before is not None:
        found.measurements = [*_distances(before, found, top), *_behavior(before, found), *fluency]
    return found


def value_vector(model: Any, layer: int, dimension: int) -> Float[Tensor, " hidden"]:
    """Column `dimension` of a layer's down projection, including an active LoRA adapter; float32, on the CPU.

    Raises:
        ValueError: The model does not have this layer, projection or column.
    """
    found = {name: module for name, module in model.named_modules() if name.endswith("mlp.down_proj")}
    layers = {int(part): module for name, module in found.items() for part in name.split(".") if part.isdigit()}
    if layer not in layers:
        raise ValueError(f"there is no MLP down projection in layer {layer}; this model has {len(layers)} of them.")
    module = layers[layer]
    weight = (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight
    if not 0 <= dimension < weight.shape[1]:
        raise ValueError(
            f"the down projection of layer {layer} has {weight.shape[1]} columns, so there is no column {dimension}."
        )
    column = weight[:, dimension].detach().float()
    if hasattr(module, "get_delta_weight") and not module.disable_adapters and not module.merged:
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                column = column + module.get_delta_weight(adapter)[:, dimension].detach().float()
    return column.cpu().clone()


def _distances(before: ConceptVectorsResult, after: ConceptVectorsResult, top: int) -> list[Measurement]:
    if before.unembedding is None:
        raise ValueError("`before` has no output embedding: pass the result of `conceptvectors` on that model.")
    found: dict[str, list[Measurement]] = {}
    for name, vector in after.vectors.items():
        if vector.shape != before.vectors[name].shape:
            raise ValueError(
                f"The vector of {name!r} has {len(before.vectors[name])} entries before and {len(vector)} after: "
                "both models must have the same architecture."
            )
        count = min(top, len(before.unembedding))
        for m in concept_vector_distance(before.vectors[name], vector, before.unembedding, top=count):
            found.setdefault(m.name, []).append(m)
    return [_over(values[0], [m.value for m in values]) for values in found.values()]


def _behavior(before: ConceptVectorsResult, after: ConceptVectorsResult) -> list[Measurement]:
    measurements = []
    for title, result in after.sets.items():
        pairs = zip(before.sets[title].scored, result.scored, strict=True)
        same = [rouge_l(old.generation or "", new.generation or "", stemmed=False)[2] for old, new in pairs]
        like = Measurement(f"{title} rouge", 0.0, "ROUGE-L F1 with the answer before", title == "unrelated", 0)
        measurements.append(_over(like, same))
    return measurements


def _over(like: Measurement, values: Sequence[float]) -> Measurement:
    """The mean of the values, with name, unit and direction of `like`."""
    array = np.asarray(values, dtype=np.float64)
    interval = mean_interval(array)
    return replace(
        like, value=float(array.mean()), examples=len(array), interval=interval, dataset="ConceptVectors concepts"
    )
