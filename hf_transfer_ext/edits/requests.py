"""Forget requests, one after another, over one base model: add, list, revoke, and apply those that stand.

A folder holds the requests of a base:

    requests.json          what was requested when, and what was revoked; written atomically
    artifacts/NAME-ID/     what the request changes: a LoRA, or the tensors that an edit has calculated

A request is calculated from the base alone, so none depends on another one, and revoking one is the same as never
having added it. `apply` adds the changes of all requests that stand to the base:

    theta = theta_0 + sum_i (theta_i - theta_0)

but a weight that some request has set to zero (pruning, ablation) is zero, however many requests did so. The data is
never stored: a request keeps its SHA-256 and its number of rows.

Requests by an edit whose changes do not add up (`acu`) share tensors, and each keeps what it removes. From both,
`apply` calculates the result of those that stand (`SharedRequests`). They are all by this edit: what it promises holds
only where nothing else changes the model.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_transfer_ext.adapters.extract import ExtractionReport
from hf_transfer_ext.edits.apply import Data, apply_edit, rows_of
from hf_transfer_ext.edits.method import NEEDS, Edited, EditMethod, SharedRequests
from hf_transfer_ext.edits.methods import EDITS
from hf_transfer_ext.edits.subject import Subject, closing, data_digest
from hf_transfer_ext.edits.write import copy_of, write_lora, write_model
from hf_transfer_ext.files import (
    only_writer,
    path_inside,
    refuse_existing_output,
    sha256_of,
    write_text,
    written_aside,
)
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import InputsInBackground, call_of
from hf_transfer_ext.hub.record import RECORD_FILE, RunRecord, Stage, describe_input, digests_of
from hf_transfer_ext.merging.method import merge_method
from hf_transfer_ext.merging.methods.task_arithmetic import task_arithmetic
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.record import inputs_of
from hf_transfer_ext.merging.streaming.stream import JOURNAL, write_tensors
from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import arguments_for, unknown_setting
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.opened import AdaptedInput, InputModel, InputTensor, StoredInput, open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference
from hf_transfer_ext.weights.repository import local_folder

#: The file of the state, and the folder of the artifacts.
STATE, ARTIFACTS = "requests.json", "artifacts"
#: Raised by one whenever a reader of the old form would misread the new one.
SCHEMA_VERSION = 2

#: File of what a request removes, and of what requests share.
_NOTED = "model.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json")


@dataclass(frozen=True)
class Request:
    """One forget request.

    Args:
        name: Of the request; unique among those that stand.
        kind: "adapter" or "edit".
        method: Name of the edit, or of how the adapter was trained; "" where nobody said.
        options: Of the edit.
        rows: Number of rows of the data; None for an edit that forgets words.
        data_sha256: SHA-256 of the data (`subject.data_digest`).
        added: UTC, ISO 8601.
        revoked: When it was revoked, or None.
        artifact: Folder of what it changes, relative to the folder of the requests.
        files: File -> SHA-256 of the artifact's weights.
    """

    name: str
    kind: str
    method: str
    options: dict[str, Any]
    rows: int | None
    data_sha256: str
    added: str
    artifact: str
    files: dict[str, str] = field(default_factory=dict)
    revoked: str | None = None


@dataclass(frozen=True)
class Shared:
    """What the requests that stand share, where their changes do not add up.

    Args:
        method: Name of the edit that all of them are by.
        artifact: Folder of the tensors, relative to the folder of the requests.
        files: File -> SHA-256.
    """

    method: str
    artifact: str
    files: dict[str, str]


@dataclass(frozen=True)
class Requests:
    """The state: a base model, by its name and its content, and all requests that were ever made."""

    base: ModelReference
    base_sha256: dict[str, str]
    requests: tuple[Request, ...] = ()
    shared: Shared | None = None

    @property
    def standing(self) -> list[Request]:
        """The requests that were not revoked, in the order in which they were added."""
        return [one for one in self.requests if one.revoked is None]


@dataclass(frozen=True)
class StackReport:
    """What `apply_requests` wrote.

    Args:
        requests: Names of the requests that it holds.
        tensors: The tensors that differ from the base's.
        adapter: What the adapter leaves out, if the result is one.
    """

    folder: str
    requests: list[str]
    tensors: list[str]
    adapter: ExtractionReport | None = None
    seconds: float = 0.0


def add_request(
    store: str | Path,
    name: str,
    *,
    base: str | None = None,
    adapter: str | Path | None = None,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    tuned: str | Path | None = None,
    forget: Data = None,
    retain: Data = None,
    columns: dict[str, str] | None = None,
    retain_bound: float | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
) -> Request:
    """Add a forget request: an adapter that was trained for it, or an edit that is calculated now.

    Args:
        store: Folder of the requests; made for the first one.
        name: Name of the request: letters, digits, `.`, `_` and `-`.
        base: Folder or Hub id of the base model, `path[@revision]`; needed for the first request only.
        adapter: Folder or Hub id of a LoRA on the base that forgets the data. It is copied.
        method: An edit (a name of `EDITS`) that is applied to the base; with `adapter`, how that was trained.
        options: The edit's own options.
        tuned: For an edit that needs a fine-tune.
        forget: The data to forget. Its SHA-256 is kept, never a row.
        retain: Rows to retain, for an edit that reads them. By an edit whose requests share a fit (`acu`), the first
            request gives all rows that the fit is made of, to forget and to retain, and later ones give none.
        columns: Schema name -> the data's own column.
        retain_bound: As for `apply_edit`.
        lora_rank: Keep the edit as a LoRA of this rank.
        seed: Of whatever the edit draws.

    Raises:
        ValueError: A name that is taken, a base that is not that of the folder, an adapter that does not fit it,
            no data, or what the edit refuses. The requests stay as they were.
    """
    store = Path(store)
    _check_name(name)
    if adapter is None and method is None:
        raise ValueError("A request needs an `adapter`, or the `method` of an edit.")
    if adapter is not None:
        unused = {"options": options, "tuned": tuned, "retain": retain, "retain_bound": retain_bound,
                  "lora_rank": lora_rank}  # fmt: skip
        for setting, value in unused.items():
            if value is not None:
                raise ValueError(f"`{setting}` belongs to an edit, and this request is an adapter. Leave it out.")
    private = _private_data(method, options) if adapter is None and method is not None else None
    rows = rows_of(forget)
    if rows is None and private is None:
        raise ValueError("`forget` is needed: the request keeps the SHA-256 of the data that is to be forgotten.")
    with _locked(store):
        state = _read(store) if (store / STATE).exists() else _first(base)
        if base is not None and parse_reference(base, "base") != state.base:
            raise ValueError(
                f"The requests in {str(store)!r} are over {str(state.base)!r}, not {base!r}. Use another folder."
            )
        if any(one.name == name for one in state.standing):
            raise ValueError(f"There is a request {name!r} already. Revoke it first, or choose another name.")
        _refuse_changed_base(state)
        edit = None if adapter is not None else EDITS[method or ""]
        _refuse_mixture(state, edit)
        artifact = f"{ARTIFACTS}/{name}-{secrets.token_hex(4)}"
        if edit is None:
            _copy_adapter(state.base, adapter or "", store / artifact)
            shown: dict[str, Any] = {}
        else:
            reads = forget is not None and "forget" in (*edit.needs, *edit.optional)
            settings: dict[str, Any] = {
                "options": options, "tuned": tuned, "forget": rows if reads else None, "retain": rows_of(retain),
                "columns": columns, "retain_bound": retain_bound, "lora_rank": lora_rank, "seed": seed,
            }  # fmt: skip
            if edit.requests is None:
                shown = _write_edit(state.base, store / artifact, method=edit.__name__, **settings)
            else:
                state, shown = _note(store, state, edit, artifact, **settings), edit.public(options or {})
        request = Request(
            name=name,
            kind="adapter" if adapter is not None else "edit",
            method=method or "",
            options=shown,
            rows=None if rows is None else len(rows),
            data_sha256=data_digest(rows) if rows is not None else data_digest([private or {}]),
            added=_now(),
            artifact=artifact,
            files=digests_of(store / artifact),
        )
        _write(store, replace(state, requests=(*state.requests, request)))
    return request


def list_requests(store: str | Path) -> list[Request]:
    """All requests that were ever made, in their order; those with a time in `revoked` do not stand any more.

    Args:
        store: Folder of the requests.
    """
    return list(_read(Path(store)).requests)


def revoke_request(store: str | Path, name: str) -> Request:
    """Revoke a request: `apply_requests` gives what it would give without it. The entry stays, its artifact goes.

    Args:
        store: Folder of the requests.
        name: Name of a request that stands.
    """
    store = Path(store)
    with _locked(store, exists=True):
        state = _read(store)
        standing = {one.name: one for one in state.standing}
        if name not in standing:
            raise ValueError(unknown_name("request", name, standing or ["(none stands)"]))
        revoked = replace(standing[name], revoked=_now())
        requests = tuple(revoked if one is standing[name] else one for one in state.requests)
        unused = [revoked.artifact]
        if state.shared is not None and len(standing) == 1:  # nobody reads it any more
            unused.append(state.shared.artifact)
            state = replace(state, shared=None)
        _write(store, replace(state, requests=requests))
        for artifact in unused:
            shutil.rmtree(path_inside(store, artifact), ignore_errors=True)
    return revoked


def apply_requests(
    store: str | Path,
    out: str | Path,
    *,
    lora_rank: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> StackReport:
    """Write the base with the changes of all requests that stand, with card and record, atomically.

    Args:
        store: Folder of the requests.
        out: Folder of the result. Without a request that stands it has the bytes of the base.
        lora_rank: Write the sum of the changes as a LoRA of this rank instead of a model.
        threads: Tensors that are calculated at the same time; all cores if None.
        overwrite: Replace a result that is in `out`.

    Raises:
        ValueError: The base, or an artifact, is not what it was when the requests were made.
    """
    store = Path(store)
    with _locked(store, exists=True):
        state = _read(store)
        refuse_existing_output(out, overwrite=overwrite, inputs=[store, state.base.path])
        _refuse_changed_base(state)
        artifacts = {one.name: _unchanged(store, one) for one in state.standing}
        how: dict[str, Any] = {"lora_rank": lora_rank, "threads": threads, "overwrite": overwrite}
        if state.shared is not None:
            how |= {"method": state.shared.method, "shared": _unchanged(store, state.shared)}
        shown = [_public(one) for one in state.requests]
        found = stack_requests(str(state.base), list(artifacts.values()), out, shown=shown, **how)
    return replace(found, requests=list(artifacts))


def stack_requests(
    base: str,
    artifacts: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | None = None,
    shared: str | Path | None = None,
    lora_rank: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    shown: Sequence[Mapping[str, Any]] = (),
) -> StackReport:
    """Write a base with the changes of some requests, by their folders: what `apply_requests` does, without a store.

    Args:
        base: Folder or Hub id, `path[@revision]`.
        artifacts: The folders of the requests, as a store holds them, in the order in which they were added.
        method: The edit that all requests were made with together, where they share something.
        shared: Folder of what they share.
        shown: What the record says of all requests that were ever made.
    """
    began, reference = time.perf_counter(), parse_reference(base, "base")
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"`lora_rank` has to be at least 1, got {lora_rank}.")
    with ExitStack() as opened:
        model = open_model(reference)
        opened.callback(model.close)
        folders = [*artifacts, *([] if shared is None else [shared])]
        wanted = [*inputs_of([reference], reference), *((folder, None, "request") for folder in folders)]
        described = opened.enter_context(InputsInBackground(wanted))
        content: dict[str, Any] = {"requests": list(shown)}
        if method is not None and shared is not None:
            edited = _together(method, shared, artifacts, model, lora_rank)
            jobs, content["found"] = edited.jobs, edited.found
        else:
            changes: dict[str, list[InputTensor]] = {}
            for folder in artifacts:
                for name, tensor in _changes(Path(folder), reference, model, opened).items():
                    changes.setdefault(name, []).append(tensor)
            jobs = {name: _sum_of(name, model, found, lora_rank is not None) for name, found in changes.items()}

        def complete(folder: Path, adapter: ExtractionReport | None) -> None:
            record = RunRecord(
                "unlearning", "hf-transfer-ext requests apply", content, recipe_sha256=sha256_of(__file__)
            )
            given = {"base": base, "artifacts": list(artifacts), "method": method, "shared": shared}
            record.call = call_of({**given, "lora_rank": lora_rank}, wanted)
            record.stages.append(Stage("apply", round(time.perf_counter() - began, 3)))
            described.put_into(record)
            if adapter is not None:
                record.metrics.append(adapter.measurement())
            record.not_measured.insert(0, "Whether the requests together forget, and what they cost. Run an audit.")
            finish_run(folder, record, quiet=True)

        adapter = None
        if lora_rank is not None:
            adapter = write_lora(
                model, jobs, out, rank=lora_rank, content=content, complete=complete, overwrite=overwrite
            )
        else:
            write_model(model, jobs, out, complete=complete, overwrite=overwrite, threads=threads)
    names = [Path(folder).name for folder in artifacts]
    return StackReport(str(out), names, sorted(jobs), adapter, time.perf_counter() - began)


@merge_method(base="required")
def stacked(base: Float[Tensor, "*shape"], models: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    r"""The base with the changes of all models, each weight zero that one of them has set to zero.

    .. math:: \theta = \theta_0 + \sum_i (\theta_i - \theta_0), \qquad
        \theta = 0 \text{ where } \theta_i = 0 \ne \theta_0 \text{ for some } i

    Source: this package's own.
    """
    total = base.clone()
    for model in models:
        total += model - base
    for model in models:
        total.masked_fill_((model == 0) & (base != 0), 0.0)
    return total


def _sum_of(name: str, base: InputModel, changes: list[InputTensor], as_lora: bool) -> TensorJob:
    """The job for a tensor that one or more requests change."""
    start = base[name]
    if len(changes) == 1 and not as_lora:
        return copy_of(name, changes[0])
    if all(isinstance(one, AdaptedInput) for one in changes):  # known by their factors
        options = {"weight": [1.0] * len(changes), "normalize": False, "lambda_": 1.0}
        return TensorJob(name, start.shape, start.dtype, task_arithmetic, start, tuple(changes), options)
    return TensorJob(name, start.shape, start.dtype, stacked, start, tuple(changes), {})


def _changes(folder: Path, reference: ModelReference, base: InputModel, opened: ExitStack) -> dict[str, InputTensor]:
    """The tensors that a request makes other than the base's."""
    if (folder / "adapter_config.json").exists():
        model = open_model(ModelReference(reference.path, reference.revision, str(folder)))
        opened.callback(model.close)
        found = {name: one for name, one in model.tensors.items() if not _is_of(one, base)}
    else:
        checkpoint = Checkpoint(folder)
        opened.callback(checkpoint.close)
        found = {name: StoredInput(checkpoint, entry) for name, entry in checkpoint.entries.items()}
    for name, tensor in found.items():
        if tensor.shape != base[name].shape:
            raise ValueError(
                f"Request {folder.name!r} gives {name!r} the shape {list(tensor.shape)}, and the base has "
                f"{list(base[name].shape)}. Changes of the vocabulary cannot be stacked."
            )
    return found


