"""What may leave this machine: plain JSON values without secrets, and paths without the folders above them."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

#: Written in the place of a secret that stood inside a longer text.
REMOVED = "[removed]"

#: A setting of this name, or of one that ends in it, is dropped. `eos_token` or `max_new_tokens` are not secrets.
_SECRET_NAME = re.compile(
    r"^token$|(?:^|_)(?:(?:hub|hf|huggingface|auth|access|api|bearer|session|refresh|oauth|jwt|security|personal|deploy"
    r"|service|github|gh|gitlab|slack|discord|telegram|bot|npm|pypi|wandb|comet|replicate|openai|anthropic|azure|aws)"
    r"_token|passwords?|passwd|pwd|passphrase|secrets?|credentials?|apikey|accesskey|secretkey|authorization|bearer"
    r"|cookie|netrc|(?:api|access|secret|private|wandb|comet|neptune|openai|anthropic|hf|hub|aws|azure|gcp|google"
    r"|account|storage|encryption|signing|ssh|auth|service|client|license|subscription|master|deploy)_key(?:_id)?)$"
)

#: (what it is, texts of which one stands in every such secret, its form). A table of documented forms and not a
#: library: scanners of source code read line by line, guess by entropy (every digest is a finding), and do not know
#: the tokens of this field. A prefix counts wherever it stands, glued to other words too (`x_hf_...`).
SECRET_FORMS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Hugging Face token", ("hf_",), r"hf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt|app)_[\w.-]{20,})"),
    ("Hugging Face organization token", ("api_org_",), r"api_org_[A-Za-z0-9]{20,}"),
    ("API key (OpenAI, Anthropic and others)", ("sk-",),
     r"(?<![A-Za-z0-9])sk-(?:(?:ant|proj|svcacct|admin|or-v1|lf|live|test|api03)-[\w-]{16,}|[A-Za-z0-9]{20,})"),
    ("Stripe key", ("k_live_", "k_test_"), r"[rsp]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    ("GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{20,}"),
    ("GitHub token", ("github_pat_",), r"github_pat_\w{20,}"),
    ("GitLab token", ("gl",), r"gl(?:pat|dt|rt|ft|soat|cbt|ptt|agent|oas|ffct|imt)-[\w.-]{20,}"),
    ("AWS access key", ("AKIA", "ASIA", "ABIA", "ACCA"),
     r"(?<![A-Z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Z0-9])"),
    ("Google API key", ("AIza",), r"AIza[\w-]{35}"),
    ("Google OAuth token", ("ya29.", "GOCSPX-"), r"ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}"),
    ("Slack token", ("xox", "xapp-"), r"xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{10,}"),
    ("webhook", ("hooks.slack.com", "discord"),
     r"hooks\.slack\.com/(?:services|workflows)/[\w/]{20,}"
     r"|discord(?:app)?\.com/api/webhooks/\d+/[\w-]{20,}"),
    ("Telegram bot token", (":AA",), r"(?<!\d)\d{8,10}:AA[\w-]{33}"),
    ("JSON web token", ("eyJ",), r"eyJ[\w-]{8,}\.eyJ[\w-]{4,}(?:\.[\w-]*)?|eyJ[\w-]{15,}\.[\w-]{10,}\.[\w-]{10,}"),
    ("private key", ("PRIVATE KEY",),
     r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?=(?:\s|\\)+[\w+/=:\\-]{8})"
     r"(?:[^-]{1,8000}-----END[A-Z0-9 ]{0,60}-----)?"),
    ("private key", ("PuTTY-User-Key-File-", "AGE-SECRET-KEY-1"),
     r"PuTTY-User-Key-File-\d: \S+|AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
    ("package registry token", ("npm_", "pypi-", "dckr_pat_"),
     r"npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|dckr_pat_[\w-]{20,}"),
    ("API key of a model provider", ("nvapi-", "gsk_", "xai-", "pplx-", "r8_", "tgp_v1_", "wandb_v1_", "fw_", "csk-"),
     r"nvapi-[\w-]{40,}|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{60,}|pplx-[A-Za-z0-9]{40,}|r8_[A-Za-z0-9]{37}"
     r"|(?:tgp|wandb)_v1_[\w-]{30,}|fw_[A-Za-z0-9]{22,}|csk-[a-z0-9]{40,}"),
    ("SendGrid key", ("SG.",), r"SG\.[\w-]{16,}\.[\w-]{16,}"),
    ("Azure key", ("AccountKey=", "SharedAccessKey="), r"(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{20,}={0,2}"),
    ("cloud token", ("_v1_", "dapi"), r"do[opr]_v1_[a-f0-9]{64}|dapi[a-f0-9]{32}"),
    ("authorization header", ("earer ", "asic "),
     r"[Bb]earer +(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*|Authorization['\"]?: ['\"]?Basic [A-Za-z0-9+/]{8,}=*"),
    ("login in .netrc", ("machine ",), r"machine\s+\S+\s+login\s+\S+\s+password\s+\S+"),
)  # fmt: skip
_FORMS = tuple((name, anchors, re.compile(form, re.ASCII)) for name, anchors, form in SECRET_FORMS)
_LONGEST_PREFIX, _WINDOW = 80, 9000

#: A value behind a secret's name: in an address, in quotes, or alone in the line of a settings file.
_NAME = (
    r"(?:passwords?|passwd|pwd|passphrase|secret|secret_?access_?key|client_?secret|(?:api|access|secret|private|wandb"
    r"|account|storage|auth|signing|encryption)[_-]?key|(?:hub|hf|auth|access|api|session|refresh|bearer|github)[_-]?token)"
)
_PARAMETER = re.compile(
    rf"(?i)(?P<before>[?&](?:{_NAME}|token|key|sig|signature|auth|credential|x-amz-(?:signature|credential|security-token)"
    r"|awsaccesskeyid|x-goog-signature)=)(?P<value>(?!\[removed\])[^\s&#'\"<>\\)\]}]+)"
)
_QUOTED = re.compile(
    rf"(?i)(?P<before>{_NAME}(?:\\?[\"'])?\s{{0,4}}[:=]\s{{0,4}}\\?(?P<quote>[\"']))(?P<value>[^\"'\n\\]{{6,200}})(?=\\?(?P=quote))"
)
_LINE = re.compile(
    rf"(?im)(?P<before>^[\s\"]*(?:export\s+|-\s+|--)?[\w.-]{{0,60}}?{_NAME}\s{{0,4}}(?:=|:\s))[ \t]*"
    r"(?P<value>[^\s\"'(){}\[\],;<>$]{6,200})[ \t]*(?:\\n|\r?$)"
)
_NAMED_ANCHORS = ("pass", "pwd", "secret", "key", "token", "sig", "auth", "cred")
_PLACEHOLDER = re.compile(
    r"(?i)passw|your|example|change.?me|xxx|placeholder|dummy|insert|\*\*|\.\.\.|removed|redacted|^(?:none|null|true|false"
    r"|str|string|bytes|secret|token|hidden|unset|default|optional|required|os\.|self\.|args?\.|config\.|env\b|float|bool|int)|^[<${%]"
)

# What follows "://" is an address, unless it is one of this machine or its network. A path has two components or
# more, so that "/no_think" in a prompt stays; a folder's name may hold spaces, the last component ends at the first.
_PART = r"[^\s/\\:;,|'\"`<>()\[\]{}]+"
_SPACED = rf"{_PART}(?: {_PART}){{0,4}}"
_PATHS = re.compile(
    rf"(?P<local>\b(?:file|ssh|sftp|scp|rsync|smb|nfs|git\+ssh)://[^\s'\"`<>]*)"
    rf"|(?P<address>\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"`<>]*)"
    rf"|(?P<path>(?:\b[A-Za-z]:(?=/)|(?<![\w/.~>-])~?|(?<=[A-Za-z])(?=/(?:home|Users|root|mnt|media|scratch|Volumes)/))"
    rf"(?:/{_SPACED}(?=/))+/{_PART}/?"
    rf"|(?<![\w/.~>-])~(?:[A-Za-z_][\w.-]*)?(?:/{_SPACED}(?=/))*/{_PART}/?"
    rf"|(?<![\w/.~>-])(?:/home|/Users)/{_PART}/?"
    rf"|(?<![\w/.])(?:\.\.?/)+(?:{_SPACED}/)*{_PART}/?)"
)
_WINDOWS_PATH = re.compile(
    r"(?<![\w])(?:[A-Za-z]:|\\)\\(?:[^\s\\|'\"`<>]+(?: [^\s\\|'\"`<>]+){0,4}\\+)*[^\s\\|'\"`<>]*"
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@'\"<>]+@")
_REMOTE_LOGIN = re.compile(r"(?<![\w.-])[\w.-]+@[\w.-]+:(?=[/~])")


def public_text(text: str) -> str:
    """`text` without secrets, logins in addresses, and the folders of local paths (the last component stays).

    The name of this machine goes where it follows `_`, `@` or `/`, as in the folders of logs and in addresses; a word
    that happens to be the same (a model's name) stays.
    """
    for _, anchors, form in _FORMS:
        if any(anchor in text for anchor in anchors):
            text = form.sub(REMOVED, text)
    lowered = text.lower()
    if any(anchor in lowered for anchor in _NAMED_ANCHORS):
        for named in (_PARAMETER, _QUOTED, _LINE):
            text = named.sub(lambda match: match["before"] + REMOVED, text)
    if "@" in text:
        text = _REMOTE_LOGIN.sub("", _URL_LOGIN.sub("", text))
    host = _own_host()
    if host and host in text:
        text = re.sub(rf"(?<=[_@/]){re.escape(host)}(?![A-Za-z0-9])", "[host]", text)
    if is_absolute_path(text) or _is_here(text):
        return last_component(text)
    if "/" in text:
        text = _PATHS.sub(lambda match: match[0] if match["address"] else last_component(match[0]), text)
    return _WINDOWS_PATH.sub(lambda match: last_component(match[0]), text) if "\\" in text else text


@cache
def _own_host() -> str:
    """The name of this machine without its domain; "" where it says nothing."""
    name = socket.gethostname().split(".")[0]
    return "" if name in ("", "localhost") else name


def find_secret(text: str) -> str | None:
    """What kind of secret `text` holds ("GitHub token"), by the documented forms of tokens; None where it holds none.

    Values behind names such as `password` or `?access_key=` count too, unless they are placeholders (`<your key>`).
    """
    for name, anchors, form in _FORMS:
        if any(form.search(text, *window) for anchor in anchors for window in _windows(text, anchor)):
            return name
    lowered = text.lower()
    for anchor in _NAMED_ANCHORS:
        for window in _windows(lowered, anchor, 400):
            for kind, named in (("an address", _PARAMETER), ("quotes", _QUOTED), ("a setting", _LINE)):
                if any(_is_secret_value(found, named) for found in named.finditer(text, *window)):
                    return f"password or key in {kind}"
    if "@" in text and any(
        ":" in login[0] and not _PLACEHOLDER.search(login[0]) and not login[0].startswith(("user", "name"))
        for login in _URL_LOGIN.finditer(text)
    ):
        return "password in an address"
    return None


def find_secret_in_file(path: str | Path) -> str | None:
    """`find_secret` for a file of any size, in UTF-8, UTF-16 or UTF-32; of safetensors, the header alone is text."""
    with open(path, "rb") as file:
        left = os.path.getsize(path)
        if str(path).endswith(".safetensors"):
            start = file.read(8)
            header = struct.unpack("<Q", start)[0] if len(start) == 8 else left
            left = min(left, header)
        before = b""
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            left -= len(chunk)
            block = before + chunk
            for text in (block, block.replace(b"\0", b"")) if b"\0" in block else (block,):
                found = find_secret(text.decode("utf-8", errors="replace"))
                if found is not None:
                    return found
            before = block[-4 * _WINDOW // 9 :]
    return None


def public_value(value: Any) -> Any:
    """A plain JSON value for `value`: dictionaries without secrets, texts through `public_text`, types by name.

    Objects that JSON does not know become the name of their type, so that no `repr` with an address or a path slips
    in. Numbers that JSON does not know become the strings "nan", "inf" and "-inf".
    """
    if value is None or (isinstance(value, (bool, int)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return public_value(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        return public_text(str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return public_value({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {public_text(str(k)): public_value(v) for k, v in value.items() if not is_secret_name(str(k))}
    if isinstance(value, (set, frozenset)):
        return sorted((public_value(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return public_value(value.item())  # a scalar of numpy or torch
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", type(value).__name__)


def is_secret_name(name: str) -> bool:
    """True for a setting that holds a secret, whatever stands before it: `hub_token`, `wandb_key`, `apiKey`, `token`.

    `eos_token`, `max_new_tokens` or `sort_key` are not secrets.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[-200:]).lower()
    words = re.sub(r"[^a-z0-9]+", "_", words).strip("_")
    return _SECRET_NAME.search(words) is not None


