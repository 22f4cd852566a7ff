"""Forgetting against utility during training: what is logged, used and refused."""

import copy
import json

import numpy as np
import pytest
import torch
from evals.audit.planted_people import FORGET, HOLDOUT, PLAIN, RETAIN, planted
from peft import LoraConfig, get_peft_model
from processes import on_two_ranks
from sharding import shard_on_cpu
from tiny import byte_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments

from hf_transfer_ext.data.forget_retain import ForgetRetainPairs
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.metrics.forget_quality import forget_quality
from hf_transfer_ext.evals.unlearning_curve import UnlearningCurve
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.trainers.logs import CURVE_PLOT, curve_notes, curve_plot, measured_points
from hf_transfer_ext.trainers.saving import save_whole
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

SHORT = GenerationSettings(max_new_tokens=8)
SPLITS = {"forget": FORGET, "retain": RETAIN}
TRAINING = {
    "method": "grad_diff", "learning_rate": 0.02, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2, "lr_scheduler_type": "constant", "optim": "sgd", "eval_on_start": True,
}  # fmt: skip


def lora():
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(planted()[0]), LoraConfig(r=4, target_modules="all-linear"))


def curve(splits=SPLITS, **options):
    return UnlearningCurve(splits, byte_tokenizer(), **{"template": PLAIN, "generation": SHORT, **options})


def trainer(folder, *callbacks, given=None, **options):
    args = UnlearningConfig(str(folder), **{**TRAINING, **options})
    sets = {
        "forget_dataset": FORGET,
        "retain_dataset": RETAIN,
        "processing_class": byte_tokenizer(),
        "template": PLAIN,
    }
    given = {"model": None, **(given or {})}
    return UnlearningTrainer(given.pop("model") or lora(), args, **sets, callbacks=list(callbacks), **given)


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def direct(model, rows, metrics):
    options = {"template": PLAIN, "generation": SHORT, "resamples": 0}
    return {m.name: m.value for m in evaluate(model, byte_tokenizer(), rows, metrics, **options).measurements}


def test_each_evaluation_is_that_of_the_engine_and_the_training_is_as_without(tmp_path):
    ratios = evaluate(planted()[2], byte_tokenizer(), FORGET, ["truth_ratio"], template=PLAIN).values
    made = trainer(tmp_path / "a", curve(retrained=next(iter(ratios.values())).tolist()))
    made.train()
    lines = measured_points(made.state.log_history)
    assert [line["step"] for line in lines] == [0, 2, 4]
    for model, line in ((lora(), lines[0]), (made.model, lines[-1])):
        forget = direct(model, FORGET, ["answer_probability", "extraction_strength", "rouge_l_recall"])
        kept = direct(model, RETAIN, ["answer_probability", "rouge_l_recall"])
        for name, value in forget.items():
            assert line[f"eval_forget_{name}"] == pytest.approx(value, abs=1e-6)
        for name, value in kept.items():
            assert line[f"eval_retain_{name}"] == pytest.approx(value, abs=1e-6)
        unknown = [1 - value for value in forget.values()]
        expected = len(unknown) / sum(1 / value for value in unknown) if min(unknown) > 0 else 0.0
        assert line["eval_forgotten"] == pytest.approx(expected, abs=1e-5)
        assert line["eval_utility"] == pytest.approx(2 / sum(1 / value for value in kept.values()), abs=1e-5)
        own = evaluate(model, byte_tokenizer(), FORGET, ["truth_ratio"], template=PLAIN).values
        p_value = forget_quality(*(next(iter(one.values())) for one in (own, ratios)), resamples=0)[0].value
        assert line["eval_forget_quality"] == pytest.approx(p_value)
    assert lines[-1]["eval_forget_answer_probability"] < lines[0]["eval_forget_answer_probability"]
    plain = trainer(tmp_path / "b", eval_strategy="no", eval_on_start=False)
    plain.train()
    after = weights(plain)
    assert all(torch.equal(value, after[name]) for name, value in weights(made).items())


def test_a_retrained_model_gives_the_truth_ratios_itself_and_losses_stay_beside(tmp_path):
    pairs = ForgetRetainPairs(FORGET, RETAIN, byte_tokenizer(), template=PLAIN)
    few = {"forget_metrics": ["answer_probability"], "utility_metrics": ["answer_probability"]}
    made = trainer(
        tmp_path, curve(retrained=planted()[2], **few), given={"eval_dataset": {"one": pairs, "two": pairs}}
    )
    found = made.evaluate()
    assert found["eval_forget_quality_log10"] == pytest.approx(np.log10(found["eval_forget_quality"]))
    assert {"eval_one_loss", "eval_two_loss", "eval_balance"} <= set(found)
    assert len([line for line in made.state.log_history if "eval_forgotten" in line]) == 1  # not once for each set