def _unchanged(store: Path, of: Request | Shared) -> Path:
    """The folder of an artifact, whose files are those that it was written with."""
    folder = path_inside(store, of.artifact)
    if not folder.is_dir() or digests_of(folder) != of.files:
        if isinstance(of, Shared):
            raise ValueError(
                f"The files in {str(folder)!r}, which all requests share, are not those that the first one wrote. "
                "Restore them, or add the requests again in another folder."
            )
        raise ValueError(
            f"The files of request {of.name!r} in {str(folder)!r} are not those that it was added with. Restore them, "
            "or revoke the request and add it again."
        )
    return folder


def _is_of(tensor: InputTensor, base: InputModel) -> bool:
    files = {file.resolve() for file in base.files}
    return isinstance(tensor, StoredInput) and tensor.entry.file.resolve() in files


def _copy_adapter(base: ModelReference, adapter: str | Path, artifact: Path) -> None:
    source = local_folder(adapter)
    fits = open_model(ModelReference(base.path, base.revision, str(source)))
    fits.close()
    with written_aside(artifact) as folder:
        for pattern in (*_ADAPTER_FILES, RECORD_FILE):
            for file in sorted(source.glob(pattern)):
                shutil.copyfile(file, folder / file.name)


def _write_edit(base: ModelReference, artifact: Path, *, method: str, **settings: Any) -> dict[str, Any]:
    """Calculate an edit and keep the tensors that it changes; returns its options, as they may be shown."""
    edit = EDITS[method]
    if settings["lora_rank"] is not None:
        return edit.public(apply_edit(str(base), artifact, method=method, **settings).options)
    work = artifact.with_name(f".{artifact.name}.edited")
    try:
        report = apply_edit(str(base), work, method=method, **settings)
        with written_aside(artifact) as folder, ExitStack() as opened:
            checkpoint = Checkpoint(work)
            opened.callback(checkpoint.close)
            jobs = [copy_of(name, StoredInput(checkpoint, checkpoint[name])) for name in report.tensors]
            write_tensors(folder, jobs, threads=1)
            for journal in folder.glob(f"{JOURNAL}-*"):
                journal.unlink()
            shutil.copyfile(work / RECORD_FILE, folder / RECORD_FILE)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return edit.public(report.options)


