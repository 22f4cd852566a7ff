"""Metrics of one evaluation (`METRICS`, per example) and comparisons of several (`COMPARISONS`)."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.evals.metric import Metric, check_declaration
from hf_transfer_ext.evals.metrics.answer_probability import answer_probability
from hf_transfer_ext.evals.metrics.choice_accuracy import choice_accuracy
from hf_transfer_ext.evals.metrics.choice_probability import choice_probability
from hf_transfer_ext.evals.metrics.concept_vector_distance import concept_vector_distance
from hf_transfer_ext.evals.metrics.exact_memorization import exact_memorization
from hf_transfer_ext.evals.metrics.extraction_strength import extraction_strength
from hf_transfer_ext.evals.metrics.fluency_entropy import fluency_entropy
from hf_transfer_ext.evals.metrics.forget_quality import forget_quality
from hf_transfer_ext.evals.metrics.gradient_norm import gradient_norm
from hf_transfer_ext.evals.metrics.kl_to_reference import kl_to_reference
from hf_transfer_ext.evals.metrics.klom import klom
from hf_transfer_ext.evals.metrics.knowledge_memorization import knowledge_memorization
from hf_transfer_ext.evals.metrics.linear_probe import linear_probe
from hf_transfer_ext.evals.metrics.loss_attack import loss_attack
from hf_transfer_ext.evals.metrics.margin import margin
from hf_transfer_ext.evals.metrics.membership_auc import membership_auc
from hf_transfer_ext.evals.metrics.membership_tpr import membership_tpr
from hf_transfer_ext.evals.metrics.min_k import min_k
from hf_transfer_ext.evals.metrics.min_k_plus_plus import min_k_plus_plus
from hf_transfer_ext.evals.metrics.model_utility import model_utility
from hf_transfer_ext.evals.metrics.nats_gained import nats_gained
from hf_transfer_ext.evals.metrics.nats_per_token import nats_per_token
from hf_transfer_ext.evals.metrics.negative_flip_rate import negative_flip_rate
from hf_transfer_ext.evals.metrics.perplexity import perplexity
from hf_transfer_ext.evals.metrics.privleak import privleak
from hf_transfer_ext.evals.metrics.reference_attack import reference_attack
from hf_transfer_ext.evals.metrics.retention import retention
from hf_transfer_ext.evals.metrics.rouge_l_recall import rouge_l_recall
from hf_transfer_ext.evals.metrics.token_agreement import token_agreement
from hf_transfer_ext.evals.metrics.truth_ratio import truth_ratio
from hf_transfer_ext.evals.metrics.verbatim_memorization import verbatim_memorization
from hf_transfer_ext.evals.metrics.zlib_attack import zlib_attack
from hf_transfer_ext.registry import Registry

#: One value per example; `evaluate(..., metrics=[...])` runs them by name.
METRICS: Registry[Metric] = Registry(
    "metric",
    [
        nats_per_token,
        perplexity,
        answer_probability,
        choice_accuracy,
        choice_probability,
        truth_ratio,
        rouge_l_recall,
        exact_memorization,
        extraction_strength,
        kl_to_reference,
        token_agreement,
        nats_gained,
        loss_attack,
        zlib_attack,
        reference_attack,
        min_k,
        min_k_plus_plus,
        gradient_norm,
        verbatim_memorization,
        knowledge_memorization,
        fluency_entropy,
        margin,
    ],
    check=check_declaration,
)


def check_comparison(comparison: Any) -> None:
    """Refuse a function that is not annotated to return measurements.

    Raises:
        ValueError: Not a function, or one whose return annotation is neither `Measurement` nor a list of them.
    """
    returned = getattr(comparison, "__annotations__", {}).get("return", "nothing")
    returned = returned if isinstance(returned, str) else getattr(returned, "__name__", str(returned))
    if not callable(comparison) or ("Measurement" not in str(returned) and returned != "list"):
        raise ValueError(
            "A comparison must be a function of several results that returns a `Measurement` or a list of them "
            f"(`-> Measurement`); {getattr(comparison, '__name__', comparison)!r} returns {returned}."
        )


#: Functions of the values of several evaluations.
COMPARISONS: Registry = Registry(
    "comparison",
    [
        forget_quality,
        model_utility,
        membership_auc,
        membership_tpr,
        privleak,
        klom,
        negative_flip_rate,
        retention,
        linear_probe,
        concept_vector_distance,
    ],
    check=check_comparison,
)
