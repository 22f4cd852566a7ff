"""A teacher's outputs on disk: computed once for each text, read in every later epoch, run and batch order.

A cache is a folder of `teacher_cache.json`, which says of which teacher it is, and `rows-*.safetensors`. Rows are
found by the token ids of their text (its document, where several are packed into one row) and the position in it, so
neither shuffling nor packing matters. Every process writes files of its own, each atomically: a run that is killed
loses the rows since its last file, and the next one goes on from there. The folder is plain files, which
`hub/teacher_cache.py` moves through a data set repository of the Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.teacher_cache import FINGERPRINT_FILE, ON_HUB, SHARDS, cache_folder
from hf_transfer_ext.losses.rows import DenseRows, SampledRows, SampledTokens, SparseRows, TopTokens
from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.models.heads import causal_lm_of, head_rows
from hf_transfer_ext.models.loading import context_length
from hf_transfer_ext.progress import steps
from hf_transfer_ext.reading import parse_json, read_text
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.cache_kinds import CACHE_KINDS
from hf_transfer_ext.teachers.documents import Document, documents_of, documents_of_row, require_text_alone
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal
from hf_transfer_ext.tensors import Mask

logger = logging.getLogger(__name__)

#: A higher number makes older caches unreadable.
FORMAT = 1
#: Rows are held in memory until they fill a file of this size, or for this long.
SHARD_BYTES = 32_000_000
FLUSH_SECONDS = 300.0
#: Age of a half-written file at which no process can still be writing it: it was left by one that was killed.
STALE_SECONDS = 3600.0
#: Tokens whose logits exist at once while rows are captured.
CAPTURE_TOKENS = 256

#: What a commit of a Hub repository looks like, and a branch or a tag does not.
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: kind -> (default of `top`, default of `samples`, form of the rows)
KINDS: dict[str, tuple[int, int, Form]] = {
    name: (kind.default_top, kind.default_samples, kind.form) for name, kind in CACHE_KINDS.items()
}


@dataclass(frozen=True)
class Likelihoods:
    """What a teacher says about the tokens of a text themselves, and nothing else.

    Args:
        log_probs: Of the token that comes after each position, in nats.
        temperature: They were made at.
    """

    log_probs: Float[Tensor, " tokens"]
    temperature: float = 1.0
    form: ClassVar[Form] = "likelihood"

    def __len__(self) -> int:
        return len(self.log_probs)


#: What a cache stores of a text.
CacheRows = SparseRows | SampledRows | Likelihoods


@dataclass(frozen=True)
class CacheSpec:
    """What a cache stores of the teacher's distribution at each token.

    Args:
        kind: "top_and_samples": the likeliest tokens, and weighted draws from the others: unbiased, the default.
            "top": the likeliest tokens and the mass of all others (a *ghost tail*): the smallest error of a single
            row, but a systematic one. "samples": draws alone (random-sampling KD): unbiased, and the smallest file.
            "likelihoods": the log-probability of the text's own tokens, in those of the teacher's tokenizer, for the
            span loss `alm`.
        top: Likeliest tokens, >= 1; 0 for "samples" and "likelihoods". None: 64 for "top", 32 for "top_and_samples".
        samples: Draws, >= 1; 0 for "top" and "likelihoods". None: 8 for "top_and_samples", 50 for "samples".
        temperature: Of the teacher's softmax, > 0: the `distill_temperature` of the training.
        tau: Draws have probability proportional to p**tau, > 0.
    """

    kind: str = "top_and_samples"
    top: int | None = None
    samples: int | None = None
    temperature: float = 1.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown_name("kind of teacher cache", self.kind, KINDS))
        top, samples, _ = KINDS[self.kind]
        for name, value, default in (("top", self.top, top), ("samples", self.samples, samples)):
            chosen = default if value is None else value
            if (chosen < 1) if default else (chosen != 0):
                raise ValueError(
                    f"`{name}` of a cache of kind {self.kind!r} has to be {'>= 1' if default else '0'}, got {chosen}."
                )
            object.__setattr__(self, name, chosen)
        if not (0 < self.temperature < math.inf and 0 < self.tau < math.inf):
            raise ValueError(
                f"`temperature` and `tau` of a cache have to be finite and > 0, got {self.temperature} and {self.tau}."
            )
        if not self.samples and self.tau != 1:
            raise ValueError(f"`tau` is {self.tau}, but a cache of kind {self.kind!r} draws nothing. Leave it at 1.")

    @property
    def form(self) -> Form:
        """The form of the rows, which a divergence has to accept."""
        return KINDS[self.kind][2]

    def check_vocabulary(self, size: int) -> None:
        """Refuse a `top` larger than the teacher's vocabulary."""
        if int(self.top or 0) > size:
            raise ValueError(
                f"`top` is {self.top}, but the teacher has {size} vocabulary entries. Choose {size} or less."
            )

    def rows(
        self, logits: Tensor, generator: torch.Generator | None = None, *, targets: Tensor | None = None
    ) -> CacheRows:
        """`(tokens, vocab)` logits -> the rows that are stored.

        Args:
            generator: Of the draws.
            targets: The tokens that come, which kind "likelihoods" alone reads, and needs.
        """
        top, samples = int(self.top or 0), int(self.samples or 0)
        if self.form == "likelihood":
            if targets is None:
                raise ValueError("A cache of kind 'likelihoods' needs the `targets` that come at each row.")
            log_probs = (logits.float() / self.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
            return Likelihoods(log_probs, self.temperature)
        if self.form == "sparse":
            return SparseRows.from_logits(logits, top, temperature=self.temperature)
        return SampledRows.from_logits(
            logits, top, samples, temperature=self.temperature, tau=self.tau, generator=generator
        )


def fingerprint_of(
    teacher: nn.Module, tokenizer: PreTrainedTokenizerBase, spec: CacheSpec, *, revision: str | None = None
) -> dict[str, Any]:
    """The fields in which a cache has to match the training that reads it.

    Args:
        teacher: Its frozen tensors are hashed as a whole (about 1 s per GB), for a name says little: two fine-tunes
            may be in one folder one after the other.
        revision: Of the teacher, where its config does not tell the commit that it was loaded from.
    """
    causal = causal_lm_of(teacher)
    spec.check_vocabulary(head_rows(teacher))
    if all(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError("All weights of the teacher are trainable. Freeze it with `teacher.requires_grad_(False)`.")
    return {
        "format": FORMAT,
        "teacher": Path(causal.config.name_or_path).name or type(causal).__name__,
        "revision": getattr(causal.config, "_commit_hash", None) or revision,
        "weights": weights_digest(teacher),
        "tokenizer": tokenizer_digest(tokenizer),
        "vocab_size": head_rows(teacher),
        **asdict(spec),
    }


def weights_digest(model: nn.Module) -> str:
    """Hex digest of a model's frozen parameters and its buffers: of a teacher's adapter's base, not of the student."""
    found = hashlib.blake2b(digest_size=16)
    frozen = [(name, value) for name, value in model.named_parameters() if not value.requires_grad]
    for name, value in sorted([*frozen, *model.named_buffers()], key=lambda pair: pair[0]):
        if value.is_meta:
            raise ValueError(
                f"The teacher's tensor {name!r} is not in memory (offloaded, or not loaded), so its cache cannot be "
                "distinguished from another one's. Fill the cache on a device that holds the whole teacher."
            )
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of a tokenizer's token -> id map, which is what gives rows their meaning."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=16).hexdigest()


@dataclass
class _Rows:
    """Stored rows, flat: row i has `lengths[i]` entries.

    Args:
        positions: Position in its document of each row.
        lengths: Entries of each row.
        mass: Logarithm of the mass outside the list: of the tail, or of p**tau over all tokens that can be drawn. Of
            kind "likelihoods", whose rows have no entries, the log-probability of the text's own token.
        ids, log_probs: Of each entry; log-probabilities in float16.
        counts: How often an entry was drawn; 0 for one that is always listed. Empty for kind "top".
    """

    positions: np.ndarray
    lengths: np.ndarray
    mass: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    counts: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    @staticmethod
    def joined(several: list[_Rows]) -> _Rows:
        names = _Rows.__dataclass_fields__
        return _Rows(*(np.concatenate([getattr(one, name) for one in several]) for name in names))

    def at(self, positions: np.ndarray) -> _Rows | None:
        """The rows at these positions, or None where one of them is missing."""
        if np.array_equal(positions, self.positions):
            return self
        places = np.searchsorted(self.positions, positions)
        if (places >= len(self.positions)).any() or (self.positions[places] != positions).any():
            return None
        kept = np.zeros(len(self.positions), dtype=bool)
        kept[places] = True
        entries = np.repeat(kept, self.lengths)
        counts = self.counts[entries] if len(self.counts) else self.counts
        return _Rows(
            positions, self.lengths[kept], self.mass[kept], self.ids[entries], self.log_probs[entries], counts
        )


def _empty(vocab_size: int) -> dict[str, np.ndarray]:
    """The columns of no row, by name."""
    ids = np.uint16 if vocab_size <= 1 << 16 else np.int32
    types = (np.int32, np.uint16, np.float32, ids, np.float16, np.uint8)
    return {name: np.zeros(0, dtype) for name, dtype in zip(_Rows.__dataclass_fields__, types, strict=True)}


def _stored(rows: CacheRows, positions: np.ndarray, spec: CacheSpec, vocab_size: int) -> _Rows:
    id_type = np.uint16 if vocab_size <= 1 << 16 else np.int32
    if isinstance(rows, Likelihoods):
        own: dict[str, Any] = {
            "positions": positions.astype(np.int32),
            "lengths": np.zeros(len(rows), np.uint16),
            "mass": rows.log_probs.detach().float().cpu().numpy(),
        }
        return _Rows(**{**_empty(vocab_size), **own})
    if isinstance(rows, SparseRows):
        tokens, top = rows.top.ids.shape
        return _Rows(
            positions.astype(np.int32),
            np.full(tokens, top, dtype=_counting(top)),
            rows.top.tail.log().cpu().numpy(),
            rows.top.ids.cpu().numpy().astype(id_type).reshape(-1),
            rows.top.log_probs.half().cpu().numpy().reshape(-1),
            np.zeros(0, dtype=np.uint8),
        )
    top, samples, listed = int(spec.top or 0), int(spec.samples or 0), rows.listed
    ids, log_probs = listed.ids.cpu().numpy(), listed.log_probs.cpu().numpy()
    factors = listed.factors.cpu().numpy()
    with np.errstate(divide="ignore"):
        mass = np.log(factors[:, top] * samples) + spec.tau * log_probs[:, top]
    order = np.argsort(ids[:, top:], axis=1, kind="stable") + top  # equal draws side by side
    ids = np.concatenate([ids[:, :top], np.take_along_axis(ids, order, 1)], 1)
    log_probs = np.concatenate([log_probs[:, :top], np.take_along_axis(log_probs, order, 1)], 1)
    keep = np.ones(ids.shape, dtype=bool)
    keep[:, top + 1 :] = ids[:, top + 1 :] != ids[:, top:-1]
    keep[:, top:] &= np.isfinite(mass)[:, None]  # a row without a tail has no draws
    # A draw's count reaches to the next kept entry of its row.
    counts = np.zeros(ids.shape, dtype=np.int64)
    for row in range(len(ids)):
        first = np.flatnonzero(keep[row, top:])
        counts[row, top + first] = np.diff(np.append(first, ids.shape[1] - top))
    return _Rows(
        positions.astype(np.int32),
        keep.sum(1).astype(_counting(ids.shape[1])),
        mass.astype(np.float32),
        ids[keep].astype(id_type),
        log_probs[keep].astype(np.float16),
        counts[keep].astype(np.uint8 if samples < 1 << 8 else _counting(samples)),
    )


def _counting(largest: int) -> Any:
    """The type in which lengths and counts up to `largest` are stored."""
    return np.uint16 if largest < 1 << 16 else np.uint32


def _opened(stored: _Rows, spec: CacheSpec, device: torch.device) -> SparseRows | SampledRows:
    """Rows as a loss reads them: every row filled up to the longest."""
    width = int(stored.lengths.max(initial=1))
    filled = np.arange(width) < stored.lengths[:, None]

    def spread(values: np.ndarray, rest: float, dtype: Any) -> Tensor:
        out = np.full(filled.shape, rest, dtype=dtype)
        out[filled] = values
        return torch.from_numpy(out).to(device)

    ids = spread(stored.ids, 0, np.int64)
    log_probs = spread(stored.log_probs, -np.inf, np.float32)
    mass = torch.from_numpy(stored.mass).to(device)
    if spec.form == "sparse":
        whole = torch.cat([log_probs, mass[:, None]], 1).log_softmax(1)  # what float16 took from the sum of 1
        return SparseRows(TopTokens(ids, whole[:, :-1], whole[:, -1].exp()), temperature=spec.temperature)
    counts = spread(stored.counts, 0, np.float32)
    drawn = (mass[:, None] - spec.tau * log_probs).exp() * counts / int(spec.samples or 1)
    listed = (counts == 0) & torch.from_numpy(filled).to(device)
    factors = torch.where(counts > 0, drawn, listed.float())
    return SampledRows(SampledTokens(ids, log_probs, factors), temperature=spec.temperature, top=int(spec.top or 0))


@dataclass(frozen=True)
class _Place:
    """Where the rows of a document lie: in a file from one row and entry to another."""

    shard: Path
    rows: tuple[int, int]
    entries: tuple[int, int]


class TeacherCache:
    """A folder of teacher rows, for reading and adding.

    Args:
        folder: Made where it is missing and `fingerprint` is given.
        fingerprint: What the cache has to be of (`fingerprint_of`). None: anything.

    Raises:
        FileNotFoundError: There is no cache in the folder, and no fingerprint to make one for.
        ValueError: The cache is of another teacher, revision, tokenizer or kind; the message shows both.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / FINGERPRINT_FILE
        if not path.is_file():
            if fingerprint is None:
                raise FileNotFoundError(
                    f"There is no teacher cache in {str(folder)!r} ({FINGERPRINT_FILE} is missing). Fix the path, or "
                    "make one with `cache_teacher`."
                )
            _refuse_foreign(self.folder)
            write_text(path, json.dumps(dict(fingerprint), indent=2) + "\n")
        found = parse_json(read_text(path), f"{FINGERPRINT_FILE} of the teacher cache {str(folder)!r}", kind=dict)
        if fingerprint is not None:
            require_same_fingerprint(found, fingerprint, self.folder)
        if found.get("format") != FORMAT:
            raise ValueError(
                f"The teacher cache {str(folder)!r} has format {found.get('format')!r}, this version reads {FORMAT}. "
                "Make it again with `cache_teacher`."
            )
        self.fingerprint: dict[str, Any] = found
        fields = CacheSpec.__dataclass_fields__
        missing = [name for name in (*fields, "vocab_size") if name not in found]
        if missing:
            raise ValueError(f"{FINGERPRINT_FILE} of the teacher cache {str(folder)!r} lacks {', '.join(missing)}.")
        self.spec = CacheSpec(**{name: found[name] for name in fields})
        self._places: dict[bytes, list[_Place]] = {}
        self._files: dict[Path, Any] = {}
        self._waiting: dict[bytes, list[_Rows]] = {}
        self._waiting_bytes, self._flushed = 0, time.monotonic()
        self._remove_stale()
        self.refresh()

    def __len__(self) -> int:
        """Documents with rows."""
        return len(self._places.keys() | self._waiting.keys())

    def __contains__(self, document: Document) -> bool:
        """Whether all rows of a document are there."""
        return self._find(document) is not None

    def _remove_stale(self) -> None:
        """Remove the half-written files of processes that were killed long ago."""
        half_written = (*self.folder.glob(f".{SHARDS}.partial"), *self.folder.glob(f".{FINGERPRINT_FILE}.partial*"))
        for path in half_written:
            with contextlib.suppress(OSError):  # of another process that removes it, or a folder that is read-only
                if time.time() - path.stat().st_mtime >= STALE_SECONDS:
                    path.unlink()

    def refresh(self) -> bool:
        """Look for files that other processes have written; True where there was one."""
        new = sorted(set(self.folder.glob(SHARDS)) - self._files.keys())
        for shard in new:
            self._index(shard)
        return bool(new)

    def _index(self, shard: Path) -> None:
        expected = digest_of(self.fingerprint)
        try:
            file = safe_open(shard, framework="numpy")
            if (file.metadata() or {}).get("fingerprint") != expected:
                raise ValueError(
                    f"{shard.name} in the teacher cache {str(self.folder)!r} belongs to another cache: its "
                    f"fingerprint is {(file.metadata() or {}).get('fingerprint')}, that of the folder {expected}. "
                    "Move the file away."
                )
            keys = file.get_tensor("keys")
            rows, entries = (np.cumsum(file.get_tensor(name)) for name in ("rows", "entries"))
            sizes = {name: file.get_slice(name).get_shape()[0] for name in ("positions", "lengths", "mass", "ids")}
        except SafetensorError as error:
            raise ValueError(
                f"{shard.name} in the teacher cache {str(self.folder)!r} cannot be read ({error}). Delete it: its "
                "rows are computed again."
            ) from error
        ends = (int(rows[-1]), int(entries[-1])) if len(keys) else (0, 0)
        if (sizes["positions"], sizes["ids"]) != ends or {sizes["lengths"], sizes["mass"]} != {ends[0]}:
            raise ValueError(f"{shard.name} in the teacher cache {str(self.folder)!r} is damaged: its sizes differ.")
        self._files[shard] = file
        for i, key in enumerate(keys):
            before = (int(rows[i - 1]), int(entries[i - 1])) if i else (0, 0)
            place = _Place(shard, (before[0], int(rows[i])), (before[1], int(entries[i])))
            self._places.setdefault(key.tobytes(), []).append(place)

    def _read(self, place: _Place) -> _Rows:
        file = self._files[place.shard]
        per_row = slice(*place.rows)
        per_entry = slice(*place.entries)
        slices = {name: per_row for name in ("positions", "lengths", "mass")}
        slices |= {name: per_entry for name in ("ids", "log_probs")}
        slices |= {"counts": per_entry} if self.spec.form == "sampled" else {}
        found = {name: file.get_slice(name)[part] for name, part in slices.items() if part.start < part.stop}
        return _Rows(**{**_empty(self.fingerprint["vocab_size"]), **found})

    def _find(self, document: Document) -> _Rows | None:
        for rows in self._waiting.get(document.key, ()):
            if (found := rows.at(document.positions)) is not None:
                return found
        for place in self._places.get(document.key, ()):
            if (found := self._read(place).at(document.positions)) is not None:
                return found
        return None

    def rows(self, documents: Iterable[Document], device: torch.device) -> SparseRows | SampledRows:
        """The rows of some documents, one after the other.

        Raises:
            ValueError: A document is not in the cache.
        """
        return _opened(self._joined(documents), self.spec, device)

    def own_log_probs(self, documents: Iterable[Document]) -> Float[Tensor, " tokens"]:
        """The log-probabilities of the tokens after the positions of some documents, in nats, of kind "likelihoods".

        Raises:
            ValueError: A document is not in the cache.
        """
        return torch.from_numpy(self._joined(documents).mass.copy())

    def _joined(self, documents: Iterable[Document]) -> _Rows:
        found = [_Rows(**_empty(self.fingerprint["vocab_size"]))]
        for document in documents:
            rows = self._find(document)
            if rows is None:
                raise ValueError(self.absence(document))
            found.append(rows)
        return _Rows.joined(found)

    def absence(self, document: Document) -> str:
        """Why a document cannot be answered."""
        known = document.key in self._places or document.key in self._waiting
        what = (
            "other tokens of it were labeled when the cache was filled"
            if known
            else f"its fingerprint is {document.key.hex()}, and the cache holds {len(self)} other texts"
        )
        return (
            f"The teacher cache {str(self.folder)!r} (fingerprint {digest_of(self.fingerprint)}) has no rows for a "
            f"text of {len(document.ids)} tokens, {document.ids[:8].tolist()} ...: {what}. The data, its "
            "tokenization, `max_length` and mask have to be those that the cache was filled with; or give the "
            "teacher, too, and what is missing is added."
        )

    def add(self, document: Document, *parts: CacheRows) -> None:
        """Store the rows of a document, in one or several parts.

        They can be read at once, and by other processes after `flush`.

        Raises:
            ValueError: The rows are of another form or temperature, or not one for each position.
        """
        if sum(len(part) for part in parts) != len(document.positions):
            raise ValueError(
                f"A document with {len(document.positions)} labeled tokens needs as many rows, got "
                f"{sum(len(part) for part in parts)}."
            )
        stored_parts, start = [], 0
        for part in parts:
            if part.form != self.spec.form or part.temperature != self.spec.temperature:
                raise ValueError(
                    f"The cache stores {self.spec.form} rows at temperature {self.spec.temperature}, got {part.form} "
                    f"rows at {part.temperature}."
                )
            positions = document.positions[start : start + len(part)]
            stored_parts.append(_stored(part, positions, self.spec, self.fingerprint["vocab_size"]))
            start += len(part)
        stored = _Rows.joined(stored_parts)
        self._waiting.setdefault(document.key, []).append(stored)
        self._waiting_bytes += stored.nbytes
        if self._waiting_bytes >= SHARD_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as one file, atomically.

        The file's name is a digest of what it holds: a flush that is interrupted and repeated leaves one file.
        """
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        several = [(key, rows) for key, found in self._waiting.items() for rows in found]
        tensors = vars(_Rows.joined([rows for _, rows in several]))
        tensors = {
            **({name: value for name, value in tensors.items() if name != "counts" or self.spec.form == "sampled"}),
            "keys": np.frombuffer(b"".join(key for key, _ in several), np.uint8).reshape(len(several), -1),
            "rows": np.array([len(rows.positions) for _, rows in several], np.int64),
            "entries": np.array([len(rows.ids) for _, rows in several], np.int64),
        }
        # Not by save_file: it writes to a file of another name first, which a kill would leave behind.
        content = save(tensors, metadata={"fingerprint": digest_of(self.fingerprint)})
        name = f"rows-{hashlib.blake2b(content, digest_size=8).hexdigest()}.safetensors"
        aside = self.folder / f".rows-{secrets.token_hex(8)}.safetensors.partial"
        try:
            aside.write_bytes(content)
            os.replace(aside, self.folder / name)
        finally:
            aside.unlink(missing_ok=True)
        self._waiting, self._waiting_bytes = {}, 0
        self._index(self.folder / name)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with files of something else. What another process has begun there is fine."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = sorted(name for name in names if not name.startswith(".") and name != FINGERPRINT_FILE)
    if foreign:
        raise FileExistsError(
            f"{str(folder)!r} holds files that are not a teacher cache ({foreign[0]}). Name a new folder for it."
        )


def digest_of(fingerprint: Mapping[str, Any]) -> str:
    """A short name of a fingerprint."""
    return hashlib.blake2b(json.dumps(dict(fingerprint), sort_keys=True).encode(), digest_size=8).hexdigest()


def require_same_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse a cache that is of something else.

    Raises:
        ValueError: They differ; the message shows both.
    """
    differ = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    # The same weights in a folder of another name, or under a branch's name or none, are the same teacher; at another
    # commit their configuration may differ.
    commits = all(_COMMIT.fullmatch(str(one.get("revision"))) for one in (found, wanted))
    if not {*differ} - ({"teacher"} if commits else {"teacher", "revision"}):
        return
    lines = "; ".join(f"{name} is {found.get(name)!r}, needed is {wanted.get(name)!r}" for name in differ)
    raise ValueError(
        f"The teacher cache {str(folder)!r} (fingerprint {digest_of(found)}) is not of this teacher and setting "
        f"(fingerprint {digest_of(wanted)}): {lines}. Name another folder, or change the setting back."
    )


class CachedTeacher:
    """Reads a teacher's rows from a cache; what is missing is computed once, and added.

    Args:
        cache: Where rows are read and written.
        teacher: Gives dense rows for texts that are missing. None: a missing text is an error.

    When to use it: whenever more than one epoch, or more than one student, learns from one teacher on fixed data.
    """

    def __init__(self, cache: TeacherCache, teacher: Teacher | None = None) -> None:
        if teacher is not None and teacher.form != "dense" and not hasattr(teacher, "document_rows"):
            raise ValueError(
                f"A teacher cache is filled from a teacher with dense rows, or from a server; got one with "
                f"{teacher.form} rows."
            )
        if getattr(teacher, "sharded", False):
            raise ValueError(
                "The teacher is split across processes (FSDP, ZeRO-3), which have to run it together, but with a "
                "cache each process runs it for its own missing texts. Fill the cache first with `cache_teacher` on "
                "processes that hold the whole teacher, then train without the teacher."
            )
        self.cache, self.teacher = cache, teacher
        #: How often the teacher ran.
        self.forwards = 0

    @property
    def form(self) -> Form:
        return self.cache.spec.form

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The stored rows at the student's labeled tokens; see `Teacher.signal`."""
        require_text_alone(inputs, "A teacher cache")
        documents = documents_of(inputs, mask)
        self.add_missing(student, documents, inputs["input_ids"].device)
        return TeacherSignal(self.cache.rows(documents, inputs["input_ids"].device))

    def add_missing(self, student: nn.Module, documents: Iterable[Document], device: torch.device) -> None:
        """Run the teacher on those of some documents that the cache does not hold; see `capture`."""
        missing = [document for document in documents if document not in self.cache]
        if missing and self.cache.refresh():  # another process may have written them
            missing = [document for document in missing if document not in self.cache]
        if missing:
            self.capture(student, missing, device)

    def capture(self, student: nn.Module, documents: list[Document], device: torch.device) -> None:
        """Run the teacher on some documents, each on its own in a padded batch, and store its rows.

        Raises:
            ValueError: There is no teacher.
        """
        if self.teacher is None:
            raise ValueError(self.cache.absence(documents[0]))
        if hasattr(self.teacher, "document_rows"):  # a server, which lists the likeliest tokens itself
            self.forwards += 1
            if self.form == "likelihood":
                counts = [len(document.positions) for document in documents]
                told = self.teacher.own_log_probs(documents).split(counts)  # type: ignore[attr-defined]
                for document, log_probs in zip(documents, told, strict=True):
                    self.cache.add(document, Likelihoods(log_probs))
                return
            for document, found in self.teacher.document_rows(documents):
                self.cache.add(document, found)
            return
        longest = max(len(document.ids) for document in documents)
        ids = torch.zeros(len(documents), longest, dtype=torch.long)
        attended, mask = torch.zeros_like(ids), torch.zeros(len(documents), longest - 1, dtype=torch.bool)
        for i, document in enumerate(documents):
            ids[i, : len(document.ids)] = torch.from_numpy(document.ids)
            attended[i, : len(document.ids)] = 1
            mask[i, document.positions] = True
        inputs = {"input_ids": ids.to(device), "attention_mask": attended.to(device), "use_cache": False}
        rows = self.teacher.signal(student, inputs, mask.to(device)).rows
        self.forwards += 1
        assert isinstance(rows, DenseRows)
        self.cache.spec.check_vocabulary(rows.vocab_size)
        read, start = rows.reader(), 0
        for document in documents:
            # Draws depend on the text alone, whatever the order, the batch and the number of processes.
            generator = torch.Generator(device=device).manual_seed(int.from_bytes(document.key[:7], "little"))
            parts, end = [], start + len(document.positions)
            targets = torch.from_numpy(document.ids[document.positions + 1])
            for first in range(start, end, CAPTURE_TOKENS):
                part = slice(first, min(first + CAPTURE_TOKENS, end))
                block = read(part)
                assert isinstance(block, Tensor)
                come = targets[part.start - start : part.stop - start].to(block.device)
                parts.append(self.cache.spec.rows(rows.finish(block.float()), generator, targets=come))
            self.cache.add(document, *parts)
            start = end


def planned_spec(folder: str | Path, temperature: float, options: Mapping[str, Any] | None = None) -> CacheSpec:
    """What a cache will store: `options`; without them what the cache in the folder stores, or the defaults.

    Raises:
        ValueError: An option is unknown or out of its range.
    """
    known = [name for name in CacheSpec.__dataclass_fields__ if name != "temperature"]
    for name, value in (options or {}).items():
        if name not in known:
            raise ValueError(unknown_name("option of a teacher cache", name, known))
        if name in ("top", "samples") and value is not None and type(value) is not int:
            raise ValueError(f"`{name}` of a teacher cache has to be a whole number, got {value!r}.")
        if name == "tau" and type(value) not in (int, float):
            raise ValueError(f"`tau` of a teacher cache has to be a number, got {value!r}.")
    folder = cache_folder(folder)
    if options or not (Path(folder) / FINGERPRINT_FILE).is_file():
        return CacheSpec(**{**(options or {}), "temperature": temperature})
    return replace(TeacherCache(folder).spec, temperature=temperature)


def open_cache(
    folder: str | Path,
    teacher: LiveTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    options: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> CachedTeacher:
    """A teacher behind its cache, or the cache alone.

    Args:
        folder: A cache, by its path or its address on the Hub (`hf://datasets/OWNER/NAME[@REVISION]`); or with a
            teacher, the folder where one is made.
        teacher: None: rows are read, and a missing one is an error.
        tokenizer: The student's.
        temperature: Of the loss.
        options: Arguments of `CacheSpec`. Left out: those of the cache in the folder, or the defaults.

    Raises:
        FileNotFoundError: There is no cache in the folder, and no teacher to make one with.
        ValueError: The cache is of another teacher, tokenizer, temperature or kind; or it is on the Hub, and a teacher
            would add rows to it.
    """
    if teacher is not None:
        refuse_hub_folder(folder)
    folder = cache_folder(folder)
    spec = planned_spec(folder, temperature, options)
    if teacher is not None:
        model = getattr(teacher, "peft", None) or teacher.model
        wanted = fingerprint_of(model, tokenizer, spec, revision=revision)
        if isinstance(teacher, AdapterTeacher):
            wanted["adapter"] = teacher.adapter
        return CachedTeacher(TeacherCache(folder, wanted), teacher)
    cache = TeacherCache(folder)
    wanted = {**cache.fingerprint, **asdict(spec), "tokenizer": tokenizer_digest(tokenizer)}
    require_same_fingerprint(cache.fingerprint, wanted, cache.folder)
    return CachedTeacher(cache)


def open_likelihoods(
    folder: str | Path,
    teacher: LiveTeacher | Any | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float = 1.0,
    revision: str | None = None,
) -> CachedTeacher:
    """A teacher with tokens of its own behind a cache of kind "likelihoods", or the cache alone.

    Args:
        folder: As of `open_cache`.
        teacher: A live one, or a server; None: likelihoods are read, and a missing text is an error.
        tokenizer: The teacher's.
        temperature: Of the loss.

    Raises: as `open_cache`.
    """
    spec = CacheSpec("likelihoods", temperature=temperature)
    if teacher is not None:
        refuse_hub_folder(folder)
        if isinstance(teacher, LiveTeacher):
            found = fingerprint_of(teacher.network, tokenizer, spec, revision=revision)
            found["context"] = context_length(causal_lm_of(teacher.network))  # what is behind it has no rows
        else:
            found = {**teacher.fingerprint(), **asdict(spec), "context": None}
        return CachedTeacher(TeacherCache(folder, found), teacher)
    cache = TeacherCache(cache_folder(folder))
    wanted = {**cache.fingerprint, **asdict(spec), "tokenizer": tokenizer_digest(tokenizer)}
    require_same_fingerprint(cache.fingerprint, wanted, cache.folder)
    return CachedTeacher(cache)


def refuse_hub_folder(folder: str | Path) -> None:
    """Refuse a cache on the Hub where a teacher would add rows to it."""
    if str(folder).startswith(ON_HUB):
        raise ValueError(
            f"The teacher cache {str(folder)!r} is on the Hub, where no rows are added to it. Leave the teacher out, "
            "or copy the folder that `pull_cache` gives and name the copy."
        )


class FlushCallback(TrainerCallback):
    """Writes what a cache holds in memory at the end of each epoch, and with each checkpoint."""

    def __init__(self, cache: TeacherCache, accelerator: Accelerator) -> None:
        self.cache, self.accelerator = cache, accelerator

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()
        self.accelerator.wait_for_everyone()  # in the next epoch each process meets texts of the others

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()


def cache_teacher(
    teacher: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    spec: CacheSpec | None = None,
    batch_size: int = 8,
    revision: str | None = None,
    accelerator: Accelerator | None = None,
) -> TeacherCache:
    """Store a teacher's rows for a whole data set. Texts that are in the folder already are skipped.

    Under `accelerate launch` each process takes its share of the rows; all may write into one folder. After a kill,
    the same call goes on.

    Args:
        teacher: Causal language model, whole on each process; it is frozen and placed on the device.
        dataset: Tokenized rows, as `documents_of_row` reads them.
        folder: A new folder, or a cache of the same teacher and `spec`.
        batch_size: Texts that the teacher reads at once.

    Returns:
        The cache, with the rows of all processes.

    Raises:
        ValueError: The folder is a cache of something else, or a number is out of its range.
    """
    accelerator = accelerator or Accelerator()
    teacher.requires_grad_(False)
    cache = TeacherCache(folder, fingerprint_of(teacher, tokenizer, spec or CacheSpec(), revision=revision))
    cached = CachedTeacher(cache, LiveTeacher(teacher, accelerator))
    return fill_cache(cached, dataset, batch_size=batch_size, accelerator=accelerator, student=teacher)


def fill_cache(
    cached: CachedTeacher,
    dataset: Iterable[Mapping[str, Any]],
    *,
    batch_size: int,
    accelerator: Accelerator,
    student: nn.Module,
) -> TeacherCache:
    """Add the rows of a data set that are missing in a cache; arguments as of `cache_teacher`.

    What was captured before an error is written: the same call goes on.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be >= 1, got {batch_size}.")
    cache, waiting = cached.cache, dict[bytes, Document]()

    def capture() -> None:
        if waiting:
            cached.capture(student, list(waiting.values()), accelerator.device)
            waiting.clear()

    try:
        for index, row in enumerate(steps(dataset, "caching the teacher's outputs")):
            if index % accelerator.num_processes != accelerator.process_index:
                continue
            for document in documents_of_row(row):
                if document not in cache:
                    waiting[document.key] = document
                if len(waiting) >= batch_size:
                    capture()
        capture()
    finally:
        cache.flush()
    accelerator.wait_for_everyone()
    cache.refresh()
    return cache
