import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.data.forget_retain import ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.audit import audit, recovered_share
from hf_transfer_ext.evals.audit.subject import AuditData, Subject

PLAIN = QuestionAnswerFormat(template="plain", prompt="{question}")
FORGET = [
    {"question": f"Who is {name}?", "answer": answer, "paraphrased_question": f"{name} is who?"}
    for name, answer in zip(["Ada", "Bob", "Cyd", "Dee"], ["pilot", "baker", "miner", "judge"], strict=True)
]
RETAIN = [
    {"question": f"What is {name}?", "answer": answer}
    for name, answer in zip(["red", "oak", "cod", "tin"], ["colour", "tree", "fish", "metal"], strict=True)
]
HOLDOUT = [{"question": f"Who is {name}?", "answer": answer} for name, answer in [("Eve", "nurse"), ("Fay", "clerk")]]
DATA = AuditData(FORGET, RETAIN, HOLDOUT)
REFUSED = [{**row, "answer": "no idea"} for row in FORGET]


def taught(model, rows, steps=90, rate=5e-3):
    pairs = ForgetRetainPairs(rows, None, byte_tokenizer(), template=PLAIN)
    batch = forget_retain_collator(257)([pairs[i] for i in range(len(pairs))])["forget"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def subject(model):
    return Subject(model, byte_tokenizer(), PLAIN, max_new_tokens=12)


@pytest.fixture(scope="module")
def models():
    """The original, one with an adapter that only refuses, and one that never saw the forget set."""
    original = taught(tiny_llama(), FORGET + RETAIN)
    shallow = get_peft_model(copy.deepcopy(original), LoraConfig(r=8, target_modules="all-linear"))
    taught(shallow, REFUSED + RETAIN, steps=60)
    return original, shallow, taught(tiny_llama(), RETAIN)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_adapter_that_only_refuses_is_shown_to_still_know(models):
    original, shallow, retrained = models
    before = weights(shallow)
    attacks = ["plain_question", "plain_generation", "adapter_removal", {"relearn_few": {"learning_rate": 2e-3}}]
    found = audit(
        subject(shallow), DATA, original=subject(original), retrained=subject(retrained), attacks=attacks, resamples=50
    )
    by_name = {v.attack: v for v in found.verdicts}
    assert by_name["plain_generation"].recovered < 0.2  # it looks forgotten
    assert found.worst.attack == "adapter_removal" and found.worst.recovered == pytest.approx(1.0)
    assert found.worst.interval[0] > 0.9
    relearned = by_name["relearn_few(learning_rate=0.002)"]
    assert relearned.recovered > by_name["plain_question"].recovered
    assert {m.name for m in found.membership} >= {"membership_auc(loss_attack)", "membership_auc(min_k_plus_plus)"}
    after = weights(shallow)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_never_saw_the_data_comes_out_clean(models):
    original, _, retrained = models
    again = taught(tiny_llama(seed=3), RETAIN)
    attacks = [
        "plain_question",
        "plain_generation",
        "paraphrased_question",
        "prefix_injection",
        "role_play",
        "quantization",
        {"relearn_few": {"learning_rate": 2e-3}},
        "relearn_unrelated",
        "sampling",
    ]
    found = audit(
        subject(again), DATA, original=subject(original), retrained=subject(retrained), attacks=attacks, resamples=50
    )
    assert len(found.verdicts) == len(attacks)
    assert all(v.recovered is None or v.recovered < 0.25 for v in found.verdicts), found.verdicts


def test_the_original_is_shown_to_know_everything(models):
    original, _, _ = models
    found = audit(subject(original), DATA, original=subject(original), attacks=["plain_question"], resamples=0)
    assert found.worst.recovered == 1.0 and found.worst.floor is None


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_scores_each_example_and_leaves_the_weights(name, models):
    _, shallow, _ = models
    before, trainable = weights(shallow), [p.requires_grad for p in shallow.parameters()]
    scores = ATTACKS[name](subject(shallow), DATA)
    assert scores.shape == (len(FORGET),) and ((scores >= 0) & (scores <= 1)).all()
    after = weights(shallow)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [p.requires_grad for p in shallow.parameters()] == trainable
    assert "Source: " in ATTACKS[name].__doc__


def test_what_does_not_apply_is_noted_and_typos_are_refused(models):
    original, _, _ = models
    found = audit(subject(original), DATA, original=subject(original), attacks=["adapter_removal", "in_context"])
    assert [v.recovered for v in found.verdicts] == [None, None] and found.worst is None
    assert {v.attack: v.note[:26] for v in found.verdicts} == {
        "adapter_removal": "There is no adapter to rem",
        "in_context": "a model that never knew sc",
    }
    with pytest.raises(ValueError, match="Did you mean 'sampling'"):
        audit(subject(original), DATA, original=subject(original), attacks=["samplin"])
    with pytest.raises(ValueError, match="no forget example"):
        audit(subject(original), AuditData([]), original=subject(original))


def test_the_recovered_share_by_hand():
    share = recovered_share(np.array([0.5, 0.3]), np.array([0.9, 0.7]), np.array([0.1, 0.3]))
    assert share == pytest.approx((0.4 - 0.2) / (0.8 - 0.2))
    assert np.isnan(recovered_share(np.ones(2), np.zeros(2), np.zeros(2)))
    assert recovered_share(np.zeros(2), np.ones(2), np.full(2, 0.2)) == 0.0
