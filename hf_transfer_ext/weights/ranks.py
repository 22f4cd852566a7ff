"""Several processes on one merge: tensors are split across them, and an error in one is raised in all.

Under `accelerate launch` or `torchrun` every process calls `merge` with the same arguments. They communicate over a
dedicated gloo group with a 30-day timeout, since processes finish their shares of a large merge at different times.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class HasInputBytes(Protocol):
    """A piece of work with a known number of input bytes."""

    @property
    def input_bytes(self) -> int: ...


Job = TypeVar("Job", bound=HasInputBytes)


@dataclass(frozen=True)
class Ranks:
    """The processes of a merge; this is number `rank` of `count`. A single process needs no group."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks; every rank must call this."""
        if self.count == 1:
            return [value]
        import torch.distributed as distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all ranks at the end of the block; an error in one of them is raised in all."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        errors = self.gather(None if failed is None else (type(failed).__name__, str(failed)))
        # A rank that only stopped because of another rank is not a cause.
        causes = [rank for rank, one in enumerate(errors) if one is not None and one[0] != "InterruptedError"]
        if failed is not None and (self.rank in causes or not causes):
            raise failed
        if causes:
            name, text = errors[causes[0]]
            raise _kind_of(name)(f"Rank {causes[0]}: {text}") from failed

    def share_of(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this rank. All ranks compute the same split: largest first, to the rank with fewest bytes."""
        loads = [0] * self.count
        own = []
        for job in sorted(jobs, key=lambda job: -job.input_bytes):
            rank = loads.index(min(loads))
            loads[rank] += job.input_bytes
            if rank == self.rank:
                own.append(job)
        return own


def _kind_of(name: str) -> type[Exception]:
    found = getattr(builtins, name, RuntimeError)
    return found if isinstance(found, type) and issubclass(found, (ValueError, TypeError, OSError)) else RuntimeError


@contextmanager
def ranks_of_launch(*, alone: bool = False) -> Iterator[Ranks]:
    """The processes that the launcher started, or only this one without a launcher or with `alone`."""
    if alone or int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Ranks()
        return
    import torch.distributed as distributed
    from accelerate import PartialState

    # Initializes torch.distributed unless it already is; `PartialState` itself does not read this Accelerate variable.
    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group(group)


def is_first_rank() -> bool:
    """Whether this is the main process: the only one, or rank 0 of a launcher."""
    return os.environ.get("RANK", "0") == "0"


def local_ranks() -> tuple[int, int]:
    """Local rank of this process on its machine, and the number of processes there."""
    return int(os.environ.get("LOCAL_RANK", "0")), max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
