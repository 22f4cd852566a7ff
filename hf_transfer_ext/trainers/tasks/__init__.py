"""Tasks of distillation beside language models. One file each; a new one joins by its line in this list."""

from hf_transfer_ext.registry import Registry
from hf_transfer_ext.trainers.tasks.masked_lm import masked_lm
from hf_transfer_ext.trainers.tasks.sentence_embedding import sentence_embedding
from hf_transfer_ext.trainers.tasks.seq2seq import seq2seq
from hf_transfer_ext.trainers.tasks.sequence_classification import sequence_classification
from hf_transfer_ext.trainers.tasks.token_classification import token_classification
from hf_transfer_ext.trainers.tasks.vision_language import vision_language

#: The task of `DistillationTrainer`; those of `TaskDistillationTrainer` are in `TASKS`.
CAUSAL_LM = "causal_lm"
TASKS: Registry = Registry(
    "task",
    [sequence_classification, token_classification, seq2seq, masked_lm, sentence_embedding, vision_language],
)

__all__ = ["CAUSAL_LM", "TASKS", *TASKS]
