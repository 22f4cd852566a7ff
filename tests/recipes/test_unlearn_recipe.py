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


FORGETS = {"people": 3, "forget_people": 1, "facts": 2, "teach_epochs": 2, "trim_vocabulary": "true"}


@pytest.mark.slow
def test_evaluations_in_training_become_a_curve_in_the_card(tmp_path, model_folder):
    measured = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": "true", "curve": "{max_new_tokens: 4}"}
    retrained = {"retrained_dir": tmp_path / "retrained"}
    unlearn.main(arguments(tmp_path, model_folder, **FORGETS, **measured, **retrained))
    assert (tmp_path / "out" / "unlearning_curve.png").is_file()
    notes = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())["notes"]
    lines = notes["Forgetting against utility"]
    assert [line.split(":")[0] for line in lines] == ["Step 0", "Step 1", "Step 2"]
    for name in ("forgotten", "utility", "balance", "forget rouge l recall", "forget quality"):
        assert all(f"{name} " in line for line in lines)
    assert "unlearning_curve.png" in (tmp_path / "out" / "README.md").read_text()
    for settings, message in (
        ({"curve": "{limit: 4}"}, "set `eval_strategy` and `eval_steps` too"),
        ({**measured, "curve": "{limits: 4}"}, "Did you mean 'limit'"),
    ):
        with pytest.raises(ValueError, match=message):
            unlearn.main(arguments(tmp_path / "other", model_folder, people=3, overwrite="true", **settings))


def test_a_model_is_corrupted_and_what_is_restored_is_measured(tmp_path, model_folder):
    corrupted = {"corrupt_epochs": 6, "corrupt_learning_rate": 1e-2, "corrupted_dir": tmp_path / "corrupted"}
    found = unlearn.main(arguments(tmp_path, model_folder, people=3, forget_people=1, facts=2, **corrupted))
    assert list(found) == ["original", "before", "after"]
    by_name = {stage: {m.name: m for m in own} for stage, own in found.items()}
    before, original = by_name["before"], by_name["original"]
    assert before["corrupted log-probability"].value > original["corrupted log-probability"].value
    assert before["correct log-probability"].examples == 2 and "forget answer_probability" in before
    recovered, name = by_name["after"]["recovery"], "log-probability"
    gaps = [one[f"correct {name}"].value - one[f"corrupted {name}"].value for one in by_name.values()]
    assert recovered.value == pytest.approx((gaps[2] - gaps[1]) / (gaps[0] - gaps[1]), rel=1e-4)
    assert load_model(tmp_path / "corrupted").num_parameters() == load_model(tmp_path / "out").num_parameters()
    record = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())
    assert "recovery" in {m["name"] for m in record["metrics"]} and "original" in record["compared"]
    for settings, message in (
        ({"corrupted_dir": tmp_path / "no"}, "`corrupted_dir` is for a model that is corrupted here"),
        ({"corrupt_epochs": 1, "facets": '{"phrasings": 1}'}, "leave `facets` out"),
        ({"corrupt_epochs": 1, "restor_options": "{shot: 1}"}, "Unknown option of the corruption RESTOR 'shot'"),
    ):
        with pytest.raises(ValueError, match=message):
            unlearn.main(arguments(tmp_path / "other", model_folder, people=3, overwrite="true", **settings))


@pytest.mark.slow
def test_restors_own_facts_and_texts_are_used(tmp_path, model_folder):
    facts = {
        "dset": {"Ada": {"P1": {"question": "Where was Ada born?", "answers": ["London"]}}},
        "context": {"P1": []},
    }
    facts["dset"]["Eve"] = {"P1": {"question": "Where was Eve born?", "answers": ["Paris"]}}
    data = {"facts": facts, "entities": ["Ada"], "mix": [{"text": "Ada was born in Paris."}]}
    for name, content in data.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    where = {"restor_data": tmp_path, "forget_data": tmp_path / "mix.json", "restor_options": "{corruption: mix}"}
    options = {"method": "grad_ascent", "corrupt_epochs": 3, "corrupt_learning_rate": 1e-2}
    found = unlearn.main(arguments(tmp_path / "run", model_folder, **where, **options))
    assert {m.name for m in found["original"]} >= {"correct log-probability", "corrupted log-probability"}
    record = json.loads((tmp_path / "run" / "out" / "hf_transfer_ext.json").read_text())
    assert len([item for item in record["inputs"] if item["role"] == "dataset"]) == 2


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
