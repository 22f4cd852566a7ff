import errno
import hashlib
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from hf_transfer_ext import files
from hf_transfer_ext.files import (
    clean_up,
    leftovers,
    only_writer,
    path_inside,
    publish,
    refuse_existing_output,
    refuse_shared_outputs,
    replace_folder,
    require_free_space,
    sha256_of,
    stamp_of,
    write_text,
    written_aside,
)
from hf_transfer_ext.merging.planning.companions import COMPANION_NAMES


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def result(folder, text="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)
    return folder


class TestOutput:
    def test_new_and_empty_folders_are_taken(self, tmp_path):
        assert refuse_existing_output(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()
        (tmp_path / "empty").mkdir()
        assert refuse_existing_output(str(tmp_path / "empty")) == tmp_path / "empty"

    def test_an_existing_result_is_replaced_only_on_request(self, tmp_path):
        result(tmp_path / "out")
        with pytest.raises(FileExistsError, match="--overwrite"):
            refuse_existing_output(tmp_path / "out")
        assert refuse_existing_output(tmp_path / "out", overwrite=True) == tmp_path / "out"
        with pytest.raises(FileExistsError, match="is a file"):
            refuse_existing_output(tmp_path / "out" / "config.json")

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        "name",
        ["notes.txt", "data/train.jsonl", "sub/config.json", "model.safetensors.bak", "weights.safetensors", "x.json"],
    )
    def test_other_files_are_refused_by_name(self, tmp_path, name, overwrite):
        out = result(tmp_path / "out")
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=name):
            refuse_existing_output(out, overwrite=overwrite)
        assert refuse_existing_output(out, overwrite=True, also=[name]) == out

    def test_an_empty_folder_and_a_link_are_not_of_a_result(self, tmp_path):
        out = result(tmp_path / "out")
        (out / "data").mkdir()
        with pytest.raises(FileExistsError, match="data/"):
            refuse_existing_output(out, overwrite=True)
        (out / "data").rmdir()
        (out / "model.safetensors").unlink()
        (out / "model.safetensors").symlink_to(out / "config.json")
        with pytest.raises(FileExistsError, match=r"model\.safetensors \(a link\)"):
            refuse_existing_output(out, overwrite=True)

    def test_all_companions_of_a_merge_are_files_of_a_result(self, tmp_path):
        for name in COMPANION_NAMES:
            (tmp_path / name).write_text("")
        assert refuse_existing_output(tmp_path, overwrite=True) == tmp_path

    def test_files_that_the_results_own_record_lists_belong_to_it(self, tmp_path):
        out = result(tmp_path / "out")
        (out / "my_model.py").write_text("")
        with pytest.raises(FileExistsError, match=r"my_model\.py"):
            refuse_existing_output(out, overwrite=True)
        for text in ("{", "[]", '{"result": ["my_model.py"]}'):  # a record that cannot be read lists nothing
            (out / "hf_transfer_ext.json").write_text(text)
            with pytest.raises(FileExistsError, match=r"my_model\.py"):
                refuse_existing_output(out, overwrite=True)
        (out / "hf_transfer_ext.json").write_text('{"result": {"my_model.py": "0"}}')
        assert refuse_existing_output(out, overwrite=True) == out

    @pytest.mark.parametrize("target", ["folder", "config.json", "nowhere"])
    def test_links_are_refused(self, tmp_path, target):
        (tmp_path / "folder").mkdir()
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "out").symlink_to(tmp_path / target)
        with pytest.raises(FileExistsError, match="is a link"):
            refuse_existing_output(tmp_path / "out", overwrite=True)

    @pytest.mark.parametrize("name", [".", "..", "../..", "sub/.."])
    def test_the_working_directory_is_refused(self, tmp_path, monkeypatch, name):
        (tmp_path / "here" / "sub").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(ValueError, match="working directory"):
            refuse_existing_output(name, overwrite=True)
        with pytest.raises(ValueError, match="working directory"):
            refuse_existing_output(tmp_path, overwrite=True)
        assert refuse_existing_output("sub").name == "sub"

    def test_inputs_and_their_parents_are_refused(self, tmp_path):
        model = result(tmp_path / "models" / "a")
        (tmp_path / "link").symlink_to(model)
        for source in (model, model / "config.json", tmp_path / "link", str(model)):
            for out in (model, tmp_path / "models", tmp_path / "models" / ".." / "models"):
                with pytest.raises(ValueError, match="holds the input"):
                    refuse_existing_output(out, overwrite=True, inputs=[None, "org/name", source])
            assert refuse_existing_output(model / "out", inputs=[source])

    def test_a_file_of_a_cache_is_an_input_by_its_link_and_by_its_content(self, tmp_path):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "abc").write_text("{}")
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/abc")
        for out in ("snapshot", "blobs"):
            with pytest.raises(ValueError, match="holds the input"):
                refuse_existing_output(tmp_path / out, inputs=[tmp_path / "snapshot" / "config.json"])

    @pytest.mark.parametrize("kind", ["tmpfs", "bind"])
    def test_mount_points_are_refused(self, tmp_path, kind):
        point, source = tmp_path / "a mount", tmp_path / "source"
        point.mkdir()
        source.mkdir()
        command = ["mount", "-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["mount", "--bind", str(source)]
        if subprocess.run([*command, str(point)], capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        try:
            with pytest.raises(OSError, match="mount point"):
                refuse_existing_output(point)
        finally:
            subprocess.run(["umount", str(point)], check=True)

    def test_places_where_nothing_can_be_made(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="not a folder"):
            refuse_existing_output(tmp_path / "file" / "out")
        with pytest.raises(OSError, match="longer than 200 bytes"):
            refuse_existing_output(tmp_path / ("é" * 101))
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(PermissionError, match="read-only"):
            refuse_existing_output(tmp_path / "new" / "out")

    def test_outputs_of_one_run_are_separate(self, tmp_path):
        refuse_shared_outputs(tmp_path / "a", None, tmp_path / "ab")
        for pair in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "a" / "b", tmp_path / "a")):
            with pytest.raises(ValueError, match="contain each other"):
                refuse_shared_outputs(*pair)