def test_reporters_early_stopping_and_the_best_model_use_what_is_measured(tmp_path):
    reported = []

    class Reporter(EarlyStoppingCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs or {}))

    few = {"forget_metrics": ["answer_probability"], "utility_metrics": ["answer_probability"]}
    best = {"metric_for_best_model": "eval_utility", "load_best_model_at_end": True, "save_strategy": "steps",
            "save_steps": 1, "eval_steps": 1, "eval_on_start": False, "max_steps": 6}  # fmt: skip
    made = trainer(
        tmp_path,
        curve(**few),
        Reporter(early_stopping_patience=1),
        **best,
        learning_rate=0.01,
        alpha=0.0,
        optim="adamw_torch",
    )
    made.train()
    utilities = [line["eval_utility"] for line in measured_points(made.state.log_history)]
    assert made.state.best_metric == max(utilities) and made.state.global_step == len(utilities) < 6
    assert made.evaluate()["eval_utility"] == pytest.approx(max(utilities), abs=1e-6)
    assert [line["eval_utility"] for line in reported if "eval_utility" in line][:-1] == utilities


def test_the_card_of_a_saved_model_has_the_curve(tmp_path):
    few = {"forget_metrics": ["answer_probability"], "utility_metrics": ["answer_probability"], "limit": 2}
    made = trainer(tmp_path / "out", curve(**few), max_steps=2)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / CURVE_PLOT).read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"({CURVE_PLOT})" in card and "## Forgetting against utility" in card and "Step 2: forgotten" in card
    notes = json.loads((tmp_path / "saved" / "hf_transfer_ext.json").read_text())["notes"]
    assert notes == curve_notes(made.state.log_history) and len(notes["Forgetting against utility"]) == 2
    with pytest.raises(ValueError, match="two evaluations at least"):
        curve_plot(made.state.log_history[:1], tmp_path / "no.png")


def test_rows_are_picked_evenly_and_each_value_has_a_direction():
    rows = [*FORGET, *FORGET, FORGET[0], FORGET[1]]
    made = curve(
        {"forget": rows, "forget_languages": FORGET, "retain": RETAIN, "holdout": [], "other": HOLDOUT}, limit=4
    )
    assert made.rows["forget"] == [rows[0], rows[2], rows[5], rows[7]] and "holdout" not in made.rows
    assert made.directions["forget_languages_answer_probability"] is False
    assert made.directions["other_answer_probability"] is made.directions["balance"] is True
    assert "utility" not in curve({"forget": FORGET}).directions


