"""The models that a job reads, described for its record while it works: digests cost about a second per gigabyte."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_transfer_ext.hub.privacy import public_value
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
        # The card, which comes last, needs this; its import takes a tenth of a second.
        self._pool.submit(import_module, "huggingface_hub.repocard")

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


def call_of(arguments: Mapping[str, Any], inputs: Sequence[Wanted]) -> dict[str, Any]:
    """The arguments of a call for `RunRecord.call`: where one names an input, with or without revision, `input:N`.

    Args:
        inputs: What was read, in the order of the record's `inputs`.
    """
    numbered = sorted(enumerate(inputs), key=lambda one: -len(str(one[1][0])))
    forms = [
        (number, re.compile(rf"(?:^|(?<=\+)){re.escape(str(path))}(?:@[^+]*)?(?=$|\+)"))
        for number, (path, _, _) in numbered
    ]

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [replaced(one) for one in value]
        if isinstance(value, (str, Path)):
            text = str(Path(value).expanduser()) if str(value).startswith("~") else str(value)
            for number, form in forms:
                text = form.sub(f"input:{number}", text)
            return text
        return value

    found: dict[str, Any] = public_value({name: replaced(value) for name, value in arguments.items()})
    return found