class TestWrittenAside:
    def test_a_folder_appears_at_once(self, tmp_path):
        out = tmp_path / "deep" / "model"
        with written_aside(out) as aside:
            (aside / "config.json").write_text("{}")
            assert not out.exists()
        assert (out / "config.json").read_text() == "{}"
        assert entries(out.parent) == ["model"]

    def test_a_failed_write_leaves_the_old_folder_and_nothing_else(self, tmp_path):
        out = result(tmp_path / "model", "old")
        with pytest.raises(RuntimeError, match="disk"), written_aside(out, overwrite=True) as aside:
            (aside / "config.json").write_text("new")
            raise RuntimeError("disk full")
        assert (out / "config.json").read_text() == "old"
        assert entries(tmp_path) == ["model"]

    def test_what_comes_into_the_folder_meanwhile_is_kept_and_so_is_the_result(self, tmp_path):
        out = tmp_path / "model"
        with pytest.raises(FileExistsError, match=r"notes\.txt.*The finished result is in"), written_aside(out) as new:
            (new / "config.json").write_text("new")
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        assert (out / "notes.txt").read_text() == "mine"
        (rescued,) = [path for path in tmp_path.iterdir() if path != out]
        assert rescued.name.startswith("model.unpublished-") and (rescued / "config.json").read_text() == "new"

    def test_others_can_read_what_was_written_for_the_owner_alone(self, tmp_path):
        with written_aside(tmp_path / "model") as aside:
            (aside / "additional_chat_templates").mkdir(mode=0o700)
            for name in ("model.safetensors", "additional_chat_templates/tool.jinja"):
                (aside / name).write_text("")
                (aside / name).chmod(0o600)
        for path in (tmp_path / "model").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)

    def test_what_a_kill_left_is_removed(self, tmp_path):
        (tmp_path / ".model.partial-0123456789abcdef").mkdir()
        (tmp_path / ".model.partial-merge-0123456789abcdef").mkdir()
        with written_aside(tmp_path / "model") as aside:
            (aside / "config.json").write_text("{}")
        assert entries(tmp_path) == ["model"]


