"""Load text datasets by Hub id, file or folder, in one of the formats that trainers accept; bad rows are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_transfer_ext.data.facts import FACTS_DATASET, fact_texts
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.reading import parse_json, read_text
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.weights.repository import place_of

logger = logging.getLogger(__name__)

TextDataset: TypeAlias = Dataset | IterableDataset

#: The formats of a row: each is a set of column roles. The first format that a dataset has is used.
FORMS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",), ("input_ids",))
#: The format of data that a student writes the rest of; only where that is asked for.
PROMPTS_ALONE = ("prompt",)
ROLES = tuple(role for form in FORMS for role in form)

#: Speaker in `{"from", "value"}` conversations -> role in a chat template; other names already are roles.
SPEAKERS = {"human": "user", "gpt": "assistant"}

#: File extension -> loader of `datasets`.
FILE_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

_EMPTY = "The dataset {name!r} has no rows in its split {split!r}. Give one with at least one row."


def load_text_dataset(
    name_or_path: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    revision: str | None = None,
    config_name: str | None = None,
    prompts_alone: bool = False,
) -> TextDataset:
    """Load text in one of the formats of TRL's `SFTTrainer`, with any column names.

    The result has the columns `text`; or `messages` (a list of `{"role", "content"}`, where tool calls may replace the
    content); or `prompt` and `completion`, both strings or both lists of messages; or `input_ids`, if it is already
    tokenized, with `labels` if there are any. A question and its answer become prompt and completion, and
    `conversations` of `{"from", "value"}` become messages.

    Args:
        name_or_path: "facts" (see `data.facts`), a file (.json, .jsonl, .csv, .parquet, .txt), a folder of such files
            or of `Dataset.save_to_disk`, or `repo[@revision][:subfolder]` on the Hub.
        split: Name of the split, or a slice of it as in "train[:1000]". A single file is all "train".
        columns: Role -> column name, for example `{"text": "content"}` or
            `{"question": "q", "answer": "a"}`. Roles: text; messages; prompt and completion; question and answer;
            input_ids. By default, the columns that are named after the roles.
        streaming: Read rows on demand (`IterableDataset`), for data larger than the disk.
        revision: Branch, tag or commit of a Hub dataset.
        config_name: Name of the configuration of a Hub dataset.
        prompts_alone: Accept rows with only a `prompt`, too.

    Raises:
        FileNotFoundError: Neither a file or folder nor a dataset that can be reached on the Hub.
        ValueError: The dataset is empty, lacks the split or a column, or holds something other than text there, or
            nothing in one of its rows.
    """
    dataset = _loaded(name_or_path, split, streaming, revision, config_name)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(_EMPTY.format(name=str(name_or_path), split=split))
    forms = (*FORMS, PROMPTS_ALONE) if prompts_alone else FORMS
    form = _form(columns, list(first), str(name_or_path), forms)
    warn_of_unused(str(name_or_path), list(first), set(form.values()))
    _check_types(first, form, str(name_or_path))
    dataset = _without_nulls(dataset, form, str(name_or_path))
    dataset = _renamed(dataset, form, list(first))
    if set(form) == {"messages"} and any("from" in message for message in first[form["messages"]]):
        dataset = dataset.map(lambda row: {"messages": [_as_message(message) for message in row["messages"]]})
    if set(form) == {"question", "answer"}:
        plain = QuestionAnswerFormat(template="plain")
        dataset = dataset.map(
            lambda row: {
                "prompt": plain.prompt.replace("{question}", row["question"]),
                "completion": plain.separator + row["answer"],
            },
            remove_columns=["question", "answer"],
        )
    return dataset


class MissingSet(FileNotFoundError, ValueError):
    """The dataset exists but does not have the requested file, configuration or split."""


def load_columns(
    name_or_path: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    revision: str | None = None,
    config_name: str | None = None,
) -> TextDataset:
    """Load a dataset of any columns, from the same sources as `load_text_dataset`.

    Args:
        columns: New name -> column, for columns to rename.

    Raises:
        FileNotFoundError: As `load_text_dataset`.
        ValueError: The dataset is empty, or lacks the split or a column.
    """
    dataset = _loaded(name_or_path, split, streaming, revision, config_name)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(_EMPTY.format(name=str(name_or_path), split=split))
    for column in (columns or {}).values():
        if column not in first:
            raise ValueError(f"{unknown_name('column', column, first)} (The dataset is {str(name_or_path)!r}.)")
    new = {column: role for role, column in (columns or {}).items() if role != column}
    dataset = dataset.remove_columns([role for role in new.values() if role in first and role not in new])
    return dataset.rename_columns(new)


def load_train_and_test(
    name_or_path: str | Path,
    train_split: str = "train",
    test_split: str | None = "test",
    *,
    load: Callable[..., TextDataset] = load_text_dataset,
    **options: Any,
) -> tuple[TextDataset, TextDataset | None]:
    """The training data and the held-out data.

    Where there is no split "test" (a single file has none), a tenth of the rows (1 to 1000) is held out from training;
    a warning says so. Prompts without completions are all for training: there is nothing to measure on.

    Args:
        test_split: None for no held-out data.
        load: `load_text_dataset` or `load_columns`.
        options: As in `load_text_dataset`.

    Raises:
        ValueError: As in `load_text_dataset`; or there are fewer than two rows to hold out from.
    """
    train = load(name_or_path, split=train_split, **options)
    prompts_alone = load is load_text_dataset and set(PROMPTS_ALONE) == set(ROLES) & set(next(iter(train)))
    if test_split is None or prompts_alone:
        return train, None
    if not Path(name_or_path).is_file() or test_split.startswith("train"):
        try:
            return train, load(name_or_path, split=test_split, **options)
        except MissingSet:
            if test_split != "test":  # a split that somebody named
                raise
    rows = len(train) if isinstance(train, Dataset) else sum(1 for _ in train)
    count = max(1, min(rows // 10, 1000))
    if rows < 2:
        raise ValueError(
            f"{str(name_or_path)!r} has {rows} row, so none can be held out for evaluation. Add rows, or set "
            "`test_split: none`."
        )
    logger.warning(
        f"{str(name_or_path)!r} has no split {test_split!r}: {count} of its {rows} rows are held out from training "
        "for evaluation. To choose yourself, set `test_split` to a slice such as `train[90%:]`, or to `none`."
    )
    if isinstance(train, IterableDataset):
        return train.skip(count), train.take(count)
    parts = train.train_test_split(test_size=count, seed=0)
    return parts["train"], parts["test"]


def load_rows(
    name_or_path: str | Path, *, split: str = "train", revision: str | None = None, config_name: str | None = None
) -> list[dict[str, Any]]:
    """All rows of a dataset, unchanged, from the same sources as `load_text_dataset`.

    Raises:
        MissingSet: The dataset lacks the configuration or the split.
        FileNotFoundError: Neither a file or folder nor a dataset that can be reached on the Hub.
        ValueError: The dataset is empty, or cannot be read.
    """
    path = Path(name_or_path)
    if split == "train" and path.is_file() and path.suffix in (".json", ".jsonl"):
        return read_rows(path)
    rows = [dict(row) for row in _loaded(name_or_path, split, False, revision, config_name)]
    if not rows:
        raise ValueError(_EMPTY.format(name=str(name_or_path), split=split))
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file: JSON lines, a JSON list of objects or strings, or another of `FILE_KINDS`.

    Raises:
        ValueError: The file is not valid, or has no rows.
    """
    if path.suffix not in (".json", ".jsonl"):
        return [dict(row) for row in _loaded(path, "train", False, None, None)]
    text = read_text(path, max_bytes=None)
    if text.lstrip().startswith("["):
        rows: Any = parse_json(text, f"{path.name}, which starts as a JSON list,", kind=list)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [parse_json(line, f"Line {n} of {path.name}", kind=None) for n, line in lines if line.strip()]
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path.name} needs rows that are JSON objects or strings, and has {len(rows)} rows.")
    return [dict(row) for row in rows]


