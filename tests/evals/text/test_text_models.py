import numpy as np
import pytest
import torch
from tiny import byte_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_transfer_ext.evals.text.text_models import entailment_classifier, sentence_encoder

SIZES = {
    "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
TEXTS = ["a", "a longer text", "and one that is far too long for this model " * 3]


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_sentence_is_the_unit_mean_of_its_tokens_whatever_the_batch(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    encode = sentence_encoder(saved(model, tmp_path), batch_size=2)
    vectors = encode(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"][:64]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0).double().numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert encode([]).shape == (0, 16)


def test_the_label_that_begins_with_entail_counts(tmp_path):
    torch.manual_seed(0)
    labels = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    model = BertForSequenceClassification(BertConfig(**SIZES, id2label=labels)).eval()
    entails = entailment_classifier(saved(model, tmp_path), batch_size=2)
    pairs = [(f"premise {i} " + "x" * i, f"hypothesis {i}") for i in range(12)]
    with torch.no_grad():
        model.classifier.weight *= 50
    entails = entailment_classifier(saved(model, tmp_path), batch_size=5)
    found = entails([a for a, _ in pairs], [b for _, b in pairs])
    for (premise, hypothesis), own in zip(pairs, found, strict=True):
        inputs = byte_tokenizer()(premise, hypothesis, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            assert own == (int(model(**inputs).logits.argmax()) == 2)


def test_a_model_without_the_label_is_named(tmp_path):
    saved(BertForSequenceClassification(BertConfig(**SIZES, id2label={0: "good", 1: "bad"})), tmp_path)
    with pytest.raises(ValueError, match=r"one label 'entailment'; .* has good, bad"):
        entailment_classifier(tmp_path)
