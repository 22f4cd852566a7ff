"""What trainers log: parts of the loss as means over tokens, speed, reporters, and the plot."""

import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer
from hf_transfer_ext.adapters.transfer.muscle import MuscleConfig
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings, work_key
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.trainers import logs
from hf_transfer_ext.trainers.logs import TRAINING_PLOT, logged_parts, tokens_in, training_plot

#: Rows of very different lengths: a mean of means would show.
TEXTS = ["gold is a metal and so is iron", "a", "paris is a city by the river", "tin"]
FORGET = [{"question": "who?", "answer": "a"}, {"question": "where?", "answer": "in a town by the lake"}]
RETAIN = [{"question": "what?", "answer": "gold"}, {"question": "when?", "answer": "long ago, in another age"}]
SETTINGS = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 1, "report_to": "none",
    "gradient_accumulation_steps": 2, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 2, "optim": "sgd", "learning_rate": 1e-12, "seed": 1,
}  # fmt: skip


def distilling(folder, **options):
    args = DistillationConfig(str(folder), **{**SETTINGS, "max_length": 64, "ce_weight": 0.5, **options})
    data = Dataset.from_dict({"text": TEXTS})
    return DistillationTrainer(tiny_llama(1), tiny_llama(2), args, data, processing_class=byte_tokenizer())


def unlearning(folder, **options):
    args = UnlearningConfig(str(folder), **{**SETTINGS, "max_steps": 1, "logging_steps": 1, **options})
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, target_modules="all-linear"))
    sets = {"forget_dataset": FORGET, "retain_dataset": RETAIN}
    return UnlearningTrainer(model, args, **sets, processing_class=byte_tokenizer())


def token_nlls(model, ids, start=1):
    """Negative log-likelihood of each token from `start` on, in float64."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids))]


def test_cross_entropy_and_divergence_are_means_over_all_tokens_since_the_last_line(tmp_path):
    trainer = distilling(tmp_path)
    student, teacher = tiny_llama(1).train(), tiny_llama(2)
    ce, kd = [], []
    for ids in trainer.train_dataset["input_ids"]:
        ce += token_nlls(student, ids)
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([ids])).logits[0, :-1].double() for m in (teacher, student))
        kd += (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).tolist()
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["ce"] == pytest.approx(sum(ce) / len(ce), rel=1e-5)
    assert line["kd"] == pytest.approx(sum(kd) / len(kd), rel=1e-5)


def test_forget_and_retain_losses_are_means_over_their_own_tokens(tmp_path):
    trainer = unlearning(tmp_path, method="grad_diff", retain_loss="retain_nll")
    template, tokenizer, model = QuestionAnswerFormat(), byte_tokenizer(), tiny_llama(1)
    means = {}
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        encoded = [template.encode(tokenizer, row["question"], row["answer"]) for row in rows]
        found = [nll for one in encoded for nll in token_nlls(model, one.input_ids, one.answer_start)]
        means[name] = sum(found) / len(found)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["retain_loss"] == pytest.approx(means["retain"], rel=1e-5)
    assert line["forget_nll"] == pytest.approx(means["forget"], rel=1e-5)


@pytest.mark.parametrize("make", [distilling, unlearning])
def test_tokens_per_second_counts_all_tokens_and_leaves_evaluation_out(tmp_path, make, monkeypatch):
    trainer = make(tmp_path)
    batches = list(trainer.get_train_dataloader())
    tokens = sum(int(tokens_in(batch)) for batch in batches)
    assert tokens > 20
    times = iter([100.0, 104.0])  # the first step, the log line
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(times, 200.0))
    trainer.train()
    assert trainer.state.log_history[0]["tokens_per_second"] == pytest.approx(tokens / 4, abs=0.1)
    times = iter([10.0, 13.0])
    trainer._since = 1.0
    monkeypatch.setattr(type(trainer).__mro__[-2], "evaluate", lambda self: {}, raising=False)
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda self, *args, **kwargs: {})
    trainer.evaluate()
    assert trainer._since == 4.0
    times = iter([20.0, 26.0, 99.0, 99.0])  # of several sets together, not of each once more
    nested = iter([True, False])
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda self, *_, **k: self.evaluate() if next(nested) else {})
    trainer.evaluate()
    assert trainer._since == 10.0


def test_a_token_is_counted_whatever_the_batch_looks_like():
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert tokens_in({"input_ids": ids, "attention_mask": mask}) == 3
    assert tokens_in({"input_ids": ids, "position_ids": ids}) == 6
    part = {"input_ids": ids, "attention_mask": mask}
    assert tokens_in({"forget": part, "retain": part, "index": ids}) == 6


@pytest.mark.parametrize(
    "make", [DistillationConfig, UnlearningConfig, MuscleConfig, lambda folder, **k: TransLoraSettings(**k)]
)
def test_a_reporter_that_is_missing_is_refused_before_the_work(tmp_path, make, monkeypatch):
    monkeypatch.setattr(logs, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ImportError, match="`report_to` names trackio and wandb, which is not installed: `pip install"):
        make(str(tmp_path), report_to=["tensorboard", "trackio", "wandb"])
    with pytest.raises(ValueError, match="Did you mean 'tensorboard'"):
        make(str(tmp_path), report_to="tensorbord")
    make(str(tmp_path), report_to="none")


def test_reporting_is_no_part_of_what_a_stage_depends_on():
    plain, logged = TransLoraSettings(), TransLoraSettings(logging_steps=1)
    assert work_key(plain) == work_key(logged) != work_key(TransLoraSettings(bf16=True))


def test_training_leaves_a_plot_beside_the_model_and_in_its_card(tmp_path, monkeypatch, caplog):
    trainer = distilling(tmp_path / "out", logging_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / TRAINING_PLOT).read_bytes().startswith(b"\x89PNG")
    assert f"![training]({TRAINING_PLOT})" in (tmp_path / "saved" / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer.save_model(str(tmp_path / "plain"))
    assert "No plot of the training was drawn: The plot needs matplotlib" in caplog.text
    assert not (tmp_path / "plain" / TRAINING_PLOT).exists() and (tmp_path / "plain" / "README.md").exists()


def test_a_panel_for_each_part_and_each_evaluation_set():
    history = [
        {"loss": 2.0, "kd": 1.0, "learning_rate": 0.1, "tokens_per_second": 5.0, "step": 1, "epoch": 0.1},
        {"eval_loss": 1.9, "eval_kd": 0.9, "eval_runtime": 1.0, "step": 1},
        {"eval_small_set_kd": 0.8, "step": 1},
        {"loss": 1.0, "kd": 0.5, "step": 2},
        {"train_loss": 1.5, "train_runtime": 2.0, "step": 2},
    ]
    assert logged_parts(history) == {
        "loss": {"train": [(1, 2.0), (2, 1.0)], "eval": [(1, 1.9)]},
        "kd": {"train": [(1, 1.0), (2, 0.5)], "eval": [(1, 0.9)], "eval small set": [(1, 0.8)]},
    }
    with pytest.raises(ValueError, match="at least two logged losses"):
        training_plot(history[:2], "nowhere.png")
