"""The models that a job reads, described for its record while it works: digests cost about a second per gigabyte."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from hf_transfer_ext.hub.record import RECORD_FILE, RunInput, RunRecord, describe_input, last_name

#: Path or Hub id, revision, role.
Wanted = tuple[str | Path, str | None, str]


class InputsInBackground:
    """Describes inputs in a thread of its own; `with` it, and call `put_into` when the job is done.

    An input whose own card or record cannot be read does not stop the job: the record says so instead.
    """

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: list[Future[tuple[RunInput, str]]] = [
            self._pool.submit(described_or_named, *one) for one in wanted
        ]

    def put_into(self, record: RunRecord) -> None:
        """Wait for the descriptions and add them to the record."""
        for future in self._found:
            described, problem = future.result()
            record.inputs.append(described)
            if problem:
                record.not_measured.append(problem)

    def __enter__(self) -> InputsInBackground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def described_or_named(path: str | Path, revision: str | None, role: str) -> tuple[RunInput, str]:
    """An input, and a sentence for the record where its history cannot be read ("" where it can)."""
    try:
        described = describe_input(path, revision, role)
    except (ValueError, OSError) as error:
        name = last_name(path)
        return RunInput(name, role), f"Where the input {name} comes from: its card or record cannot be read ({error})"
    if described.record is None and (Path(path) / RECORD_FILE).is_file():
        return described, f"Where the input {described.name} comes from: its record cannot be read."
    return described, ""
