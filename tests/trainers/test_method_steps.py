"""Steps and weights of a method's own, inside the trainer."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from trainers.test_unlearning import FORGET, RETAIN, distance, lora, sequence_nll, trainer, weights_after

from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning_method import Method, Progress
from hf_transfer_ext.models.views import decoder_layers, rounded


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


def weighted_update(tmp_path, kind, forget_gradient, **options):
    """(weights after the trainer's step, the same by the definition in float64).

    Args:
        forget_gradient: (model in float64, reference, its parameters) -> gradient of the forget loss.
    """
    rate = 1e-2
    own, base = copy.deepcopy(kind()).double().eval(), tiny_llama().double()
    reference = {r["question"]: sequence_nll(base, r["question"], r["answer"]).detach() for r in FORGET}
    parameters = {name: p for name, p in own.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    forget = forget_gradient(own, reference, list(parameters.values()))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    retain = torch.autograd.grad(sums(own, reference)[1], parameters.values(), allow_unused=True)
    expected = {n: start[n] - rate * (0.7 * f + 1.9 * r) for n, f, r in zip(parameters, forget, retain, strict=True)}
    made = trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=rate, **options)
    return weights_after(made), expected


def mean_nll(model):
    """Mean loss of a token of the answers to forget."""
    losses = [sequence_nll(model, row["question"], row["answer"]) for row in FORGET]
    return sum(losses) / sum(len(row["answer"]) + 2 for row in FORGET)


@pytest.mark.parametrize("kind", [lora, tiny_llama], ids=["lora", "full"])
def test_a_step_of_tar_equals_the_definition_in_float64(tmp_path, kind):
    def forget_gradient(model, reference, parameters):
        total = torch.autograd.grad(sums(model, reference)[0], parameters)
        for _ in range(2):
            slope = torch.autograd.grad(mean_nll(model), parameters)
            with torch.no_grad():
                for p, g in zip(parameters, slope, strict=True):
                    p -= 1e-2 * g.sign()
            total = [t + g for t, g in zip(total, torch.autograd.grad(sums(model, reference)[0], parameters),
                                           strict=True)]  # fmt: skip
        return [t / 3 for t in total]

    options = {"method": "tar", "method_options": {"inner_steps": 2, "inner_rate": 1e-2}}
    after, expected = weighted_update(tmp_path, kind, forget_gradient, **options)
    assert distance(after, expected) < 1e-5
    plain = weights_after(trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=1e-2, method="npo"))
    assert distance(after, plain) > 1e-4


@pytest.mark.parametrize("kind", [lora, tiny_llama], ids=["lora", "full"])
def test_a_step_of_qaf_equals_the_definition_in_float64(tmp_path, kind):
    """The rounded model is a copy whose base weights are replaced: Q(W + BA) - BA, so that it acts as Q(W + BA)."""

    def forget_gradient(model, reference, parameters):
        plain = torch.autograd.grad(sums(model, reference)[0], parameters)
        with torch.no_grad():
            layers = {id(m.base_layer): m for m in model.modules() if hasattr(m, "base_layer")}
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name:
                    layer = layers.get(id(module))
                    change = 0.0 if layer is None else layer.get_delta_weight("default")
                    module.weight += rounded((module.weight + change).float(), 4).double() - module.weight - change
        through = torch.autograd.grad(sums(model, reference)[0], parameters)
        with torch.no_grad():
            for name, p in model.named_parameters():  # the frozen base as it was; the caller restores the trained
                if not p.requires_grad:
                    p.copy_(dict(kind().named_parameters())[name])
        return [(p + 3 * t) / 4 for p, t in zip(plain, through, strict=True)]

    options = {"method": "qaf", "method_options": {"share": 3.0}}
    after, expected = weighted_update(tmp_path, kind, forget_gradient, **options)
    assert distance(after, expected) < 1e-5
    plain = weights_after(trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=1e-2, method="npo"))
    assert distance(after, plain) > 1e-4
    checkpointed = weights_after(trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=1e-2,
                                         gradient_checkpointing=True, **options))  # fmt: skip
    assert distance(after, checkpointed) < 1e-6


@pytest.mark.parametrize("kind", [lora, tiny_llama], ids=["lora", "full"])
def test_a_step_of_lat_equals_the_definition_in_float64(tmp_path, kind):
    """Row by row, without padding; the attack is written out on the model's own layer."""

    def forget_gradient(model, reference, parameters):
        layer = decoder_layers(model)[0]
        changes = [None] * len(FORGET)
        lengths = list(changes)

        def attacked(place):
            def hook(module, inputs, output):
                if changes[place] is None:
                    lengths[place] = output.detach().norm(dim=-1, keepdim=True)
                    changes[place] = torch.zeros_like(output, requires_grad=True)
                return output + changes[place]

            handle = layer.register_forward_hook(hook)
            nll = sequence_nll(model, FORGET[place]["question"], FORGET[place]["answer"])
            handle.remove()
            return nll

        for _ in range(2):
            for place in range(len(FORGET)):
                (slope,) = torch.autograd.grad(attacked(place), changes[place])
                size = slope.norm(dim=-1, keepdim=True)
                change = changes[place].detach() - 0.3 * lengths[place] * torch.where(size > 0, slope / size, 0.0)
                far = change.norm(dim=-1, keepdim=True) / (0.3 * lengths[place])
                changes[place] = (change / far.clamp(min=1.0)).requires_grad_(True)
        terms = [
            -(2 / 0.1) * torch.nn.functional.logsigmoid(0.1 * (attacked(i) - reference[row["question"]]))
            for i, row in enumerate(FORGET)
        ]
        return torch.autograd.grad(sum(terms) / len(FORGET), parameters)

    options = {"method": "lat", "method_options": {"radius": 0.3, "attack_steps": 2}}
    after, expected = weighted_update(tmp_path, kind, forget_gradient, **options)
    assert distance(after, expected) < 1e-5
    plain = weights_after(trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=1e-2, method="npo"))
    assert distance(after, plain) > 1e-4
    checkpointed = weights_after(trainer(tmp_path, kind(), gamma=0.7, alpha=1.9, learning_rate=1e-2,
                                         gradient_checkpointing=True, **options))  # fmt: skip
    assert distance(after, checkpointed) < 1e-6


