"""The card of a result that is not a model: the report of an evaluation or an audit."""

from __future__ import annotations

from collections.abc import Sequence

from hf_transfer_ext.hub import card
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.hub.teacher_cache import THIS_CACHE

_ABOUT = {
    "evaluation": "Models were measured on the same data.",
    "audit": "An unlearned model was attacked to see how much of the removed knowledge comes back.",
    "caching": "The next-token distributions of a teacher on a data set, for distillation without the teacher.",
    "quickstart": "The jobs of this package were run one after the other; each result is a folder of its own.",
}

#: How the result is read again, where it is more than a report.
_USES = {
    "caching": f"""## Load it

```python
from hf_transfer_ext.hub.teacher_cache import pull_cache

folder = pull_cache("{THIS_CACHE}")
```

`hf-transfer-ext distill --teacher_cache FOLDER`, with the same data and `max_length`, then needs no teacher. A cache
of kind likelihoods is for `--loss alm`, and needs the teacher's tokenizer: `--teacher_tokenizer NAME`.""",
}


def report_card(record: RunRecord, *, plots: Sequence[str] = (), earlier: str = "") -> str:
    """The README of a report, from its record alone: what was measured, of what, how, and with which versions.

    Args:
        plots: Images beside the card.
        earlier: The card that this one replaces, whose user's own text is kept.
    """
    names = ", ".join(card._code(item.name) for item in record.inputs if item.role != "dataset")
    title = f"{record.job.capitalize()} of {names}" if names else record.job.capitalize()
    about = _ABOUT.get(record.job, "A report of hf_transfer_ext.")
    made = f"Written by {card._code(record.recipe)} of hf_transfer_ext on {record.created}."
    parts = [
        card.START,
        f"# {title}",
        f"{about} {made}",
        _USES.get(record.job, ""),
        "## Measurements\n\n" + card._measurements(record),
        card._plots(plots),
        card._limits(record),
        "## Not measured\n\n" + card._not_measured(record),
        "## Inputs\n\n" + card._inputs(record),
        card._history(record),
        "## Run\n\n" + card._run(record),
        card.END,
    ]
    front = "---\ntags:\n- hf_transfer_ext\n- " + record.job + "\n---\n\n"
    return card.with_own_text(front + "\n\n".join(part for part in parts if part) + "\n", earlier)
