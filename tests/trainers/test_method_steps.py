"""Steps and weights of a method's own, inside the trainer."""

import copy

import pytest
import torch
from tiny import tiny_llama
from trainers.test_unlearning import FORGET, RETAIN, distance, lora, sequence_nll, trainer, weights_after

from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning_method import Method, Progress


def sums(model, reference, beta=0.1):
    """The NPO loss and the retain cross-entropy of all rows, each as a mean, in float64."""
    forget = []
    for row in FORGET:
        difference = sequence_nll(model, row["question"], row["answer"]) - reference[row["question"]]
        forget.append(-(2 / beta) * torch.nn.functional.logsigmoid(beta * difference))
    retain = sum(sequence_nll(model, row["question"], row["answer"]) for row in RETAIN)
    return sum(forget) / len(FORGET), retain / sum(len(row["answer"]) + 2 for row in RETAIN)


@pytest.mark.parametrize("kind", [lora, tiny_llama], ids=["lora", "full"])
def test_a_step_of_npo_sam_equals_the_definition_in_float64(tmp_path, kind):
    rho, rate = 0.5, 1e-2
    own = copy.deepcopy(kind()).double().eval()
    base = tiny_llama().double()
    reference = {r["question"]: sequence_nll(base, r["question"], r["answer"]).detach() for r in FORGET}
    parameters = {name: p for name, p in own.named_parameters() if p.requires_grad}
    first = torch.autograd.grad(sums(own, reference)[0], parameters.values())
    length = torch.sqrt(sum(g.square().sum() for g in first))
    start = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for p, g in zip(parameters.values(), first, strict=True):
            p += rho * g / length
    sharp = torch.autograd.grad(sums(own, reference)[0], parameters.values())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    kept = torch.autograd.grad(sums(own, reference)[1], parameters.values(), allow_unused=True)
    expected = {
        name: start[name] - rate * (0.7 * g + 1.9 * k) for name, g, k in zip(parameters, sharp, kept, strict=True)
    }
    options = {"method": "npo_sam", "method_options": {"rho": rho}, "gamma": 0.7, "alpha": 1.9, "learning_rate": rate}
    made = trainer(tmp_path, kind(), **options)
    after = weights_after(made)
    assert distance(after, expected) < 2e-6
    plain = weights_after(trainer(tmp_path, kind(), **{**options, "method_options": {"rho": 0.0}}))
    assert distance(after, plain) > 1e-4  # the move matters here
    logged = made.state.log_history[0]  # the losses at the weights as they are, not as they were moved
    assert logged["forget_loss"] == pytest.approx(sums(own, reference)[0].item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(0.7 * logged["forget_loss"] + 1.9 * logged["retain_loss"], rel=1e-4)


def test_an_own_step_that_only_adds_equals_the_shared_backward_pass(tmp_path):
    npo = weights_after(trainer(tmp_path, lora(), method="npo", max_steps=3))
    added = weights_after(trainer(tmp_path, lora(), method="npo_sam", method_options={"rho": 0.0}, max_steps=3))
    assert distance(npo, added) < 1e-6


def test_an_own_step_works_with_gradient_checkpointing_and_without_a_retain_loss(tmp_path):
    options = {"method": "npo_sam", "method_options": {"rho": 0.5}, "retain_loss": "none"}
    plain = weights_after(trainer(tmp_path, lora(), **options))
    checkpointed = weights_after(trainer(tmp_path, lora(), gradient_checkpointing=True, **options))
    start = {name: p for name, p in lora().named_parameters() if p.requires_grad}
    assert distance(plain, checkpointed) < 1e-6 and distance(plain, start) > 1e-3


PDU = {"method": "pdu", "method_options": {"dual": 1.0, "dual_rate": 0.5, "bound": 2.0, "warmup_epochs": 0.0}}


@pytest.mark.parametrize("batch, accumulation", [(4, 1), (1, 4)])
def test_the_dual_of_pdu_follows_the_retain_loss_of_whole_steps(tmp_path, batch, accumulation):
    made = trainer(
        tmp_path, lora(), max_steps=4, learning_rate=1e-3, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, **PDU,
    )  # fmt: skip
    made.train()
    dual = 1.0
    logs = [log for log in made.state.log_history if "retain_loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["loss"] == pytest.approx(log["forget_loss"] + dual * log["retain_loss"], rel=1e-4)
        dual = max(0.0, dual + 0.5 * (log["retain_loss"] - 2.0))
        assert log["dual"] == pytest.approx(dual, rel=1e-5)
    assert dual > 2.0


def test_a_warm_up_holds_the_dual_and_the_first_step_equals_its_definition(tmp_path):
    options = {**PDU["method_options"], "warmup_epochs": 2.0}
    made = trainer(tmp_path, method="pdu", method_options=options, max_steps=3, learning_rate=1e-3)
    made.train()
    duals = [log["dual"] for log in made.state.log_history if "dual" in log]
    assert duals[:2] == [1.0, 1.0] and duals[2] != 1.0


def test_learned_values_are_restored_with_a_checkpoint(tmp_path):
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, **PDU}
    whole = trainer(tmp_path / "whole", lora(), save_strategy="steps", save_steps=3, **options)
    straight = weights_after(whole)
    again = trainer(tmp_path / "again", lora(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    resumed = {name: p.detach() for name, p in again.model.named_parameters() if p.requires_grad}
    assert distance(straight, resumed) == 0.0 and again.learned == whole.learned
    once_more = trainer(tmp_path / "anew", lora(), **options)
    once_more.train()
    once_more.train()  # a run of its own starts with the method's own value
    first = next(log for log in once_more.state.log_history if "dual" in log)
    assert first["loss"] == pytest.approx(first["forget_loss"] + 1.0 * first["retain_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="does not have the learned values dual"):
        saved = trainer(tmp_path / "npo", lora(), **{**options, "method": "npo", "method_options": {}},
                        save_strategy="steps", save_steps=3)  # fmt: skip
        saved.train()
        again.train(resume_from_checkpoint=str(tmp_path / "npo" / "checkpoint-3"))


class fading(Method):
    """A schedule: the forget loss fades over the run."""

    forget = "grad_ascent"
    retain = "retain_nll"

    def weights(self, gamma, alpha, progress: Progress, learned):
        return gamma * (1.0 - progress.share), alpha


def test_a_schedule_follows_the_progress(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS._functions, "fading", fading)
    made = trainer(tmp_path, lora(), method="fading", max_steps=4, learning_rate=1e-3, gamma=2.0)
    made.train()
    logs = [log for log in made.state.log_history if "retain_loss" in log]
    for step, log in enumerate(logs):
        expected = 2.0 * (1 - step / 4) * log["forget_loss"] + log["retain_loss"]
        assert log["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [({"fp16": True}, "under fp16"), ({"n_gpu": 2}, "DataParallel"), ({"plugin": True}, "FSDP holds them itself")],
)
def test_where_an_own_step_cannot_work_it_is_refused(tmp_path, monkeypatch, change, message):
    from accelerate.utils import DistributedType

    made = trainer(tmp_path, lora(), method="npo")
    made.method = METHODS["npo_sam"]()
    if change.get("fp16"):
        made.args.fp16 = True
    if change.get("n_gpu"):
        made.args._n_gpu = 2
    if change.get("plugin"):
        monkeypatch.setattr(type(made.accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=message):
        made._refuse_own_step()