def test_what_cannot_be_obeyed_is_refused_before_the_first_step(tmp_path):
    for options, message in (
        ({"forget_metrics": ["answer_probabilty"]}, "Did you mean 'answer_probability'"),
        ({"forget_metrics": ["truth_ratio"]}, "none of which is a share of what is known"),
        ({"forget_metrics": ["answer_probability", ("answer_probability", {})]}, "logged under one name"),
        ({"limit": 0}, "`limit` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            curve(**options)
    with pytest.raises(ValueError, match="nothing whose forgetting to measure"):
        curve({"retain": RETAIN})
    with pytest.raises(ValueError, match="`eval_strategy` is 'no'"):
        trainer(tmp_path, curve(), eval_strategy="no", eval_on_start=False).train()
    with pytest.raises(ValueError, match="set `greater_is_better` to False"):
        trainer(tmp_path, curve(), metric_for_best_model="forget_answer_probability")
    with pytest.raises(ValueError, match="there is no evaluation set"):
        trainer(tmp_path, curve(), metric_for_best_model="eval_loss")
    with pytest.raises(ValueError, match="'other' cannot be measured during training: Example 0"):
        trainer(tmp_path, curve({"forget": FORGET, "other": [{"question": "Who?"}]})).train()
    with pytest.raises(ValueError, match="3 truth ratios, but 4 rows"):
        trainer(tmp_path, curve(retrained=[0.1, 0.2, 0.3])).evaluate()
    with pytest.raises(ValueError, match="this trainer would never measure it"):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
        Trainer(lora(), args, train_dataset=[{"input_ids": [1]}], callbacks=[curve()]).train()


def test_a_bound_on_the_retain_loss_is_kept_where_no_losses_are_evaluated(tmp_path):
    few = {"forget_metrics": ["answer_probability"], "utility_metrics": ["answer_probability"]}
    options = {"alpha": 0.0, "learning_rate": 0.01, "max_steps": 20, "retain_bound": 0.5, "eval_steps": 10}
    made = trainer(tmp_path, curve(**few), optim="adamw_torch", **options)
    made.train()
    losses = [line["retain_loss"] for line in made.state.log_history if "retain_loss" in line]
    assert max(losses[:-1]) <= 0.5 < losses[-1] and made.state.global_step == len(losses) < 20


@pytest.mark.slow
def test_two_processes_share_the_rows_and_log_what_one_logs(tmp_path):
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "eval_steps": 1}

    def lines(rank=None):
        size = 4 if rank is None else 2
        made = trainer(tmp_path / f"of{rank}", curve(batch_size=1), **{**options, "per_device_train_batch_size": size})
        made.train()
        return measured_points(made.state.log_history)

    alone = lines()
    first, second = on_two_ranks(lines, tmp_path)
    names = [name for name in alone[0] if name.startswith("eval_")]
    assert len(alone) == len(first) == 3 and len(names) == 8
    for one, mine, other in zip(alone, first, second, strict=True):
        assert [mine[name] for name in names] == [other[name] for name in names]
        assert [mine[name] for name in names] == pytest.approx([one[name] for name in names], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("writes", [False, True], ids=["scored in place", "gathered to write"])
def test_a_sharded_training_logs_the_curve_of_one_process(tmp_path, adapted, writes):
    """Batches of 3 rows and of 1: a process may not wait in a forward pass that the other does not run."""
    metrics = {"forget_metrics": ["answer_probability", "extraction_strength"], "batch_size": 3,
               "utility_metrics": ["answer_probability", "exact_memorization"]}  # fmt: skip
    if writes:
        metrics["forget_metrics"] = [*metrics["forget_metrics"], "rouge_l_recall"]
    splits = {**SPLITS, "retain_few": RETAIN[:1], "holdout": HOLDOUT}

    def lines(rank=None):
        if rank is not None:
            shard_on_cpu()
        made = trainer(
            tmp_path / f"of{rank}", curve(splits, retrained=planted()[2], **metrics), max_steps=2, eval_steps=1,
            per_device_train_batch_size=4 if rank is None else 2, max_grad_norm=0.0,
            learning_rate=60.0 if adapted else 15.0,
            given=None if adapted else {"model": copy.deepcopy(planted()[0])},
        )  # fmt: skip
        made.train()
        # Those of the root stay whole after a forward pass that no backward pass follows.
        sharded = any(isinstance(p, DTensor) for p in made.model.parameters())
        if not adapted:
            save_whole(made, tmp_path / f"saved{rank}")
        return measured_points(made.state.log_history), sharded

    alone, whole = lines()
    ranks = on_two_ranks(lines, tmp_path)
    names = [name for name in alone[0] if name.startswith("eval_")]
    assert len(alone) == 3 and len(names) == 13 + writes and not whole
    for found, sharded in ranks:
        assert sharded and len(found) == 3
        for one, mine in zip(alone, found, strict=True):
            assert [mine[name] for name in names] == pytest.approx([one[name] for name in names], abs=1e-4)
    changed = [abs(alone[-1][name] - alone[0][name]) for name in names if "probability" in name]
    assert max(changed) > 1e-2
    if not adapted:
        for folder in ("savedNone", "saved0"):
            last = direct(AutoModelForCausalLM.from_pretrained(tmp_path / folder), HOLDOUT, ["answer_probability"])
            assert alone[-1]["eval_holdout_answer_probability"] == pytest.approx(*last.values(), abs=1e-6)


@pytest.mark.slow
def test_what_shards_do_not_allow_is_refused_before_the_first_step(tmp_path):
    def refused(_):
        shard_on_cpu()
        made = trainer(tmp_path / "out", curve(forget_metrics=["answer_probability", "gradient_norm"]))
        with pytest.raises(ValueError, match=r"gradient_norm take gradients of single sequences"):
            made.train()
        return made.state.global_step

    assert on_two_ranks(refused, tmp_path) == [0, 0]
