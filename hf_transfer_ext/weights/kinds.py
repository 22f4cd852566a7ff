"""Kinds of models by their task: which Auto class loads one, and what the Hub, PEFT and a card call it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelKind:
    """What follows from a model's task.

    Args:
        auto_class: The class of transformers that loads such a model.
        pipeline_tag: The Hub's name of the task.
        learned: What a distilled model of this kind was trained to reproduce, in a sentence.
        suffix: How the names of its model classes end; "" where they have no common ending.
        peft_task: PEFT's name of the task, which keeps a new output layer trainable; None where PEFT has none.
        reader: The class of transformers that loads what turns data into the model's inputs.
    """

    auto_class: str
    pipeline_tag: str
    learned: str
    suffix: str = ""
    peft_task: str | None = None
    reader: str = "AutoTokenizer"


#: Task -> kind of model; the tasks of `trainers.tasks`, and plain language models.
MODEL_KINDS: dict[str, ModelKind] = {
    "causal_lm": ModelKind(
        "AutoModelForCausalLM",
        "text-generation",
        "A student was trained to give the next-token distributions of a teacher.",
        "ForCausalLM",
        "CAUSAL_LM",
    ),
    "sequence_classification": ModelKind(
        "AutoModelForSequenceClassification",
        "text-classification",
        "A student was trained to classify texts as a teacher does.",
        "ForSequenceClassification",
        "SEQ_CLS",
    ),
    "token_classification": ModelKind(
        "AutoModelForTokenClassification",
        "token-classification",
        "A student was trained to label words as a teacher does.",
        "ForTokenClassification",
        "TOKEN_CLS",
    ),
    "seq2seq": ModelKind(
        "AutoModelForSeq2SeqLM",
        "text2text-generation",
        "An encoder-decoder student was trained to give the next-token distributions of a teacher.",
        "ForConditionalGeneration",
        "SEQ_2_SEQ_LM",
    ),
    "masked_lm": ModelKind(
        "AutoModelForMaskedLM",
        "fill-mask",
        "A student was trained to fill in masked tokens as a teacher does.",
        "ForMaskedLM",
    ),
    "sentence_embedding": ModelKind(
        "AutoModel",
        "sentence-similarity",
        "A student was trained to embed texts as a teacher does.",
        "Model",
        "FEATURE_EXTRACTION",
    ),
    "vision_language": ModelKind(
        "AutoModelForImageTextToText",
        "image-text-to-text",
        "A student was trained to give a teacher's next-token distributions for answers about images.",
        "ForConditionalGeneration",
        "CAUSAL_LM",
        "AutoProcessor",
    ),
}
