"""Where the public TOFU data lies, for tests against published numbers; it is no part of this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tofu_folder() -> Path:
    """The folder `tofu`, or a skip with the reason."""
    named = os.environ.get("HF_TRANSFER_EXT_DATA")
    for root in [Path(named)] if named else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]:
        if (root / "tofu").is_dir():
            return root / "tofu"
    pytest.skip("the public TOFU data is not here; set HF_TRANSFER_EXT_DATA to a folder that holds tofu/")


def reference_log(model: str) -> dict:
    """Per-example log of Phi-1.5 fine-tuned on "full" or "retain90"."""
    path = tofu_folder() / "reference_logs" / f"phi_{model}_wd0.01_eval_log_aggregated.json"
    return json.loads(path.read_text(encoding="utf-8"))
