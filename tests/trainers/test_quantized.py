"""Students and teachers whose weights are packed to four bits by bitsandbytes."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer, tiny_llama
from transformers import BitsAndBytesConfig

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.models.loading import four_bit, load_model
from hf_transfer_ext.recipes import distill, unlearn

pytestmark = pytest.mark.slow
TEXTS = ["gold is a metal", "paris", "the sea is wide and the sky is high", "iron"]


@pytest.fixture(autouse=True)
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def wide_llama(seed):
    """bitsandbytes' own product on a CPU takes rows of whole blocks, 64 weights each."""
    return tiny_llama(seed, hidden_size=64, intermediate_size=128)


def in_four_bits(model, folder):
    model.save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = load_model(folder, dtype="float32", quantization_config=nf4)
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    return loaded


def same(one, other):
    """Equal; on CPUs with bfloat16 instructions, bitsandbytes reorders and rounds the scales in an evaluation."""
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    return torch.equal(one.flatten().bfloat16().sort()[0], other.flatten().bfloat16().sort()[0])


def trainer_of(student, teacher, folder, peft_config=None, **options):
    args = DistillationConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", max_length=64, learning_rate=2e-2, max_steps=20,
        lr_scheduler_type="constant", per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
        logging_steps=1, seed=0, **options,
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    return DistillationTrainer(
        student, teacher, args, data, byte_tokenizer(), eval_dataset=data, peft_config=peft_config
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_lora_on_a_four_bit_student_distils_and_the_packed_weights_stay(tmp_path, fused):
    student = in_four_bits(wide_llama(1), tmp_path / "student")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(student, tiny_llama(2), tmp_path / "out", fused=fused, peft_config=lora)
    before = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not same(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    losses = [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_divergence_from_a_four_bit_teacher_is_that_from_its_own_logits(tmp_path, fused):
    teacher, student = in_four_bits(wide_llama(2), tmp_path / "teacher"), tiny_llama(1)
    trainer = trainer_of(student, teacher, tmp_path / "out", fused=fused, gradient_checkpointing=False)
    measured = trainer.evaluate()["eval_kd"]

    def logits(model):
        with torch.no_grad():
            return [model(torch.tensor([row["input_ids"]])).logits[0, :-1] for row in trainer.eval_dataset]

    before = logits(teacher)
    p, q = (torch.cat(rows).double().log_softmax(-1) for rows in (before, logits(student)))
    assert measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)

    trainer.train()
    assert trainer.evaluate()["eval_kd"] < 0.7 * measured
    assert all(map(torch.equal, logits(teacher), before))


def test_the_recipes_train_a_lora_on_a_four_bit_model_and_save_it_alone(tmp_path):
    """`student: {four_bit: true, lora_rank: 4}`, and `four_bit: true`, from the command line to the saved adapter."""
    for seed, name in ((1, "student"), (2, "teacher")):
        wide_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    shared = "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu true --report_to none "
    shared += "--save_strategy no --disable_tqdm true --output_dir {}/"
    distilling = (
        "--teacher {}/teacher --student {}/student --student.four_bit true --student.lora_rank 4 --bf16 false "
    )
    distilling += "--dataset {}/data.jsonl --test_split train[:2] --max_length 64 " + shared + "distilled"
    measured = distill.main(distilling.replace("{}", str(tmp_path)).split())
    before, after = ({m.name: m.value for m in measured[name]} for name in ("student before", "student"))
    assert after["kl_to_reference"] < before["kl_to_reference"]
    unlearning = (
        "--model_name_or_path {}/student --four_bit true --people 2 --forget_people 1 --facts 2 --lora_rank 4 "
    )
    unlearn.main((unlearning + shared + "unlearned").replace("{}", str(tmp_path)).split())
    for folder in ("distilled", "unlearned"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
        assert not (tmp_path / folder / "model.safetensors").exists()
        adapted = load_model(tmp_path / folder)
        assert any(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("words, message", [
    ("--student {}/x --student_four_bit true", "cannot be trained then. Set `student_lora_rank`"),
    ("--student_lora_rank 4", "`student_lora_rank` is 4, but the student is made from the teacher"),
    ("--student {}/x --student_lora_rank -1", "must be >= 0"),
    ("--student {}/x --student_lora_rank 2 --student_four_bit true --compare_with_ce true", "packs them. Leave one"),
])  # fmt: skip
def test_what_a_lora_of_the_student_cannot_be_is_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        distill.main(
            ["--teacher", "t", "--output_dir", str(tmp_path / "o"), *words.replace("{}", str(tmp_path)).split()]
        )


def test_without_bitsandbytes_the_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_transfer_ext.models.loading.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, .*hf_transfer_ext\[gpu\]"):
        four_bit()
