"""Make a result again from its record and compare: bytes of merges, surgery and edits, measurements of training."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from hf_transfer_ext.data.facts import FACTS_DATASET
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.files import refuse_existing_output, sha256_of
from hf_transfer_ext.hub.privacy import public_value
from hf_transfer_ext.hub.publish import PATH_KEYS
from hf_transfer_ext.hub.record import (
    RunInput,
    RunRecord,
    digests_of,
    installed_versions,
    read_record,
)
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.recipe import parse_recipe
from hf_transfer_ext.recipes.run import TRAINER_GROUPS
from hf_transfer_ext.settings import REQUIRED, Setting, arguments_for, settings_of_class
from hf_transfer_ext.weights.repository import Place, file_of, local_folder

#: Recipe of a record -> (module, function, parameter of the output folder): called with the `call` of the record.
CALLS = {
    "hf-transfer-ext merge": ("hf_transfer_ext.merging.run", "merge", "out_dir"),
    "hf-transfer-ext moe": ("hf_transfer_ext.merging.moe.assemble", "assemble", "out_dir"),
    "hf-transfer-ext extract": ("hf_transfer_ext.adapters.extract", "extract_lora", "out"),
    "hf-transfer-ext resize": ("hf_transfer_ext.adapters.resize", "resize_lora", "out"),
    "hf-transfer-ext convert": ("hf_transfer_ext.adapters.convert", "convert_to_lora", "out"),
    "hf-transfer-ext transfer": ("hf_transfer_ext.adapters.transfer.run", "transfer_lora", "out"),
    "hf-transfer-ext edit": ("hf_transfer_ext.edits.apply", "apply_edit", "out"),
    "hf-transfer-ext export": ("hf_transfer_ext.export", "export", "out"),
    "hf-transfer-ext requests apply": ("hf_transfer_ext.edits.requests", "stack_requests", "out"),
    "hf-transfer-ext cache-teacher": ("hf_transfer_ext.recipes.cache_teacher", "cache_for_distillation", "folder"),
}
#: The same for a transfer with its training and comparison, which share the command with the closed forms.
TRAINED_TRANSFER = ("hf_transfer_ext.adapters.transfer.trainer", "transfer_again", "out")
#: Recipe of a record -> (module, names of the classes of its settings): run with its settings as a YAML file.
RECIPES = {
    "hf-transfer-ext distill": ("hf_transfer_ext.recipes.distill", ("DistillArguments", "DistillationConfig")),
    "hf-transfer-ext unlearn": ("hf_transfer_ext.recipes.unlearn", ("UnlearnArguments", "UnlearningConfig")),
    "hf-transfer-ext robustify": ("hf_transfer_ext.recipes.robustify", ("RobustifyArguments", "DistillationConfig")),
    "hf-transfer-ext evaluate": ("hf_transfer_ext.recipes.evaluate", ("EvaluateArguments",)),
    "hf-transfer-ext audit": ("hf_transfer_ext.recipes.audit", ("AuditArguments",)),
}
#: Files that name the inputs in words of their own, so that their bytes say nothing about the result.
NOT_COMPARED = ("mergekit_config.yml", "mergekit_moe_config.yml", "transfer.json", "comparison.png")
#: Arguments of a call that name a model, adapter or data set; each has to be an input of the record.
MODEL_KEYS = ("adapter", "artifacts", "base", "base_model", "data", "dataset", "finetuned", "forget", "lora", "model",
              "path", "retain", "shared", "source_base", "source_model", "target_base", "teacher", "test_data",
              "texts", "train_data", "tuned")  # fmt: skip
_INPUTS = re.compile(r"input:[0-9]{1,4}(\+input:[0-9]{1,4})?")
#: Settings of a recipe that do not change its result, and that a second run must not obey.
_NOT_REPEATED = ("output_dir", "overwrite", "push_to_hub", "private", "create_pr", "resume_from_checkpoint",
                 "logging_dir", "report_to", "original_dir", "retrained_dir", "corrupted_dir", "cache",
                 "update_card")  # fmt: skip
#: Measurements without an interval are equal up to this relative difference.
TOLERANCE = 1e-9


@dataclass
class Reproduction:
    """What became of a second run.

    Args:
        folder: Where the new result is; "" if it was not kept.
        by: "bytes" or "measurements": what decides.
        files: File -> "equal", "differs", "missing" or "new"; in JSON files, paths of models are not compared.
        metrics: (name, value in the record, value now, "equal", "within", "outside" or "differs, no interval").
        notes: What was not the same: versions, device, code; where the hardware does not give the same bytes twice.
    """

    folder: str
    by: str
    files: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "equal", "within intervals", "undecided" (no interval states how much may differ) or "differs"."""
        if all(state == "equal" for state in self.files.values()) and self.files:
            return "equal"
        if self.by == "bytes" or not self.metrics:
            return "differs"
        states = {state for *_, state in self.metrics}
        if "outside" in states:
            return "differs"
        return "undecided" if "differs, no interval" in states else "within intervals"

    def text(self) -> str:
        """The comparison in lines."""
        lines = [f"{self.verdict}, by {self.by}"]
        equal = sum(state == "equal" for state in self.files.values())
        lines.append(f"{equal} of {len(self.files)} files are equal")
        lines += [f"  {name}: {state}" for name, state in self.files.items() if state != "equal"]
        lines += [f"  {name}: {old:.6g} then, {new:.6g} now, {state}" for name, old, new, state in self.metrics]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def reproduce(
    path_or_repo: str,
    *,
    revision: str | None = None,
    inputs: list[str] | None = None,
    search: list[str] | None = None,
    out: str | None = None,
) -> Reproduction:
    """Run the job of a result again, from its record and the same inputs, and compare the two results.

    Args:
        path_or_repo: Folder or Hub id of the result; `repo@revision` and `repo:subfolder` too.
        revision: Branch, tag or commit of a repository.
        inputs: `name=path` of local inputs, by their names in the record; `input:N=path` where two share a name. They
            must have the digests that the record states. Inputs on the Hub are read at their recorded commit.
        search: Folders in which local inputs are looked for by their digests.
        out: Keep the new result in this folder.

    Raises:
        FileNotFoundError: There is no record, or an input is missing.
        ValueError: The record does not say enough to run the job again, or an input has another digest.
    """
    record = read_record(path_or_repo, revision=revision)
    _refuse_unrepeatable(record, path_or_repo)
    _refuse_unsafe({"call": record.call, "settings": record.config})
    if out is not None:
        refuse_existing_output(out)
    places = _Places(record, inputs or [], search or [])
    by = "bytes" if record.recipe in CALLS and _function_of(record) != TRAINED_TRANSFER else "measurements"
    notes = [*_differences(record)]
    before = _threads(record)
    try:
        with TemporaryDirectory(prefix="reproduce-") as scratch:
            made = Path(out) if out is not None else Path(scratch) / "result"
            if record.recipe in CALLS:
                _call(record, places, made)
            else:
                notes += _run_recipe(record, places, made, Path(scratch) / "settings.yaml")
            return _compared(path_or_repo, revision, record, made, Reproduction(str(out or ""), by, notes=notes))
    finally:
        _set_threads(before)


