"""The peak of resident memory does not grow with the model. The models are sparse files, so they take no disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import yaml
from merging.tiny_models import CONFIG

from benchmarks.merging import run_engine


def sparse_model(folder: Path, rows: int, tensors: int = 4) -> str:
    """A model of zeros: a header, and a hole of the right length."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for i in range(tensors):
        size = rows * 1024 * 2
        header[f"model.layers.{i}.w.weight"] = {
            "dtype": "BF16",
            "shape": [rows, 1024],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": tensors, "layer_types": None}))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_sixteen_times_the_model_takes_the_same_memory(tmp_path, method):
    peaks = []
    for name, rows in (("small", 4_000), ("large", 64_000)):
        base, *tuned = (sparse_model(tmp_path / name / part, rows) for part in ("base", "a", "b"))
        config = {"merge_method": method, "models": [{"model": path} for path in tuned]}
        if method == "slerp":
            config |= {"base_model": base, "parameters": {"t": 0.5}, "models": [{"model": tuned[0]}]}
        else:
            config["parameters"] = {"weight": 0.5} | ({"density": 0.3} if method == "ties" else {})
            config |= {"base_model": base} if method == "ties" else {}
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(config))
        record = run_engine("ours", tmp_path / f"{name}.yml", tmp_path / f"{name}_out", 2, 300)
        assert record["status"] == "ok", record
        peaks.append(record["peak_bytes"])
    assert peaks[0] < 5e8 and peaks[1] < peaks[0] + 4e7, peaks
