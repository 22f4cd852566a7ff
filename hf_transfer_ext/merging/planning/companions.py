"""Which files of a model folder belong to the model in addition to its weights and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Files of tokenizers, processors, generation, chat and sentence-transformers, wherever they come from.
COMPANION_NAMES = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "feature_extractor_config.json",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "modules.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "source.spm",
    "target.spm",
}

#: Endings of tokenizer files whose names are free.
_ENDINGS = (".tiktoken", ".model", ".spm")


def companion_files(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The files that a result needs beside weights and config.json, as paths relative to the folder.

    Own code of the repository is among them if `auto_map` names it, with the modules of the folder that it may import;
    it is copied, never run. Links count as what they point to, but nothing outside of the folder's own tree is named.
    """
    found = [path.name for path in folder.iterdir() if path.is_file() and _is_companion(path.name)]
    if config.get("auto_map") or _tokenizer_has_code(folder):
        found += [path.name for path in folder.glob("*.py") if path.is_file()]
    templates = folder / "additional_chat_templates"
    if templates.is_dir() and not templates.is_symlink():
        found += [f"{templates.name}/{path.name}" for path in templates.glob("*.jinja") if path.is_file()]
    if (folder / "modules.json").is_file():  # sentence-transformers keeps each module's config in a folder
        for part in folder.iterdir():
            if part.is_dir() and not part.is_symlink() and part.name[:1].isdigit():
                found += [f"{part.name}/{path.name}" for path in part.iterdir() if path.is_file()]
    return sorted(found)


def _is_companion(name: str) -> bool:
    return name in COMPANION_NAMES or name.endswith(_ENDINGS)


def _tokenizer_has_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and b'"auto_map"' in path.read_bytes()
