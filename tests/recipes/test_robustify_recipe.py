import json

import pytest
import torch
from edits.edited_models import write_adapter, write_base
from tiny import byte_tokenizer

from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipe import CONFIGS, parse_recipe
from hf_transfer_ext.recipes import robustify
from hf_transfer_ext.recipes.run import TRAINER_GROUPS
from hf_transfer_ext.reproduce import reproduce
from hf_transfer_ext.trainers.distillation_config import DistillationConfig


def arguments(folder, model, **settings):
    told = {
        "output_dir": folder / "out", "model_name_or_path": model, "people": 3, "forget_people": 1, "facts": 2,
        "kd_weight": 1.0, "ce_weight": 0.0, "per_device_train_batch_size": 4, "num_train_epochs": 1,
        "use_cpu": "true", "bf16": "false", "report_to": "none", "save_strategy": "no", "disable_tqdm": "true",
        **settings,
    }  # fmt: skip
    return [str(word) for name, value in told.items() for word in (f"--{name}", value)]


def test_the_student_comes_back_to_its_teacher(tmp_path):
    base = write_base(tmp_path / "base", initializer_range=0.3)
    adapter = write_adapter(tmp_path / "adapter", base)
    byte_tokenizer().save_pretrained(adapter)
    found = robustify.main(arguments(tmp_path, adapter, share=0.2, num_train_epochs=16, learning_rate=3e-3))
    assert list(found) == ["unlearned", "with noise", "distilled"]
    teacher, noised, student = (
        load_model(adapter).merge_and_unload(),
        load_model(adapter),
        load_model(tmp_path / "out"),
    )
    noised = noised.merge_and_unload()
    robustify.perturb_model(noised, share=0.2, noise_scale=0.1, seed=42)
    row = fictitious_people(3, forget=1, holdout=0, facts=2, seed=42)["retain"][0]
    answer = QuestionAnswerFormat().encode(byte_tokenizer(), row["question"], row["answer"])

    def log_probs(model):
        with torch.no_grad():
            return model(torch.tensor([answer.input_ids])).logits[0, answer.answer_start - 1 : -1].log_softmax(-1)

    target = log_probs(teacher)
    before, after = ((target.exp() * (target - log_probs(one))).sum(-1).mean() for one in (noised, student))
    assert before > 0.05 and after < 0.5 * before
    record = read_record(tmp_path / "out")
    assert record.job == "unlearning" and record.config["share"] == 0.2 and record.seed == 42
    assert {one.role for one in record.inputs} >= {"model"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "was distilled from the unlearned model" in card and "with noise" in card and "No audit was made" in card


@pytest.mark.slow
def test_a_result_is_made_again_and_equal(tmp_path):
    base = write_base(tmp_path / "base", initializer_range=0.3)
    adapter = write_adapter(tmp_path / "adapter", base)
    byte_tokenizer().save_pretrained(adapter)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(4)))
    more = {"texts": tmp_path / "texts.jsonl", "text_rows": 3, "share": 0.1, "seed": 7}
    more |= {"logging_steps": 1, "num_train_epochs": 3, "overwrite": "true"}
    for _ in range(2):  # the plot that the first run drew among its checkpoints is replaced
        robustify.main(arguments(tmp_path, adapter, **more))
        assert (tmp_path / "out.training" / "training.png").is_file()
    found = reproduce(str(tmp_path / "out"), search=[str(tmp_path)])
    assert found.verdict == "equal", found.text()
    assert found.files["model.safetensors"] == "equal"
    assert found.metrics and {state for *_, state in found.metrics} == {"equal"}, found.text()


def test_what_is_distilled(tmp_path, monkeypatch):
    seen = {}

    class Stop(Exception):
        pass

    def trainer(student, teacher, args, data, **_):
        seen["rows"] = data
        raise Stop

    monkeypatch.setattr(robustify, "DistillationTrainer", trainer)
    base = write_base(tmp_path / "base")
    for name, count in (("forget", 2), ("retain", 3)):
        rows = [{"question": f"{name} {i}?", "answer": f"yes {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(5)))
    sets = {"forget_data": tmp_path / "forget.jsonl", "retain_data": tmp_path / "retain.jsonl"}
    more = {"texts": tmp_path / "texts.jsonl", "text_rows": 2}
    for forget, count in (("true", 7), ("false", 5)):
        with pytest.raises(Stop):
            robustify.main(arguments(tmp_path, base, **sets, **more, distill_forget=forget, overwrite="true"))
        assert len(seen["rows"]) == count
        for row in seen["rows"]:
            learned = [label for label in row["labels"] if label != -100]
            assert learned and row["input_ids"][-len(learned) :] == learned
        assert sum(row["labels"][0] == -100 for row in seen["rows"]) >= count - 2  # prompts are not distilled


def test_bad_settings_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(robustify, "load_named", lambda *arguments, **options: pytest.fail("loaded a model"))
    for more in ({"share": 0}, {"share": 1.5}, {"noise_scale": -0.1}):
        with pytest.raises(ValueError, match="`share` has to be"):
            robustify.main(arguments(tmp_path, "nowhere", **more))
    with pytest.raises(ValueError, match="would teach the answers of the forget set again"):
        robustify.main(arguments(tmp_path, "nowhere", ce_weight=0.5))
    for more in ({"kd_weight": 0, "ce_weight": 1, "distill_forget": "false"}, {"task": "seq2seq"}):
        with pytest.raises(ValueError, match="teaches its own copy"):
            robustify.main(arguments(tmp_path, "nowhere", **more))


def test_the_configuration_is_read():
    path = CONFIGS / "robustify" / "demo.yaml"
    job, args = parse_recipe(
        robustify.RobustifyArguments, DistillationConfig, argv=["--config", str(path)], groups=TRAINER_GROUPS
    )
    assert job.share == 0.15 and args.loss == "forward_kl"