def warn_of_unused(name: str, available: Iterable[str], used: Collection[str]) -> None:
    """Log which columns of a dataset are used if some are not: one of those may contain the answer."""
    unused = [column for column in available if column not in used]
    if unused:
        logger.warning(
            "Dataset %r: columns used: %s; not used: %s. Choose others with `columns`.",
            name, ", ".join(column for column in available if column in used) or "(none)", ", ".join(unused),
        )  # fmt: skip


def require_labels(dataset: TextDataset, *, on_unlabelled: str = "error") -> TextDataset:
    """Refuse or drop tokenized rows without a token to learn: they would contribute nothing, or NaN, to a mean.

    Args:
        dataset: Rows with `input_ids` and perhaps `labels` (-100: not learned) or a 0/1 `completion_mask` or
            `assistant_masks`. The first token of a row is never predicted, so it never counts.
        on_unlabelled: "error" or "skip". A streaming dataset raises when it reaches the row.

    Raises:
        ValueError: A row has no such token (under "error"), or none is left (under "skip").
    """
    advice = (
        "The completion may be empty, or cut off by `max_length`. Fix the row, or skip such rows "
        "(`on_unlabelled: skip`)."
    )
    return _kept(
        dataset,
        lambda row: labelled_tokens(row) > 0,
        lambda index, row: f"Row {index} has no labeled token among its {len(row['input_ids'])}. {advice}",
        _one_of("on_unlabelled", on_unlabelled, ("error", "skip")),
    )


