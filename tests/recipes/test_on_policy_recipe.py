"""The distillation recipe with a student that writes its own texts, from the command line to its result."""

import json
import shutil

import pytest
from recipes.test_distill_recipe import run, setup, values  # noqa: F401

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.trainers.rollouts import WRITTEN


def test_the_student_writes_and_the_twin_learns_from_the_data(setup):  # noqa: F811
    for split in ("train", "test"):
        rows = [{"prompt": f"what is {name}? ", "completion": "a metal"} for name in ("gold", "tin", "iron")] * 4
        (setup / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = run(
        setup, "--columns", "none", "--on_policy", "gkd", "--on_policy_share", "1", "--max_new_tokens", "6",
        "--loss", "reverse_kl", "--log_rollouts", "1", "--compare_with_ce", "true",
    )  # fmt: skip
    assert list(measured) == ["teacher", "student before", "student", "twin without teacher"]
    assert values(measured, "kl_to_reference")["student"] >= 0
    record = read_record(setup / "out")
    assert record.config["on_policy"] == "gkd" and record.config["max_new_tokens"] == 6


def test_prompts_alone_are_written_after_and_what_needs_texts_is_refused(setup):  # noqa: F811
    shutil.rmtree(setup / "data")
    rows = [{"prompt": f"what is {name}? "} for name in ("gold", "tin", "iron", "lead")]
    (setup / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "--columns", "none", "--dataset", str(setup / "data.jsonl"), "--on_policy", "gkd", "--on_policy_share", "1",
        "--max_new_tokens", "6", "--max_steps", "2",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"`teach_steps` is 3, which needs whole texts, but .*data.jsonl' holds prompts"
    ):
        run(setup, *words, "--teach_steps", "3")
    assert run(setup, *words, "--log_rollouts", "4") == {}
    written = (setup / "out.training" / "checkpoints" / WRITTEN).read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in written} == {row["prompt"] for row in rows}
    with pytest.raises(ValueError, match="which match none of the formats"):
        run(setup, *words[:4], "--overwrite", "true")
