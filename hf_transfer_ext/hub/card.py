"""The model card: a run record in readable form, with front matter that the Hub understands."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from hf_transfer_ext.hub.privacy import public_text
from hf_transfer_ext.hub.record import RunInput, RunRecord
from hf_transfer_ext.measurement import Measurement

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

#: The card's file in a model folder or repository.
CARD_FILE = "README.md"
#: Measurements in the form that the Hub reads beside the model-index, in a model folder or repository.
EVAL_RESULTS_FILE = ".eval_results/hf_transfer_ext.yaml"
#: Stands where the card names its own repository, until `push` knows it.
THIS_MODEL = "PATH_OR_REPOSITORY_OF_THIS_MODEL"
#: How a result can derive from its bases, in the Hub's words.
RELATIONS = ("adapter", "finetune", "merge", "quantized")

#: job -> (what was done, in a sentence; which inputs are the bases: the first of these roles that the record has)
_JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "distillation": (
        "A student was trained to give the next-token distributions of a teacher.",
        ("student", "base", "teacher"),
    ),
    "merging": ("The weights of several models were combined into one model, tensor by tensor.", ("base", "model")),
    "unlearning": (
        "A model was trained to stop giving chosen knowledge while keeping the rest.",
        ("model", "student", "base"),
    ),
    "extraction": (
        "The difference between a fine-tuned model and its base was written as a low-rank adapter (LoRA).",
        ("base", "model"),
    ),
    "resizing": ("A low-rank adapter (LoRA) was rewritten at another rank.", ("base",)),
    "conversion": ("An adapter was rewritten as a plain low-rank adapter (LoRA).", ("base",)),
    "transfer": (
        "An adapter that was trained on one base model was carried over to another one.",
        ("student", "base", "model"),
    ),
}
_OTHER_JOB = ("This model is the result of a run of hf_transfer_ext.", ("student", "model", "base", "teacher"))

#: What readers of such a model would like to know and mostly is not measured: (sentence, words in metric names).
_EXPECTED = {
    "unlearning": (
        ("Whether the forgotten knowledge returns after a little further training.", ("relearn",)),
        ("Whether it shows under paraphrases, other languages or adversarial prompts.", ("paraphras", "attack")),
    ),
    "merging": (("Whether each merged model's own abilities are kept.", ("kept", "retention", "accuracy")),),
}


def model_card(
    record: RunRecord,
    *,
    title: str | None = None,
    adapter: bool = False,
    relation: str | None = None,
    chat: bool = False,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Write the card of a run's result from its record alone, so that the card cannot claim more than was recorded.

    The front matter names the bases that are on the Hub. A base that is only a local folder is replaced by the bases
    that its own card or record names, or left out. The license is taken from the inputs' cards when all models among
    them state the same one, and is never guessed; a Gemma model among them, a teacher too, makes it "gemma".

    Args:
        title: Heading and name in the model-index; made from the job and the first base if None.
        adapter: The result is a LoRA, not a full model.
        relation: "finetune", "adapter", "merge" or "quantized"; follows from `adapter` and the job if None.
        chat: The tokenizer brings a chat template.
        tags: Added to "hf_transfer_ext", the job, "merge" for merges and "lora" for adapters.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if relation is None:
        relation = "adapter" if adapter else "merge" if record.job == "merging" else "finetune"
    if relation not in RELATIONS:
        raise ValueError(f"`relation` has to be one of {', '.join(RELATIONS)}, got {relation!r}.")
    bases = base_models(record, direct=adapter)
    title = public_text(title or _title(record, bases))
    datasets = [item.name for item in record.inputs if item.role == "dataset" and item.on_hub]
    own_tags = [*(["merge"] if record.job == "merging" else []), *(["lora"] if adapter else [])]
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=relation if bases else None,
        datasets=datasets or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["hf_transfer_ext", record.job, *own_tags, *tags])),
        eval_results=_eval_results(record) or None,
        model_name=title,
        **_license(record),
    )
    if not data.eval_results:
        data.model_name = None
    parts = [
        f"# {_text(title)}",
        _what_was_done(record, bases, [name for name in base_models(record) if name not in bases]),
        _terms(record),
        "## Load it\n\n" + _how_to_load(adapter, bases, chat),
        *(f"## {_text(head)}\n\n{_list(lines)}" for head, lines in record.notes.items()),
        "## Measurements\n\n" + _measurements(record),
        "## Not measured\n\n" + _not_measured(record),
        "## Inputs\n\n" + _inputs(record),
        _history(record),
        "## Run\n\n" + _run(record),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def base_models(record: RunRecord, *, direct: bool = False, known: dict[int, list[str]] | None = None) -> list[str]:
    """Hub ids of the models that the result derives from, in the user's order, each once.

    Args:
        direct: The bases of an adapter: the model that it is loaded on, not the others of a merge, and not the one
            behind a base that is only a local folder. Otherwise the Hub ids that a local folder's card or record
            names stand for it.
        known: `id(record)` -> answer for ancestors; each is looked at once, however many ways lead to it.
    """
    known = {} if known is None else known
    roles = _JOBS.get(record.job, _OTHER_JOB)[1]
    if record.job == "merging" and not direct:
        chosen = [item for item in record.inputs if item.role in roles]
    else:
        role = next((role for role in roles if any(item.role == role for item in record.inputs)), None)
        chosen = [item for item in record.inputs if item.role == role]
    return list(dict.fromkeys(name for item in chosen for name in _hub_names(item, direct, known)))


def _hub_names(item: RunInput, direct: bool, known: dict[int, list[str]]) -> list[str]:
    if item.on_hub:
        return [item.name]
    if direct:
        return []
    stated = [name for name in item.base_model if re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", name)]
    if stated or item.record is None:
        return stated
    if id(item.record) not in known:
        known[id(item.record)] = base_models(item.record, known=known)
    return known[id(item.record)]


def _title(record: RunRecord, bases: Sequence[str]) -> str:
    names = bases or [item.name for item in record.inputs if item.role != "dataset"]
    return f"{record.job.capitalize()} of {names[0].rsplit('/', 1)[-1]}" if names else record.job.capitalize()


def _models(record: RunRecord) -> list[RunInput]:
    return [item for item in record.inputs if item.role != "dataset"]


def _is_gemma(item: RunInput, known: dict[int, bool] | None = None) -> bool:
    """Under Gemma's terms: stated so, or a Gemma model whose card states nothing; Gemma 4 has a license of its own."""
    known = {} if known is None else known  # `id(record)` -> answer; each ancestor is looked at once
    if item.license:
        return item.license.get("license") == "gemma"
    kind = item.model_type or ""
    by_type = "gemma" in kind and not kind.startswith("gemma4")
    if by_type or item.record is None:
        return by_type
    if id(item.record) not in known:
        known[id(item.record)] = any(_is_gemma(i, known) for i in _models(item.record))
    return known[id(item.record)]


