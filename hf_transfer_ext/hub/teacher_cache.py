"""The files of a teacher cache, and their way through a data set repository of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_transfer_ext.hub.access import again, checked, clear_errors, create
from hf_transfer_ext.reading import read_text
from hf_transfer_ext.weights.repository import Place, place_of

FINGERPRINT_FILE = "teacher_cache.json"
SHARDS = "rows-*.safetensors"
#: Stands where the card names its own repository, until `push_cache` knows it.
THIS_CACHE = "REPOSITORY_OF_THIS_CACHE"
#: In front of the name of a cache on the Hub, `hf://datasets/OWNER/NAME[@REVISION]`, as in other libraries' addresses:
#: a name alone is a folder, which may have to be made.
ON_HUB = "hf://datasets/"
#: What travels: the cache, and the card and record that `cache-teacher` adds.
FILES = [FINGERPRINT_FILE, SHARDS, "README.md", "hf_transfer_ext.json"]


def refuse_part_of_cache(place: Place, *, create_pr: bool = False, include: Sequence[str] = ()) -> None:
    """Refuse to publish a cache other than as it is, on the main branch of a repository of its own.

    Raises:
        ValueError: A branch, a subfolder, a pull request or further files.
    """
    if place.revision is not None or place.subfolder or create_pr or include:
        raise ValueError(
            "A teacher cache is pushed as a whole, to the main branch of a data set repository: leave out branch, "
            "subfolder, `create_pr` and `include`."
        )


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
    from huggingface_hub import CommitOperationAdd, HfApi

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
    with clear_errors(repo_id, f"{repo_id!r} was not changed."):
        place, exists = checked(api, place_of(repo_id), repo_type="dataset")
        if not exists:
            create(api, place, private=private, repo_type="dataset")
        operations = [
            CommitOperationAdd(path.name, _with_name(path, place.path) if path.suffix == ".md" else str(path))
            for pattern in FILES
            for path in sorted(folder.glob(pattern))
        ]
        message = commit_message or "Add teacher rows"
        again(lambda: api.create_commit(place.path, operations, commit_message=message, repo_type="dataset"))
    return f"{api.endpoint}/datasets/{place.path}"


def _with_name(card: Path, repo_id: str) -> bytes:
    """The card with the repository's name in its example."""
    return read_text(card).replace(THIS_CACHE, repo_id).encode()


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


def cache_folder(name: str | Path) -> Path:
    """The folder of a cache by its path, or by its address on the Hub, from where it is downloaded."""
    if not str(name).startswith(ON_HUB):
        return Path(name)
    place = place_of(str(name).removeprefix(ON_HUB))
    return pull_cache(place.path, revision=place.revision)
