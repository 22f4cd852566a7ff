from dataclasses import dataclass, field

import pytest

from hf_transfer_ext import DistillationConfig
from hf_transfer_ext.recipe import (
    CONFIGS,
    find_config,
    inherited_defaults,
    parse_recipe,
    read_yaml,
    settings_of,
    use_all_cores,
)


@dataclass
class Job:
    """What the job does.

    Args:
        steps: How many steps.
    """

    dataset: str = field(metadata={"group": "data", "help": "What is read."})
    columns: dict[str, str] | str | None = field(default=None, metadata={"group": "data"})
    teacher: str | None = field(default=None, metadata={"group": "teacher"})
    teacher_revision: str = field(default="main", metadata={"group": "teacher"})
    steps: int = 3
    rate: float | None = 0.5
    shuffle: bool = True
    names: list[str] = field(default_factory=lambda: ["a"])


@dataclass
class Other:
    width: int = 2


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_the_file_fills_and_the_command_line_wins(tmp_path):
    argv = write(tmp_path, "dataset: facts\nsteps: 7\nrate: 1e-4\nshuffle: false\nnames: [x, y]\nwidth: 5\n")
    job, other = parse_recipe(Job, Other, argv=[*argv, "--steps", "9"])
    assert job == Job("facts", steps=9, rate=1e-4, shuffle=False, names=["x", "y"]) and other == Other(5)
    assert parse_recipe(Job, Other, argv=[*argv, "--rate", "none"])[0].rate is None


def test_without_a_file():
    assert parse_recipe(Job, argv=["--dataset", "d", "--names", "p", "q"]) == (Job("d", names=["p", "q"]),)


@pytest.mark.parametrize(
    "text",
    [
        "dataset: d\ncolumns: {text: body}\nteacher: t\nteacher_revision: v1\nsteps: 5\n",
        "data: {dataset: d, columns: {text: body}}\nteacher: {name: t, revision: v1}\nsteps: 5\n",
        "data: {dataset: d, columns: {text: body}}\nteacher: {teacher: t, teacher_revision: v1}\nsteps: 5\n",
        "data: {dataset: d}\ncolumns: {text: body}\nteacher: t\nteacher_revision: v1\nsteps: 5\n",
    ],
)
def test_settings_stand_in_groups_or_flat(tmp_path, text):
    (job,) = parse_recipe(Job, argv=write(tmp_path, text))
    assert job == Job("d", {"text": "body"}, "t", "v1", steps=5)
    (job,) = parse_recipe(Job, argv=[*write(tmp_path, text), "--teacher.revision", "v2", "--teacher", "u"])
    assert (job.teacher, job.teacher_revision) == ("u", "v2")


