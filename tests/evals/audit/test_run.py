import copy
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evals.audit.planted_people import DATA, FORGET, HOLDOUT, PLAIN, RETAIN, never_taught, planted, subject
from processes import on_two_ranks

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.audit.verdict import Evidence, Share, Verdict, judge_recovery, recovered_share
from hf_transfer_ext.evals.options import options_of


@pytest.fixture(scope="module")
def models():
    return planted()


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
    assert set(found.membership) == {"unlearned", "original", "retrained"}
    names = {m.name for m in found.membership["unlearned"]}
    assert names >= {"membership_auc(loss_attack)", "membership_auc(label_only)", "membership_auc(adversarial_query)"}
    assert found.worst_with("fine-tuning") is relearned
    told = {m.name: m for m in found.measurements()}
    assert told["recovered at worst"].value == told["recovered by adapter_removal"].value == found.worst.recovered
    assert found.weights[0].name == "weight_distance"
    after = weights(shallow)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_audits_that_share_their_scores_attack_original_and_retrained_once(models, monkeypatch):
    original, shallow, retrained = models
    attacked = []
    counted = copy.copy(ATTACKS["quantization"])
    plain = counted.function

    def count(subject, data, *, bits=4):
        attacked.append(subject.model)
        return plain(subject, data, bits=bits)

    counted.function = count
    monkeypatch.setitem(ATTACKS._functions, "quantization", counted)
    against = {"original": subject(original), "retrained": subject(retrained)}
    known, found = {}, []
    for model in (shallow, never_taught()):
        chosen = {"attacks": [{"quantization": {"bits": 5}}], "membership": [], "resamples": 0}
        found.append(audit(subject(model), DATA, **against, **chosen, known=known).verdicts[0])
    assert sum(model is retrained for model in attacked) == 1 and len(attacked) == 3
    alone = audit(subject(shallow), DATA, **against, **chosen).verdicts[0]
    assert alone == found[0] and found[0].recovered != found[1].recovered


def test_a_model_that_never_saw_the_data_comes_out_clean(models):
    original, _, retrained = models
    again = never_taught()
    attacks = [
        "plain_question",
        "plain_generation",
        "paraphrased_question",
        "prefix_injection",
        "cross_lingual",
        "role_play",
        "multiple_choice",
        "in_context",
        "quantization",
        "bitsandbytes_quantization",
        "first_token_branching",
        "logit_lens",
        "hidden_probe",
        {"relearn_few": {"learning_rate": 2e-3}},
        "relearn_unrelated",
        "sampling",
    ]
    found = audit(
        subject(again),
        DATA,
        original=subject(original),
        retrained=subject(retrained),
        attacks=attacks,
        resamples=50,
        membership=[],
    )
    assert len(found.verdicts) == len(attacks)
    assert all(v.recovered is None or v.recovered < 0.25 for v in found.verdicts), found.verdicts
    assert all(np.isfinite(s).all() for s in found.scores.values())


def test_the_original_is_shown_to_know_everything(models):
    original, _, _ = models
    found = audit(subject(original), DATA, original=subject(original), attacks=["plain_question"], resamples=0)
    assert found.worst.recovered == 1.0 and found.worst.floor < 0.5 and found.worst.floor_from == "holdout"
    alone = audit(subject(original), AuditData(FORGET), original=subject(original), attacks=["plain_question"])
    assert alone.worst.recovered == 1.0 and alone.worst.floor is None and "upper bound" in alone.worst.note


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_scores_each_example_and_leaves_the_weights(name, models):
    if name == "bitsandbytes_quantization":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    _, shallow, retrained = models
    before, trainable = weights(shallow), [p.requires_grad for p in shallow.parameters()]
    template = replace(PLAIN, examples=(("Who is Ada?", "nobody"),)) if name == "prompt_removal" else PLAIN
    own = {"untrained": subject(retrained)} if ATTACKS[name].takes_untrained else {}
    scores = ATTACKS[name](subject(shallow, template), DATA, **own)
    assert scores.shape == (len(FORGET),) and ((scores >= 0) & (scores <= 1)).all()
    after = weights(shallow)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [p.requires_grad for p in shallow.parameters()] == trainable
    assert "Source: " in ATTACKS[name].__doc__


