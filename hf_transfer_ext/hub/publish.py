"""Save a result with its card and record, push it to the Hub, and pull one back."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.files import path_inside, refuse_existing_output, require_free_space, write_text, written_aside
from hf_transfer_ext.hub.card import CARD_FILE, THIS_MODEL, base_models, model_card
from hf_transfer_ext.hub.privacy import holds_token, is_absolute_path, last_component
from hf_transfer_ext.hub.record import RECORD_FILE, RunRecord, read_record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Never pushed: pickles (training arguments hold local paths and may hold a token), checkpoints, logs, hidden files.
NOT_PUBLISHED = (
    "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "checkpoint-*", "runs", "logs", "wandb", "__pycache__",
    ".*", "trainer_state.json",
)  # fmt: skip
#: Files of a model folder in which libraries write the path that a model was loaded from, and the keys they use.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
_PATH_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path", "vocab_file", "tokenizer_file")
#: Files that are searched for access tokens before anything is sent.
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".toml", ".cfg", ".py", ".sh", ".log")


def save_result(
    folder: str | Path,
    *,
    model: PreTrainedModel | Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: RunRecord,
    overwrite: bool = False,
    extra_files: Mapping[str, str | Path] | None = None,
    **card_options: Any,
) -> Path:
    """Write a result that is whole or absent: safetensors, tokenizer, generation config, card and record.

    With `model`, everything is written aside and renamed to `folder`. A `PeftModel` gives the adapter alone, with our
    card in place of PEFT's. Without `model`, card and record are added to `folder`, in which another writer (a merge,
    `Trainer.save_model`) has just put the weights. Call it on the main process only.

    Args:
        overwrite: Replace `folder` if it holds a result already (without `model`: if it holds a record already).
        extra_files: Name in the folder -> file to copy there (plots, token maps).
        card_options: Passed to `model_card` (`title`, `relation`, `tags`).

    Raises:
        FileExistsError: `folder` holds a result and `overwrite` is False.
        FileNotFoundError: Without `model`: there are no weights in `folder`. Or an extra file is missing.
    """
    extras = {name: Path(source) for name, source in (extra_files or {}).items()}
    for name, source in extras.items():
        path_inside(folder, name)
        if not source.is_file():
            raise FileNotFoundError(f"The extra file {name!r} is to be copied from {str(source)!r}, which is no file.")
    if model is None:
        return _complete(Path(folder), tokenizer, record, overwrite, extras, card_options)
    refuse_existing_output(folder, overwrite=overwrite, inputs=extras.values(), also=extras)
    adapter = hasattr(model, "peft_config")
    weights = model.parameters() if not adapter else (p for n, p in model.named_parameters() if "lora_" in n)
    require_free_space(folder, sum(p.numel() * p.element_size() for p in weights))
    with written_aside(folder, overwrite=overwrite, inputs=extras.values(), also=extras) as aside:
        model.save_pretrained(str(aside))
        _complete(aside, tokenizer, record, True, extras, card_options)
    return Path(folder)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish a folder of `save_result`; returns the address of the (last) commit.

    A folder of up to some 250 files is one commit; the client splits larger ones.

    The repository is made if it is not there, and so is the branch `revision`. Pickles, checkpoints, logs and hidden
    files stay here. Local paths that libraries wrote into the configs (an adapter's base) are replaced in what is
    sent: by the base's Hub id if the record knows it, else by the last component; the folder itself is not changed.

    Args:
        private: For a new repository; None takes the account's default.
        token: Access token; None takes the one of `hf auth login` or of HF_TOKEN.

    Raises:
        FileNotFoundError: `folder` has no card, no record or no weights.
        PermissionError: No login, a token that is refused, or no right to write there.
        ValueError: A text file in `folder` holds an access token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    folder = Path(folder)
    for needed in (CARD_FILE, RECORD_FILE):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {needed}, and a result is not published without one. "
                "Write the folder with `save_result`, or add card and record with `save_result(folder, record=...)`."
            )
    _require_weights(folder)
    record = read_record(folder)
    api = HfApi(token=token)
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        with _publishable(folder, record, repo_id) as staged:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=str(revision), exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                commit_message=commit_message or f"Add the result of a {record.job} run",
            )
    except LocalTokenNotFoundError as error:
        raise PermissionError(_log_in(repo_id)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(f"{_log_in(repo_id)} The Hub answered {status}.") from error
        raise
    return str(commit.commit_url)


def pull(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a published result: a snapshot in the Hub cache, safetensors and text files only."""
    from hf_transfer_ext.weights.repository import local_folder

    return local_folder(repo_id, revision=revision)


def _complete(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    record: RunRecord,
    overwrite: bool,
    extras: Mapping[str, Path],
    card_options: Mapping[str, Any],
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
    write_text(folder / CARD_FILE, str(model_card(record, adapter=adapter, chat=chat, **card_options)))
    record.write(folder)
    return folder


def _require_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{str(folder)!r} holds no safetensors weights. Save a model there first, or pass it as `model=`."
        )


@contextmanager
def _publishable(folder: Path, record: RunRecord, repo_id: str) -> Iterator[Path]:
    """A folder of links to what may be published, with own copies of the files that name local paths."""
    with tempfile.TemporaryDirectory(prefix="publish-") as made:
        staged = Path(made)
        ignore = shutil.ignore_patterns(*NOT_PUBLISHED)
        shutil.copytree(folder, staged, ignore=ignore, copy_function=_link, dirs_exist_ok=True)
        card = (folder / CARD_FILE).read_text(encoding="utf-8").replace(THIS_MODEL, repo_id)
        _replace(staged / CARD_FILE, card)
        bases = base_models(record, direct=True)
        for name in _CONFIGS:
            if (staged / name).is_file():
                text = (staged / name).read_text(encoding="utf-8")
                mended = _without_local_paths(text, bases[0] if len(bases) == 1 else None)
                if mended != text:
                    _replace(staged / name, mended)
        if (staged / "adapter_config.json").is_file() and not bases:
            logger.warning("The adapter's base is only a local folder; users will have to name it when they load.")
        for path in sorted(staged.rglob("*")):
            readable = path.suffix in _TEXTS and path.is_file() and path.stat().st_size < 5_000_000
            if readable and holds_token(path.read_text(encoding="utf-8", errors="replace")):
                raise ValueError(
                    f"{path.relative_to(staged).as_posix()!r} in {str(folder)!r} holds an access token. Delete it "
                    "there, and revoke the token if anybody else could read it."
                )
        yield staged


def _without_local_paths(config_json: str, base: str | None) -> str:
    """A config file's text with local paths under the known keys replaced; all else stays as it is."""
    config = json.loads(config_json)
    changed = False
    for key in _PATH_KEYS:
        value = config.get(key) if isinstance(config, dict) else None
        if isinstance(value, str) and (
            is_absolute_path(value) or re.match(r"\.{1,2}[/\\]", value) or _is_folder(value)
        ):
            config[key] = base if base and not key.endswith("_file") else last_component(value)
            changed = True
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n" if changed else config_json


def _is_folder(value: str) -> bool:
    return bool(value) and os.path.isdir(value)


def _replace(link: Path, text: str) -> None:
    link.unlink()
    link.write_text(text, encoding="utf-8")


def _link(source: str, target: str) -> None:
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(source, target)


def _log_in(repo_id: str) -> str:
    return (
        f"Writing to the Hub repository {repo_id!r} needs a token that may write there. Run `hf auth login`, set "
        "HF_TOKEN, or pass `token=`; for a repository of an organisation, check your role in it."
    )
