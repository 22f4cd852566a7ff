import hashlib
import json
import math

import pytest

from hf_transfer_ext.hub.record import (
    RECORD_FILE,
    SCHEMA_VERSION,
    RunInput,
    RunRecord,
    describe_input,
    device_summary,
    read_record,
)
from hf_transfer_ext.measurement import Measurement

TOKEN = "hf_" + "aB3" * 12


def record(**fields):
    return RunRecord(**{"job": "distillation", "recipe": "recipes/distill.py", **fields})


def model_folder(folder, weights=b"weights", card="", model_type="llama"):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def test_what_is_written_is_read_back(tmp_path):
    written = record(
        config={"loss": "reverse_kl", "lr": 1e-4},
        inputs=[RunInput("a/b", "teacher", True, "c" * 40, {"model.safetensors": "d" * 64}, {"license": "mit"})],
        metrics=[
            Measurement("perplexity", 3.5, "perplexity", False, 7, (3.0, 4.0), "held-out"),
            Measurement("broken", float("nan"), "nats per token", False, 7),
        ],
        compared={"teacher": [Measurement("perplexity", 3.0, "perplexity", False, 7)]},
        not_measured=["Anything else."],
        seed=3,
        device={"device": "cpu"},
    )
    with written.stage("train"):
        pass
    written.write(tmp_path)
    read = read_record(tmp_path)
    assert math.isnan(read.metrics[1].value)
    assert read.to_dict() == written.to_dict() and read.digest() == written.digest()
    assert read.metrics[0] == written.metrics[0] and read.inputs == written.inputs
    assert read.stages[0].name == "train" and read.versions["python"].startswith("3.")
    assert json.loads((tmp_path / RECORD_FILE).read_text())["schema_version"] == SCHEMA_VERSION


def test_neither_tokens_nor_folders_are_written(tmp_path):
    data = tmp_path / "secret-folder" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    made = record(
        config={
            "hub_token": TOKEN,
            "note": f"token {TOKEN}",
            "data": str(data),
            "nested": [{"out": tmp_path / "out"}],
        },
        metrics=[Measurement("perplexity", 1.0, "perplexity", False, 1, dataset=str(data))],
    )
    text = made.write(tmp_path).read_text()
    assert TOKEN not in text and str(tmp_path) not in text and "secret-folder" not in text
    assert made.config == {"note": "token [removed]", "data": "train.jsonl", "nested": [{"out": "out"}]}
    assert made.files == {"train.jsonl": hashlib.sha256(b"{}").hexdigest()}


def test_a_foreign_record_does_not_make_us_read_local_files(tmp_path):
    private = tmp_path / "private.txt"
    private.write_text("x")
    data = record().to_dict()
    data["config"] = {"data": str(private)}
    assert RunRecord.from_dict(data).files == {}


def test_a_chain_has_one_record_of_all_that_was_done(tmp_path):
    teacher = model_folder(tmp_path / "teacher")
    student = model_folder(tmp_path / "student", b"student")
    record(inputs=[describe_input(teacher, role="teacher")]).write(student)
    left, right = model_folder(tmp_path / "left", b"l"), model_folder(tmp_path / "right", b"r")
    for folder in (left, right):
        record(job="unlearning", inputs=[describe_input(student)], config={"name": folder.name}).write(folder)
    merged = model_folder(tmp_path / "merged", b"m")
    record(job="merging", inputs=[describe_input(left), describe_input(right)]).write(merged)

    read = read_record(merged)
    assert [old.job for old in read.history()] == ["distillation", "unlearning", "unlearning", "merging"]
    assert [old.config.get("name") for old in read.history()] == [None, "left", "right", None]
    assert len(read.to_dict()["parents"]) == 3  # the student's record once, though two ways lead to it
    assert read.parents[0].parents[0].inputs[0].sha256 == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_a_long_line_with_two_ways_at_each_step_stays_small():
    line = record(config={"step": 0})
    for step in range(1, 40):  # 2**39 ways from the last to the first
        line = record(
            job="merging",
            config={"step": step},
            inputs=[RunInput("a", "model", record=line), RunInput("b", "model", record=line)],
        )
    data = line.to_dict()
    assert len(data["parents"]) == 39
    assert RunRecord.from_dict(data).to_dict() == data