def _refuse_mixture(state: Requests, edit: EditMethod | None) -> None:
    """Refuse requests of which some share a fit and others do not, or share another one."""
    own = None if edit is None or edit.requests is None else edit.__name__
    standing = state.shared.method if state.shared is not None else None
    if state.standing and own != standing:
        name = own or standing
        raise ValueError(
            f"What `{name}` removes is exact only where nothing else changes the model, so its requests and others "
            "cannot stand together. Use another folder for them."
        )


def _note(store: Path, state: Requests, edit: EditMethod, artifact: str, **settings: Any) -> Requests:
    """Write what a request removes from what all of them share, and that too for the first; returns the state."""
    options = settings["options"] or {}
    given = {need: settings[need] is not None for need in NEEDS}
    edit.check(options, given)
    for name in ("retain_bound", "lora_rank"):
        if settings[name] is not None:
            raise ValueError(f"`{name}` cannot be used with `{edit.__name__}`, whose requests are applied as one.")
    if state.shared is not None:
        for name in ("retain", "options"):
            if settings[name]:
                raise ValueError(
                    f"`{name}` belongs to the first of these requests, which decides it for all that stand with it. "
                    "Leave it out."
                )
    base = open_model(state.base)
    with closing(base):
        subject = Subject(
            base,
            None,
            settings["forget"],
            settings["retain"],
            columns=settings["columns"] or {},
            seed=settings["seed"],
        )
        shared, others = _noted(store, state)
        requests = cast(SharedRequests, edit.requests)
        if state.shared is None:
            shared = requests.begin(subject, **options)
        own = requests.note(subject, shared, others)
    if state.shared is None:
        place = f"{ARTIFACTS}/{edit.__name__}-{secrets.token_hex(4)}"
        _write_tensors(store / place, shared)
        state = replace(state, shared=Shared(edit.__name__, place, digests_of(store / place)))
    _write_tensors(store / artifact, own)
    return state


