"""The distillation recipe with a student that writes its own texts, from the command line to its result."""

import json

from recipes.test_distill_recipe import run, setup, values  # noqa: F401

from hf_transfer_ext.hub.record import read_record


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
