import pytest
import torch
from evals.audit.planted_people import FORGET, HOLDOUT, PLAIN, planted, subject
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.audit.membership.adversarial_query import adversarial_query, losses_of
from hf_transfer_ext.evals.audit.references import References
from hf_transfer_ext.models.scoring import Batch

ROWS = [*FORGET, *HOLDOUT]


@pytest.fixture
def models():
    original, shallow, retrained = map(subject, planted())
    return original, shallow, retrained, References(original, retrained)


def test_a_query_sets_trained_and_untrained_further_apart_than_the_question_does(models):
    original, _, retrained, references = models
    plain = [one.metric_values(FORGET, ["loss_attack"])["loss_attack"] for one in (retrained, original)]
    gaps = [plain[0] - plain[1]]
    for steps in (2, 8):
        found = [adversarial_query(one, FORGET, references, steps=steps) for one in (retrained, original)]
        gaps.append(found[0] - found[1])
    assert gaps[2].mean() > gaps[1].mean() and gaps[2].mean() > gaps[0].mean()
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        adversarial_query(original, FORGET, references, steps=0)
    wide = References(original, subject(tiny_llama(hidden_size=64)))
    with pytest.raises(ValueError, match="embeddings of the same shape"):
        adversarial_query(original, FORGET, wide)


def test_an_unchanged_query_has_the_loss_of_the_question(models):
    original = models[0]
    encoded = [PLAIN.encode(byte_tokenizer(), row["question"], row["answer"]) for row in FORGET]
    batch = Batch.of(encoded, 257, "cpu")
    with torch.no_grad():
        found = losses_of(original, batch, torch.zeros(*batch.input_ids.shape, 32))
    assert found.numpy() == pytest.approx(original.metric_values(FORGET, ["loss_attack"])["loss_attack"], abs=1e-5)
