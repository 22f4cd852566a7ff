"""Save a result with its card and record, push it to the Hub, and pull one back."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.files import (
    path_inside,
    refuse_existing_output,
    require_free_space,
    sha256_of,
    write_text,
    written_aside,
)
from hf_transfer_ext.hub.access import again, checked, clear_errors, create
from hf_transfer_ext.hub.card import (
    CARD_FILE,
    EVAL_RESULTS_FILE,
    THIS_MODEL,
    base_models,
    eval_results_yaml,
    is_built_with_llama,
    is_generated,
    listing_card,
    model_card,
    own_text,
    with_own_text,
)
from hf_transfer_ext.hub.privacy import find_secret, find_secret_in_file, is_absolute_path, last_component
from hf_transfer_ext.hub.record import RECORD_FILE, RunRecord, read_record
from hf_transfer_ext.hub.servable import Server, servable_by
from hf_transfer_ext.hub.teacher_cache import FINGERPRINT_FILE, push_cache, refuse_part_of_cache
from hf_transfer_ext.reading import one_line, parse_json, read_text
from hf_transfer_ext.weights.repository import MODEL_FILES, Place, connection_error, local_folder, place_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

#: Files that a result consists of where another writer made the folder. Whatever else lies there is sent only by name.
RESULT_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "*preprocessor_config.json", "processor_config.json",
    "mergekit_config.yml", "mergekit_moe_config.yml", "vocabulary_map.json", "residuals.json", "transfer.json",
    "transfer_seeds.json", "discriminator/adapter_config.json", "discriminator/*.safetensors",
)  # fmt: skip
#: Files by which libraries choose what to load. Those of an earlier content of the repository would be loaded in the
#: place of what is pushed, so they are removed whoever wrote them; the repository's history keeps them.
DECIDE_WHAT_IS_LOADED = (
    "model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model*.bin.index.json", "adapter_model*.bin", "tf_model.h5", "flax_model.msgpack", "config.json",
    "adapter_config.json",
)  # fmt: skip
#: Files in which libraries write the path that a model was loaded from, and the keys they use.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
PATH_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path", "vocab_file", "tokenizer_file")
#: How often a push starts again because somebody else committed in the meantime.
_ATTEMPTS = 40
#: Jobs whose result is a report without weights.
REPORTS = ("audit", "evaluation", "quickstart")
#: Results in subfolders that the card of a repository lists.
MAX_LISTED = 200


def save_result(
    folder: str | Path,
    *,
    model: PreTrainedModel | Any = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    record: RunRecord,
    overwrite: bool = False,
    extra_files: Mapping[str, str | Path] | None = None,
    digests: Mapping[str, str] | None = None,
    **card_options: Any,
) -> Path:
    """Write a result atomically: safetensors, tokenizer, generation config, card and record.

    With `model`, everything is written aside and renamed to `folder`. A `PeftModel` gives the adapter alone, with our
    card in place of PEFT's. Without `model`, card and record are added to `folder`, in which another writer (a merge,
    `Trainer.save_model`) has just put the weights. Call it on the main process only.

    Args:
        tokenizer: Of the model, or its processor of texts and images.
        overwrite: Replace `folder` if it holds a result already (without `model`: if it holds a record already).
        extra_files: Name in the folder -> file to copy there (plots, token maps).
        digests: Name -> hex SHA-256 of files in `folder` that were hashed as they were written; they are not read
            again.
        card_options: Passed to `model_card` (`title`, `relation`, `tags`).

    Raises:
        FileExistsError: `folder` holds a result and `overwrite` is False.
        FileNotFoundError: Without `model`: there are no weights in `folder`. Or an extra file is missing.
    """
    extras = {name: Path(source) for name, source in (extra_files or {}).items()}
    for name, source in extras.items():
        path_inside(folder, name)
        if not source.is_file():
            raise FileNotFoundError(
                f"The extra file {name!r} is to be copied from {str(source)!r}, which is not a file."
            )
    card_options.setdefault("earlier", earlier_card(Path(folder)))
    if model is None:
        return _complete(Path(folder), tokenizer, record, overwrite, extras, card_options, digests or {})
    refuse_existing_output(folder, overwrite=overwrite, inputs=extras.values(), also=extras)
    adapter = hasattr(model, "peft_config")
    weights = model.parameters() if not adapter else (p for n, p in model.named_parameters() if "lora_" in n)
    require_free_space(folder, sum(p.numel() * p.element_size() for p in weights))
    with written_aside(folder, overwrite=overwrite, inputs=extras.values(), also=extras) as aside:
        model.save_pretrained(str(aside))
        _complete(aside, tokenizer, record, True, extras, card_options, {})
    return Path(folder)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    include: Sequence[str] = (),
) -> str:
    """Publish a folder of `save_result` in one commit that makes the repository what the folder is.

    Sent are the files of the result, as its record lists them, card and record, and what `include` names; nothing
    else that lies in the folder, and no link. Files of an earlier result that the new one lacks are removed in the
    same commit, so that nobody loads old weights under a new card. Other people's files in the repository stay, and
    are named in a warning; so does what a user wrote into the card there, around its generated part. A teacher cache
    goes to a data set repository (`push_cache`). Local paths that libraries wrote into the configs (an adapter's base)
    are replaced in what is sent: by the base's Hub id if the record knows it, else by the last component; the folder
    is not changed. A connection that drops is tried again; large files that have arrived are not sent twice.

    Args:
        repo_id: `repo[@branch][:subfolder]`. In a subfolder, a result stands beside those of other jobs; the card of
            the repository itself then lists them.
        private: For a new repository; None takes the account's default, and makes a teacher cache private.
        revision: Branch, created if it does not exist, or an open pull request (`refs/pr/N`); None is the main branch.
        create_pr: Open a pull request with the commit instead of changing the branch.
        token: Access token; None takes the one of `hf auth login` or of HF_TOKEN.
        include: Further files to send, by name or pattern below `folder` ("notes.md", "figures/*.png").

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FileNotFoundError: `folder` has no card, no record or no weights, or lacks a file of its result.
        PermissionError: No login, a token that is refused, or no right to write there.
        ValueError: A file to be sent holds a secret, is a link, or has changed since the result was saved.
        ConnectionError: The Hub fails, or others keep committing to the repository.
    """
    from huggingface_hub import HfApi

    folder, place = Path(folder), place_of(repo_id, revision)
    if (folder / FINGERPRINT_FILE).is_file():
        refuse_part_of_cache(place, create_pr=create_pr, include=include)
        return push_cache(folder, repo_id, private=private is not False, token=token, commit_message=commit_message)
    for needed in (CARD_FILE, RECORD_FILE):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {needed}, and a result is not published without one. "
                "Write the folder with `save_result`, or add card and record with `save_result(folder, record=...)`."
            )
    record = read_record(folder)
    if record.job not in REPORTS:
        _require_weights(folder)
    if create_pr and place.revision not in (None, "main"):
        raise ValueError(f"A pull request goes to the main branch, not to {place.revision!r}: leave the branch out.")
    if is_built_with_llama(record) and not place.path.rpartition("/")[2].lower().startswith("llama"):
        logger.warning(
            "A parent of this model is under a Llama license, which from Llama 3 on asks for a name that begins with "
            "'Llama'; %r does not.", place.path,
        )  # fmt: skip
    api = HfApi(token=token)
    with clear_errors(place.path, f"{place.path!r} was not changed."):
        place, exists = checked(api, place, create_pr=create_pr)
        content = _content(folder, record, place, include)
        branch = place.revision or "main"
        if not exists:
            create(api, place, private=private)
        if branch != "main" and not branch.startswith("refs/pr/"):
            again(lambda: api.create_branch(place.path, branch=branch, exist_ok=True))
        message = commit_message or f"Add the result of a {record.job} run"
        return str(again(lambda: _commit(api, place, content, message, create_pr)))


def pull(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a published result: a snapshot in the Hub cache, safetensors and text files only.

    Files are checked against the digests in the record. Those that arrived as others (a proxy that gives an old file
    under a new name, a damaged cache) are fetched once more.

    Raises:
        FileNotFoundError: There is no such repository.
        ValueError: A file is not the one whose digest the record states, is missing, or would be loaded without
            being part of the result.
    """
    folder: Path = again(lambda: local_folder(repo_id, revision=revision))
    if not (folder / RECORD_FILE).is_file():
        logger.warning("%r has no %s, so its files cannot be verified.", repo_id, RECORD_FILE)
        return folder
    stated = read_record(folder).result
    if not stated:
        logger.warning("The record of %r states no digests of its files, so they cannot be verified.", repo_id)
        return folder
    wrong = _other_than_stated(folder, stated)
    if wrong and not Path(repo_id).exists():
        _fetch_again(place_of(repo_id, revision), folder, [name for name in wrong if name in stated])
        wrong = _other_than_stated(folder, stated)
    if wrong:
        raise ValueError(
            f"The files of {repo_id!r} are not those of its record: {', '.join(wrong)}. They were changed or "
            "added after the result was published, or arrived damaged. Delete them from the cache and pull again, or "
            "choose a `revision` of which the record is true."
        )
    return folder


def _other_than_stated(folder: Path, stated: Mapping[str, str]) -> list[str]:
    """Files with another digest than the record states, that are missing, or would be loaded without being in it."""
    fetched = [name for name in stated if _fits(name, MODEL_FILES)]
    present = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    wrong = [n for n in fetched if n not in present or sha256_of(path_inside_cache(folder, n)) != stated[n]]
    wrong += [name for name in present if _fits(name, DECIDE_WHAT_IS_LOADED) and name not in stated]
    return sorted(wrong)


def _fetch_again(place: Place, folder: Path, names: Sequence[str]) -> None:
    """Download files of a snapshot again, whatever the cache holds; without a connection they are missing then."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    commit = next((part for part in reversed(folder.parts) if re.fullmatch("[0-9a-f]{40}", part)), place.revision)
    for name in names:
        logger.warning("%s of %s is not the file that its record states. Fetching it again.", name, place)
        path_inside_cache(folder, name).unlink(missing_ok=True)  # the client leaves a link to another file as it is
        try:
            again(partial(hf_hub_download, place.path, place.inside(name), revision=commit, force_download=True))
        except (HfHubHTTPError, OSError, connection_error()) as error:
            logger.warning("%s was not fetched again: %s", name, one_line(error))


def path_inside_cache(folder: Path, name: str) -> Path:
    """A file of a snapshot by a name out of its record; files of the Hub cache are links out of their folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"The record names the file {name!r}, which leads out of its folder; refused.")
    return folder / name