def _refuse_unrepeatable(record: RunRecord, name: str) -> None:
    """Refuse a result that its record is not enough to make again.

    Raises:
        ValueError: With the reason, and what to do instead.
    """
    command = record.recipe.removeprefix("hf-transfer-ext ")
    reason = ""
    if record.recipe == "hf-transfer-ext quickstart":
        reason = "a quickstart is a chain of jobs. Reproduce the results of its stages, each in a folder of its own"
    elif record.recipe in RECIPES and record.job == "fine-tuning":
        reason = f"it is a model that a run of {command!r} made on its way. Reproduce the result of that run"
    elif record.recipe not in CALLS and record.recipe not in RECIPES:
        known = ", ".join(sorted(name.removeprefix("hf-transfer-ext ") for name in (*CALLS, *RECIPES)))
        reason = (
            f"{record.recipe!r} was called from Python with rows or models that the record only names. Results of the "
            f"commands {known} are made again"
        )
    elif record.recipe in CALLS and not record.call:
        reason = (
            "the record does not hold the call: it is of an earlier version, its data were Python objects or came "
            "from several runs, or its options are private. Run the command again yourself"
        )
    if reason:
        raise ValueError(f"The result {name!r} is not made again from its record: {reason}.")


def _function_of(record: RunRecord) -> tuple[str, str, str]:
    """(module, function, parameter of the output folder) of a record with a call."""
    if record.recipe == "hf-transfer-ext transfer" and "settings" in record.call:
        return TRAINED_TRANSFER
    return CALLS[record.recipe]


