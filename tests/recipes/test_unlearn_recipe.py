import json

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.edits import apply
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipe import CONFIGS, parse_recipe
from hf_transfer_ext.recipes import unlearn
from hf_transfer_ext.recipes.run import TRAINER_GROUPS
from hf_transfer_ext.trainers.unlearning import UnlearningConfig


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def arguments(tmp_path, model_folder, **settings):
    told = {
        "output_dir": tmp_path / "out",
        "model_name_or_path": model_folder,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
        **settings,
    }
    return [str(word) for name, value in told.items() for word in (f"--{name}", value)]


def test_made_up_people_are_taught_and_forgotten_and_the_result_is_whole(tmp_path, model_folder, capsys):
    found = unlearn.main(
        arguments(
            tmp_path,
            model_folder,
            people=3,
            forget_people=1,
            facts=2,
            teach_epochs=8,
            trim_vocabulary="true",
            original_dir=tmp_path / "original",
            retrained_dir=tmp_path / "retrained",
        )
    )
    names = [m.name for m in found["after"]]
    assert "forget truth_ratio(definition=arithmetic, role=forget)" in names and "retain perplexity" in names
    assert "forget answer_probability" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())
    assert record["job"] == "unlearning" and [m["name"] for m in record["metrics"]] == names
    assert (tmp_path / "out" / "README.md").is_file()
    assert load_model(tmp_path / "out").num_parameters() > 0
    original, retrained = (load_model(tmp_path / name).state_dict() for name in ("original", "retrained"))
    assert any(not torch.equal(original[name], retrained[name]) for name in original)
    with pytest.raises(FileExistsError, match="--overwrite"):
        unlearn.main(arguments(tmp_path, model_folder))


def test_facets_are_measured_and_their_own_facts_are_learned(tmp_path, model_folder, monkeypatch):
    learned = {}
    monkeypatch.setattr(unlearn, "teach", lambda run, job, model, tokenizer, rows, _: learned.update(rows) or model)
    facets = '{"phrasings": 1, "languages": ["fr"], "multi_hop": 2}'
    more = {"people": 3, "forget_people": 1, "facts": 4, "teach_epochs": 1, "facets": facets}
    found = unlearn.main(arguments(tmp_path, model_folder, **more))
    counts = {m.name: m.examples for m in found["after"] if m.name.endswith("answer_probability")}
    assert counts["forget_phrasings answer_probability"] == 4 and counts["retain_multi_hop answer_probability"] == 6
    assert {m.name.split()[0] for m in found["before"]} >= {"forget_languages", "retain_languages"}
    assert [row["fact"] for row in learned["forget"]][3:] == ["employer", "neighbor"]
    assert not next(m for m in found["after"] if m.name == "forget_languages answer_probability").higher_is_better
    with pytest.raises(ValueError, match="Unknown facet of fictitious people 'phrasing'"):
        unlearn.main(arguments(tmp_path / "other", model_folder, facets='{"phrasing": 1}'))


def test_own_data_with_other_columns_gives_an_adapter(tmp_path, model_folder):
    for name in ("forget", "retain"):
        rows = [{"frage": f"{name} {i}?", "antwort": f"yes {i}"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = unlearn.main(
        arguments(
            tmp_path,
            model_folder,
            forget_data=tmp_path / "forget.jsonl",
            retain_data=tmp_path / "retain.jsonl",
            columns='{"question": "frage", "answer": "antwort"}',
            method="simnpo",
        )
    )
    assert [m.examples for m in found["after"] if m.name.startswith("retain")] == [3, 3]
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_typo_is_told_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="'metod'"):
        unlearn.main(["--output_dir", str(tmp_path), "--model_name_or_path", "nowhere/at-all", "--metod", "npo"])


@pytest.mark.parametrize("setting", ["original_dir", "retrained_dir"])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_further_output_folders_are_checked_before_work(tmp_path, model_folder, monkeypatch, setting, overwrite):
    monkeypatch.setattr(unlearn, "load_named", lambda *arguments, **options: pytest.fail("loaded a model"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder, error, message in (
        (tmp_path / "mine", FileExistsError, r"notes\.txt"),
        (model_folder, ValueError, "holds the input"),
        (tmp_path / "out", ValueError, "contain each other"),
        (tmp_path / "out" / "original", ValueError, "contain each other"),
    ):
        with pytest.raises(error, match=message):
            unlearn.main(arguments(tmp_path, model_folder, overwrite=overwrite, **{setting: folder}))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and (model_folder / "config.json").exists()


CONFIGURED = sorted((CONFIGS / "unlearn").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in CONFIGURED if p.stem != "edits"], ids=lambda path: path.stem)
def test_each_configuration_is_one_that_the_recipe_takes(tmp_path, path):
    own = [] if "output_dir" in path.read_text() else ["--output_dir", str(tmp_path), "--model_name_or_path", "demo"]
    words = ["--config", str(path), *own, "--use_cpu", "true"]
    job, args = parse_recipe(unlearn.UnlearnArguments, UnlearningConfig, argv=words, groups=TRAINER_GROUPS)
    assert args.method in METHODS and args.report_to == []
    assert job.model_name_or_path == ("Qwen/Qwen2.5-7B-Instruct" if path.stem == "qlora" else "demo")


def test_there_is_a_configuration_for_each_family():
    families = {"gradient_difference", "preference", "representation", "edits", "robust"}
    assert families <= {path.stem for path in CONFIGURED}


def test_the_configuration_of_an_edit_is_one_that_the_command_takes(tmp_path, model_folder):
    for part in ("forget", "retain"):
        row = {"question": f"{part}?", "answer": f"{part} yes"}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(row) + "\n")
    words = [str(model_folder), str(tmp_path / "out"), "--config", str(CONFIGS / "unlearn" / "edits.yaml")]
    words += ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    assert apply.main(words) == 0
    record = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())
    assert record["config"]["method"] == "wanda" and record["config"]["options"]["share"] == 0.05
    plain = apply.with_config(["--config", str(CONFIGS / "unlearn" / "edits.yaml"), "--seed", "4"])
    assert plain[:2] == ["runs/unlearn-demo-original", "runs/unlearn-edits"] and plain.count("--seed") == 1
    with pytest.raises(ValueError, match="--config needs a file"):
        apply.main(["--config"])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="has to hold settings as `name: value`"):
        apply.main(["--config", str(tmp_path / "list.yaml")])