def fit_context(dataset: TextDataset, context: int, *, on_long: str = "error") -> TextDataset:
    """Refuse, cut or drop tokenized rows longer than the model's context.

    Args:
        context: The longest sequence in tokens, as in `loading.context_length(model)`.
        on_long: "error"; "truncate" (the end of every per-token column is cut off: call `require_labels` afterwards);
            or "skip". A streaming dataset raises when it reaches the row.
    """
    if context < 1:
        raise ValueError(f"`context` must be at least 1 token, got {context}.")
    if _one_of("on_long", on_long, ("error", "truncate", "skip")) == "truncate":
        return dataset.map(lambda row: _cut(row, context))
    return _kept(
        dataset,
        lambda row: len(row["input_ids"]) <= context,
        lambda index, row: (
            f"Row {index} has {len(row['input_ids'])} tokens, but the model supports only {context}. Split the text, "
            "or set `on_long: truncate` (loses its end) or `on_long: skip`."
        ),
        on_long,
    )


def labelled_tokens(row: Mapping[str, Any]) -> int:
    """Number of tokens of a tokenized row that are predicted and learned."""
    learned = [True] * len(row["input_ids"])
    if row.get("labels") is not None:
        learned = [label != -100 for label in row["labels"]]
    for name in ("completion_mask", "assistant_masks"):
        if row.get(name) is not None:
            learned = [kept and bool(mask) for kept, mask in zip(learned, row[name], strict=True)]
    return sum(learned[1:])