def _refuse_unsafe(value: Any, key: str = "") -> None:
    """Refuse what a record of a stranger must not make this machine do: run code, or read models not among its inputs.

    Raises:
        ValueError: With the setting.
    """
    if isinstance(value, Mapping):
        for name, one in value.items():
            if name == "trust_remote_code" and one not in (None, False):
                raise ValueError(
                    "The record sets `trust_remote_code`, so the job runs Python code from a repository. Read it; if "
                    "you trust it, run the command yourself."
                )
            _refuse_unsafe(one, "call" if name == "call" else key and str(name))
    elif isinstance(value, list):
        for one in value:
            _refuse_unsafe(one, key)
    elif key in MODEL_KEYS and isinstance(value, str) and not _INPUTS.fullmatch(value):
        raise ValueError(
            f"`{key}` in the call of the record names {value!r}, which is not one of its inputs; refused."
        )


class _Places:
    """Where the inputs of a record are now; each is found when it is needed, and checked."""

    def __init__(self, record: RunRecord, given: Sequence[str], search: Sequence[str]) -> None:
        self.record, self.search = record, search
        self.given: dict[str, Path] = {}
        names = {*(item.name for item in record.inputs), *record.files}
        names |= {f"input:{number}" for number in range(len(record.inputs))}
        for one in given:
            name, equals, path = one.partition("=")
            if not equals or not path:
                raise ValueError(f"`inputs` takes name=path, got {one!r}.")
            if name not in names:
                raise ValueError(f"The record has no input {name!r}. It has: {', '.join(sorted(names)) or 'none'}.")
            if not Path(path).exists():
                raise FileNotFoundError(f"There is nothing at {path!r}, given for the input {name!r}. Fix the path.")
            self.given[name] = Path(path)

    def of_input(self, number: int) -> str:
        """A local path of an input with the content that the record states; Hub data sets by name and commit."""
        if number >= len(self.record.inputs):
            raise ValueError(f"The call of the record names input {number}, and there are {len(self.record.inputs)}.")
        item = self.record.inputs[number]
        if item.role == "dataset" and item.name.startswith(f"{FACTS_DATASET} ("):
            return FACTS_DATASET
        path = self.given.get(f"input:{number}", self.given.get(item.name))
        if path is None and item.on_hub:
            place = Place(item.name, item.revision, item.subfolder)
            if item.role == "dataset":
                return str(place)
            path = local_folder(str(place))
        if path is None:
            path = next((found for found in _candidates(self.search, item) if _has_content(found, item)), None)
        if path is None:
            where = "no searched folder holds" if self.search else "give its path for"
            raise FileNotFoundError(
                f"The input {item.name!r} ({item.role}) was local: {where} files of these digests: "
                f"{', '.join(f'{n} {d[:12]}' for n, d in list(item.sha256.items())[:3]) or 'none were recorded'}. "
                f"Pass --inputs {item.name}=PATH."
            )
        if not _has_content(path, item):
            raise ValueError(
                f"The input {item.name!r} at {str(path)!r} is not the one that was read: its files have other digests "
                "than the record states. Name the folder with the same files."
            )
        return str(path)

    def of_file(self, name: str) -> str | None:
        """The path of a file that the settings named, where it was given; its digest must be that of the record."""
        path = self.given.get(name)
        if path is None:
            return None
        if sha256_of(path) != self.record.files[name]:
            raise ValueError(f"The file {str(path)!r} is not the {name!r} that was read: its digest differs.")
        return str(path)

    def resolved(self, value: Any, key: str = "", *, by_name: bool = False) -> Any:
        """A value of the record with its inputs as paths of this machine.

        Args:
            key: The setting that holds it.
            by_name: Inputs stand by their names, as in the settings of a recipe, and not as `input:N`.
        """
        if isinstance(value, Mapping):
            return {name: self.resolved(one, str(name), by_name=by_name) for name, one in value.items()}
        if isinstance(value, list):
            return [self.resolved(one, key, by_name=by_name) for one in value]
        if not isinstance(value, str):
            return value
        if not by_name:
            parts = value.split("+")
            if not _INPUTS.fullmatch(value):
                return self.of_file(value) or value if value in self.record.files else value
            return "+".join(self.of_input(int(part[6:])) for part in parts)
        named = [number for number, item in enumerate(self.record.inputs) if value in (item.name, str(item.place))]
        digests = {tuple(sorted(self.record.inputs[number].sha256.items())) for number in named}
        if len(digests) > 1:  # two inputs share a name
            named = [number for number in named if self.record.inputs[number].role in key] or named
            if len(named) > 1:
                raise ValueError(f"Several inputs are called {value!r}, and `{key}` does not say which. Rename one.")
        if named:
            return self.of_input(named[0])
        return self.of_file(value) or value if value in self.record.files else value