def _license(record: RunRecord, known: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Front matter for the license: that of all models among the inputs if they agree, else nothing."""
    known = {} if known is None else known  # `id(record)` -> answer; each ancestor is looked at once
    models = _models(record)
    if any(_is_gemma(item) for item in models):
        return {"license": "gemma"}
    stated = [item.license or _license_of_parent(item, known) for item in models]
    agreed = stated[0] if stated and all(one == stated[0] for one in stated) else {}
    # The Hub refuses a card whose license is no identifier, so a base's free text is left to the body.
    return dict(agreed) if re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", agreed.get("license", "")) else {}


def _license_name(item: RunInput) -> str:
    return _text(item.license.get("license_name") or item.license.get("license") or "not stated")


def _license_of_parent(item: RunInput, known: dict[int, dict[str, Any]]) -> dict[str, str]:
    if item.record is None:
        return {}
    if id(item.record) not in known:
        known[id(item.record)] = _license(item.record, known)
    return known[id(item.record)]


def _eval_results(record: RunRecord) -> list[Any]:
    """The record's measurements of the result for the model-index. A value that is not a finite number is left out."""
    from huggingface_hub import EvalResult

    results = []
    for m, data in _measured_on(record):
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="custom" if data is None else data.name,
                dataset_name=public_text(m.dataset or "data of this run"),
                metric_type=m.name,
                metric_name=f"{m.name} ({m.unit}, {_direction(m)}, {m.examples} examples)",
                metric_value=m.value,
                metric_args={"interval_95": list(m.interval)} if m.interval else None,
            )
        )
    return results


