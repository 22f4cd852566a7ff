import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.metrics import gradient_norm


def test_it_is_the_norm_of_the_whole_gradient_of_one_sequence():
    model = tiny_llama()
    texts = [{"text": "abc"}, {"text": "a longer text"}]
    result = evaluate(model, byte_tokenizer(), texts, ["gradient_norm", "perplexity"])
    for row, value in zip(texts, result.values["gradient_norm"], strict=True):
        ids = byte_tokenizer()(row["text"], return_tensors="pt")["input_ids"]
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert value == pytest.approx(float(whole.norm()), rel=1e-4)
    assert all(s.answer.gradient_norm is not None for s in result.scored)


def test_a_model_that_trains_nothing_is_told_so():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="Unfreeze"):
        evaluate(model, byte_tokenizer(), [{"text": "abc"}], [gradient_norm.__name__])
