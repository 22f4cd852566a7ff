"""SHA-256 of the files of a result, computed while they are written, so that nothing waits for it at the end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from hf_transfer_ext.weights.checkpoints import PlannedFile

#: Bytes that are read and hashed at a time.
STEP = 1 << 20


class DigestsInBackground:
    """Hashes files in a thread of its own: each tensor once it and all tensors before it are written.

    `with` it, report tensors to `finish`, and get the digests from `result`.

    Args:
        folder: Holds the files, with their headers.
        finished: Names of the tensors that an earlier run wrote.
    """

    def __init__(self, folder: Path, files: Sequence[PlannedFile], finished: Iterable[str] = ()) -> None:
        self._folder, self._files = folder, files
        self._finished, self._stopped = set(finished), False
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(1)
        self._digests = self._pool.submit(self._hash_all)

    def finish(self, name: str) -> None:
        """Report that a tensor is completely written."""
        with self._changed:
            self._finished.add(name)
            self._changed.notify()

    def result(self) -> dict[str, str]:
        """File name -> hex SHA-256; waits for the rest, once all tensors are written."""
        return self._digests.result()

    def _hash_all(self) -> dict[str, str]:
        return {file.name: self._hash(file) for file in self._files}

    def _hash(self, planned: PlannedFile) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(STEP))
        with open(self._folder / planned.name, "rb", buffering=0) as file:
            ends = [(None, len(planned.header)), *((spec.name, place + spec.nbytes) for spec, place in planned.places)]
            for name, end in ends:
                self._wait_for(name)
                while file.tell() < end:
                    count = file.readinto(buffer[: min(STEP, end - file.tell())])
                    if not count:
                        raise OSError(f"{planned.name!r} ended in the middle, while it was written. Start again.")
                    digest.update(buffer[:count])
        return digest.hexdigest()

    def _wait_for(self, name: str | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or name is None or name in self._finished)
            if self._stopped:
                raise InterruptedError("The files were not completed.")

    def __enter__(self) -> DigestsInBackground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._pool.shutdown(wait=True)
