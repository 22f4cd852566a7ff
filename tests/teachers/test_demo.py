import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from hf_transfer_ext.hub.card import model_card
from hf_transfer_ext.hub.record import RunRecord, describe_input
from hf_transfer_ext.teachers import demo


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package with the weights; what is converted is counted, and small."""
    shipped = tmp_path / "site-packages" / "data"
    shipped.mkdir(parents=True)
    (shipped / "GEMMA_TERMS.html").write_text("terms")
    (shipped / "NOTICE.md").write_text("notice")
    fake = ModuleType(demo.MODULE)
    fake.EXPECTED_SHA256, fake.conversions = "a5fd", 0

    def convert(package, folder):
        fake.conversions += 1
        time.sleep(0.05)
        (folder / "model.safetensors").write_text("weights")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setitem(sys.modules, demo.MODULE, fake)
    monkeypatch.setattr(demo, "files", lambda module: shipped.parent)
    monkeypatch.setattr(demo, "_version", lambda: "1.0.0")
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(demo, "NEEDED_BYTES", 1)
    return fake


def test_converts_once_and_then_reuses(package, tmp_path):
    folder = demo.demo_model(tmp_path / "cache" / "gemma")
    assert demo.demo_model(tmp_path / "cache" / "gemma") == folder
    assert package.conversions == 1
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "tokenizer.json", "README.md", "GEMMA_TERMS.html", "NOTICE.md", demo.STAMP_FILE,
    }  # fmt: skip
    stamp = json.loads((folder / demo.STAMP_FILE).read_text())
    assert stamp == {"package": demo.PACKAGE, "version": "1.0.0", "sha256": "a5fd", "conversion": demo.CONVERSION}


def test_a_students_card_names_where_the_weights_come_from(package, tmp_path):
    folder = demo.demo_model(tmp_path / "gemma")
    (folder / "README.md").unlink()  # a folder of an earlier version
    assert "sha256 a5fd" in (demo.demo_model(folder) / "README.md").read_text()
    teacher = describe_input(folder, role="teacher")
    assert teacher.base_model == [demo.SOURCE] and teacher.license == {"license": "gemma"}
    data = model_card(RunRecord("distillation", "recipes/distill.py", inputs=[teacher])).data
    assert data.base_model == demo.SOURCE and data.license == "gemma"


@pytest.mark.parametrize("change", ["version", "checksum", "weights"])
def test_a_stale_or_damaged_cache_is_built_again(package, tmp_path, monkeypatch, change):
    folder = demo.demo_model(tmp_path / "gemma")
    if change == "version":
        monkeypatch.setattr(demo, "_version", lambda: "1.0.1")
    elif change == "checksum":
        package.EXPECTED_SHA256 = "ffff"
    else:
        (folder / "model.safetensors").unlink()
    demo.demo_model(tmp_path / "gemma")
    assert package.conversions == 2
    assert (folder / "model.safetensors").read_text() == "weights"


def test_concurrent_first_loads_convert_once(package, tmp_path):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.demo_model(tmp_path / "gemma"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "gemma"] * 4
    assert package.conversions == 1


def test_a_failed_conversion_leaves_nothing(package, tmp_path, monkeypatch):
    def fail(package, folder):
        (folder / "model.safetensors").write_text("half")
        raise ValueError("Assembled file sha256 did not match expected value")

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(ValueError, match="sha256"):
        demo.demo_model(tmp_path / "cache" / "gemma")
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_with_other_files_is_refused(package, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years of work")
    with pytest.raises(FileExistsError, match="not the demo's teacher"):
        demo.demo_model(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_full_disk_is_told_before_the_work(package, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NEEDED_BYTES", 10**18)
    with pytest.raises(OSError, match="GB are free"):
        demo.demo_model(tmp_path / "gemma")
    assert package.conversions == 0


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, demo.MODULE, None)
    with pytest.raises(ImportError, match=r"pip install 'hf_transfer_ext\[demo\]'"):
        demo.demo_model(tmp_path / "gemma")


def test_the_default_folder_follows_hf_home(package, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.constants, "HF_HOME", str(tmp_path / "home"))
    assert demo.demo_model() == tmp_path / "home" / "hf_transfer_ext" / "gemma-3-270m"


@pytest.mark.slow
def test_the_real_teacher_loads_and_knows_paris():
    """Needs the extra `demo`; the first run converts the model (most of a minute)."""
    pytest.importorskip(demo.MODULE)
    from hf_transfer_ext.models.loading import load_model, load_tokenizer

    folder = demo.demo_model()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    inputs = tokenizer("The Eiffel Tower stands in the city of", return_tensors="pt")
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]).strip() == "Paris"