def _together(
    method: str, shared: str | Path, artifacts: Sequence[str | Path], base: InputModel, lora_rank: int | None
) -> Edited:
    """The edit of all requests that stand, which share something."""
    edit = EDITS[method]
    if lora_rank is not None:
        raise ValueError(f"`{edit.__name__}` cannot be written as a LoRA; leave `lora_rank` out.")
    return cast(SharedRequests, edit.requests).together(
        Subject(base), load_file(Path(shared) / _NOTED), [load_file(Path(one) / _NOTED) for one in artifacts]
    )


def _noted(store: Path, state: Requests) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What the requests that stand share, and what each of them removes."""
    if state.shared is None:
        return {}, []
    kept: list[Request | Shared] = [state.shared, *state.standing]
    shared, *noted = [load_file(_unchanged(store, one) / _NOTED) for one in kept]
    return shared, noted


def _write_tensors(artifact: Path, tensors: Mapping[str, Tensor]) -> None:
    with written_aside(artifact) as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _NOTED)


def _private_data(method: str, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The data that an edit gets as options (words), or None."""
    found = {name: value for name, value in (options or {}).items() if name in EDITS[method].private}
    return found or None


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"The name of a request is made of up to 100 letters, digits, '.', '_' and '-', got {name!r:.120}."
        )