def test_lat_refuses_a_layer_that_the_model_does_not_have(tmp_path):
    made = trainer(tmp_path, lora(), method="lat", method_options={"layer": 3})
    with pytest.raises(ValueError, match="`layer` of 'lat' is 3, but the model has 2 layers"):
        made.train()


def test_pruned_weights_stay_zero_and_a_checkpoint_goes_on_alike(tmp_path):
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2,
               "method": "prune_first", "method_options": {"sparsity": 0.7}, "weight_decay": 0.1}  # fmt: skip
    whole = weights_after(trainer(tmp_path / "whole", tiny_llama(), save_strategy="steps", save_steps=2, **options))
    for name, weight in whole.items():
        if weight.dim() > 1:
            assert int((weight == 0).sum()) == int(0.7 * weight.numel()), name
    again = trainer(tmp_path / "again", tiny_llama(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(whole, {n: p.detach() for n, p in again.model.named_parameters()}) == 0.0


def test_sure_moves_the_neurons_of_its_mask_alone_and_its_checkpoint_brings_the_mask(tmp_path):
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2,
               "method": "sure", "method_options": {"quantile": 0.7}}  # fmt: skip
    whole = trainer(tmp_path / "whole", tiny_llama(), save_strategy="steps", save_steps=2, **options)
    straight = weights_after(whole)
    start = {name: p.detach() for name, p in tiny_llama().named_parameters()}
    moved = [(straight[n] != start[n]).reshape(len(p), -1).any(-1) for n, p in start.items()]
    masks = load_file(tmp_path / "whole" / "checkpoint-2" / "method.safetensors")
    assert all(torch.equal(masks[str(i)], rows) for i, rows in enumerate(moved))
    count = sum(len(rows) for rows in moved)
    assert sum(int(rows.sum()) for rows in moved) == pytest.approx(0.3 * count, abs=1)
    again = trainer(tmp_path / "again", tiny_llama(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(straight, {n: p.detach() for n, p in again.model.named_parameters()}) == 0.0
    npo = {**options, "method": "npo", "method_options": {}}
    trainer(tmp_path / "npo", tiny_llama(), save_strategy="steps", save_steps=2, **npo).train()
    with pytest.raises(ValueError, match=r"has no method\.safetensors, which holds what 'sure' computed"):
        again.train(resume_from_checkpoint=str(tmp_path / "npo" / "checkpoint-2"))


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
