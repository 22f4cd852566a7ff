"""Progress of long stages: one line when a stage begins, then a bar, shown by the main process alone.

The bars of this package are switched off together with those of the libraries that are loaded:
`datasets.disable_progress_bars()`, `transformers.utils.logging.disable_progress_bar()`,
`huggingface_hub.utils.disable_progress_bars()`, or the environment variables of datasets and huggingface_hub.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from hf_transfer_ext.launch import started_rank

Item = TypeVar("Item")

#: Library, once it is imported -> (its function, whether the function returning True means that bars are shown).
_SWITCHES = {
    "transformers.utils.logging": ("is_progress_bar_enabled", True),
    "datasets.utils.tqdm": ("are_progress_bars_disabled", False),
    "huggingface_hub.utils.tqdm": ("are_progress_bars_disabled", False),
}
#: The same before the library is imported.
_VARIABLES = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
#: Seconds that a stage may take before its bar appears, and between two lines of a bar that goes into a file.
_FIRST_AFTER, _BETWEEN = 1.0, 10.0


@contextmanager
def stage(
    title: str, total: int | None, unit: str = "row", *, done: int = 0, show: bool = True
) -> Iterator[Callable[[int], object]]:
    """Announce a long stage in one line on stderr, and show how far it is.

    Args:
        title: What is done, as a noun or a gerund ("caching the teacher's outputs").
        total: Number of `unit` in the whole stage; None where it is not known.
        unit: Singular; "B" for bytes.
        done: How many of them an earlier run has done.
        show: False shows nothing, on any process.

    Yields:
        A function that is called with the number of units that were just done.
    """
    if total == done or not announce(title, total, unit, done=done, show=show):
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    between = 0.1 if sys.stderr.isatty() else _BETWEEN
    bar = tqdm(
        total=total, initial=done, desc=title, unit=unit, unit_scale=unit == "B", delay=_FIRST_AFTER,
        mininterval=between, smoothing=0.1, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        yield bar.update


def announce(title: str, total: int | None, unit: str = "row", *, done: int = 0, show: bool = True) -> bool:
    """The line of `stage` alone, for stages with a bar of their own; returns whether it was written."""
    if not (show and shows_progress()):
        return False
    from tqdm import tqdm

    tqdm.write(f"{title}: {_amount(total, unit)}{f', {done:,} of them done' if done else ''}", file=sys.stderr)
    return True


def steps(items: Iterable[Item], title: str, unit: str = "row", *, total: int | None = None, show: bool = True) -> (
    Iterator[Item]
):  # fmt: skip
    """The items, one after another, as a `stage`; `total` is their number by default."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(title, total, unit, show=show) as advance:
        for item in items:
            yield item
            advance(1)


def shows_progress() -> bool:
    """Whether this is the main process, and no loaded library was told to hide its bars."""
    if started_rank() != 0 or any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in _VARIABLES
    ):
        return False
    loaded = [(sys.modules[name], *switch) for name, switch in _SWITCHES.items() if name in sys.modules]
    return all(getattr(module, function)() is shown for module, function, shown in loaded)


def _amount(total: int | None, unit: str) -> str:
    if total is None:
        return f"{unit}s as they come"
    if unit == "B":
        return f"{total / 1e6:,.1f} MB"
    return f"{total:,} {unit}{'' if total == 1 or unit.endswith('s') else 's'}"