def test_a_newer_schema_and_broken_records_are_refused(tmp_path):
    data = record().to_dict()
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps({**data, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ValueError, match="upgrade hf_transfer_ext"):
        read_record(tmp_path)
    path.write_text(json.dumps({**data, "inputs": [{"name": "x"}]}))
    with pytest.raises(ValueError, match="malformed"):
        read_record(tmp_path)
    path.write_text(json.dumps({**data, "inputs": [{"name": "x", "role": "model", "record": "d"}], "parents": {
        "d": {**data, "inputs": [{"name": "x", "role": "model", "record": "d"}]}}}))  # fmt: skip
    with pytest.raises(ValueError, match="own ancestor"):
        read_record(tmp_path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError):
            read_record(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not written by hf_transfer_ext"):
        read_record(tmp_path)


def test_a_role_is_any_lower_case_word_and_a_config_that_is_none_is_refused():
    assert RunInput("a", "expert").role == "expert"
    for role in ("", "Expert", "two words"):
        with pytest.raises(ValueError, match="has to be one lower-case word"):
            RunInput("a", role)
    with pytest.raises(TypeError, match="dictionary"):
        record(config=["a"])


def test_a_local_model_is_known_by_its_content(tmp_path):
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: a/b\n---\n"
    folder = model_folder(tmp_path / "some" / "student", card=card)
    (folder / "training_args.bin").write_bytes(b"not weights")
    found = describe_input(folder, role="student")
    assert (found.name, found.on_hub, found.revision) == ("student", False, None)
    assert found.sha256 == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert found.license == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert found.model_type == "llama" and found.base_model == ["a/b"]
    with pytest.raises(FileNotFoundError, match="There is no model"):
        describe_input(tmp_path / "nothing")


def test_a_file_of_weights_takes_its_type_from_the_loaded_model(tmp_path):
    class Loaded:
        class config:
            model_type = "gemma3_text"

    (tmp_path / "model.gguf").write_bytes(b"weights")
    found = describe_input(tmp_path / "model.gguf", role="teacher", model=Loaded())
    assert (found.name, found.model_type) == ("model.gguf", "gemma3_text")
    assert found.sha256 == {"model.gguf": hashlib.sha256(b"weights").hexdigest()}


def test_a_local_data_set_is_known_by_its_content(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.jsonl").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    assert describe_input(tmp_path / "data", role="dataset").sha256 == {"deep/a.jsonl": digest}
    assert describe_input(tmp_path / "data" / "deep" / "a.jsonl", role="dataset").sha256 == {"a.jsonl": digest}


def test_a_hub_model_is_known_by_its_commit(hub, tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "student", card="---\nlicense: mit\n---\n")
    record(config={"first": True}).write(folder)
    commit = hub.seed("tester/student", folder)
    hub.seed("tester/student", {"config.json": "{}"}, revision="other")
    digests = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    for found in (describe_input("tester/student"), describe_input("tester/student", commit)):
        assert (found.name, found.on_hub, found.revision, found.sha256) == ("tester/student", True, commit, digests)
        assert found.license == {"license": "mit"} and found.model_type == "llama"
        assert found.record is not None and found.record.config == {"first": True}
    assert describe_input("tester/student", "other").sha256 == {}
    assert read_record("tester/student").config == {"first": True}
    with pytest.raises(FileNotFoundError, match="neither a local path nor"):
        describe_input("tester/none")


def test_without_a_connection_the_cache_answers(hub, tmp_path, monkeypatch):
    import huggingface_hub

    from hf_transfer_ext.weights.repository import local_folder

    commit = hub.seed("tester/cached", model_folder(tmp_path / "student"))
    folder = local_folder("tester/cached")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = describe_input("tester/cached")
    assert (found.revision, found.sha256) == (commit, {"model.safetensors": hashlib.sha256(b"weights").hexdigest()})
    monkeypatch.undo()
    assert describe_input(folder) == found  # a folder of the cache is the repository that it came from


def test_the_device_is_described_without_names():
    summary = device_summary(precision="bfloat16")
    assert summary["device"] in ("cpu", "cuda") and summary["processes"] == 1 and summary["precision"] == "bfloat16"


def test_defaults_command_and_recipe_are_pinned_and_may_be_published(tmp_path):
    words = ["--data", str(tmp_path / "data"), "--hub_token", "abc", f"--api_key={TOKEN}", "--note", f"n {TOKEN}", "x"]
    made = record(defaults={"weight_decay": 0.0, "logging_dir": str(tmp_path)}, command=words, recipe_sha256="a" * 64)
    made.write(tmp_path)
    read = read_record(tmp_path)
    assert read.command == [
        "--data", "data", "--hub_token", "[removed]", "--api_key=[removed]", "--note", "n [removed]", "x",
    ]  # fmt: skip
    assert read.defaults == {"weight_decay": 0.0, "logging_dir": tmp_path.name} and read.recipe_sha256 == "a" * 64
    assert read.digest() == made.digest()


def test_a_record_without_the_later_keys_is_read_and_keeps_its_digest():
    data = record(config={"a": 1}).to_dict()
    assert not {"defaults", "command", "recipe_sha256"} & set(data)
    assert RunRecord.from_dict(data).digest() == RunRecord.from_dict({**data, "defaults": {}, "command": []}).digest()


def test_digests_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    from hf_transfer_ext.hub import record as module

    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 0)
    folder = model_folder(tmp_path / "model")
    found = module.digests_of(folder)
    assert found == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    calculated = []
    monkeypatch.setattr(module, "sha256_of", lambda path: calculated.append(path) or "0" * 64)
    assert module.digests_of(folder) == found and not calculated
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    assert module.digests_of(folder) != found and calculated