def _first(base: str | None) -> Requests:
    if base is None:
        raise ValueError("The first request of a folder needs the `base` model.")
    reference = parse_reference(base, "base")
    if reference.lora is not None:
        raise ValueError(f"The base has to be a model, and {base!r} is one with an adapter. Merge them first.")
    opened = open_model(reference)
    opened.close()
    if opened.adapted is not None:
        raise ValueError(f"The base has to be a model, and {base!r} is an adapter. Merge it into its base first.")
    return Requests(reference, _digests(reference))


def _digests(base: ModelReference) -> dict[str, str]:
    return describe_input(base.path, base.revision, "base").sha256


def _refuse_changed_base(state: Requests) -> None:
    if _digests(state.base) != state.base_sha256:
        raise ValueError(
            f"The weights of the base {str(state.base)!r} are not those over which the requests were made. Restore "
            "them, or make the requests again in another folder."
        )


@contextmanager
def _locked(store: Path, *, exists: bool = False) -> Iterator[None]:
    """One writer of the state at a time."""
    if exists and not (store / STATE).exists():
        raise FileNotFoundError(f"There are no requests in {str(store)!r}: it has no {STATE}. Add one first.")
    is_new = not store.exists()
    store.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(store / STATE, wait=True):
            yield
    except BaseException:
        if is_new and not (store / STATE).exists():
            shutil.rmtree(store, ignore_errors=True)
        raise


