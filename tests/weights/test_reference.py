"""A reference is read as its writer meant it: folders that exist win over signs with a meaning."""

from __future__ import annotations

import pytest

from hf_transfer_ext.weights.reference import ModelReference, parse_reference


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("v1+v2", "lora", "lo@ra", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/m", ModelReference("org/m")),
        ("org/m@refs/pr/1", ModelReference("org/m", "refs/pr/1")),
        ("org/m@a+org/l@b", ModelReference("org/m", "a", "org/l", "b")),
        ("v1+v2", ModelReference("v1+v2")),
        ("v1+v2+lora", ModelReference("v1+v2", None, "lora")),
        ("v1+v2+org/l@main", ModelReference("v1+v2", None, "org/l", "main")),
        ("c+lo@ra", ModelReference("c", None, "lo@ra")),
        ("org/m@main+lo@ra", ModelReference("org/m", "main", "lo@ra")),
    ],
)
def test_folders_win(folders, text, expected):
    assert parse_reference(text, "model") == expected


def test_the_home_folder(folders):
    assert parse_reference("~/c+~/lora", "model") == ModelReference(str(folders / "c"), None, str(folders / "lora"))
    assert parse_reference({"model": {"path": "~/c"}}, "model") == ModelReference(str(folders / "c"))
