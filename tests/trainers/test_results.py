"""What trainers save and publish themselves."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer, pull
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.students import AUXILIARIES, StudentShape, linear_expansion
from hf_transfer_ext.trainers.results import refuse_published_states

SETTINGS = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1,
    "learning_rate": 1e-2,
}  # fmt: skip
TEXTS = ["gold is a metal", "paris is a city", "iron is a metal", "rome is a city"]


def distilling(folder, student=None, **options):
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_llama(seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    args = DistillationConfig(str(folder / "out"), **{**SETTINGS, "max_length": 64, **options})
    return DistillationTrainer(
        student or str(folder / "student"), str(folder / "teacher"), args, Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(),
    )  # fmt: skip


def unlearning(folder, **options):
    rows = [{"question": f"what is {word}?", "answer": "a metal"} for word in ("gold", "iron", "tin", "lead")]
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, target_modules="all-linear"))
    args = UnlearningConfig(str(folder / "out"), **{**SETTINGS, **options})
    return UnlearningTrainer(
        model, args, forget_dataset=rows[:2], retain_dataset=rows[2:], processing_class=byte_tokenizer()
    )


MAKERS = {"distillation": distilling, "unlearning": unlearning}


@pytest.mark.parametrize("job", MAKERS)
def test_save_model_leaves_a_result_without_a_pickle(tmp_path, job):
    trainer = MAKERS[job](tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    record = read_record(tmp_path / "saved")
    assert record.job == job and record.recipe == type(trainer).__name__ and record.config["learning_rate"] == 1e-2
    assert record.stages[0].seconds > 0 and record.seed == 1
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\n") and "hf_transfer_ext" in card and "fine-tuned version of" not in card
    assert not list((tmp_path / "saved").glob("*.bin"))
    if job == "distillation":
        assert [(item.role, item.name, bool(item.sha256)) for item in record.inputs] == [
            ("student", "student", True), ("teacher", "teacher", True),
            ("dataset", "rows given to the trainer, 4 rows", False),
        ]  # fmt: skip


@pytest.mark.parametrize("job", MAKERS)
def test_push_to_hub_publishes_the_result_alone(hub, tmp_path, monkeypatch, job):
    trainer = MAKERS[job](tmp_path, hub_token=hub.token, hub_model_id=f"tester/{job}", hub_private_repo=True)
    trainer.train()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    address = trainer.push_to_hub(dataset_name="tester/data", tags=["mine"], model_name="A title")
    sent = hub.files(f"tester/{job}")
    assert address.startswith("http") and not [name for name in sent if name.endswith((".bin", ".txt"))]
    card = sent["README.md"].decode()
    assert "# A title" in card and "- mine" in card and "tester/data" in card
    assert not any(hub.token.encode() in content for content in sent.values())
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert read_record(pull(f"tester/{job}")).job == job


def test_checkpoints_publish_the_model_and_no_optimizer(hub, tmp_path):
    trainer = distilling(
        tmp_path, push_to_hub=True, hub_token=hub.token, hub_model_id="tester/steps", save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert len(hub.commits("tester/steps")) >= 3  # the repository's own, and one a checkpoint
    assert not [name for name in hub.files("tester/steps") if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    with pytest.raises(ValueError, match="`hub_strategy` is 'checkpoint', but checkpoints with optimizer states"):
        refuse_published_states(
            DistillationConfig(str(tmp_path), **SETTINGS, push_to_hub=True, hub_strategy="checkpoint")
        )
    with pytest.raises(ValueError, match="`blocking=False` is not supported"):
        trainer.push_to_hub(blocking=False)


def test_without_a_teacher_the_record_says_fine_tuning(tmp_path):
    args = DistillationConfig(str(tmp_path / "out"), kd_weight=0.0, ce_weight=1.0, max_length=64, **SETTINGS)
    trainer = DistillationTrainer(
        tiny_llama(1), None, args, Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer()
    )
    record = trainer.record()
    assert record.job == "fine-tuning"
    assert record.inputs[0].name == "LlamaForCausalLM made in memory"


@pytest.mark.parametrize("init", AUXILIARIES)
def test_a_model_with_shared_layers_is_saved_expanded_and_resumes_exactly(tmp_path, init):
    teacher = tiny_llama(2, num_hidden_layers=4)

    def trainer_of(folder, **options):
        args = DistillationConfig(str(folder), **{**SETTINGS, "max_length": 64, "max_steps": 4, **options})
        return DistillationTrainer(
            AUXILIARIES[init](teacher), tiny_llama(3, num_hidden_layers=4), args, Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(),
        )  # fmt: skip

    whole = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "shared_parameters.safetensors").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(saved(ids).logits, whole.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert saved.config.num_hidden_layers == 4


def test_the_best_model_with_shared_layers_is_loaded_again(tmp_path):
    args = DistillationConfig(
        str(tmp_path), **{**SETTINGS, "max_length": 64, "save_strategy": "steps", "save_steps": 1, "max_steps": 2},
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    auxiliary = AUXILIARIES["linear_expansion"](tiny_llama(2, num_hidden_layers=4))
    data = Dataset.from_dict({"text": TEXTS})
    trainer = DistillationTrainer(
        auxiliary, tiny_llama(3, num_hidden_layers=4), args, data, eval_dataset=data, processing_class=byte_tokenizer()
    )
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(best(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert linear_expansion(trainer.model, StudentShape(depth=2)).config.num_hidden_layers == 2