def _commit(
    api: HfApi, place: Place, content: Mapping[str, Path | bytes], message: str, create_pr: bool = False
) -> str:
    """One commit on top of what was looked at; where somebody committed in between, it starts again."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, branch, prefix = place.path, place.revision or "main", place.inside("")
    for attempt in range(_ATTEMPTS):
        info = api.model_info(repo_id, revision=branch)
        everything = {sibling.rfilename for sibling in info.siblings or []}
        present = {name.removeprefix(prefix) for name in everything if name.startswith(prefix)}
        sent = {prefix + name: data for name, data in content.items()}
        if CARD_FILE in present:
            sent[prefix + CARD_FILE] = _with_text_there(api, place, str(info.sha), content[CARD_FILE])
        if prefix:
            listing = _listing(api, repo_id, str(info.sha), everything, {place.subfolder: content[RECORD_FILE]})
            sent |= {} if listing is None else {CARD_FILE: listing.encode()}
        present -= set(content)
        earlier = _earlier_result(api, place, str(info.sha), everything)
        removed = {name for name in present if name in earlier or _fits(name, DECIDE_WHAT_IS_LOADED)}
        kept = sorted(present - removed - {".gitattributes"})
        if attempt == 0 and removed:
            logger.warning("Removed from %s in this commit: %s.", repo_id, ", ".join(sorted(removed)))
        if attempt == 0 and kept:
            logger.warning("Files in %s that no result of ours wrote stay there: %s.", repo_id, ", ".join(kept))
        operations: list[Any] = [CommitOperationDelete(path_in_repo=prefix + name) for name in sorted(removed)]
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
            for name, data in sent.items()
        ]
        try:
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=branch, parent_commit=info.sha,
                create_pr=create_pr or None,
            )  # fmt: skip
            return str(commit.pr_url or commit.commit_url)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in (409, 412):
                raise
            time.sleep(random.uniform(0.05, 0.2) * min(attempt + 1, 10))
    raise ConnectionError(f"{repo_id!r} was not changed: others committed {_ATTEMPTS} times in between. Push again.")


def _with_text_there(api: HfApi, place: Place, commit: str, card: Path | bytes) -> bytes:
    """Our card, with what a user wrote into the one in the repository, unless the folder's own has such text."""
    ours = card.decode() if isinstance(card, bytes) else read_text(card)
    if own_text(ours):
        return ours.encode()
    try:
        there = read_text(api.hf_hub_download(place.path, place.inside(CARD_FILE), revision=commit))
    except ValueError as error:
        logger.warning("The card in %s is replaced: %s", place.path, error)
        return ours.encode()
    return with_own_text(ours, there).encode()


