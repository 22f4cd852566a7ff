"""The run record: what was done, with which inputs, and what came out, in one JSON file beside the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_transfer_ext import reading
from hf_transfer_ext.data.facts import FACTS_DATASET
from hf_transfer_ext.files import sha256_of, write_text
from hf_transfer_ext.hub.privacy import (
    REMOVED,
    is_absolute_path,
    is_secret_name,
    last_component,
    public_text,
    public_value,
)
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.reading import card_metadata, one_line, parse_json, read_json, read_text
from hf_transfer_ext.settings import COMMAND
from hf_transfer_ext.weights.repository import Place, connection_error, file_of, place_of

logger = logging.getLogger(__name__)

#: The record's file in a model folder or repository.
RECORD_FILE = "hf_transfer_ext.json"
#: Limits of a record that is read: its size, the records that it carries, and how many of them in one line.
MAX_RECORD_BYTES, MAX_ANCESTORS, MAX_GENERATIONS = 20_000_000, 1000, 100
#: Raised by one whenever a reader of the old form would misread the new one.
SCHEMA_VERSION = 1
#: What an input usually is to a run, in the words that cards know. Any other lower-case word is a role too.
ROLES = ("base", "dataset", "model", "student", "teacher")
_ROLE = re.compile(r"[a-z][a-z0-9_-]*")
#: The packages whose versions a record names.
PACKAGES = ("hf_transfer_ext", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "safetensors")

_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "rng_state.pth")
_DATA = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.arrow", "*.gz", "*.zst")
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: Digests of smaller files are calculated each time.
_REMEMBERED_BYTES = 16_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(
    r"(?P<kind>models|datasets)--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?P<inside>.*)", re.DOTALL
)


@dataclass
class RunInput:
    """A model or data set that a run read.

    Args:
        name: Hub id, or the last component of a local path.
        role: What it is to the run: one of `ROLES`, or another lower-case word ("expert", "reference").
        on_hub: True where `name` is a Hub id; a local folder's name means nothing to others.
        revision: Commit hash on the Hub; None for local files, which `sha256` tells apart.
        subfolder: Folder inside the repository; "" for the repository itself.
        gated: The Hub hands the repository out only to those who accept its terms.
        sha256: File name -> hex digest of its content, for weight files (data files of a data set).
        license: License as the input's own card states it (`license`, `license_name`, `license_link`); {} if unknown.
        model_type: `model_type` of the input's config.json.
        base_model: Hub ids that the input's own card names as its bases.
        record: The input's own record, if this package made it.
    """

    name: str
    role: str
    on_hub: bool = False
    revision: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    license: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None
    base_model: list[str] = field(default_factory=list)
    record: RunRecord | None = None
    subfolder: str = ""
    gated: bool = False

    @property
    def place(self) -> str:
        """What names it to a user: `repo` or `repo:subfolder` on the Hub, else the last component of its path."""
        return str(Place(self.name, None, self.subfolder)) if self.on_hub else self.name

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or not _ROLE.fullmatch(self.role):
            raise ValueError(
                f"Input {self.name!r} has the role {self.role!r}; it has to be one lower-case word, such as "
                f"{', '.join(ROLES)}."
            )


@dataclass
class Stage:
    """One step of a run and the wall-clock seconds it took."""

    name: str
    seconds: float


@dataclass
class RunRecord:
    """What a run did, written as `hf_transfer_ext.json` into its result.

    Secrets are dropped from `config` and absolute local paths in it are cut to their last component; the digest of
    each *file* that was named by such a path is kept in `files`. (Folders that were read belong into `inputs`.)

    Args:
        job: "distillation", "merging", "unlearning", "extraction", "transfer", ...
        recipe: Which recipe or command ran ("hf-transfer-ext distill").
        config: The settings of the run: a dictionary or a dataclass.
        defaults: The settings that were left at the defaults of transformers and TRL, which may change between
            their versions.
        command: The words of the command line, without secrets and local folders; by default those of
            this process's command, [] for a call from Python.
        recipe_sha256: Hex digest of the file of the recipe or command.
        call: All arguments of the call that made the result, defaults too, for `reproduce`; `input:N` stands for the
            N-th of `inputs` (`inputs.call_of`). {} where the settings in `config` are enough, or where no call from a
            record alone can make the result again.
        notes: Heading -> sentences that the card shows under it: {"Lineage": ["The layers are equal ..."]}.
        inputs: Models and data sets that were read (`describe_input`), in the user's order.
        metrics: Measurements of the *result*; these alone become the card's model-index.
        compared: Measurements of other models in the same run, by name: {"before": [...], "teacher": [...]}.
        not_measured: Sentences on what a reader might expect to be measured here and was not.
        seed: Seed of all random choices; None where none were made.
        device: Device, precision and processes (`device_summary`).
        stages: Where the time went (`with record.stage("train"): ...`).
        files: Name -> sha256 of the local files named in `config`.
        result: File -> sha256 of the files that the result consists of, without card and record (`save_result`).
        versions: Versions of python and PACKAGES; read from the installed packages unless given.
        created: Start of the run, UTC, ISO 8601.
    """

    job: str
    recipe: str
    config: Any = field(default_factory=dict)
    inputs: list[RunInput] = field(default_factory=list)
    metrics: list[Measurement] = field(default_factory=list)
    compared: dict[str, list[Measurement]] = field(default_factory=dict)
    not_measured: list[str] = field(default_factory=list)
    seed: int | None = None
    device: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    result: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=lambda: list(COMMAND.get([])))
    recipe_sha256: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = {**files_named_in(self.config), **self.files}
        self.config = public_value(self.config)
        if not isinstance(self.config, dict):
            raise TypeError(f"`config` has to be a dictionary or a dataclass, got {type(self.config).__name__}.")
        self.defaults, self.call = public_value(dict(self.defaults)), public_value(dict(self.call))
        self.command = public_command(self.command)
        self.versions = self.versions or installed_versions()
        self.created = self.created or datetime.now(timezone.utc).isoformat(timespec="seconds")

    @property
    def parents(self) -> list[RunRecord]:
        """Records of the inputs that this package made."""
        return [item.record for item in self.inputs if item.record is not None]

    def history(self) -> list[RunRecord]:
        """All records that led here, oldest first and this one last; each once, however many ways lead to it."""
        return list(_with_ancestors(self, {}).values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block and add it to `stages`, also where the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages.append(Stage(name, round(time.perf_counter() - start, 3)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Records of inputs stand under `parents` by digest, each once, for the whole chain."""
        digests: dict[int, str] = {}
        ancestors = _with_ancestors(self, digests)
        own = ancestors.pop(digests[id(self)])._own_dict(digests)
        parents = {digest: record._own_dict(digests) for digest, record in ancestors.items()}
        return {"schema_version": SCHEMA_VERSION, **own, "parents": parents}

    def digest(self) -> str:
        """Hex sha256 of this record (its inputs' digests included), the name by which a child refers to it."""
        digests: dict[int, str] = {}
        _with_ancestors(self, digests)
        return digests[id(self)]

    def write(self, folder: str | Path) -> Path:
        """Write `hf_transfer_ext.json` into `folder`, atomically; returns its path."""
        path = Path(folder) / RECORD_FILE
        write_text(path, self.text())
        return path

    def text(self) -> str:
        """The content of `hf_transfer_ext.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "the record") -> RunRecord:
        """The record of `to_dict`. Raises `ValueError` for a newer schema and for a record that is malformed."""
        schema = data.get("schema_version")
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise ValueError(
                f"{where} has no `schema_version`; it is not a record of hf_transfer_ext, or was cut short."
            )
        if schema > SCHEMA_VERSION:
            raise ValueError(
                f"{where} has schema version {schema}, and this hf_transfer_ext reads up to {SCHEMA_VERSION}. "
                "It was written by a newer version: upgrade hf_transfer_ext."
            )
        try:
            parents = reading.field_of(data, "parents", dict, where=where, default={})
            if len(parents) > MAX_ANCESTORS:
                raise ValueError(f"it has {len(parents)} ancestors, and {MAX_ANCESTORS} are read")
            return _linked(data, parents, {}, ())
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{where} is malformed ({type(error).__name__}: {one_line(error)}). Write it anew."
            ) from error

    def _own_dict(self, digests: Mapping[int, str]) -> dict[str, Any]:
        """This record alone; its inputs refer to their records by digest (`id(record)` -> digest)."""
        later = {"defaults": self.defaults, "command": self.command, "recipe_sha256": self.recipe_sha256}
        later |= {"call": self.call, "notes": self.notes}
        return public_value(
            {
                "job": self.job,
                "recipe": self.recipe,
                "created": self.created,
                "config": self.config,
                "files": self.files,
                # Left out where empty: records of earlier versions lack it, and their digests stay the same.
                **({"result": self.result} if self.result else {}),
                "inputs": [
                    {
                        "name": item.name,
                        "role": item.role,
                        "on_hub": item.on_hub,
                        "revision": item.revision,
                        "sha256": item.sha256,
                        "license": item.license,
                        "model_type": item.model_type,
                        "base_model": item.base_model,
                        "record": None if item.record is None else digests[id(item.record)],
                        **({"subfolder": item.subfolder} if item.subfolder else {}),
                        **({"gated": True} if item.gated else {}),
                    }
                    for item in self.inputs
                ],
                "seed": self.seed,
                "device": self.device,
                "metrics": [m.to_dict() for m in self.metrics],
                "compared": {name: [m.to_dict() for m in found] for name, found in self.compared.items()},
                "not_measured": self.not_measured,
                "stages": [{"name": s.name, "seconds": s.seconds} for s in self.stages],
                "versions": self.versions,
                # Keys that older records lack: left out where empty, so that the digests of older records stay.
                **{key: value for key, value in later.items() if value},
            }
        )


def read_record(folder_or_repo: str | Path, *, revision: str | None = None) -> RunRecord:
    """The record of a model folder, or of a Hub repository at `revision`.

    Raises:
        FileNotFoundError: There is no record; the model was not made by this package.
        ValueError: The record is malformed or of a newer schema.
    """
    path = file_of(folder_or_repo, RECORD_FILE, revision=revision)
    if path is None:
        raise FileNotFoundError(
            f"{public_text(str(folder_or_repo))!r} holds no {RECORD_FILE}: it was not written by hf_transfer_ext, "
            "or there is no such folder or repository."
        )
    where = f"{RECORD_FILE} of {last_name(folder_or_repo)!r}"
    data = parse_json(read_text(path, max_bytes=MAX_RECORD_BYTES), where)
    return RunRecord.from_dict(data, where=where)


def describe_dataset(name_or_path: str | Path, revision: str | None = None) -> RunInput:
    """Which data a run reads, for its record: Hub commit, digests of local files, or the packages behind "facts"."""
    if str(name_or_path) == FACTS_DATASET and not Path(FACTS_DATASET).exists():
        made_from = ", ".join(f"{package} {version(package)}" for package in ("countryinfo", "mendeleev"))
        return RunInput(f"{FACTS_DATASET} (made from {made_from})", "dataset")
    return describe_input(name_or_path, revision, "dataset")


def describe_input(
    name_or_path: str | Path, revision: str | None = None, role: str = "model", *, model: Any = None
) -> RunInput:
    """Say exactly which model or data set a run reads, by commit and content and never by a path of this machine.

    A Hub id gets its commit and the digests that the Hub states for its large files (or, without a connection, the
    digests of the snapshot in the cache). A local file or folder gets the digests of its weight files, or of its data
    files for the role "dataset". Digests of local weights cost about a second for each gigabyte, once.

    Args:
        model: The loaded model, if there is one: its config names the commit that was really loaded, and the type of
            a model that has no config.json (GGUF).

    Raises:
        FileNotFoundError: A local path that is not there, or a Hub id that neither the Hub nor the cache knows.
    """
    path, place = Path(name_or_path), place_of(name_or_path, revision)
    if path.exists():
        inside_cache = _SNAPSHOT.search(str(path.absolute()))
        if inside_cache:
            inside = inside_cache["inside"].strip("/\\").replace("\\", "/")
            where = Place(
                inside_cache["repo"].replace("--", "/"), inside_cache["commit"], inside if path.is_dir() else ""
            )
            described = RunInput(where.path, role, True, where.revision, subfolder=where.subfolder)
        else:
            described = RunInput(last_name(path), role)
        described.sha256 = digests_of(path, dataset=role == "dataset")
    elif is_absolute_path(str(name_or_path)) or place.path.count("/") > 1 or str(path).startswith("."):
        raise FileNotFoundError(f"There is no {role} at {str(name_or_path)!r}. Fix the path, or give a Hub id.")
    else:
        config = None if hasattr(model, "peft_config") else getattr(model, "config", None)  # of the adapter's base
        described, cached = _on_hub(place, role, config)
        path = cached or path
    if role != "dataset":
        _read_card_and_config(described, path if path.exists() else described.place, described.revision)
        described.model_type = described.model_type or getattr(getattr(model, "config", None), "model_type", None)
    return described


def digests_of(path: str | Path, *, dataset: bool = False) -> dict[str, str]:
    """File name -> hex sha256 of a file, or of the weight files (data files) of a folder, in sorted order."""
    path = Path(path)
    if path.is_file():
        return {path.name: _digest(path)}
    if dataset:
        found = {p for pattern in _DATA for p in path.rglob(pattern) if not _hidden(p.relative_to(path))}
    else:
        found = {p for pattern in _WEIGHTS for p in path.glob(pattern) if p.name not in _NOT_WEIGHTS}
    return {p.relative_to(path).as_posix(): _digest(p) for p in sorted(found) if p.is_file()}


def _digest(path: Path) -> str:
    """`sha256_of`, remembered for large files as long as nobody has written to them (inode, size and times agree)."""
    stat = path.stat()
    if stat.st_size < _REMEMBERED_BYTES:
        return sha256_of(path)
    from huggingface_hub import constants

    state = (str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.sha256(repr(state).encode()).hexdigest()
    memory = Path(constants.HF_HOME) / "hf_transfer_ext" / "digests" / name
    try:
        found = memory.read_text(encoding="utf-8")
        if _DIGEST.fullmatch(found):
            return found
    except (OSError, UnicodeDecodeError):
        pass
    found = sha256_of(path)
    try:
        write_text(memory, found)
    except OSError:
        pass  # a cache that cannot be written costs time only
    return found


def public_command(words: Sequence[str]) -> list[str]:
    """A command line that may be published: values of secret options removed, local paths by their last component."""
    found: list[str] = []
    is_secret = False
    for word in words:
        name, has_value, value = str(word).partition("=")
        if is_secret and not name.startswith("--"):
            found.append(REMOVED)
            is_secret = False
            continue
        is_secret = name.startswith("--") and is_secret_name(name[2:])
        if has_value and name.startswith("--"):
            found.append(f"{name}={REMOVED if is_secret else public_text(value)}")
            is_secret = False
        else:
            found.append(public_text(str(word)))
    return found


def installed_versions() -> dict[str, str]:
    """Versions of python and of the installed PACKAGES, without importing any of them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_summary(model: Any = None, *, precision: str | None = None) -> dict[str, Any]:
    """Kind of device, number of processes, threads and precision of this run; no host or user name.

    Args:
        model: Its device and dtype are taken, if given.
        precision: Name of the compute dtype where it differs from the model's ("bfloat16" under autocast).
    """
    import torch

    device = getattr(model, "device", None) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary: dict[str, Any] = {
        "device": device.type,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "precision": precision or public_value(getattr(model, "dtype", None)),
    }
    if device.type == "cuda":
        summary["accelerator"] = torch.cuda.get_device_name(device)
    else:
        summary["threads"] = torch.get_num_threads()
    return summary


