"""A bound on the retain loss, in training steps and in evaluations."""

import pytest
import torch
from tiny import byte_tokenizer
from trainers.test_unlearning import FORGET, PLAIN, config, distance, lora, trainer, weights_after

from hf_transfer_ext.data.forget_retain import ForgetRetainPairs

#: Answers like those to forget, so that forgetting harms them; and no weight on them.
SIMILAR = [{"question": f"Keep {i}?", "answer": "ba" * (i + 1)} for i in range(4)]
HARD = {"method": "grad_diff", "alpha": 0.0, "learning_rate": 0.02, "max_steps": 12, "retain": SIMILAR}


def retain_losses(made, name="retain_loss"):
    return [log[name] for log in made.state.log_history if name in log]


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The retain losses of a run without a bound: they start where the model is and rise."""
    made = trainer(tmp_path_factory.mktemp("free"), lora(), **HARD)
    made.train()
    losses = retain_losses(made)
    assert len(losses) == 12 and max(losses) > losses[0] + 0.5
    return losses


def first_above(losses, bound):
    return next(step for step, loss in enumerate(losses) if loss > bound)


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_a_run_stops_at_the_first_step_whose_retain_loss_is_above(tmp_path, free, caplog, split):
    bound = free[0] + 0.3
    step = first_above(free, bound)
    made = trainer(tmp_path, lora(), retain_bound=bound, per_device_train_batch_size=split[0],
                   gradient_accumulation_steps=split[1], **HARD)  # fmt: skip
    made.train()
    assert 0 < step < 11 and made.state.global_step == step + 1
    assert f"after step {step} is" in caplog.text and "the weights stay as they are" in caplog.text


def test_restoring_gives_the_last_weights_within_the_bound(tmp_path, free, caplog):
    bound = free[0] + 0.3
    step = first_above(free, bound)  # the loss at the weights after `step` updates; before, it was within
    after = weights_after(trainer(tmp_path, lora(), retain_bound=bound, on_bound="restore", **HARD))
    short = weights_after(trainer(tmp_path, lora(), **{**HARD, "max_steps": step - 1}))
    assert distance(after, short) < 1e-6
    assert f"the weights after step {step - 1}, the last within it, are back" in caplog.text


def test_a_bound_that_is_never_reached_changes_nothing(tmp_path, free):
    plain = weights_after(trainer(tmp_path, lora(), **HARD))
    bounded = trainer(tmp_path, lora(), retain_bound=max(free) + 1.0, on_bound="restore", **HARD)
    assert distance(plain, weights_after(bounded)) == 0.0 and bounded.state.global_step == 12


@pytest.mark.parametrize("method", ["npo_sam", "pdu"])
def test_it_bounds_methods_with_steps_and_weights_of_their_own(tmp_path, free, method):
    own = {"npo_sam": {}, "pdu": {"dual": 0.0, "dual_rate": 0.0}}[method]
    options = {**HARD, "method": method, "method_options": own, "retain_bound": free[0] + 0.1}
    if method == "pdu":
        options.update(alpha=None, forget_loss="grad_ascent")  # with a dual of 0
    made = trainer(tmp_path, lora(), **options)
    made.train()
    losses = retain_losses(made)
    assert losses[-1] > free[0] + 0.1 >= max(losses[:-1]) and made.state.global_step == len(losses) < 12


def test_where_the_run_evaluates_the_bound_is_on_the_evaluation(tmp_path):
    pairs = ForgetRetainPairs(FORGET, SIMILAR, byte_tokenizer(), template=PLAIN)
    options = {**HARD, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    loose = trainer(tmp_path, lora(), given={"eval_dataset": pairs}, **options)
    loose.train()
    losses = retain_losses(loose, "eval_retain_loss")
    bound = losses[0] + 0.3
    count = first_above(losses, bound)
    assert count > 0
    made = trainer(tmp_path, lora(), given={"eval_dataset": pairs}, retain_bound=bound, on_bound="restore", **options)
    after = weights_after(made)
    assert made.state.global_step == 2 * (count + 1)
    assert distance(after, weights_after(trainer(tmp_path, lora(), **{**HARD, "max_steps": 2 * count}))) < 1e-6
    assert made.evaluate()["eval_loss"] == pytest.approx(
        [log["eval_loss"] for log in loose.state.log_history if "eval_loss" in log][count - 1], rel=1e-5
    )


def test_a_model_that_starts_above_the_bound_is_refused(tmp_path, free):
    start = {name: p.detach().clone() for name, p in lora().named_parameters() if p.requires_grad}
    made = trainer(tmp_path, lora(), retain_bound=free[0] - 0.1, **HARD)
    with pytest.raises(ValueError, match="before the first update, above `retain_bound`"):
        made.train()
    assert all(torch.equal(p, start[name]) for name, p in made.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_bound": "rollback"}, "'stop' or 'restore', got 'rollback'"),
        ({"retain_bound": float("nan")}, "must be a finite number, got nan"),
        ({"retain_bound": 1.0, "retain_loss": "none"}, "`retain_loss` is 'none'"),
        ({"retain_bound": 1.0, "on_bound": "restore", "load_best_model_at_end": True, "eval_strategy": "steps",
          "save_strategy": "steps"}, "both choose the weights"),
    ],
)  # fmt: skip
def test_the_config_refuses_bounds_that_mean_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