def _listing(api: HfApi, repo_id: str, commit: str, present: set[str], new: Mapping[str, Path | bytes]) -> str | None:
    """The card of a repository with results in subfolders; None where its card is somebody's own, or a result's."""
    there = ""
    if RECORD_FILE in present:
        return None
    if CARD_FILE in present:
        try:
            there = read_text(api.hf_hub_download(repo_id, CARD_FILE, revision=commit))
        except ValueError:
            return None
        if there.strip() and not is_generated(there):
            return None
    folders = sorted(name.removesuffix(f"/{RECORD_FILE}") for name in present if name.endswith(f"/{RECORD_FILE}"))
    records: dict[str, RunRecord] = {}
    for folder in sorted({*folders, *new})[:MAX_LISTED]:
        try:
            if folder in new:
                data = new[folder]
                text = data.decode() if isinstance(data, bytes) else read_text(data)
                records[folder] = RunRecord.from_dict(parse_json(text, folder))
            else:
                records[folder] = read_record(f"{repo_id}@{commit}:{folder}")
        except (ValueError, OSError) as error:
            logger.warning("%r is not listed in the card of %s: %s", folder, repo_id, one_line(error))
    return with_own_text(listing_card(repo_id, records), there)


def _earlier_result(api: HfApi, place: Place, commit: str, present: set[str]) -> set[str]:
    """Files in a repository, or its subfolder, that an earlier push of a result wrote, by its record there."""
    if place.inside(RECORD_FILE) not in present:
        return set()
    path = api.hf_hub_download(place.path, place.inside(RECORD_FILE), revision=commit)
    try:
        record = read_record(Path(path).parent)
    except ValueError as error:
        logger.warning("%s Its files are not known.", error)
        return {RECORD_FILE, CARD_FILE}
    inside = {name.removeprefix(place.inside("")) for name in present if name.startswith(place.inside(""))}
    listed = set(record.result) or {name for name in inside if _fits(name, RESULT_PATTERNS)}
    return {RECORD_FILE, CARD_FILE, *listed}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") <= pattern.count("/") for pattern in patterns)


