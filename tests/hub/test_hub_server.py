"""The test server behaves as the Hub does, as far as the real client can tell."""

from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import (
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    (made / "deep").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Text\n")
    (made / "deep" / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "empty.txt").write_text("")
    return made


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_folder_comes_back_as_it_was_sent(hub, api, folder, tmp_path, repo_type):
    url = api.create_repo("tester/a", repo_type=repo_type)
    assert (url.repo_id, url.repo_type) == ("tester/a", repo_type)
    commit = api.upload_folder(repo_id="tester/a", folder_path=folder, repo_type=repo_type, commit_message="Add it")
    stored = hub.files("tester/a", repo_type=repo_type)
    assert {path: data for path, data in stored.items() if path != ".gitattributes"} == contents(folder)
    back = snapshot_download("tester/a", repo_type=repo_type, local_dir=tmp_path / "back")
    got = contents(tmp_path / "back")
    assert {path: data for path, data in got.items() if not path.startswith(".")} == contents(folder)
    assert back == str(tmp_path / "back")
    info = api.repo_info("tester/a", repo_type=repo_type, files_metadata=True)
    assert info.sha == commit.oid and info.card_data.license == "mit"
    large = {s.rfilename for s in info.siblings if s.lfs is not None}
    assert large == {"model.safetensors"}
    titles = [c.title for c in api.list_repo_commits("tester/a", repo_type=repo_type)]
    assert titles == ["Add it", "initial commit"]


def test_sending_the_same_again_makes_no_commit(hub, api, folder):
    api.create_repo("tester/a")
    first = api.upload_folder(repo_id="tester/a", folder_path=folder)
    again = api.upload_folder(repo_id="tester/a", folder_path=folder)
    assert first.oid == again.oid and len(hub.commits("tester/a")) == 2


def test_branches_tags_pull_requests_and_encoded_revisions(hub, api, folder):
    hub.seed("tester/a", {"x.txt": "one"})
    api.create_branch("tester/a", branch="try/this")
    api.create_tag("tester/a", tag="v1")
    with pytest.raises(HfHubHTTPError):
        api.create_tag("tester/a", tag="v1")
    api.create_tag("tester/a", tag="v1", exist_ok=True)
    api.upload_file(path_or_fileobj=b"two", path_in_repo="x.txt", repo_id="tester/a", revision="try/this")
    proposal = api.upload_file(path_or_fileobj=b"three", path_in_repo="x.txt", repo_id="tester/a", create_pr=True)
    assert proposal.pr_revision == "refs/pr/1"
    read = {
        revision: open(hf_hub_download("tester/a", "x.txt", revision=revision)).read()
        for revision in ("main", "v1", "try/this", "refs/pr/1", proposal.oid)
    }
    assert read == {"main": "one", "v1": "one", "try/this": "two", "refs/pr/1": "three", proposal.oid: "three"}
    refs = api.list_repo_refs("tester/a", include_pull_requests=True)
    assert [b.name for b in refs.branches] == ["main", "try/this"] and [t.name for t in refs.tags] == ["v1"]
    assert [p.ref for p in refs.pull_requests] == ["refs/pr/1"]
    api.delete_branch("tester/a", branch="try/this")
    api.delete_tag("tester/a", tag="v1")
    assert [b.name for b in api.list_repo_refs("tester/a").branches] == ["main"]


def test_what_is_missing_is_told_apart(hub, api):
    hub.seed("tester/a", {"x.txt": "one"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/none")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("gpt2", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("tester/a", "x.txt", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/a", "y.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/a", "folder"))


def test_a_token_decides_what_may_be_seen_and_written(hub, api):
    assert api.whoami()["name"] == "tester"
    hub.seed("tester/secret", {"x.txt": "one"}, private=True)
    assert api.model_info("tester/secret").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("tester/secret")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").create_repo("tester/b")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=hub.reader_token).create_repo("tester/b")
    api.update_repo_settings("tester/secret", private=False)
    assert not HfApi(token=False).model_info("tester/secret").private


def test_parts_of_a_file(hub):
    hub.seed("tester/a", {"w.safetensors": bytes(range(100))})
    address = f"{hub.endpoint}/tester/a/resolve/main/w.safetensors"
    for asked, expected in (
        ("0-3", range(4)),
        ("98-", range(98, 100)),
        ("-2", range(98, 100)),
        ("90-500", range(90, 100)),
    ):
        with urlopen(Request(address, headers={"Range": f"bytes={asked}"})) as answer:
            assert answer.status == 206 and answer.read() == bytes(expected)


def test_cards_are_checked(hub, api):
    hub.seed("tester/a", {"x.txt": "one"})
    ModelCard("---\nlicense: mit\ntags: [a]\n---\n# Hello\n").push_to_hub("tester/a", token=hub.token)
    assert ModelCard.load("tester/a").data.license == "mit"
    metadata_update("tester/a", {"pipeline_tag": "text-generation"}, token=hub.token)
    assert b"pipeline_tag: text-generation" in hub.files("tester/a")["README.md"]
    bad = ModelCard("---\nbase_model_relation: cousin\n---\n# Hello\n")
    with pytest.raises((ValueError, HfHubHTTPError), match="base_model_relation"):
        bad.push_to_hub("tester/a", token=hub.token)
    assert ModelCard.load("tester/a").data.pipeline_tag == "text-generation"


def test_deleting(hub, api, folder):
    hub.seed("tester/a", folder)
    operations = [CommitOperationDelete("deep/", is_folder=True), CommitOperationDelete("empty.txt")]
    api.create_commit("tester/a", operations=operations, commit_message="Delete")
    assert set(hub.files("tester/a")) == {"README.md", "model.safetensors"}
    api.delete_repo("tester/a")
    assert not api.repo_exists("tester/a")


def test_sixteen_commits_at_once_are_all_kept(hub, api):
    api.create_repo("tester/a")

    def send(number):
        return api.upload_file(path_or_fileobj=b"%d" % number, path_in_repo=f"{number}.txt", repo_id="tester/a")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(16)))
    assert {f"{n}.txt" for n in range(16)} <= set(hub.files("tester/a"))
    assert len(hub.commits("tester/a")) == 17


def test_a_commit_on_an_outdated_parent_is_refused(hub, api):
    old = hub.seed("tester/a", {"x.txt": "one"})
    api.upload_file(path_or_fileobj=b"two", path_in_repo="x.txt", repo_id="tester/a")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"three", path_in_repo="x.txt", repo_id="tester/a", parent_commit=old)
