import hashlib
import os

import pytest

from hf_transfer_ext.files import (
    path_inside,
    refuse_existing_output,
    require_free_space,
    sha256_of,
    write_text,
    written_aside,
)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "model"
    with written_aside(out) as aside:
        (aside / "config.json").write_text("{}")
        assert not out.exists()
    assert (out / "config.json").read_text() == "{}"
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    out = tmp_path / "model"
    with written_aside(out) as aside:
        (aside / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), written_aside(out, overwrite=True) as aside:
        (aside / "config.json").write_text("new")
        raise RuntimeError("disk full")
    assert (out / "config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_existing_model_is_replaced_only_on_request(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--overwrite"):
        refuse_existing_output(tmp_path)
    assert refuse_existing_output(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(FileExistsError, match="is a file"):
        refuse_existing_output(tmp_path / "config.json")


def test_a_path_cannot_leave_its_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    assert path_inside(root, "a/b.safetensors") == root / "a/b.safetensors"
    os.symlink(tmp_path, root / "link")
    for bad in ("../x", "/etc/passwd", "a/../../x", "link/x"):
        with pytest.raises(ValueError, match="leads out"):
            path_inside(root, bad)


def test_too_little_space_is_told_before_work(tmp_path):
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OSError, match="GB are free"):
        require_free_space(tmp_path, 10**18)


def test_write_text_and_digest(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "é")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "é"
    assert sha256_of(tmp_path / "a" / "b.txt") == hashlib.sha256("é".encode()).hexdigest()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]