def _complete(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    record: RunRecord,
    overwrite: bool,
    extras: Mapping[str, Path],
    card_options: Mapping[str, Any],
    digests: Mapping[str, str],
) -> Path:
    """Add tokenizer, extra files, card and record to a folder that holds weights; the record comes last."""
    _require_weights(folder)
    if (folder / RECORD_FILE).exists() and not overwrite:
        raise FileExistsError(f"{str(folder)!r} holds a record already. Pass overwrite=True to replace it.")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for name, source in extras.items():
        target = path_inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    chat = (folder / "chat_template.jinja").exists()
    results = eval_results_yaml(record)
    (folder / EVAL_RESULTS_FILE).unlink(missing_ok=True)  # of an earlier result
    if results:
        write_text(folder / EVAL_RESULTS_FILE, results)
    known = {name for name in record.result if name != EVAL_RESULTS_FILE and path_inside(folder, name).is_file()}
    own = {*_result_files(folder), *known, *extras, *([EVAL_RESULTS_FILE] if results else [])} - {
        CARD_FILE,
        RECORD_FILE,
    }
    record.result = {name: digests.get(name) or sha256_of(folder / name) for name in sorted(own)}
    options = {"plots": [name for name in sorted(own) if name.endswith(".png")], **card_options}
    if record.job == "export":
        options["gguf"] = next((name for name in sorted(own) if name.endswith(".gguf")), None)
    servers = _servers(folder) if adapter else []
    write_text(folder / CARD_FILE, str(model_card(record, adapter=adapter, chat=chat, servers=servers, **options)))
    record.write(folder)
    return folder


def holds_weights(folder: Path) -> bool:
    """Whether a folder has tensors of a model or an adapter; the rows of a teacher cache are none."""
    found = any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    return found and not (folder / FINGERPRINT_FILE).is_file()


def earlier_card(folder: Path) -> str:
    """The card that is in a folder, for what its user wrote there; "" if there is none that can be read."""
    try:
        return read_text(folder / CARD_FILE)
    except FileNotFoundError:
        return ""
    except (ValueError, OSError) as error:
        logger.warning("%s The card is written anew.", error)
        return ""


