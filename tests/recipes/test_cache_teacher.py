import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.numpy import load_file
from teachers.test_server import server  # noqa: F401
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_fallback, byte_level
from trainers.test_cached_distillation import trained_without_teacher

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub.publish import push
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.hub.teacher_cache import pull_cache
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipes import distill
from hf_transfer_ext.recipes.cache_teacher import main
from hf_transfer_ext.teachers.cache import TeacherCache

ROWS = [{"prompt": "gold is", "completion": " a metal"}, {"prompt": "the sea", "completion": " is wide and deep"}]
MORE = {"prompt": "iron is", "completion": " hard"}


@pytest.fixture
def teacher(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [str(tmp_path / "teacher"), str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]


def test_what_the_command_stores_is_what_the_trainer_looks_for(tmp_path, teacher, capsys):
    assert main([*teacher, "--kind", "top", "--top", "258", "--max-length", "64"]) == 0
    assert "2 texts in" in capsys.readouterr().out
    trainer = trained_without_teacher(
        tmp_path / "out", data=Dataset.from_list(ROWS), teacher_cache=teacher[2], max_length=64
    )
    assert trainer.state.global_step == 1 and trainer.teacher.teacher is None


def distilled(folder, **teacher):
    """A run of the recipe with a student of its own, from the teacher and its cache."""
    config = {
        "output_dir": str(folder / "out"), "overwrite": True, "teacher": {**teacher, "cache": str(folder / "cache")},
        "student": str(folder / "student"), "dataset": str(folder / "rows.jsonl"), "test_split": None,
        "max_steps": 1, "max_length": 64, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    distill.main(["--config", str(folder / "config.yaml")])


def test_the_recipe_takes_the_cache_of_the_revision_that_both_name(tmp_path, teacher, hub):
    tiny_llama(1).save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    first = hub.seed("tester/teacher", teacher[0], revision="v1")
    hub.seed("tester/teacher", {**hub.files("tester/teacher", "v1"), "NOTES.md": "newer"})
    assert main(["tester/teacher", *teacher[1:], "--max-length", "64", "--revision", "v1"]) == 0
    assert TeacherCache(teacher[2]).fingerprint["revision"] == first
    distilled(tmp_path, name="tester/teacher", revision="v1")
    distilled(tmp_path, name="tester/teacher", revision=first)
    distilled(tmp_path, name=teacher[0])  # the same weights on the disk
    with pytest.raises(ValueError, match=f"revision is '{first}', needed is"):
        distilled(tmp_path, name="tester/teacher")  # another commit
    shutil.rmtree(teacher[2])
    main([*teacher, "--max-length", "64", "--revision", "v1"])
    distilled(tmp_path, name=teacher[0], revision="v1")


@pytest.fixture
def far(tmp_path):
    """A student, and a teacher with another tokenizer, in folders."""
    for name, seed, tokenizer in (("student", 1, byte_level()), ("far", 2, byte_fallback())):
        tiny_llama(seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [str(tmp_path / "rows.jsonl"), str(tmp_path / "cache"), "--kind", "likelihoods", "--max-length", "64"]
    return tmp_path, [*words, "--student", str(tmp_path / "student")]


def learned_likelihoods(folder, **teacher):
    """A run of the recipe with `loss: alm`, and the student that it wrote."""
    config = {
        "output_dir": str(folder / "out"), "overwrite": True, "student": str(folder / "student"),
        "dataset": str(folder / "rows.jsonl"), "test_split": None, "max_steps": 2, "max_length": 64, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "loss": "alm", "loss_options": {"tau": 5.0},
        "learning_rate": 0.01, **teacher,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    distill.main(["--config", str(folder / "config.yaml")])
    return dict(load_model(folder / "out").named_parameters())


def test_the_recipe_learns_from_likelihoods_that_the_command_has_stored_as_from_the_teacher(far, capsys):
    folder, words = far
    assert main([str(folder / "far"), *words]) == 0
    assert "2 texts in" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    record = read_record(folder / "cache")
    assert [item.role for item in record.inputs] == ["teacher", "dataset", "student"]
    assert [record.call[name] for name in ("teacher", "dataset", "student")] == ["input:0", "input:1", "input:2"]
    assert main([str(folder / "far"), *words]) == 0  # nothing is missing
    shards = [name for name in before if name.startswith("rows-")]
    assert [path.name for path in (folder / "cache").glob("rows-*")] == shards
    alone = learned_likelihoods(folder, teacher={"cache": str(folder / "cache"), "tokenizer": str(folder / "far")})
    live = learned_likelihoods(folder, teacher=str(folder / "far"))
    for name, value in live.items():
        torch.testing.assert_close(alone[name], value, atol=1e-5, rtol=0)
    both = learned_likelihoods(folder, teacher={"name": str(folder / "far"), "cache": str(folder / "cache")})
    assert [path.name for path in (folder / "cache").glob("rows-*")] == shards
    for name, value in live.items():
        torch.testing.assert_close(both[name], value, atol=1e-5, rtol=0)


def test_a_server_stores_likelihoods_that_add_what_is_missing_on_a_second_call(far, server):  # noqa: F811
    folder, words = far
    server.model, server.tokenizer = load_model(folder / "far"), byte_fallback()
    served = [server.url, *words, "--server-model", "big", "--server-options", "{retries: 0, pause: 0.0}"]
    with pytest.raises(ValueError, match=r"the name there, 'big', is not a folder .* Pass it as `teacher_tokenizer`"):
        main(served)
    served += ["--teacher-tokenizer", str(folder / "far")]
    assert main(served) == 0
    asked = [body["prompt"] for path, body, _ in server.requests if path == "/v1/completions"]
    assert len(asked) == len(ROWS) and len(TeacherCache(folder / "cache")) == len(ROWS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, MORE]))
    server.requests.clear()
    assert main(served) == 0
    assert len([body for path, body, _ in server.requests if path == "/v1/completions"]) == 1
    assert len(TeacherCache(folder / "cache")) == len(ROWS) + 1


def test_settings_that_do_not_fit_the_teacher_are_refused(teacher):
    with pytest.raises(ValueError, match="A server needs `student`"):
        main([*teacher, "--student", teacher[0]])
    served = ["http://127.0.0.1:9", *teacher[1:], "--student", teacher[0], "--server-model", "big"]
    with pytest.raises(ValueError, match="`kind` can only be top"):
        main([*served, "--kind", "samples"])
    with pytest.raises(ValueError, match="except `student` with `kind: likelihoods`"):
        main([*teacher, "--kind", "likelihoods"])
    with pytest.raises(ValueError, match="`teacher_tokenizer` is for a server with `kind: likelihoods`"):
        main([*served, "--teacher-tokenizer", teacher[0]])
    with pytest.raises(ValueError, match="`tau` and `revision` have to be left out; got kind None and tau"):
        main([*served, "--tau", "0.5"])
    for options, message in (
        ("{top: 5}", "`server_options` hold `top`, which is an option of its own"),
        ("{retrys: 2}", "Unknown option of a teacher on a server 'retrys'. Did you mean 'retries'"),
        ("{api_key: secret}", "Unknown option of a teacher on a server 'api_key'"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*served, "--server-options", options])
    with pytest.raises(ValueError, match=r"A server needs `student`.*may have `server_options`"):
        main([*teacher, "--server-options", "{retries: 2}"])
    with pytest.raises(ValueError, match="the teacher has 258 vocabulary entries"):
        main([*teacher, "--top", "999", "--max-length", "64"])


def test_card_and_record_travel_with_the_cache(tmp_path, teacher, hub):
    main([*teacher, "--max-length", "64"])
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "rain falls"}) + "\n")
    main([teacher[0], str(tmp_path / "more.jsonl"), teacher[2], "--max-length", "64"])
    record = read_record(teacher[2])
    assert [item.name for item in record.inputs] == ["teacher", "more.jsonl", "rows.jsonl"]
    assert record.result == {name: sha256_of(tmp_path / "cache" / name) for name in record.result}
    assert len(record.result) == 3
    address = push(teacher[2], "tester/rows", token=hub.token)
    assert "datasets/tester/rows" in address
    found = pull_cache("tester/rows", token=hub.token)
    assert len(TeacherCache(found)) == 3 and read_record(found).result == record.result
    assert (found / "README.md").read_text().startswith("---\n")
    with pytest.raises(ValueError, match="teacher cache is pushed as a whole"):
        push(teacher[2], "tester/rows", token=hub.token, revision="x")