def files_named_in(config: Any) -> dict[str, str]:
    """Name -> sha256 of each existing file that `config` names by an absolute path."""
    found: dict[str, str] = {}
    for text in _texts(config):
        if is_absolute_path(text) and Path(text).is_file():
            found[last_component(text)] = sha256_of(text)
    return found


def last_name(path: str | Path) -> str:
    """A name for `path` that may be published: a Hub id as it is, a local path by its last component."""
    path_ = Path(path)
    return last_component(str(path_.absolute())) if path_.exists() or path_.is_absolute() else str(path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _texts(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _texts(getattr(value, name))


def _with_ancestors(record: RunRecord, digests: dict[int, str]) -> dict[str, RunRecord]:
    """Digest -> record for a record and all that led to it, oldest first; fills `digests` (`id(record)` -> digest)."""
    found: dict[str, RunRecord] = {}
    for parent in record.parents:
        if id(parent) in digests:
            continue  # reached by another way; its whole line was added then
        found.update({d: r for d, r in _with_ancestors(parent, digests).items() if d not in found})
    own = json.dumps(record._own_dict(digests), sort_keys=True).encode()
    digests[id(record)] = hashlib.sha256(own).hexdigest()
    return {**found, digests[id(record)]: record}


def _linked(
    data: Mapping[str, Any], parents: Mapping[str, Any], built: dict[str, RunRecord], above: Sequence[str]
) -> RunRecord:
    """Build a record and, by their digests, those of its inputs; `above` are the digests that are being built now."""
    inputs = []
    if len(above) > MAX_GENERATIONS:
        raise ValueError(f"it goes back more than {MAX_GENERATIONS} generations")
    text = partial(reading.field_of, where="the record", kind=str)
    for item in _mappings(data, "inputs"):
        digest = text(item, "record", default=None)
        if digest in above:
            raise ValueError(f"record {digest} is its own ancestor")
        if digest in parents and digest not in built:
            parent = reading.field_of(parents, digest, dict, where="`parents` of the record")
            built[digest] = _linked(parent, parents, built, (*above, digest))
        inputs.append(
            RunInput(
                name=text(item, "name"),
                role=text(item, "role"),
                on_hub=bool(item.get("on_hub", False)),
                revision=text(item, "revision", default=None),
                sha256=_strings(item.get("sha256")),
                license=_strings(item.get("license")),
                model_type=text(item, "model_type", default=None),
                base_model=[
                    str(name) for name in reading.field_of(item, "base_model", list, where="an input", default=[])
                ],
                record=built.get(digest) if digest is not None else None,
                subfolder=text(item, "subfolder", default=""),
                gated=item.get("gated") is True,
            )
        )
    compared = reading.field_of(data, "compared", dict, where="the record", default={})
    return RunRecord(
        job=text(data, "job"),
        recipe=text(data, "recipe"),
        config=public_value(
            reading.field_of(data, "config", dict, where="the record")
        ),  # a foreign record may name files of this machine: do not read them
        inputs=inputs,
        metrics=[_measurement(m) for m in _mappings(data, "metrics")],
        compared={name: [_measurement(m) for m in _mappings(compared, name)] for name in compared},
        not_measured=[str(sentence) for sentence in data.get("not_measured") or []],
        seed=reading.field_of(data, "seed", int, where="the record", default=None),
        device=dict(reading.field_of(data, "device", dict, where="the record", default={})),
        stages=[Stage(str(s["name"]), float(s["seconds"])) for s in data.get("stages") or []],
        files=_strings(data.get("files")),
        result=_strings(data.get("result")),
        versions=_strings(data.get("versions")),
        created=str(data["created"]),
        defaults=dict(data.get("defaults") or {}),
        command=[str(word) for word in data.get("command") or []],
        recipe_sha256=text(data, "recipe_sha256", default=None),
        call=public_value(reading.field_of(data, "call", dict, where="the record", default={})),
        notes={str(head): [str(one) for one in lines] for head, lines in dict(data.get("notes") or {}).items()},
    )


def _measurement(data: Mapping[str, Any]) -> Measurement:
    interval = data.get("interval")
    return Measurement(
        name=str(data["name"]),
        value=float(data["value"]),  # "nan" and "inf" stand as strings in JSON
        unit=str(data["unit"]),
        higher_is_better=bool(data["higher_is_better"]),
        examples=int(data["examples"]),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        dataset=reading.field_of(data, "dataset", str, where="a measurement", default=None),
    )


def _mappings(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = reading.field_of(data, key, list, where="the record")
    if not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"`{key}` has to be a list of mappings")
    return found


def _strings(data: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(data or {}).items()}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts) or path.name in ("dataset_info.json", "state.json")


def _on_hub(place: Place, role: str, config: Any) -> tuple[RunInput, Path | None]:
    """Commit and digests of a Hub repository: from the Hub; without a connection from the cache, with its folder."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    repo_type = "dataset" if role == "dataset" else "model"
    described = RunInput(place.path, role, True, subfolder=place.subfolder)
    wanted = getattr(config, "_commit_hash", None) or place.revision or "main"
    try:
        look_up = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
        info = look_up(place.path, revision=wanted, files_metadata=True)
        prefix = place.inside("")
        large = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs is not None}
        inside = {file.removeprefix(prefix): digest for file, digest in large.items() if file.startswith(prefix)}
        kept = {file: digest for file, digest in sorted(inside.items()) if Path(file).name not in _NOT_WEIGHTS}
        if repo_type == "model" and not place.subfolder and any("/" not in file for file in kept):
            kept = {file: digest for file, digest in kept.items() if "/" not in file}  # other jobs' adapters beside it
        described.revision, described.sha256, described.gated = str(info.sha), kept, bool(info.gated)
        return described, None
    except (HfHubHTTPError, HFValidationError, OSError, connection_error()) as error:
        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=place.path, repo_type=repo_type)
        ref = cache / "refs" / wanted
        commit = wanted if _COMMIT.fullmatch(wanted) else ref.read_text().strip() if ref.is_file() else ""
        folder = cache / "snapshots" / commit / place.subfolder
        if not commit or not folder.is_dir():
            at = f" at revision {place.revision!r}" if place.revision else ""
            raise FileNotFoundError(
                f"The {role} {str(Place(place.path, None, place.subfolder))!r}{at} is neither a local path nor a "
                f"repository that the Hub or the local cache knows ({type(error).__name__}). Fix the name, or log in."
            ) from error
    described.revision, described.sha256 = commit, digests_of(folder, dataset=repo_type == "dataset")
    return described, folder


def _read_card_and_config(described: RunInput, source: str | Path, revision: str | None) -> None:
    """Fill in license, bases, model type and record from the input's own files, as far as it states them."""
    config = file_of(source, "config.json", revision=revision)
    if config is not None:
        try:
            model_type = read_json(config).get("model_type")
            described.model_type = model_type if isinstance(model_type, str) else None
        except (ValueError, OSError):
            pass  # loading the model explains this error better
    card = file_of(source, "README.md", revision=revision)
    if card is not None:
        try:
            stated = card_metadata(_head(card), f"README.md of {last_name(source)!r}")
        except (ValueError, OSError) as error:
            logger.warning("%s The card is not read: license and base models of this input stay unknown.", error)
            stated = {}
        for key in ("license", "license_name", "license_link"):
            if isinstance(stated.get(key), str):
                described.license[key] = stated[key]
        bases = stated.get("base_model")
        described.base_model = [b for b in (bases if isinstance(bases, list) else [bases]) if isinstance(b, str) and b]
    if file_of(source, RECORD_FILE, revision=revision) is not None:
        try:
            described.record = read_record(source, revision=revision)
        except (ValueError, OSError) as error:
            logger.warning("%s It is left out: the history of this input stays unknown.", error)


def _head(card: Path) -> str:
    """The part of a card that can hold its front matter."""
    with open(card, "rb") as file:
        return file.read(2 * reading.MAX_YAML_BYTES).decode("utf-8-sig", errors="replace")
