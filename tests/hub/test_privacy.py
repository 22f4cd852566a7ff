import dataclasses
import enum
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_transfer_ext.hub.privacy import is_secret_name, public_text, public_value

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/someone/models/student", "student"),
        ("~/models/student/", "student"),
        ("file:///home/someone/data.jsonl", "data.jsonl"),
        ("C:\\Users\\someone\\student", "student"),
        ("/home/someone/my models/the student", "the student"),
        ("read /home/someone/data.jsonl twice", "read data.jsonl twice"),
        ("PATH=/usr/bin:/home/someone/bin", "PATH=bin:bin"),
        ("--out=/home/someone/out", "--out=out"),
        (f"pushed with {TOKEN}.", "pushed with [removed]."),
        ("https://someone:secret@host.org/a/b", "https://host.org/a/b"),
        (str(Path.home()), "~"),
    ],
)
def test_folders_tokens_and_logins_are_cut(text, public):
    assert public_text(text) == public


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M",
        "https://arxiv.org/abs/2306.08543",
        "s3://bucket/some/key",
        "data/train.jsonl",
        "./out/student",
        "/no_think",
        "true and/or false, 3/4 of it",
        "<s>[INST] question [/INST]</s>",
        "model.layers.0.self_attn.q_proj",
        "hf_transfer_ext",
    ],
)
def test_other_text_stays(text):
    assert public_text(text) == text


@pytest.mark.parametrize("name", ["token", "hub_token", "push_to_hub_token", "HF_TOKEN", "openai_api_key", "password"])
def test_secret_names(name):
    assert is_secret_name(name) and public_value({name: "x", "kept": 1}) == {"kept": 1}


@pytest.mark.parametrize("name", ["eos_token", "max_new_tokens", "tokenizer", "token_loss", "secretary"])
def test_names_that_only_look_secret(name):
    assert not is_secret_name(name)


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Settings:
    out: Path
    hub_token: str
    mode: Mode
    dtype: torch.dtype
    modules: set
    rate: float
    loss: object
    collator: object


def test_any_config_becomes_plain_json():
    settings = Settings(
        Path("/home/someone/out"), "x", Mode.FAST, torch.bfloat16, {"v", "q"}, float("nan"), np.float32(0.5), object()
    )
    plain = public_value({"settings": settings, 3: (1, None, True), "function": public_text})
    assert plain == {
        "settings": {
            "out": "out",
            "mode": "fast",
            "dtype": "bfloat16",
            "modules": ["q", "v"],
            "rate": "nan",
            "loss": 0.5,
            "collator": "object",
        },
        "3": [1, None, True],
        "function": "public_text",
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert public_value(plain) == plain