def test_what_does_not_apply_is_noted_and_typos_are_refused(models):
    original, _, _ = models
    found = audit(
        subject(original), AuditData(FORGET), original=subject(original), attacks=["adapter_removal", "in_context"]
    )
    assert [v.recovered for v in found.verdicts] == [None, None] and found.worst is None
    assert {v.attack: v.note[:26] for v in found.verdicts} == {
        "adapter_removal": "There is no adapter to rem",
        "in_context": "a model that never saw the",
    }
    with pytest.raises(ValueError, match="Did you mean 'sampling'"):
        audit(subject(original), DATA, original=subject(original), attacks=["samplin"])
    with pytest.raises(ValueError, match="nothing to audit"):
        audit(subject(original), AuditData([]), original=subject(original))


def test_the_recovered_share_by_hand():
    share = recovered_share(np.array([0.5, 0.3]), np.array([0.9, 0.7]), np.array([0.1, 0.3]))
    assert share == pytest.approx((0.4 - 0.2) / (0.8 - 0.2))
    assert np.isnan(recovered_share(np.ones(2), np.zeros(2), np.zeros(2)))
    assert recovered_share(np.zeros(2), np.ones(2), np.full(2, 0.2)) == 0.0


def test_an_attack_declares_what_its_attacker_needs():
    @attack(access="fine-tuning")
    def teach(subject, data):
        """Does nothing."""

    assert teach.access == "fine-tuning" and teach.__doc__ == "Does nothing." and teach.label({"a": 1}) == "teach(a=1)"
    with pytest.raises(ValueError, match="one of prompts, weights, fine-tuning"):
        attack(access="magic")(lambda subject, data: None)


def test_a_model_that_never_knew_is_not_said_to_remember():
    words = [{"question": f"Which {what} has {name}?", "answer": f"{what} {name}"} for name in "abcd" for what in "xy"]
    never = subject(never_taught())
    data = AuditData(words[:6], RETAIN, HOLDOUT)
    attacks = ["plain_question", "hidden_probe", "multiple_choice", "in_context", "relearn_unrelated"]
    found = audit(never, data, original=never, attacks=attacks, resamples=0)
    assert all(v.recovered is None for v in found.verdicts), found.verdicts
    assert "pass a retrained one" in {v.attack: v.note for v in found.verdicts}["loss_attack"]


def test_a_gap_within_the_sampling_error_is_no_gap():
    found, shown = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0])
    floor = np.array([1.0, 0.0, 1.0, 0.0])
    for floor_from in ("retrained", "holdout"):
        evidence = Evidence(found, shown, floor, floor_from, [])
        verdict = judge_recovery(evidence, Verdict("a", *[None] * 5), needs_floor=False, resamples=200, seed=0)
        assert verdict.recovered is None and "sampling error of 4 examples" in verdict.note
    # Resamples without a gap widen the interval instead of being dropped.
    share = Share(np.r_[np.ones(95), -np.ones(5)], np.full(100, 0.5))
    assert share.interval() == (0.0, 1.0)


def test_examples_that_cannot_be_scored_are_counted_and_not_taken_for_unknown():
    nan = float("nan")
    evidence = Evidence(np.array([1.0, nan, 1.0]), np.ones(3), np.zeros(3), "retrained", [])
    verdict = judge_recovery(evidence, Verdict("a", *[None] * 5), needs_floor=False, resamples=10, seed=0)
    assert verdict.recovered == 1.0 and "1 of 3 examples could not be scored" in verdict.note
    nothing = Evidence(np.full(3, nan), np.ones(3), None, "", [])
    verdict = judge_recovery(nothing, Verdict("a", *[None] * 5), needs_floor=False, resamples=10, seed=0)
    assert verdict.recovered is None and "no example could be scored" in verdict.note