def _servers(folder: Path) -> list[Server]:
    """Which servers load an adapter; nothing is said of one that cannot be read."""
    try:
        return servable_by(folder)
    except (ValueError, OSError) as error:
        logger.warning("Which servers load %r is not known: %s", folder.name, error)
        return []


def _require_weights(folder: Path) -> None:
    if not holds_weights(folder):
        raise FileNotFoundError(
            f"{str(folder)!r} holds no safetensors or GGUF weights. Save a model there first, or pass it as `model=`."
        )


def _result_files(folder: Path) -> list[str]:
    """Files of a model, tokenizer or adapter in a folder, by their names; links are not followed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [name for path in files if _fits(name := path.relative_to(folder).as_posix(), RESULT_PATTERNS)]


def _content(folder: Path, record: RunRecord, place: Place, include: Sequence[str]) -> dict[str, Path | bytes]:
    """Name in the repository -> file or bytes, for all that is published; secrets, links and changes are refused."""
    result = record.result or {name: "" for name in _result_files(folder)}
    named = {p.relative_to(folder).as_posix() for pattern in include for p in folder.glob(pattern) if not p.is_dir()}
    for pattern in include:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            raise FileNotFoundError(f"`include` names {pattern!r}, and there is no such file in {str(folder)!r}.")
    content: dict[str, Path | bytes] = {}
    for name in sorted({CARD_FILE, RECORD_FILE, *result, *named}):
        path = path_inside(folder, name)
        if any((folder / part).is_symlink() for part in (name, *map(str, Path(name).parents)) if part != "."):
            raise ValueError(f"{name!r} in {str(folder)!r} is a link, and links are not published. Put a copy there.")
        if not path.is_file():
            raise FileNotFoundError(f"{name!r}, a file of the result, is missing in {str(folder)!r}. Save it again.")
        if result.get(name) and sha256_of(path) != result[name]:
            raise ValueError(
                f"{name!r} in {str(folder)!r} has changed since the result was saved. If that was meant, record it "
                "with `save_result(folder, record=read_record(folder), overwrite=True)`."
            )
        content[name] = path
    left = sorted({p.relative_to(folder).parts[0] for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
                  - {Path(name).parts[0] for name in content})  # fmt: skip
    if left:
        logger.warning("Not part of the result, so not published: %s. Name them in `include` to send them.", left)
    card = read_text(folder / CARD_FILE)
    if place.subfolder:
        card = card.replace(f'"{THIS_MODEL}"', f'"{place.path}", subfolder="{place.subfolder}"')
    card = card.replace(THIS_MODEL, place.path)
    content[CARD_FILE] = card.encode()
    bases = base_models(record, direct="adapter_config.json" in content)
    changed = {}
    for name in sorted(content):
        if Path(name).name in _CONFIGS:
            text = read_text(folder / name)
            public = _without_local_paths(text, bases[0] if len(bases) == 1 else None)
            if public != text:
                content[name] = changed[name] = public.encode()
    if changed and record.result:
        record.result |= {name: hashlib.sha256(data).hexdigest() for name, data in changed.items()}
        content[RECORD_FILE] = record.text().encode()
    if "adapter_config.json" in content and not bases:
        logger.warning("The adapter's base is only a local folder; users will have to name it when they load.")
    for name, data in content.items():
        found = find_secret(data.decode()) if isinstance(data, bytes) else find_secret_in_file(data)
        if found is not None:
            raise ValueError(
                f"{name!r} in {str(folder)!r} holds an access token or another secret ({found}). Delete it there, and "
                "revoke it if anybody else could read it."
            )
    return content


def _without_local_paths(config_json: str, base: str | None) -> str:
    """A config file's text with local paths under the known keys replaced; all else stays as it is."""
    config = parse_json(config_json, "a config file", kind=None)
    changed = False
    for key in PATH_KEYS:
        value = config.get(key) if isinstance(config, dict) else None
        if isinstance(value, str) and (
            is_absolute_path(value) or re.match(r"\.{1,2}[/\\]", value) or _is_folder(value)
        ):
            config[key] = base if base and not key.endswith("_file") else last_component(value)
            changed = True
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n" if changed else config_json


def _is_folder(value: str) -> bool:
    return bool(value) and os.path.isdir(value)