def _candidates(search: Sequence[str], item: RunInput) -> Iterator[Path]:
    """Files, and folders that hold files of the input's names."""
    if not item.sha256:
        return
    first = Path(next(iter(item.sha256)))
    for start in search:
        for folder, below, files in os.walk(start):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if first.name in files:
                yield Path(folder)
                if item.role == "dataset":
                    yield Path(folder) / first.name


def _has_content(path: Path, item: RunInput) -> bool:
    """Whether the files at a path are those of the record; a repository may list files that are not downloaded."""
    if not item.sha256:
        return item.on_hub
    found = digests_of(path, dataset=item.role == "dataset")
    if item.on_hub:
        common = set(found) & set(item.sha256)
        return bool(common) and all(found[name] == item.sha256[name] for name in common)
    return sorted(found.values()) == sorted(item.sha256.values())


def _call(record: RunRecord, places: _Places, out: Path) -> None:
    module, name, parameter = _function_of(record)
    arguments: dict[str, Any] = places.resolved(record.call)
    if isinstance(arguments.get("template"), Mapping):
        given = dict(arguments["template"])
        given["examples"] = tuple(tuple(pair) for pair in given.get("examples", ()))
        arguments["template"] = QuestionAnswerFormat(**given)
    if arguments.get("revision") is not None:
        arguments["revision"] = None  # the input is a local folder of that revision now
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    arguments[parameter] = str(out)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"This version of {record.recipe!r} does not take the recorded call: {error}") from error
    function(**arguments)


def _run_recipe(record: RunRecord, places: _Places, out: Path, settings: Path) -> list[str]:
    """Run a recipe with the settings of a record; returns what could not be set."""
    module_name, kinds = RECIPES[record.recipe]
    module = importlib.import_module(module_name)
    known: dict[str, Setting] = {
        setting.name: setting for kind in kinds for setting in settings_of_class(getattr(module, kind), TRAINER_GROUPS)
    }
    chosen: dict[str, Any] = {}
    notes = []
    for name, value in {**record.defaults, **record.config}.items():
        if name in _NOT_REPEATED or name.startswith("hub_"):
            continue
        if name not in known:
            if value not in (None, False):
                notes.append(f"The setting {name!r} of the record is not known to this version.")
            continue
        default = known[name].default
        untouched = default is not REQUIRED and value == public_value(default)
        if untouched and name in record.defaults:
            continue  # pinned, and still the default
        # A default names no input, though an input may be called the same ("teacher").
        chosen[name] = value if untouched else places.resolved(value, name, by_name=True)
        if name.endswith("revision"):
            chosen[name] = None  # the inputs are those of the recorded commits
    if "update_card" in known:
        chosen["update_card"] = False  # the input belongs to somebody
    settings.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    words = ["--config", str(settings), "--output_dir", str(out)]
    words += ["--report_to", "none"] if "report_to" in known else []
    parse_recipe(*(getattr(module, kind) for kind in kinds), argv=words, groups=TRAINER_GROUPS)  # refused before work
    module.main(words)
    return notes