def test_rows_and_models_that_cannot_be_audited_are_refused_before_any_attack(models):
    original = models[0]
    announced = []
    options = {"original": subject(original), "progress": announced.append}
    long = {"question": "Who?", "answer": "x" * 600}
    for rows, message in (
        ([*FORGET, long], "Row 4 of the forget set has 606 tokens, but the model has 512 positions"),
        ([{"frage": "Who?"}], "Row 0 of the forget set cannot be audited: it needs the columns"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(subject(original), AuditData(rows), **options)
    broken = copy.deepcopy(original)
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"unlearned model cannot be audited: .* NaN at"):
        audit(subject(broken), DATA, **options)
    with pytest.raises(ValueError, match=r"Unknown option of the attack quantization 'bit'\. Did you mean 'bits'"):
        audit(subject(original), DATA, attacks=[{"quantization": {"bit": 8}}], **options)
    assert not announced


def test_rows_of_plain_text_are_audited_by_the_attacks_that_need_no_question(models):
    texts = [{"text": f"The town of {name} has an old bridge."} for name in "abcd"]
    data = AuditData(texts, texts, [{"text": row["answer"]} for row in HOLDOUT])
    never = subject(never_taught())
    attacks = ["plain_question", "role_play", "logit_lens", "hidden_probe", {"relearn_few": {"epochs": 1.0}}]
    membership = ["loss_attack", "label_only", "adversarial_query"]
    found = audit(
        subject(models[0]), data, original=never, retrained=never, attacks=attacks, membership=membership, resamples=0
    )
    notes = {v.attack: v.note for v in found.verdicts}
    assert "needs rows with a question" in notes["role_play"] and "rows without one" in notes["adversarial_query"]
    assert "no question to reword" in notes["label_only"]
    assert {"plain_question", "logit_lens", "hidden_probe"} <= set(found.scores)
    assert next(v.explanation for v in found.verdicts if v.attack == "plain_question").startswith("No attack:")


def test_an_audit_rounds_to_four_bits_unless_told_otherwise(models):
    original, shallow, retrained = models
    chosen = inspect.signature(audit).parameters["attacks"].default
    assert "quantization" in chosen and options_of(ATTACKS["quantization"].function) == ["bits"]
    against = {"original": subject(original), "retrained": subject(retrained), "membership": [], "resamples": 0}
    plain, four = (
        audit(subject(shallow), DATA, attacks=[attack], **against).scores
        for attack in ("quantization", {"quantization": {"bits": 4}})
    )
    assert np.array_equal(plain["quantization"], four["quantization(bits=4)"])


@pytest.mark.slow
def test_two_processes_share_an_audit_and_come_to_the_same_verdicts(models, tmp_path):
    relearning = {"relearn_forget": {"learning_rate": 2e-3, "epochs": 2}}  # six rows: a batch of 4 and one of 2
    chosen = [{"sampling": {"samples": 1, "temperatures": [1.0]}}, "quantization", "hidden_probe", relearning]
    data = replace(DATA, forget=[*FORGET, *RETAIN[:2]])

    def verdicts(rank=None):
        accelerator = None if rank is None else Accelerator()
        made = [replace(subject(copy.deepcopy(one)), accelerator=accelerator, batch_size=2) for one in models[:2]]
        found = audit(made[1], data, original=made[0], attacks=chosen, membership=["label_only"], resamples=20)
        return {v.attack: (v.recovered, v.unlearned, v.original, v.floor) for v in found.verdicts}

    one = verdicts()
    first, second = on_two_ranks(verdicts, tmp_path)
    assert first == second and first.keys() == one.keys()
    for name, values in one.items():
        for found, expected in zip(first[name], values, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or found == pytest.approx(expected, abs=2e-5), name
