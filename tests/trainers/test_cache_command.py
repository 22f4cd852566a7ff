import json

import pytest
from datasets import Dataset
from tiny import byte_tokenizer, tiny_llama
from trainers.test_cached_distillation import trained_without_teacher

from hf_transfer_ext.trainers.cache_command import main

ROWS = [{"prompt": "gold is", "completion": " a metal"}, {"prompt": "the sea", "completion": " is wide and deep"}]


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


def test_settings_that_do_not_fit_the_teacher_are_refused(teacher):
    with pytest.raises(ValueError, match="A server needs `student`"):
        main([*teacher, "--student", teacher[0]])
    server = ["http://127.0.0.1:9", *teacher[1:], "--student", teacher[0], "--server-model", "big"]
    with pytest.raises(ValueError, match="`kind` can only be top"):
        main([*server, "--kind", "samples"])
    with pytest.raises(ValueError, match="the teacher has 258 vocabulary entries"):
        main([*teacher, "--top", "999", "--max-length", "64"])
