"""What recipes share."""

from pathlib import Path

import pytest

from hf_transfer_ext import DistillationConfig
from hf_transfer_ext.recipes.run import as_words, start_record
from hf_transfer_ext.recipes.training import start_training


def config(folder, **more):
    return DistillationConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **more)


def test_a_run_pins_all_settings_its_command_and_its_recipe(tmp_path):
    args = config(tmp_path / "out", learning_rate=0.1)
    record = start_record(
        "distillation", __file__, ["--hub_token", "secret", "--a", str(tmp_path / "b")], args, seed=3
    )
    assert record.command == ["test_run", "--hub_token", "[removed]", "--a", "b"]
    assert record.config["learning_rate"] == 0.1 and record.defaults["weight_decay"] == 0.0
    assert len(record.recipe_sha256) == 64 and record.seed == 3 and record.recipe == "hf-transfer-ext test_run"


@pytest.mark.parametrize(
    "told, expected",
    [(None, None), ("false", None), ("none", None), ("true", "newest"), ("some/folder", "some/folder")],
)
def test_a_run_goes_on_from_the_checkpoint_that_was_named(tmp_path, told, expected):
    args = config(tmp_path / "out", resume_from_checkpoint=told)
    run = start_training("distillation", __file__, [], args, args, overwrite=False)
    assert run.out == tmp_path / "out" and args.output_dir == str(tmp_path / "out.training" / "checkpoints")
    whole = Path(args.output_dir) / "checkpoint-3"
    whole.mkdir(parents=True)
    (whole / "trainer_state.json").write_text("{}")
    assert run.checkpoint == (str(whole) if expected == "newest" else expected)


def test_the_result_is_pushed_and_not_the_checkpoints(tmp_path, hub):
    args = config(tmp_path / "out", push_to_hub=True, hub_model_id="tester/name", hub_token=hub.token)
    run = start_training("distillation", __file__, [], args, args, overwrite=False)
    assert run.push_to == "tester/name" and args.push_to_hub is False
    assert as_words(seed=1, overwrite=True) == ["--seed", "1", "--overwrite", "True"]
