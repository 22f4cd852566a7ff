from dataclasses import dataclass, field

import pytest

from hf_transfer_ext import DistillationConfig
from hf_transfer_ext.recipe import parse_recipe, read_yaml, settings_of, use_all_cores


@dataclass
class Job:
    dataset: str
    steps: int = 3
    rate: float | None = 0.5
    shuffle: bool = True
    names: list[str] = field(default_factory=lambda: ["a"])
    columns: dict[str, str] | str | None = None


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
    assert job == Job("facts", 9, 1e-4, False, ["x", "y"]) and other == Other(5)


def test_without_a_file(tmp_path):
    assert parse_recipe(Job, argv=["--dataset", "d", "--names", "p", "q"]) == (Job("d", names=["p", "q"]),)


@pytest.mark.parametrize(
    "text, extra, message",
    [
        ("dataset: d\nstps: 3\n", [], "Unknown setting 'stps'. Did you mean 'steps'"),
        ("dataset: d\n", ["--stps", "3"], "Unknown option 'stps'. Did you mean 'steps'"),
        ("dataset: d\n", ["--stps=3"], "Unknown option 'stps'. Did you mean 'steps'"),
        ("dataset: d\n", ["stray"], "Unexpected argument 'stray'"),
        ("dataset: d\nsteps: many\n", [], "invalid int value: 'many'"),
        ("steps: 3\n", [], "required: --dataset"),
        ("- a\n", [], "has to hold `key: value` settings"),
        ("a: [\n", [], "is not valid YAML"),
    ],
)
def test_mistakes_are_told(tmp_path, text, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(Job, argv=[*write(tmp_path, text), *extra])


def test_a_mapping_comes_from_the_file_and_as_json(tmp_path):
    argv = write(tmp_path, "dataset: d\ncolumns: {text: body}\n")
    assert parse_recipe(Job, argv=argv)[0].columns == {"text": "body"}
    assert parse_recipe(Job, argv=[*argv, "--columns", '{"text": "b"}'])[0].columns == {"text": "b"}
    with pytest.raises(ValueError, match="`columns` is not valid JSON"):
        parse_recipe(Job, argv=[*argv, "--columns", "{text: b}"])


def test_a_missing_file_is_told():
    with pytest.raises(FileNotFoundError, match="no config file at 'absent'"):
        parse_recipe(Job, argv=["--config", "absent"])


def test_on_the_command_line_a_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes/job.py", "--dataset", "d", "--widht", "3"])
    with pytest.raises(SystemExit) as stop:
        parse_recipe(Job, Other)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("job.py: Unknown option 'widht'. Did you mean 'width'?")


def test_a_trainers_config_with_a_dictionary(tmp_path):
    argv = write(
        tmp_path, f"output_dir: {tmp_path}\nloss: generalized_jsd\nloss_options: {{beta: 0.3}}\nlearning_rate: 1e-3\n"
    )
    (config,) = parse_recipe(DistillationConfig, argv=[*argv, "--use_cpu", "true", "--bf16", "false"])
    assert config.loss_options == {"beta": 0.3} and config.learning_rate == 1e-3 and config.use_cpu
    with pytest.raises(ValueError, match="`beta` has to lie between"):
        parse_recipe(DistillationConfig, argv=[*argv, "--loss_options", '{"beta": 3}', "--bf16", "false"])


def test_the_settings_are_all_of_ours_and_what_differs_of_the_trainers(tmp_path):
    assert settings_of(Other(4)) == {"width": 4} and settings_of(Other()) == {"width": 2}
    told = settings_of(DistillationConfig(str(tmp_path), bf16=False, learning_rate=0.1))
    assert told["loss"] == "forward_kl" and told["learning_rate"] == 0.1 and told["output_dir"] == str(tmp_path)
    assert "weight_decay" not in told and "packing" not in told


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
