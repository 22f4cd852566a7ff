"""The evaluation engine: one pass over the data for all metrics, with scores, generations, cache and result."""

from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.models.generation import GenerationSettings, generate

__all__ = ["EvaluationResult", "GenerationSettings", "evaluate", "generate"]
