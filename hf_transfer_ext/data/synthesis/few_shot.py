"""New inputs of a task, written by a language model that is shown a few of them as a numbered list."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

#: `(prompts, seed) -> continuations`: how a caller's model continues each prompt, sampled.
Continue = Callable[[Sequence[str], int], list[str]]

_NEXT_NUMBER = re.compile(r"\n\s*\d+[.)]")


def few_shot_prompt(seeds: Sequence[str], total: int = 10) -> str:
    """A numbered list of examples that ends with the number of the next one.

    Example: *Here are 10 examples:* followed by *1. ...* to *5. ...* and *6.*
    """
    if not seeds:
        raise ValueError("At least one seed example is needed to show a model what the inputs look like.")
    listed = "".join(f"{i}. {seed.strip()}\n" for i, seed in enumerate(seeds, 1))
    return f"Here are {max(total, len(seeds) + 1)} examples:\n{listed}{len(seeds) + 1}."


def first_item(continuation: str) -> str:
    """What a model wrote as the next item of the list: up to the number after it."""
    return _NEXT_NUMBER.split(continuation, maxsplit=1)[0].strip()


def synthetic_inputs(
    write: Continue,
    seeds: Sequence[str],
    *,
    shown: int = 5,
    batch_size: int = 16,
    longest: int = 2000,
    seed: int = 0,
    exclude: Sequence[str] = (),
    attempt: int = 0,
    attempts: int | None = None,
) -> Iterator[tuple[int, str]]:
    """New inputs, one at a time, with the number of the attempt that wrote each.

    Every prompt shows `shown` of the seeds, drawn anew and in another order. Empty inputs, repetitions (of seeds and
    of each other) and inputs of more than `longest` characters are skipped; their attempts count all the same, so
    that a caller can compute the share of usable ones.

    Args:
        exclude: Inputs that exist already.
        attempt: The last attempt of an interrupted run, which continues as if it had not been interrupted.
        attempts: Stop after this many attempts; None never stops, even where the model only repeats itself.

    Raises:
        ValueError: No seed example, or a number out of its range.
    """
    if shown < 1 or batch_size < 1:
        raise ValueError(f"`shown` and `batch_size` must be at least 1, got {shown} and {batch_size}.")
    known = {item.strip() for item in (*seeds, *exclude)}
    done, attempt = attempt, attempt // batch_size * batch_size
    while attempts is None or attempt < attempts:
        draw = random.Random(seed * 1_000_003 + attempt)
        prompts = [few_shot_prompt(draw.sample(list(seeds), min(shown, len(seeds)))) for _ in range(batch_size)]
        for continuation in write(prompts, seed * 1_000_003 + attempt):
            attempt += 1
            item = first_item(continuation)
            if attempt > done and item and item not in known and len(item) <= longest:
                known.add(item)
                yield attempt, item