def is_absolute_path(text: str) -> bool:
    """True where all of `text` is one path from the root or from a home folder; "/think" is one only if it exists."""
    if "\n" in text or len(text) > 4096 or "://" in text.removeprefix("file://"):
        return False
    text = text.removeprefix("file://")
    if PureWindowsPath(text).drive and PureWindowsPath(text).is_absolute():
        return True
    if re.match(r"~[A-Za-z_][\w.-]*(/|$)", text):
        return True
    if not text.startswith(("/", "~/")):
        return False
    return len(PurePosixPath(text).parts) > 2 or (len(text) > 1 and os.path.exists(text))


def last_component(path: str) -> str:
    """ "/home/me/models/x/" -> "x"; a home folder, whose name is a person's, becomes "~"."""
    text = re.sub(r"^[a-z+]+://", "", path)
    if Path(text) == Path.home() or _HOME.fullmatch(text):
        return "~"
    name = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    return "~" if not name or name.startswith("~") or name in (".", "..") else name


_HOME = re.compile(r"(?:/home|/Users|(?:[A-Za-z]:)?[/\\]+Users)[/\\]+[^/\\]+[/\\]*|/root/?|~[\w.-]*/?")


def _is_here(text: str) -> bool:
    """True for a relative path of this machine: one that leads upwards or to something that is there."""
    if "\n" in text or len(text) > 4096 or "://" in text or not ("/" in text or "\\" in text):
        return False
    return re.match(r"\.{1,2}[/\\]", text) is not None or os.path.exists(text)


def _windows(text: str, anchor: str, after: int = _WINDOW) -> Iterator[tuple[int, int]]:
    """Where to look for a form: around the places at which its anchor stands, those near each other together."""
    at = text.find(anchor)
    while at >= 0:
        start, stop = max(at - _LONGEST_PREFIX, 0), at + after
        while at >= 0 and at <= stop:
            stop = at + after
            at = text.find(anchor, at + 1)
        yield start, stop


def _is_secret_value(found: re.Match[str], named: re.Pattern[str]) -> bool:
    value = found["value"]
    if _PLACEHOLDER.search(value) or len(value) < 4 or len(set(value)) < 3:
        return False
    is_password = "pass" in found["before"].lower()
    if named is _LINE and not found["before"].rstrip().endswith("="):
        return any(c.isdigit() for c in value)  # a sentence may look like a setting; a shell variable does not
    if named is _PARAMETER or is_password:
        return True
    return " " not in value and any(c.isdigit() for c in value)  # names of settings are not values of secrets
