"""The files that accompany merged weights: config, tokenizer, and the configuration of the merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.privacy import public_text
from hf_transfer_ext.merging.planning.companions import companion_files
from hf_transfer_ext.reading import parse_yaml
from hf_transfer_ext.weights.opened import InputModel

#: File name of the merge configuration in the result, as recognized by the Hub.
CONFIG_FILE = "mergekit_config.yml"


def write_companions(folder: Path, donor: InputModel, config: Mapping[str, Any], text: str) -> None:
    """Write config.json and the configuration of the merge, and copy the donor's other files.

    Args:
        donor: The model that provides tokenizer and generation config.
        config: Content of config.json.
        text: The configuration of the merge (`public_yaml`).
    """
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / CONFIG_FILE, text)
    copy_companions(donor.folder, folder, config)


def copy_companions(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy the files that a model with this config needs in addition to its weights: tokenizer, processor, code."""
    for name in companion_files(source, config):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def public_yaml(config: Mapping[str, Any] | str | Path) -> str:
    """The configuration as written to the result: verbatim, unless it contains paths of this machine."""
    text = None if isinstance(config, Mapping) else Path(config).read_text(encoding="utf-8")
    content = dict(config) if isinstance(config, Mapping) else parse_yaml(text or "", repr(str(config)))
    public = _without_local_paths(content)
    return text if text is not None and public == content else yaml.safe_dump(public, sort_keys=False)


def _without_local_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_local_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(one) for one in value]
    return public_text(str(value)) if isinstance(value, (str, Path)) else value
