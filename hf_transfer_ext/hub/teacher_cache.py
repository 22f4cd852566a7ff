"""The files of a teacher cache, and their way through a data set repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

FINGERPRINT_FILE = "teacher_cache.json"
SHARDS = "rows-*.safetensors"
#: What travels: the cache, and the card and record that `cache-teacher` adds.
FILES = [FINGERPRINT_FILE, SHARDS, "README.md", "hf_transfer_ext.json"]


def push_cache(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a cache to a data set repository of the Hub, which is made where it is missing; returns its address.

    The rows show which words a text probably consists of, so a cache is as private as its texts: by default the
    repository is private.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not (folder / FINGERPRINT_FILE).is_file():
        raise FileNotFoundError(f"There is no teacher cache in {str(folder)!r}: {FINGERPRINT_FILE} is missing.")
    for shard in sorted(folder.glob(SHARDS)):
        try:
            with safe_open(shard, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{shard.name} in {str(folder)!r} cannot be read ({error}). Delete it, and fill the cache again."
            ) from error
    api = HfApi(token=token)
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=str(folder), allow_patterns=FILES,
        commit_message=commit_message or "Add teacher rows",
    )  # fmt: skip
    return str(address)


def pull_cache(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of a cache on the Hub, downloaded where it is not there yet.

    It belongs to the Hub's own cache of files: `TeacherCache` reads it; copy it to add rows.

    Raises:
        ValueError: The repository is not a teacher cache.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=FILES)
    )
    if not (folder / FINGERPRINT_FILE).is_file():
        raise ValueError(f"The data set {repo_id!r} is not a teacher cache: {FINGERPRINT_FILE} is missing in it.")
    return folder
