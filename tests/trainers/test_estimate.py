"""Memory and time on paper: parts that can be counted are exact, the sum is compared with a measured peak."""

import json

import pytest
import torch
import transformers
from tiny import tiny_llama
from transformers import LlamaConfig

from benchmarks import plan
from hf_transfer_ext.cli import main
from hf_transfer_ext.trainers.estimate import Rates, Shape, Step, devices_of, kept_bytes
from hf_transfer_ext.trainers.taught import lora_on
from hf_transfer_ext.weights.kinds import MODEL_KINDS


def test_a_shape_counts_the_parameters_of_the_model_and_of_its_lora():
    model = tiny_llama(1)
    shape = Shape.of(model.config)
    assert shape.parameters == model.num_parameters()
    trained = sum(p.numel() for p in lora_on(model, 4).parameters() if p.requires_grad)
    assert shape.adapter_parameters(4) == trained


def test_the_parts_of_the_memory_follow_the_settings():
    shape = Shape.of(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4))
    whole = Step(shape, 1024, shape).memory()
    assert whole["weights"] == whole["teacher"] == 4 * shape.parameters
    assert whole["optimizer"] == 8 * shape.parameters
    sharded = Step(shape, 1024, shape, shards=8).memory()
    assert sharded["optimizer"] == whole["optimizer"] / 8 and sharded["teacher"] == whole["teacher"] / 8
    assert Step(shape, 1024, shape, optimizer="paged_adamw_8bit").memory()["optimizer"] == 2 * shape.parameters
    assert Step(shape, 1024).memory()["teacher"] == 0
    assert Step(shape, 1024, checkpointing=True).activations() < Step(shape, 1024).activations() / 2
    assert Step(shape, 2048).activations() == 2 * Step(shape, 1024).activations()
    lora = Step(shape, 1024, trained=1000, weight_bytes=0.5).memory()
    assert lora["optimizer"] == 8000 and lora["weights"] == 0.5 * shape.parameters + 4000


def test_the_time_is_the_sum_of_its_parts_each_at_its_own_rate():
    untied = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape = Shape.of(LlamaConfig(**untied, vocab_size=100, tie_word_embeddings=False))
    tied = Shape.of(LlamaConfig(**untied, vocab_size=100, tie_word_embeddings=True))
    assert shape.multiplied == shape.parameters - 6400 == tied.multiplied == tied.parameters
    alone, taught = Step(shape, 1024, length=512), Step(shape, 1024, shape, length=512)
    assert alone.operations() == 6 * 1024 * shape.multiplied and taught.operations() == 8 * 1024 * shape.multiplied
    assert alone.attention_operations() == 3.5 * 2 * 1024 * 512 * 64 * 4
    assert taught.attention_operations() == 4.5 * 2 * 1024 * 512 * 64 * 4
    assert Step(shape, 1024, length=512, checkpointing=True).attention_operations() == taught.attention_operations()
    parts, faster = (taught.seconds(Rates(*rates)) for rates in ((1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0)))
    assert parts["loss"] == 5 * 1024 * 100 and parts["update"] == (12 + 16) * shape.parameters
    assert faster == {**parts, "products": parts["products"] / 2}


def test_devices_are_a_number_and_a_size():
    assert devices_of("8x80GB") == (8, 80e9) and devices_of("1x24 gb") == (1, 24e9)
    for wrong in ("80GB", "0x80GB", "8x80"):
        with pytest.raises(ValueError, match="such as 8x80GB"):
            devices_of(wrong)


@pytest.fixture
def recipe(tmp_path):
    for name, layers in (("student", 2), ("teacher", 4)):
        tiny_llama(1, num_hidden_layers=layers).save_pretrained(tmp_path / name)
    content = {"teacher": {"name": str(tmp_path / "teacher")}, "student": str(tmp_path / "student"), "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return tmp_path


def test_the_doctor_plans_a_recipe(recipe, capsys):
    assert main(["doctor", "--plan", str(recipe / "recipe.yaml"), "--gpus", "8x80GB", "--sharded"]) == 0
    out = capsys.readouterr().out
    assert "shared by 8 devices; 512 tokens" in out and "optimizer" in out and "It fits" in out
    assert main(["doctor", "--plan", str(recipe / "recipe.yaml"), "--gpus", "1x0.05GB"]) == 0
    assert "It does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "masked_lm", "seq2seq"])
def test_the_doctor_plans_the_other_tasks(tmp_path, capsys, task):
    for name in ("student", "teacher"):
        plan.task_config_of(task, (64, 128, 2)).save_pretrained(tmp_path / name)
    content = {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student"), "task": task}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    assert main(["doctor", "--plan", str(tmp_path / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    length = 1024 if task == "seq2seq" else 512  # as many as BERT has positions
    assert f"{8 * length} tokens in a micro-batch" in out and "The time is estimated for language models" in out
    assert ("logits" in out) is (task in ("masked_lm", "seq2seq"))


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm", "seq2seq"])
def test_what_is_kept_is_counted_as_a_forward_pass_with_memory_keeps_it(task):
    config, rows, length = plan.task_config_of(task, (64, 128, 2)), 3, 40
    kind = getattr(transformers, MODEL_KINDS[task].auto_class)
    model, found = kind.from_config(config).train(), {}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = {"input_ids": torch.ones(rows, length, dtype=torch.long)}
    answers = {"decoder_input_ids": ids["input_ids"]} if task == "seq2seq" else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**ids, **answers)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert output.logits is not None
    target = {"target_length": length} if answers else {}
    counted = rows * kept_bytes(config, task, length=length, fused_attention=False, **target)
    assert counted == pytest.approx(kept, rel=0.02)  # T5's bias of positions is the same for all rows
    if task != "seq2seq":
        flash = rows * kept_bytes(config, task, length=length)
        assert flash < counted


@pytest.mark.parametrize("content, message", [
    ({"teacher": "t"}, "name a finished `student`"),
    ({"teacher": "t", "studnet": "s"}, "Did you mean 'student'"),
    ({"teachers": [{"model": "a"}, {"adapter": "c"}, {"model": "b"}], "student": "s"}, "2 models (a, b). `--dry_run"),
    ({"teacher": "t", "student": "s", "task": "vision_language"}, "'vision_language' cannot be planned: how many"),
    ({"teacher": "t", "student": "s", "task": "sentence_embedding"}, "cannot be planned: whether a row is one text"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_planned_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    assert main(["doctor", "--plan", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", plan.CASES)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(name):
    found = plan.measure_in_child("benchmarks.plan:step_of", {"name": name}, limit_bytes=8e9)
    assert found["status"] == "ok", found
    estimate = sum(plan.estimated(plan.CASES[name]).memory().values())
    assert estimate == pytest.approx(found["growth_bytes"], rel=0.2)
