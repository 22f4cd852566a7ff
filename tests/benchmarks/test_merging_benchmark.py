"""The benchmark of merging runs, and its table says what its records say."""

from __future__ import annotations

import json

import pytest

from benchmarks import merging
from hf_transfer_ext.merging.planning.config import parse_config


def test_a_toy_run(tmp_path, capsys):
    out = tmp_path / "table"
    words = f"--shapes toy --methods ties --engines floor ours --threads 1 --out {out} --work {tmp_path}"
    assert merging.main(words.split()) == 0
    records = json.loads(out.with_suffix(".json").read_text())["records"]
    assert [record["engine"] for record in records] == ["floor", "ours"]
    ours = records[1]
    assert ours["status"] == "ok" and 0 < ours["cpu_s"] < 120 and 2e7 < ours["peak_bytes"] < 1e9
    sizes = merging.specs_of(merging.SHAPES["toy"])
    assert ours["read_bytes"] == pytest.approx(4 * sum(spec.nbytes for spec in sizes), rel=0.05)
    assert (
        f"| toy | warm | ties | {records[0]['wall_s']:.2f} | {ours['wall_s']:.2f} |"
        in out.with_suffix(".md").read_text()
    )


@pytest.mark.parametrize(("method", "least"), [("iso_c", "svd"), ("wudi", "products")])
def test_methods_on_whole_matrices_stand_beside_the_least_that_they_do(tmp_path, monkeypatch, method, least):
    monkeypatch.delenv(merging.VARIABLE, raising=False)
    out = tmp_path / "table"
    words = f"--shapes toy --methods {method} --threads 1 --out {out} --work {tmp_path}"
    assert merging.main(words.split()) == 0
    records = json.loads(out.with_suffix(".json").read_text())["records"]
    assert [(one["engine"], one["status"]) for one in records] == [("floor", "ok"), ("ours", "ok"), (least, "ok")]
    wall, cpu = (records[1][value] / records[2][value] for value in ("wall_s", "cpu_s"))
    target = {**merging.SVD_TARGETS, **merging.PRODUCT_TARGETS}[method]
    assert f"| {wall:.1f} | {cpu:.1f} | {target} |" in out.with_suffix(".md").read_text()


def test_ratios_are_those_of_the_medians():
    def record(engine, wall, peak=None, method="ties"):
        shared = {"shape": "s", "state": "warm", "method": method, "engine": engine, "status": "ok", "cpu_s": wall}
        return {**shared, "wall_s": wall} | ({"peak_bytes": peak} if peak else {})

    records = [
        record("floor", 1.0),
        *(record("ours", wall, 100) for wall in (2.0, 9.0, 3.0)),
        record("mergekit", 60.0, 1000),
    ]
    (row,) = merging.rows_of(records)
    assert row["ours_wall_s"] == 3.0 and row["speedup"] == 20.0 and row["memory"] == 10.0 and row["target"] == 20


def test_holes_are_planned_and_merged_by_us_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(merging.SPARSE, "toy", "sparse")
    out = tmp_path / "table"
    words = f"--shapes toy --methods linear --engines ours --out {out} --models {tmp_path / 'models'}"
    assert merging.main([*words.split(), "--work", str(tmp_path)]) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert [(one["state"], one["engine"], one["status"]) for one in content["records"]] == [("sparse", "ours", "ok")]
    assert str(tmp_path) not in content["command"].replace(str(out), "")
    file = tmp_path / "models/toy/base/model.safetensors"
    assert file.stat().st_blocks * 512 < file.stat().st_size / 4
    monkeypatch.setitem(merging.SPARSE, "toy", "dry run")
    assert merging.main([*words.split(), "--append", "--work", str(tmp_path)]) == 0  # the models are there
    assert "| toy | dry run | linear |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("method", merging.METHODS)
def test_configurations_are_read(tmp_path, method):
    config = merging.configuration(method, [tmp_path / name for name in ("base", "a", "b", "c")])
    assert parse_config(config).merge_method == method


def test_mergekit_needs_its_interpreter(monkeypatch, capsys):
    monkeypatch.delenv(merging.VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        merging.main(["--shapes", "toy"])
    assert merging.VARIABLE in capsys.readouterr().err