def test_the_command_publishes_the_cache_in_a_private_data_set_repository(tmp_path, teacher, hub, monkeypatch, capsys):
    for words, message in ((["tester/rows:a"], "as a whole"), (["tester/rows", "--create_pr"], "as a whole")):
        with pytest.raises(ValueError, match=message):
            main([*teacher, "--push_to_hub", *words])
    with pytest.raises(PermissionError, match="Nothing has been done yet"):
        main([*teacher, "--push_to_hub", "tester/rows"])
    assert not (tmp_path / "cache").exists() and not hub.repos
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main([*teacher, "--max-length", "64", "--push_to_hub", "tester/rows"]) == 0
    assert "Pushed to" in capsys.readouterr().out and hub.repos[("datasets", "tester/rows")].private
    found = pull_cache("tester/rows", token=hub.token)
    assert len(TeacherCache(found)) == 2 and 'pull_cache("tester/rows")' in (found / "README.md").read_text()
    assert len(hub.commits("tester/rows", repo_type="dataset")) == 2


def positions_of(folder, name="positions"):
    """How many rows the files of a cache hold."""
    return sum(len(load_file(path)[name]) for path in (folder / "cache").glob("*.safetensors"))


def trained_on_cache(folder, data, **settings):
    args = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    args |= {"save_strategy": "no", "teacher_cache": str(folder / "cache"), "max_length": 64, **settings}
    trainer = DistillationTrainer(
        tiny_llama(1), None, DistillationConfig(**args), data, processing_class=byte_tokenizer()
    )
    trainer.train()