def _read(store: Path) -> Requests:
    path = store / STATE
    if not path.exists():
        raise FileNotFoundError(f"There are no requests in {str(store)!r}: it has no {STATE}. Add one first.")
    content, where = read_json(path), f"{STATE} of {str(store)!r}"
    version = field_of(content, "schema_version", int, where=where)
    if version > SCHEMA_VERSION:
        raise ValueError(f"{where} has the schema version {version}; this version reads up to {SCHEMA_VERSION}.")
    base = field_of(content, "base", dict, where=where)
    requests = []
    for entry in field_of(content, "requests", list, where=where):
        try:
            request = Request(**entry)
            _check_name(request.name)
            path_inside(store, request.artifact)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has an entry that cannot be read: {error}") from error
        requests.append(request)
    reference = ModelReference(
        field_of(base, "path", str, where=where), field_of(base, "revision", str, where=where, default=None)
    )
    shared = field_of(content, "shared", dict, where=where, default=None)
    if shared is not None:
        try:
            shared = Shared(**shared)
            path_inside(store, shared.artifact)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has an entry 'shared' that cannot be read: {error}") from error
    return Requests(reference, field_of(content, "base_sha256", dict, where=where), tuple(requests), shared)


def _write(store: Path, state: Requests) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        "base": {"path": state.base.path, "revision": state.base.revision},
        "base_sha256": state.base_sha256,
        "requests": [asdict(one) for one in state.requests],
        "shared": None if state.shared is None else asdict(state.shared),
    }
    write_text(store / STATE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _public(request: Request) -> dict[str, Any]:
    """What a result's record says of a request."""
    return {name: value for name, value in asdict(request).items() if name != "artifact"}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


#: Command -> (function, what it does).
COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "add": (add_request, "Add a forget request: an adapter that was trained for it, or an edit that is made now."),
    "list": (list_requests, "List all requests: name, what was done, rows, digest of the data, when."),
    "revoke": (revoke_request, "Revoke a request: the result is as if it had never been added."),
    "apply": (apply_requests, "Write the base with the changes of all requests that stand."),
}


def main(argv: Sequence[str]) -> int:
    """`hf-transfer-ext requests add|list|revoke|apply STORE ...`."""
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print("usage: hf-transfer-ext requests add|list|revoke|apply STORE ... [options]\n")
        print("\n".join(f"  {name:<8}{about}" for name, (_, about) in COMMANDS.items()))
        if argv:
            raise SystemExit(0)
        return 0
    if command not in COMMANDS:
        raise ValueError(unknown_setting("command", command, COMMANDS))
    function, about = COMMANDS[command]
    extra = PUSH_OPTIONS if command == "apply" else ()
    arguments = arguments_for(function, rest, program=f"hf-transfer-ext requests {command}", about=about, extra=extra)
    publication = Publication.taken_from(arguments)
    found = function(**arguments)
    if command == "list":
        print(request_table(found))
    elif command == "apply":
        stack = ", ".join(found.requests) or "no request stands"
        print(f"{found.folder}: {stack}; {len(found.tensors)} tensors changed in {found.seconds:.1f} s")
        publication.publish(found.folder)
    else:
        print(request_table([found]))
    return 0


def request_table(requests: Sequence[Request]) -> str:
    """One line for each request."""
    rows = [("request", "kind", "method", "rows", "data sha256", "added", "revoked")]
    for one in requests:
        count = "" if one.rows is None else str(one.rows)
        rows.append((one.name, one.kind, one.method, count, one.data_sha256[:12], one.added, one.revoked or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
