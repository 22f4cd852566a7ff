"""What an audit has finished so far, so that one that was killed goes on with the next attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext import __version__
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.audit.verdict import Verdict
from hf_transfer_ext.evals.engine.cache import ScoreCache, digest, model_fingerprint
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.measurement import Measurement


class Journal:
    """Finished attacks in a folder, by everything that their result depends on.

    Without a folder it remembers nothing, and no weight is read for a fingerprint. Every process reads the entries of
    all processes before any of them writes, so all of them skip the same attacks.

    Args:
        folder: Where the entries are kept; None for none.
        subjects: Role -> model under attack: its weights, tokenizer and settings are part of the key.
        settings: Whatever else the verdicts depend on (seed, resamples).
    """

    def __init__(
        self, folder: str | Path | None, subjects: Mapping[str, Subject], data: AuditData, settings: Mapping[str, Any]
    ) -> None:
        accelerator = next(iter(subjects.values())).accelerator
        known = ""
        if folder is not None:
            rows = [[repr(sorted(row.items())) for row in part] for part in (data.forget, data.retain, data.holdout)]
            known = digest([__version__, rows, dict(settings), {r: _key(s) for r, s in subjects.items()}])
        self._entries = ScoreCache(folder, known, 0 if accelerator is None else accelerator.process_index)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    def attack(self, label: str) -> tuple[Verdict, Values | None] | None:
        """Verdict and scores of a finished attack (no scores if it did not apply); None if it is still to run."""
        entry = self._entries.get(f"attack {label}")
        if entry is None:
            return None
        scores = entry["scores"]
        return _verdict(entry["verdict"]), None if scores is None else np.array(scores, dtype=np.float64)

    def note_attack(self, label: str, verdict: Verdict, scores: Values | None) -> None:
        listed = None if scores is None else scores.astype(np.float64).tolist()
        self._entries.put(f"attack {label}", {"verdict": verdict.to_dict(), "scores": listed})

    def membership(self, label: str) -> tuple[Verdict, dict[str, Measurement]] | None:
        """Verdict and measurements by model of a finished membership attack; None if it is still to run."""
        entry = self._entries.get(f"membership {label}")
        if entry is None:
            return None
        found = {
            model: Measurement(**{**content, "interval": _pair(content["interval"])})
            for model, content in entry["found"].items()
        }
        return _verdict(entry["verdict"]), found

    def note_membership(self, label: str, verdict: Verdict, found: Mapping[str, Measurement]) -> None:
        content = {model: measurement.to_dict() for model, measurement in found.items()}
        self._entries.put(f"membership {label}", {"verdict": verdict.to_dict(), "found": content})


def _key(subject: Subject) -> Any:
    """Everything about a subject that its scores depend on, as JSON."""
    tokenizer = subject.tokenizer
    words = digest([tokenizer.get_vocab(), str(getattr(tokenizer, "chat_template", None))])
    template = {name: str(value) for name, value in asdict(subject.template).items()}
    return [
        model_fingerprint(subject.model),
        words,
        template,
        subject.max_new_tokens,
        subject.batch_size,
        subject.seed,
    ]


def _verdict(content: Mapping[str, Any]) -> Verdict:
    return Verdict(**{**content, "interval": _pair(content["interval"])})


def _pair(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
