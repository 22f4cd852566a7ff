import dataclasses
import enum
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_transfer_ext.hub.privacy import find_secret, find_secret_in_file, is_secret_name, public_text, public_value

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


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "Q" * 34, "x_hf_" + "a1" * 17, "hf_oauth_" + "a" * 30, "api_org_" + "Z" * 34, "sk-" + "a1B2" * 12,
        "sk-ant-api03-" + "a1_-" * 10, "sk-proj-" + "a1B2" * 10, "ghp_" + "a1" * 18, "github_pat_" + "a1_" * 20,
        "glpat-" + "a1" * 10, "AKIA" + "ABCD2345" * 2, "ASIA" + "ABCD2345" * 2, "AIza" + "a1B2c" * 7,
        "xoxb-1234567890-abcdef", JWT, PEM, PEM.replace("\n", "\\n"), "Bearer abcdef0123456789xyz", "npm_" + "a1" * 18,
        "sk_live_" + "a1" * 10, "gsk_" + "a1" * 26, "nvapi-" + "a1_-" * 16, "123456789:AA" + "a1B" * 11,
        "https://host/x?access_key=abc123", "https://host/x?a=b&token=abc123", "https://someone:pa55@host/x",
        'password = "hunter22"', '{"passphrase": "correct horse battery"}', "export API_KEY=abc123def",
        "PASSWORD=hunter2x",
        '"aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzz1"', 'password = \\"hunter22\\"',
        "machine api.wandb.ai login user password 0123456789abcdef",
        "https://hooks.slack.com/services/T00000000/B00000000/abcdefghijkl",
    ],
)  # fmt: skip
def test_forms_of_secrets(tmp_path, secret):
    assert find_secret(f"before {secret} after") or find_secret(f"before\n{secret}\nafter")
    assert find_secret(public_text(secret)) is None
    content = f"text {'.' * 30}\n{secret}\n"
    for encoding in ("utf-8", "utf-16", "utf-16-be", "utf-32-le"):
        (tmp_path / "file").write_bytes(("line\n" * 10_000 + content).encode(encoding))
        assert find_secret_in_file(tmp_path / "file"), encoding


@pytest.mark.parametrize(
    "text",
    [
        '{"eos_token": "<|endoftext|>", "pad_token": "</s>", "max_new_tokens": 20}', 
        '{"password": 1234, "token": 77}',
        '{"model.layers.0.self_attn.k_proj.weight": "model-00001-of-00002.safetensors"}', "d" * 64,
        "0123456789abcdef" * 4,
        "scikit sk-learn-compatible-estimators-and-more", "hf_transfer_ext hf_hub_download", "eyJ is not a token",
        "Log in with `hf auth login`, or set HF_TOKEN.", 'token="hf_..."', 'api_key="YOUR_API_KEY"',
        "?token=<your token>",
        'load(password=os.environ["PASSWORD"])', "password: str = field(default=None)",
        "The secret: everything is fine.",
        "AKIA", "-----BEGIN PUBLIC KEY-----", "https://host.org/a?page=2&sort_key=name",
        "basic understanding of things",
        '"storage_key": "cond_frame_outputs"',
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret(text):
    assert find_secret(text) is None


def test_a_secret_is_found_wherever_it_stands_in_a_file(tmp_path):
    for at in (0, 4_194_300, 4_194_304, 9_000_000):
        (tmp_path / "big").write_bytes(b"x " * (at // 2) + TOKEN.encode() + b" x" * 1000)
        assert find_secret_in_file(tmp_path / "big") == "Hugging Face token"
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"note": TOKEN})
    save_file({"w": torch.frombuffer(bytearray(TOKEN.encode()), dtype=torch.uint8)}, tmp_path / "b.safetensors")
    assert find_secret_in_file(tmp_path / "a.safetensors") and not find_secret_in_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see /home/someone/my docs/the plan/x.txt", "see x.txt"),
        ("/home/someone", "~"), ("~someone/data/x", "x"), ("~someone", "~"),
        ("in ~someone/data/x now", "in x now"),
        ("../project/model", "model"), ("./out/student", "student"),
        ("read ../../project/x.json now", "read x.json now"),
        ("-I/home/someone/include", "-Iinclude"), ("ssh://someone@host/home/someone/x", "x"),
        ("someone@host:/home/someone/x", "x"), ("C:\\Users\\Some One\\my data\\x.txt", "x.txt"),
        ("C:\\Users\\someone", "~"),
        ("https://h/x?access_key=abc&b=1", "https://h/x?access_key=[removed]&b=1"),
        ("~100 tokens in ~5 minutes", "~100 tokens in ~5 minutes"), ("a / b and c / d", "a / b and c / d"),
        ("https://host.org/home/page/x", "https://host.org/home/page/x"),
    ],
)  # fmt: skip
def test_persons_and_projects_do_not_stay_in_paths(text, public):
    assert public_text(text) == public
    assert public_text(public) == public
