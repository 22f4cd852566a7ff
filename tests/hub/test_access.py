"""Who may not publish is told so before a job has done anything."""

import pytest
from hub_server import Refusal, _Handler
from huggingface_hub import HfApi

from hf_transfer_ext.cli import COMMANDS, main
from hf_transfer_ext.hub import access
from hf_transfer_ext.hub.access import require_write_access

#: Command -> words whose inputs do not exist: whoever reads them before the check fails with another error.
JOBS = {
    "merge": ("no.yml", "out"),
    "merge with --config": ("--merge_config", "no.yml"),
    "moe": ("no.yml", "out"),
    "extract": ("no/base", "no/tuned", "out", "--rank", "2"),
    "transfer": ("no/adapter", "no/base", "out"),
    "transfer with --config": ("--config", "transfer/demo.yaml", "--adapter", "no/adapter"),
    "resize": ("no/adapter", "out", "--rank", "2"),
    "convert": ("no/adapter", "out"),
    "export": ("no/model", "out"),
    "edit": ("no/model", "out", "--method", "negation"),
    "requests": ("apply", "no/store", "out"),
    "cache-teacher": ("no/teacher", "no.jsonl", "out"),
    "distill": ("--teacher", "no/teacher", "--output_dir", "out", "--hub_model_id", "tester/x"),
    "unlearn": ("--model_name_or_path", "no/model", "--output_dir", "out", "--hub_model_id", "tester/x"),
    "robustify": ("--model_name_or_path", "no/model", "--output_dir", "out", "--hub_model_id", "tester/x"),
    "evaluate": ("--models", "no/model", "--metrics", "no_metric"),
    "audit": ("--unlearned", "no/model", "--original", "no/model"),
    "quickstart": ("--teacher", "no/teacher"),
}
#: Commands that publish nothing.
SILENT = ("push", "pull", "adapters", "lineage", "reproduce", "methods", "doctor")


def test_every_command_is_listed():
    assert {name.split(" ")[0] for name in JOBS} | set(SILENT) == set(COMMANDS)


@pytest.mark.parametrize("job", JOBS)
def test_a_refused_token_stops_a_job_before_its_work(hub, tmp_path, monkeypatch, capsys, job):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    trainer = job in ("distill", "unlearn", "robustify")
    words = [job.split(" ")[0], *JOBS[job], "--push_to_hub", "true" if trainer else "tester/x"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error and "The Hub answered 403. Nothing has been done yet." in error, error
    assert not hub.repos and not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [None, "hf_" + "w" * 34, "reader"], ids=["none", "wrong", "no-right"])
@pytest.mark.parametrize("exists", [True, False])
def test_every_refusal_is_a_permission_error(hub, token, exists):
    if exists:
        hub.seed("tester/x", {"README.md": "theirs"})
    token = hub.reader_token if token == "reader" else token
    with pytest.raises(PermissionError, match="hf auth login") as error:
        require_write_access("tester/x", token=token)
    assert token is None or token not in str(error.value)
    assert len(hub.repos) == exists


def test_a_repository_is_created_and_an_existing_one_is_left_as_it_is(hub):
    require_write_access("tester/x@branch:sub", private=True, token=hub.token)
    assert hub.repos[("models", "tester/x")].private and len(hub.commits("tester/x")) == 1
    require_write_access("x", token=hub.token)
    require_write_access("tester/x", token=hub.token, repo_type="dataset")
    assert {kind for kind, _ in hub.repos} == {"models", "datasets"} and len(hub.commits("tester/x")) == 1
    require_write_access(None)


def test_a_pull_request_needs_only_the_right_to_read(hub):
    hub.seed("tester/x", {"README.md": "theirs"})
    require_write_access("tester/x", create_pr=True, token=hub.reader_token)
    hub.repos[("models", "tester/x")].gated = "auto"
    with pytest.raises(PermissionError, match="answered 403"):
        require_write_access("tester/x", create_pr=True, token=hub.reader_token)


def test_only_the_main_process_asks(hub, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    require_write_access("tester/x")
    assert not hub.requests


def test_a_hub_that_is_out_of_order_is_asked_again_and_named(hub, monkeypatch):
    monkeypatch.setattr(access, "WAITS", (0.01, 0.01))
    statuses = iter([500, 429])
    original = _Handler._api

    def fails(handler, parts, body):
        status = next(statuses, None)
        if status:
            raise Refusal(status, None, "out of order")
        original(handler, parts, body)

    monkeypatch.setattr(_Handler, "_api", fails)
    require_write_access("tester/x", token=hub.token)
    assert HfApi(token=hub.token).repo_exists("tester/x")
    statuses = iter([500] * 9)
    with pytest.raises(ConnectionError, match="The Hub answered 500"):
        require_write_access("tester/x", token=hub.token)
