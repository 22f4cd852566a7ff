"""The page for those who come from another tool: every name on our side exists, and no setting of TRL is left out."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import hf_transfer_ext
from hf_transfer_ext import DistillationConfig, DistillationTrainer, trl
from hf_transfer_ext.catalogue import registries
from hf_transfer_ext.cli import COMMANDS
from hf_transfer_ext.recipes.distill import DistillArguments
from hf_transfer_ext.trainers.trl_names import TRL_NAMES, converted

PAGE = (Path(hf_transfer_ext.__file__).parent.parent / "docs" / "coming-from.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and line.count("|") == 4 and not line.startswith("| TRL |")
]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def test_every_setting_on_our_side_exists():
    own = {field.name for kind in (DistillationConfig, DistillArguments) for field in fields(kind)}
    known = own | set(inspect.signature(DistillationTrainer.__init__).parameters) | {"peft_config"}
    named = [name for _, ours, _ in ROWS for name in quoted(ours)]
    assert len(named) > 50 and not [name for name in named if name not in known]


def test_every_method_that_is_recommended_exists():
    methods = {name for found in registries().values() for name in found}
    for name in ("forward_kl", "reverse_kl", "generalized_jsd", "total_variation", "uld", "gold", "alm", "hidden_mse",
                 "hidden_cosine", "sampled_reverse_kl", "distillm", "distillm_2", "minillm"):  # fmt: skip
        assert f"`{name}`" in PAGE and name in methods
    assert "cache-teacher" in PAGE and "cache-teacher" in COMMANDS


def test_the_defaults_of_the_page_are_those_of_the_configurations(tmp_path):
    kinds = (DistillationConfig, trl.DistillationConfig, trl.GKDConfig, trl.GOLDConfig)
    configs = [converted(kind(str(tmp_path), use_cpu=True, bf16=False), DistillationConfig) for kind in kinds]
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in PAGE.splitlines() if line.count("|") == 6}
    for row, name in (("`learning_rate`", "learning_rate"), ("most tokens written", "max_new_tokens")):
        assert [float(cell) for cell in cells[row]] == [getattr(config, name) for config in configs]
    temperatures = [(config.sampling_temperature, config.distill_temperature) for config in configs]
    assert [
        tuple(map(float, cell.split(","))) for cell in cells["temperature of sampling, of the loss"]
    ] == temperatures
    assert [float(cell) for cell in cells["`top_p`"]] == [one.generation_options.get("top_p", 1) for one in configs]
    assert [cell.strip() for cell in cells["`disable_dropout`"]] == [str(one.disable_dropout) for one in configs]
    assert [one.truncation_mode for one in configs] == ["keep_start", "keep_start", "keep_end", "keep_end"]
    assert [one.max_length for one in configs] == [1024, None, 1024, 1024]


def test_no_setting_of_trl_is_left_out():
    section = PAGE.split("## TRL")[1].split("## DistillKit")[0]
    theirs = {name for line in section.splitlines() if line.startswith("|") for name in quoted(line.split("|")[1])}
    assert not TRL_NAMES - theirs