def _compared(
    path_or_repo: str, revision: str | None, record: RunRecord, made: Path, found: Reproduction
) -> Reproduction:
    """Fill in files and measurements of the new result beside those of the record."""
    if not record.result:
        raise ValueError("The record states no digests of the result's files, so there is nothing to compare with.")
    new = read_record(made)
    for name in sorted({*record.result, *new.result} - set(NOT_COMPARED)):
        if name not in record.result or name not in new.result:
            found.files[name] = "new" if name in new.result else "missing"
        elif record.result[name] == new.result[name]:
            found.files[name] = "equal"
        else:
            found.files[name] = "differs"
    for name in [name for name, state in found.files.items() if state == "missing"]:
        # The files of a teacher cache have names at random.
        same = [other for other, state in found.files.items()
                if state == "new" and new.result[other] == record.result[name]]  # fmt: skip
        if same:
            found.files[name] = "equal"
            del found.files[same[0]]
    for name, state in found.files.items():
        original = file_of(path_or_repo, name, revision=revision) if state == "differs" else None
        if original is not None and name.endswith(".json") and _without_paths(original) == _without_paths(made / name):
            found.files[name] = "equal"
    if found.by == "bytes":
        return found
    for key, m, again in _paired(record, new):
        if again is not None:
            found.metrics.append((f"{key}: {m.name}" if key else m.name, m.value, again.value, _state(m, again)))
        else:
            found.notes.append(f"{m.name} was not measured again.")
    if any(state != "equal" for state in found.files.values()):
        found.notes.append(
            "Training gives the same bytes only with the same device, number of threads and versions; on a GPU, sums "
            "in another order may differ in their last bits each time. So the measurements decide."
        )
    return found


def _measured(record: RunRecord) -> Iterator[tuple[str, Measurement]]:
    for m in record.metrics:
        yield "", m
    for name, found in record.compared.items():
        for m in found:
            yield name, m


def _paired(record: RunRecord, new: RunRecord) -> Iterator[tuple[str, Measurement, Measurement | None]]:
    """Each measurement of a record with the same one of the new run.

    By name where that is the same; else by place, since an evaluation names models and data after their folders,
    which may be others now.
    """
    old, now = list(_measured(record)), list(_measured(new))
    named = {(key, m.name, m.dataset): m for key, m in now}
    if any((key, m.name, m.dataset) not in named for key, m in old) and [m.unit for _, m in old] == [
        m.unit for _, m in now
    ]:
        yield from ((key, m, again) for (key, m), (_, again) in zip(old, now, strict=True))
    else:
        yield from ((key, m, named.get((key, m.name, m.dataset))) for key, m in old)


def _state(old: Measurement, new: Measurement) -> str:
    if old.value == new.value or abs(old.value - new.value) <= TOLERANCE * abs(old.value):
        return "equal"
    if old.interval is None:
        return "differs, no interval"
    return "within" if old.interval[0] <= new.value <= old.interval[1] else "outside"


def _without_paths(path: Path) -> Any:
    """A JSON file without the keys under which libraries write where a model was loaded from."""
    content = read_json(path, kind=None)
    return (
        {k: v for k, v in content.items() if k not in (*PATH_KEYS, "revision")}
        if isinstance(content, dict)
        else content
    )


def _differences(record: RunRecord) -> Iterator[str]:
    """What is not as it was when the result was made."""
    now = installed_versions()
    changed = [f"{name} {old} then, {now.get(name, 'absent')} now" for name, old in record.versions.items()
               if now.get(name) != old]  # fmt: skip
    if changed:
        yield f"Other versions: {'; '.join(changed)}."
    if record.recipe in CALLS and not record.call:
        return
    module = (_function_of(record) if record.recipe in CALLS else RECIPES[record.recipe])[0]
    file = importlib.import_module(module).__file__
    if record.recipe_sha256 and file and sha256_of(file) != record.recipe_sha256:
        yield f"The code of {record.recipe!r} has changed since."
    import torch

    device = str(record.device.get("device", "cpu"))
    if device == "cuda":
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        made_on = record.device.get("accelerator", "a GPU")
        yield (
            f"It was made on {made_on}; here is {here}. GPUs of other kinds, and some operations on the same one, "
            "round differently: the same bytes are not promised."
        )
    if int(record.device.get("processes", 1) or 1) > 1:
        yield f"It was made by {record.device['processes']} processes; this is one."


def _threads(record: RunRecord) -> int:
    """Use as many threads as the record says, since they change how sums are rounded; returns the number before."""
    import torch

    before = torch.get_num_threads()
    wanted = record.device.get("threads")
    if isinstance(wanted, int) and 0 < wanted <= 1024 and record.recipe in (*CALLS, *RECIPES):
        torch.set_num_threads(wanted)
    return before


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext reproduce PATH_OR_REPO`; the status is 1 where the new result is not the recorded one."""
    about = "Make a result again from its record and the same inputs, and compare."
    found = reproduce(**arguments_for(reproduce, argv, program="hf-transfer-ext reproduce", about=about))
    print(found.text())
    return 0 if found.verdict in ("equal", "within intervals") else 1