def eval_results_yaml(record: RunRecord) -> str:
    """The content of `.eval_results/hf_transfer_ext.yaml`, which the Hub shows on the pages of model and data set.

    It holds the measurements of the result on data sets of the Hub; "" where there are none.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for m, data in _measured_on(record):
        if data is not None:
            interval = f", 95 % interval [{m.interval[0]:.6g}, {m.interval[1]:.6g}]" if m.interval else ""
            notes = f"{m.unit}, {_direction(m)}, {m.examples} examples{interval}"
            entries.append(
                EvalResultEntry(
                    data.name, m.name, m.value, dataset_revision=data.revision, date=record.created, notes=notes
                )
            )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def _measured_on(record: RunRecord) -> list[tuple[Measurement, RunInput | None]]:
    """The finite measurements of the result, each with its data set on the Hub, if it is one."""
    on_hub = [item for item in record.inputs if item.role == "dataset" and item.on_hub]
    return [
        (m, next((item for item in on_hub if m.dataset and item.name in m.dataset), None))
        for m in record.metrics
        if math.isfinite(m.value)
    ]


def _what_was_done(record: RunRecord, bases: Sequence[str], parents: Sequence[str]) -> str:
    sentence = _JOBS.get(record.job, _OTHER_JOB)[0]
    lines = [sentence, f"Made by {_code(record.recipe)} of hf_transfer_ext ({_code(record.job)}) on {record.created}."]
    if bases:
        lines.append("It derives from " + ", ".join(_code(name) for name in bases) + ".")
        if parents:  # of an adapter: models whose knowledge it carries, but which it does not load on
            lines.append("It also carries what was learned by " + ", ".join(_code(name) for name in parents) + ".")
    elif _models(record):
        lines.append("What it derives from was read from local folders; their digests are below.")
    return " ".join(lines)


def _terms(record: RunRecord) -> str:
    if any(_is_gemma(item) for item in _models(record)):
        return (
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms. This model derives from a Gemma model (distillation counts as "
            "deriving), so these terms and the Gemma Prohibited Use Policy apply to it too."
        )
    if not _license(record) and _models(record):
        found = [f"{_code(item.name)}: {_license_name(item)}" for item in _models(record)]
        return (
            "No license is stated here, because the inputs' cards do not state one and the same "
            f"({', '.join(found)}). Those of the inputs apply."
        )
    return ""


def _how_to_load(adapter: bool, bases: Sequence[str], chat: bool) -> str:
    if adapter:
        base = bases[0] if len(bases) == 1 else "PATH_OR_REPOSITORY_OF_THE_BASE"
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            f'model = PeftModel.from_pretrained(base, "{THIS_MODEL}")',
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})",
        ]
        note = "It is in the format of PEFT."
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{THIS_MODEL}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{THIS_MODEL}")',
        ]
        note = "The weights are safetensors; no code from the repository is needed."
    if chat:
        note += " The tokenizer brings a chat template (`tokenizer.apply_chat_template`)."
    return "\n".join(["```python", *code, "```", "", note])


def _measurements(record: RunRecord) -> str:
    """One row for each metric and data set; this model beside the others that the run measured."""
    columns = {"this model": record.metrics, **record.compared}
    rows: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for column, found in columns.items():
        for m in found:
            rows.setdefault((m.name, m.unit, m.dataset or ""), {})[column] = m
    if not rows:
        return "None were made in this run."
    names = [name for name in (*record.compared, "this model") if columns[name]]
    head = ["metric", "unit", "better", "measured on", "examples", *names]
    table = [
        [
            _code(name),
            _text(unit),
            _direction(next(iter(cells.values()))).split()[0],
            _text(dataset or "not stated"),
            _examples(cells.values()),
            *(_value(cells[column]) if column in cells else "" for column in names),
        ]
        for (name, unit, dataset), cells in rows.items()
    ]
    note = (
        "\n\nBrackets hold 95 % intervals."
        if any(m.interval for cells in rows.values() for m in cells.values())
        else ""
    )
    return _table([_text(cell) for cell in head], table) + note


def _not_measured(record: RunRecord) -> str:
    names = [m.name for m in record.metrics]
    missing = [
        sentence
        for sentence, words in _EXPECTED.get(record.job, ())
        if not any(word in name for name in names for word in words)
    ]
    general = "Safety, bias, and any language or task that the table above does not name."
    return _list([*record.not_measured, *missing, general])


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_text(sentence, keep=True)}" for sentence in sentences)


def _inputs(record: RunRecord) -> str:
    if not record.inputs:
        return "None were recorded."
    rows = []
    for item in record.inputs:
        digests = [f"{_code(name)} {_code(digest[:12])}" for name, digest in list(item.sha256.items())[:4]]
        more = len(item.sha256) - len(digests)
        rows.append(
            [
                item.role,
                _code(item.name) + ("" if item.on_hub else " (local)"),
                _code(item.revision[:12]) if item.revision else "",
                ", ".join(digests) + (f" and {more} more" if more > 0 else ""),
                _license_name(item),
            ]
        )
    return _table(["role", "name", "revision", "sha256", "license"], rows) + (
        "\n\nFull digests are in `hf_transfer_ext.json`."
    )


def _history(record: RunRecord) -> str:
    """What was done to the inputs before this run, oldest first."""
    earlier = record.history()[:-1]
    if not earlier:
        return ""
    lines = [
        f"{number}. {_text(old.job)} by {_code(old.recipe)}, {_text(old.created)}, from "
        + (", ".join(f"{_code(item.name)} ({item.role})" for item in old.inputs) or "no recorded inputs")
        for number, old in enumerate(earlier, start=1)
    ]
    return "## Earlier steps\n\n" + "\n".join(lines)


def _run(record: RunRecord) -> str:
    parts = []
    if record.stages:
        rows = [[_text(stage.name), f"{stage.seconds:.1f}"] for stage in record.stages]
        parts.append(_table(["stage", "seconds"], rows))
    facts = {**record.device, **({} if record.seed is None else {"seed": record.seed})}
    if facts:
        parts.append("Run with " + ", ".join(f"{_text(str(k))} {_code(str(v))}" for k, v in facts.items()) + ".")
    parts.append("Versions: " + ", ".join(f"{_text(k)} {_text(v)}" for k, v in record.versions.items()) + ".")
    settings = json.dumps(record.config, indent=2, ensure_ascii=False, allow_nan=False)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", settings)), default=0))
    parts.append(f"All settings:\n\n{fence}json\n{settings}\n{fence}")
    return "\n\n".join(parts)


def _direction(m: Measurement) -> str:
    return "higher is better" if m.higher_is_better else "lower is better"


def _examples(found: Iterable[Measurement]) -> str:
    counts = list(dict.fromkeys(m.examples for m in found))
    return " / ".join(f"{count:,}" for count in counts)


def _value(m: Measurement) -> str:
    shown = f"{m.value:.4g}"
    return shown if m.interval is None else f"{shown} \\[{m.interval[0]:.4g}, {m.interval[1]:.4g}\\]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str, *, keep: bool = False) -> str:
    """Text from models and data as one line of Markdown that shows it and does nothing else.

    Args:
        keep: Do not cut the text at 200 characters.
    """
    line = " ".join(public_text(str(text)).split())
    if len(line) > 200 and not keep:
        line = line[:199] + "…"
    escaped = re.sub(r"([\\*_\[\]#|~$!])", r"\\\1", html.escape(line, quote=False))
    return escaped.replace("`", "&#96;").replace("://", ":&#47;&#47;").replace("@", "&#64;")


def _code(text: str) -> str:
    """Text as code inside a line or a table cell."""
    line = " ".join(public_text(str(text)).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line[:200]}`" if line else ""
