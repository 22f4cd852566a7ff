"""The right to write to a repository, checked before a job starts; clear errors and retries where the Hub fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.reading import one_line
from hf_transfer_ext.weights.ranks import is_first_rank
from hf_transfer_ext.weights.repository import Place, connection_error, place_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

#: Seconds to wait before each further try after a dropped connection or an error of the Hub.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)


def require_write_access(
    repo_id: str | None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    repo_type: str = "model",
) -> None:
    """Check that a result can be published, before the work that makes it. On the main process only.

    A repository that does not exist is created (empty), as the Trainer does it with `push_to_hub`: that is the only
    way to know that it can be.

    Args:
        repo_id: `repo[@branch][:subfolder]`; None where nothing is published.
        private: For a new repository; None takes the account's default.
        create_pr: The result will be proposed in a pull request, for which reading is enough.

    Raises:
        PermissionError: No login, a token that is refused, or no right to write there.
        ConnectionError: The Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if repo_id is None or not is_first_rank():
        return
    place = place_of(repo_id, revision)
    with clear_errors(place.path, "Nothing has been done yet."):
        api = HfApi(token=token)
        place, exists = checked(api, place, create_pr=create_pr, repo_type=repo_type)
        if not exists:
            create(api, place, private=private, repo_type=repo_type)


def checked(api: HfApi, place: Place, *, create_pr: bool = False, repo_type: str = "model") -> tuple[Place, bool]:
    """The place with its account, and whether the repository exists; it may be written to, or somebody is logged in.

    Raises the errors of the client; use it within `clear_errors`.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if "/" not in place.path:
        place = replace(place, path=f"{again(lambda: api.whoami()['name'])}/{place.path}")
    try:
        again(lambda: _check(api, place.path, repo_type, write=not create_pr))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        again(api.whoami)
        return place, False
    return place, True


def create(api: HfApi, place: Place, *, private: bool | None, repo_type: str = "model") -> None:
    """Create a repository; one that exists by now is taken as it is."""
    again(lambda: api.create_repo(place.path, repo_type=repo_type, private=private, exist_ok=True))


def _check(api: HfApi, path: str, repo_type: str, *, write: bool) -> None:
    try:
        api.auth_check(path, repo_type=repo_type, write=write)
    except TypeError:  # a client of before 2.0, which only asks whether one may read
        api.auth_check(path, repo_type=repo_type)


def again(work: Callable[[], Any]) -> Any:
    """Do it again, after a wait, where the connection dropped or the Hub is out of order (5xx, 429)."""
    for wait in WAITS:
        try:
            return _unwrapped(work)
        except Exception as error:
            fault = _passing_fault(error)
            if fault is None:
                raise
            logger.warning("%s Trying again in %g s.", fault, wait)
        time.sleep(wait)
    return _unwrapped(work)


def _passing_fault(error: BaseException | None) -> str | None:
    """What went wrong, where it may be over soon: in an error, or in the one that caused it; None for others."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 500
            return f"The Hub answered {status}." if status >= 500 or status == 429 else None
        if isinstance(error, connection_error()):
            return f"The connection to the Hub dropped ({type(error).__name__})."
        error = error.__cause__
    return None


def _unwrapped(work: Callable[[], Any]) -> Any:
    """`work()`, with the error of an upload in the place of the client's RuntimeError around it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return work()
    except RuntimeError as error:
        if isinstance(error.__cause__, (HfHubHTTPError, connection_error())):
            raise error.__cause__ from error
        if "client has been closed" in f"{error} {error.__cause__}":  # by another thread, whose connection dropped
            raise connection_error()("The connection dropped during an upload.") from error
        raise


@contextmanager
def clear_errors(repo_id: str, state: str) -> Iterator[None]:
    """Errors of the client as `PermissionError`, with what to do, or as `ConnectionError`.

    Args:
        state: What became of the work, in a sentence.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    advice = (
        f"Writing to the Hub repository {repo_id!r} needs a token that may write there. Run `hf auth login`, set "
        "HF_TOKEN, or pass `token=`; for a repository of an organization, check your role in it."
    )
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{advice} {state}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(f"{advice} The Hub answered {status}. {state}") from error
        raise ConnectionError(f"{state} The Hub answered {status}. {one_line(error)}") from error
    except connection_error() as error:
        raise ConnectionError(f"{state} {type(error).__name__}: {one_line(error)}") from error
