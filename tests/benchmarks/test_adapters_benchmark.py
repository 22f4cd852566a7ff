"""The benchmark of adapters runs, and its table says what its records say."""

from __future__ import annotations

import json

import pytest

from benchmarks import adapters


@pytest.mark.slow
def test_a_toy_run(tmp_path, capsys):
    out = tmp_path / "table"
    words = f"--shape toy --engines ours --rank 4 --resize 8 2 --threads 1 --out {out} --work {tmp_path}"
    assert adapters.main(words.split()) == 0
    records = json.loads(out.with_suffix(".json").read_text())["records"]
    assert [(one["job"], one["engine"], one["status"]) for one in records] == [
        ("extract", "ours", "ok"), ("resize", "ours", "ok"), ("resize", "dense SVD", "ok"),
    ]  # fmt: skip
    extracted, ours, dense = records
    assert extracted["modules"] == 14 and 0.5 < extracted["residual"] < 1 and extracted["peak_bytes"] > 1e8
    assert ours["difference"] < 1e-4 and dense["difference"] < 1e-4
    table = out.with_suffix(".md").read_text()
    assert f"| residual | {extracted['residual']:.5f} | – | – |" in table
    assert (
        f"| seconds | {ours['step_s']:.3f} | {dense['step_s']:.3f} | {dense['step_s'] / ours['step_s']:.1f} |" in table
    )


def test_the_peer_has_to_be_named(monkeypatch, capsys):
    monkeypatch.delenv(adapters.VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        adapters.main(["--shape", "toy"])
    assert "HF_TRANSFER_EXT_MERGEKIT_PYTHON" in capsys.readouterr().err
