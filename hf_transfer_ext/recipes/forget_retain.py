"""Which data to forget and to retain, for all jobs around unlearning: data sets, or people who do not exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.data.forget_retain import forget_retain_rows
from hf_transfer_ext.hub.record import RunRecord, describe_dataset
from hf_transfer_ext.recipe import setting


@dataclass(kw_only=True)
class ForgetRetainArguments:
    """The data to forget and to retain. Jobs with the same settings and seed get the same made-up people."""

    forget_data: str | None = setting(None, "data", "File, folder or Hub id; none: made-up people.")
    retain_data: str | None = setting(None, "data", "File, folder or Hub id.")
    columns: dict[str, str] = setting({}, "data", "Name in the schema -> your column: {question: q, answer: a}.")
    template: str = setting("auto", "data", "auto, chat or plain.")
    people: int = setting(20, "data", "Made-up people, in all.")
    forget_people: int = setting(2, "data", "Of these, the ones to forget.")
    facts: int | None = setting(None, "data", "Questions about each of them; none: all.")
    facets: dict[str, Any] = setting({}, "data", "Further questions: {phrasings: 2, languages: [de], multi_hop: 4}.")

    def rows(
        self, record: RunRecord, seed: int, holdout_data: str | None = None, **more: Any
    ) -> dict[str, list[dict[str, Any]]]:
        """The rows of each set, as `forget_retain_rows` gives them; the record notes the data sets as inputs.

        Args:
            more: Further arguments of `forget_retain_rows` (`split`, `holdout_people`).
        """
        named = ("columns", "people", "forget_people", "facts", "facets")
        how: Any = {name: getattr(self, name) for name in named} | {"seed": seed, **more}
        sets = (self.forget_data, self.retain_data, holdout_data)
        found = forget_retain_rows(*sets, **how)
        record.inputs += [describe_dataset(name) for name in sets if name]
        return found