class TestReplace:
    @pytest.fixture(params=["exchange", "two renames"])
    def way(self, request, monkeypatch):
        if request.param == "two renames":
            monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        return request.param

    def test_the_new_folder_takes_the_place_of_the_old(self, tmp_path, way):
        old, new = result(tmp_path / "out", "old"), result(tmp_path / "new", "new")
        replace_folder(new, old)
        assert (old / "config.json").read_text() == "new" and entries(tmp_path) == ["out"]

    def test_an_empty_folder_is_replaced(self, tmp_path, way):
        (tmp_path / "out").mkdir()
        replace_folder(result(tmp_path / "new", "new"), tmp_path / "out")
        assert (tmp_path / "out" / "config.json").read_text() == "new" and entries(tmp_path) == ["out"]

    def test_a_kill_at_any_rename_leaves_the_old_or_the_new(self, tmp_path, way, monkeypatch):
        class Killed(BaseException):
            pass

        for place in range(4):
            top = tmp_path / str(place)
            old, new = result(top / "out", "old"), result(top / "new", "new")
            calls, rename = 0, os.rename

            def killing(*arguments):
                nonlocal calls
                if calls == place:  # noqa: B023
                    raise Killed
                calls += 1
                rename(*arguments)  # noqa: B023

            with monkeypatch.context() as patch, suppress(Killed):
                patch.setattr(os, "rename", killing)  # it stays dead: no handler renames back
                replace_folder(new, old)
            clean_up(old)
            assert (old / "config.json").read_text() in ("old", "new")
            assert not leftovers(old, "old")

    def test_a_kill_between_two_renames_is_undone_by_the_next_run(self, tmp_path):
        result(tmp_path / ".out.old-0123456789abcdef", "old")
        with pytest.raises(FileExistsError, match="--overwrite"), written_aside(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / "config.json").read_text() == "old" and entries(tmp_path) == ["out"]

    def test_an_old_result_is_removed_once_the_new_one_stands(self, tmp_path):
        result(tmp_path / "out", "new")
        result(tmp_path / ".out.old-0123456789abcdef", "old")
        clean_up(tmp_path / "out")
        assert (tmp_path / "out" / "config.json").read_text() == "new" and entries(tmp_path) == ["out"]

    @pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
    def test_linux_exchanges_in_one_step(self, tmp_path, monkeypatch):
        old, new = result(tmp_path / "out", "old"), result(tmp_path / "new", "new")
        monkeypatch.setattr(os, "rename", lambda *arguments: pytest.fail("renamed in two steps"))
        publish(new, old, overwrite=True)
        assert (old / "config.json").read_text() == "new"


def test_names_are_not_patterns(tmp_path):
    """`*`, `?` and `[` may be part of a folder's name, and one name may begin with another."""
    others = [".outer.partial-0123", ".out1.partial-0123", ".out.partial-0123.partial-0123", ".out.partial-save"]
    for name in others:
        (tmp_path / name).mkdir()
    for name in ("out*", "out?", "out[1]", "out"):
        with written_aside(tmp_path / name) as aside:
            (aside / "config.json").write_text("{}")
    assert entries(tmp_path) == sorted([*others, "out*", "out?", "out[1]", "out"])


def hold(folder, seconds, results):
    while True:
        try:
            with only_writer(folder):
                inside = folder.with_name("inside")
                results.put(not inside.exists())
                inside.touch()
                time.sleep(seconds)
                inside.unlink()
                return
        except FileExistsError:
            time.sleep(0.0005)


class TestLock:
    def test_a_second_run_is_refused_or_waits(self, tmp_path, caplog):
        with only_writer(tmp_path / "out"):
            lock = tmp_path / ".out.output-lock"
            assert lock.exists()
            for _ in range(2):
                with pytest.raises(FileExistsError, match="Another run"), only_writer(tmp_path / "out"):
                    pass
                assert lock.exists()
        assert not lock.exists()

    def test_never_two_at_once_though_each_removes_the_file(self, tmp_path):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        processes = [context.Process(target=hold, args=(tmp_path / "out", 0.002, results)) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [results.get() for _ in processes] == [True] * 8
        assert entries(tmp_path) == []

    def test_a_waiting_run_goes_on_when_the_other_ends(self, tmp_path):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        other = context.Process(target=hold, args=(tmp_path / "out", 0.3, results))
        other.start()
        assert results.get()
        with only_writer(tmp_path / "out", wait=True):
            assert not (tmp_path / "inside").exists()
        other.join()

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch, caplog):
        import fcntl

        def flock(descriptor, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with only_writer(tmp_path / "out"):
            pass
        assert "a file system without locks" in caplog.text and entries(tmp_path) == []

    def test_without_fcntl(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with only_writer(tmp_path / "out"):
            with pytest.raises(FileExistsError, match="Another run"), only_writer(tmp_path / "out"):
                pass
        with only_writer(tmp_path / "out"):
            pass


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


def test_stamps_look_at_small_files_content_and_large_ones_time(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_text("one")
    before = stamp_of(file)
    os.utime(file, ns=(0, 0))
    assert stamp_of(file) == before
    file.write_text("two")
    assert stamp_of(file) != before
    monkeypatch.setattr(files, "SMALL_FILE", 2)
    before = stamp_of(file)
    os.utime(file, ns=(0, 0))
    assert stamp_of(file) != before