def test_masks_template_and_columns_are_those_of_the_training(tmp_path, teacher):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": row["prompt"]}) + "\n" for row in ROWS))
    words = [*teacher, "--max-length", "64"]
    with pytest.raises(ValueError, match=r"for example `columns: \{text: body\}`"):
        main(words)
    assert main([*words, "--columns", "{text: body}", "--tau", "0.5"]) == 0
    assert TeacherCache(teacher[2]).spec.tau == 0.5 and len(TeacherCache(teacher[2])) == 2
    shutil.rmtree(teacher[2])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main(words)
    masked = positions_of(tmp_path)
    shutil.rmtree(teacher[2])
    main([*words, "--completion-only-loss", "false"])
    assert positions_of(tmp_path) == masked + sum(len(row["prompt"]) - 1 for row in ROWS)
    trained_on_cache(tmp_path, Dataset.from_list(ROWS), completion_only_loss=False)
    shutil.rmtree(teacher[2])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "turns.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }};{% endgeneration %}"
        "{% else %}{{ m.content }}?{% endif %}{% endfor %}"
    )
    template = ["--chat-template-path", str(tmp_path / "turns.jinja")]
    main([*words, *template, "--assistant-only-loss", "true"])
    assert positions_of(tmp_path) == len("yo;")
    trained_on_cache(
        tmp_path, Dataset.from_list([{"messages": turns}]), assistant_only_loss=True, chat_template_path=template[1]
    )
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"make the head grow from 258 to \d+ rows, which nobody trained"):
        main([*words, "--chat-template-path", str(tmp_path / "other")])


def test_a_server_is_asked_as_its_options_say(tmp_path, teacher, server):  # noqa: F811
    server.tokenizer, words = None, [server.url, *teacher[1:], "--student", teacher[0], "--server-model", "big"]
    with pytest.raises(ValueError, match="set `check_tokenizer=False`"):
        main([*words, "--top", "6", "--max-length", "64"])
    shutil.rmtree(teacher[2], ignore_errors=True)
    options = ["--server-options", "{check_tokenizer: false, retries: 1, pause: 0, parallel: 2, timeout: 9.5}"]
    server.faults = [(503, b"", {})]
    assert main([*words, *options, "--top", "6", "--max-length", "64"]) == 0
    assert len(TeacherCache(teacher[2])) == 2 and TeacherCache(teacher[2]).spec.top == 6
    shutil.rmtree(teacher[2])
    server.faults = [(503, b"", {})] * 2
    with pytest.raises(OSError, match="No answer after 2 attempts"):
        main([*words, *options, "--max-length", "64"])