@pytest.mark.parametrize(
    "text, extra, message",
    [
        ("dataset: d\nstps: 3\n", [], r"recipe.yaml: Unknown setting 'stps'. Did you mean 'steps'\?$"),
        ("dataset: d\n", ["--stps", "3"], r"^Unknown option 'stps'. Did you mean 'steps'\?$"),
        ("dataset: d\n", ["--stps=3"], r"Unknown option 'stps'. Did you mean 'steps'\?$"),
        (
            "dataset: d\nteacher: {revison: 3}\n",
            [],
            r"In `teacher`: Unknown setting 'revison'. Did you mean 'revision'",
        ),
        ("dataset: d\nteacher: {steps: 3}\n", [], "`steps` does not belong to `teacher`: it stands outside of groups"),
        ("dataset: d\nteacher: {dataset: 3}\n", [], "does not belong to `teacher`: it stands in the group `data`"),
        ("dataset: d\ndata: {dataset: e}\n", [], "`dataset` is set twice"),
        ("dataset: d\ndata: 3\n", [], "`data` is a group of settings"),
        ("dataset: d\n", ["--teacher.revison", "3"], "Did you mean 'revision'"),
        ("dataset: d\n", ["stray"], "Unexpected argument 'stray'"),
        ("dataset: d\nsteps: many\n", [], "`steps` has to be INT, got 'many'"),
        ("dataset: d\nsteps: null\n", [], "`steps` has to be INT, got None"),
        ("steps: 3\n", [], "`dataset` is required: What is read"),
        ("- a\n", [], "has to hold `key: value` settings"),
        ("a: [\n", [], "is not valid YAML"),
    ],
)
def test_mistakes_are_told(tmp_path, text, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(Job, argv=[*write(tmp_path, text), *extra])


def test_a_mapping_comes_from_the_file_and_from_one_line(tmp_path):
    argv = write(tmp_path, "dataset: d\ncolumns: {text: body}\n")
    assert parse_recipe(Job, argv=argv)[0].columns == {"text": "body"}
    for text in ('{"text": "b"}', "{text: b}"):
        assert parse_recipe(Job, argv=[*argv, "--columns", text])[0].columns == {"text": "b"}
    with pytest.raises(ValueError, match="`columns` has to be a list"):
        parse_recipe(Job, argv=[*argv, "--columns", "{text: [}"])


def test_help_shows_the_jobs_own_settings_by_group_and_then_what_is_inherited(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_recipe(Job, DistillationConfig, argv=["--help"], groups={"loss": ["loss", "kd_weight"]})
    assert stop.value.code == 0
    out = capsys.readouterr().out
    order = ["What the job does.", "data (in YAML", "What is read. (required)", "--teacher_revision", "loss (in YAML"]
    order += ["reverse_kl", "settings:", "How many steps.", "inherited from transformers and TRL", "--learning_rate"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)


def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("recipes/configs/distill/demo.yaml", "distill/demo.yaml"):
        assert find_config(path) == CONFIGS / "distill" / "demo.yaml"
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "demo.yaml").write_text("teacher: mine\n")
    assert read_yaml("distill/demo.yaml") == {"teacher": "mine"}
    for path in ("absent", "../recipes/configs/distill/demo.yaml", "/recipes/configs/distill/demo.yaml"):
        with pytest.raises(FileNotFoundError, match="no config file at"):
            find_config(path)


def test_a_trainers_config_with_a_dictionary(tmp_path):
    text = f"output_dir: {tmp_path}\nloss: {{name: generalized_jsd, options: {{beta: 0.3}}}}\nlearning_rate: 1e-3\n"
    argv, groups = write(tmp_path, text), {"loss": ["loss", "loss_options"]}
    (config,) = parse_recipe(DistillationConfig, argv=[*argv, "--use_cpu", "true", "--bf16", "false"], groups=groups)
    assert config.loss == "generalized_jsd" and config.loss_options == {"beta": 0.3}
    assert config.learning_rate == 1e-3 and config.use_cpu
    with pytest.raises(ValueError, match="`beta` has to lie between"):
        extra = ["--loss_options", '{"beta": 3}', "--bf16", "false"]
        parse_recipe(DistillationConfig, argv=[*write(tmp_path, "loss: generalized_jsd\n"), *extra], groups=groups)


def test_all_settings_are_pinned_what_was_set_apart_from_inherited_defaults(tmp_path):
    assert settings_of(Other(4)) == {"width": 4} and settings_of(Other()) == {"width": 2}
    config = DistillationConfig(str(tmp_path), bf16=False, learning_rate=0.1)
    told, rest = settings_of(config), inherited_defaults(config)
    assert told["loss"] == "forward_kl" and told["learning_rate"] == 0.1 and told["output_dir"] == str(tmp_path)
    assert "weight_decay" not in told and rest["weight_decay"] == 0.0 and rest["packing"] is False
    assert not set(told) & set(rest)
    assert set(told) | set(rest) == {name for name, f in config.__dataclass_fields__.items() if f.init}


def test_an_empty_file_sets_nothing(tmp_path):
    assert read_yaml(write(tmp_path, "# nothing\n")[1]) == {}


def test_a_lone_process_of_the_launcher_gets_all_cores(monkeypatch):
    given = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    use_all_cores()  # not launched: the number is the user's own
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    use_all_cores()
    assert given == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    use_all_cores()
    assert given == [3]