def _loaded(
    name: str | Path, split: str, streaming: bool, revision: str | None, config_name: str | None
) -> TextDataset:
    path = Path(name)
    if str(name) == FACTS_DATASET and not path.exists():
        dataset = Dataset.from_list(fact_texts(split))
        return dataset.to_iterable_dataset() if streaming else dataset
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise MissingSet(unknown_name(f"split of {str(name)!r}", split, saved))
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(
                f"{str(name)!r} is not a supported data file. Supported extensions: {', '.join(sorted(FILE_KINDS))}."
            )
        source, options["data_files"] = FILE_KINDS[path.suffix], {"train": str(path)}
    elif path.is_dir():
        source = str(path)
    elif path.suffix in FILE_KINDS or path.is_absolute() or str(name).startswith((".", "~")):
        raise FileNotFoundError(f"There is no data file or folder at {str(name)!r}. Fix the path, or pass a Hub id.")
    else:
        place = place_of(name, revision)
        source, options["revision"], options["name"] = place.path, place.revision, config_name
        options |= {"data_dir": place.subfolder} if place.subfolder else {}
    try:
        return load_dataset(source, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"The dataset {str(name)!r}{f' at revision {revision!r}' if revision else ''} is neither a local file or "
            f"folder nor a dataset that can be reached on the Hub ({type(error).__name__}). Fix the name, or log in."
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{str(name)!r} cannot be read as a dataset: {error.__cause__ or error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The folder {str(name)!r} has no data files that can be read: {error}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(_EMPTY.format(name=str(name), split=split)) from error
        missing = any(text in str(error) for text in ("BuilderConfig", "Unknown split", "Bad split"))
        kind = MissingSet if missing else ValueError
        raise kind(f"The dataset {str(name)!r} cannot be loaded: {error}") from error


def _form(
    columns: Mapping[str, str] | None, available: list[str], name: str, forms: Sequence[tuple[str, ...]]
) -> dict[str, str]:
    """Role -> column for one format."""
    if columns is None:
        for form in forms:
            if all(role in available for role in form):
                return {role: role for role in form}
        if "conversations" in available:
            return {"messages": "conversations"}
        raise ValueError(
            f"The dataset {name!r} has the columns {', '.join(available)}, which match none of the formats "
            f"{'; '.join(' + '.join(form) for form in forms)}. Map roles to columns, for example "
            f"`columns: {{text: {available[0]}}}`."
        )
    for role, column in columns.items():
        if role not in ROLES:
            raise ValueError(unknown_name("role of a column", role, ROLES))
        if column not in available:
            raise ValueError(f"{unknown_name('column', column, available)} (The dataset is {name!r}.)")
    if set(columns) not in [set(form) for form in forms]:
        raise ValueError(
            f"`columns` has the roles {', '.join(columns)}, but needs all roles of one format: "
            f"{'; '.join(' + '.join(form) for form in forms)}."
        )
    return dict(columns)


def _check_types(row: Mapping[str, Any], form: Mapping[str, str], name: str) -> None:
    is_chat = "prompt" in form and isinstance(row[form["prompt"]], list)
    for role, column in form.items():
        value = row[column]
        if role == "messages" or (is_chat and role in ("prompt", "completion")):
            good, needed = _are_messages(value), 'a list of {"role", "content"} or of {"from", "value"}'
        elif role == "input_ids":
            good, needed = isinstance(value, list) and all(isinstance(v, int) for v in value), "a list of token ids"
        else:
            good, needed = isinstance(value, str), "text"
        if not good:
            raise ValueError(
                f"Column {column!r} of the dataset {name!r} must hold {needed}, but its first row holds "
                f"{type(value).__name__} {str(value)[:80]!r}."
            )


def _are_messages(value: Any) -> bool:
    def is_message(m: Any) -> bool:
        spoken = isinstance(m, dict) and m.get("role") is not None and {"content", "tool_calls"} & set(m)
        return bool(spoken) or (isinstance(m, dict) and {"from", "value"} <= set(m))

    return isinstance(value, list) and bool(value) and all(is_message(m) for m in value)


def _as_message(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": SPEAKERS.get(message["from"], message["from"]), "content": message["value"]}


def _without_nulls(dataset: TextDataset, form: Mapping[str, str], name: str) -> TextDataset:
    """Refuse rows with null in a column that is used; a streaming dataset raises when it reaches the row."""

    def checked(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        for column in form.values():
            if row[column] is None:
                raise ValueError(
                    f"Row {index} of the dataset {name!r} has null in the column {column!r}. Fix or delete the row."
                )
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(checked, with_indices=True)
    nulls = [column for column in form.values() if dataset.data.column(column).null_count]
    for index, row in enumerate(dataset.select_columns(list(form.values())) if nulls else ()):
        checked(row, index)
    return dataset


def _renamed(dataset: TextDataset, form: Mapping[str, str], available: list[str]) -> TextDataset:
    """Rename the columns to their roles and drop columns of other formats, so that one format remains."""
    taken = set(form.values())
    dataset = dataset.remove_columns([column for column in available if column in ROLES and column not in taken])
    return dataset.rename_columns({column: role for role, column in form.items() if column != role})


def _kept(
    dataset: TextDataset,
    good: Callable[[Mapping[str, Any]], bool],
    message: Callable[[int, Mapping[str, Any]], str],
    policy: str,
) -> TextDataset:
    """The valid rows; an invalid one is dropped ("skip") or raises ("error")."""
    if policy == "skip":
        kept = dataset.filter(good)
        if next(iter(kept), None) is None:
            raise ValueError("No row is left after skipping: every row is too long or has nothing to learn.")
        return kept

    def checked(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        if not good(row):
            raise ValueError(message(index, row))
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(checked, with_indices=True)
    for index, row in enumerate(dataset):
        checked(row, index)
    return dataset


def _cut(row: Mapping[str, Any], context: int) -> dict[str, Any]:
    length = len(row["input_ids"])
    return {name: value[:context] for name, value in row.items() if isinstance(value, list) and len(value) == length}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    return value
