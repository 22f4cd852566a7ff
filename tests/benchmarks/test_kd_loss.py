"""The benchmark itself, on toy shapes: does its table say what was measured?"""

import json
from importlib.util import find_spec

import pytest
import torch
import trl
from packaging.version import Version

from benchmarks import kd_loss, measure

PEERS = [
    name
    for name in kd_loss.LOSSES
    if name not in ("ours", *kd_loss.GPU_ONLY) and (name != "liger chunked" or find_spec("liger_kernel"))
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.slow
def test_the_table_of_a_toy_run(tmp_path):
    out = tmp_path / "results" / "toy"
    common = ["--shapes", "toy", "--dtypes", "float32", "--methods", "ours,products", "--rounds", "1"]
    kd_loss.main([*common, "--divergences", "generalized_jsd", "--out", str(out)])
    kd_loss.main([*common, "--divergences", "adaptive_kl", "--out", str(out), "--append"])
    result = json.loads(out.with_suffix(".json").read_text())
    rows = {(row["divergence"], row["method"]): row for row in result["rows"]}
    assert set(rows) == {("", "products"), ("generalized_jsd", "ours"), ("adaptive_kl", "ours")}
    assert rows["", "products"]["rounds"] == 2  # one a sitting
    for row in rows.values():
        assert row["status"] == measure.OK and row["wall_s"] > 0 and row["growth_gb"] is not None
    for divergence in ("generalized_jsd", "adaptive_kl"):
        row = rows[divergence, "ours"]
        assert row["wall_over_ours"] == 1.0 and row["cpu_over_floor"] > 0
        assert max(row["loss_error"], row["gradient_error"]) < kd_loss.TOLERANCE["float32"]
    text = out.with_suffix(".md").read_text()
    assert text.count("python -m benchmarks.kd_loss --shapes toy --dtypes float32") == 2
    assert "| adaptive_kl, ours | 1 |" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("divergence", kd_loss.PEER_BETA)
def test_peers_compute_the_same_loss_and_gradients(method, divergence):
    if method == "trl chunked" and Version(trl.__version__) < Version("1.15"):
        pytest.skip("the benchmark calls the tiled loss as TRL has it since 1.15")
    assert max(kd_loss.errors("float32", method, divergence)) < kd_loss.TOLERANCE["float32"]


def test_a_method_that_computes_something_else_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(kd_loss.LOSSES, "ours", lambda x, divergence: 2 * kd_loss.ours(x, "reverse_kl"))
    with pytest.raises(ValueError, match="ours does not compute forward_kl in float32"):
        kd_loss.main(["--shapes", "toy", "--dtypes", "float32", "--methods", "ours", "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_the_products_are_those_of_the_losses():
    x = kd_loss.problem(kd_loss.SHAPES["toy"], torch.float32)
    d_hidden, d_head = kd_loss.products(x)
    logits = (x.hidden @ x.head.T).detach()
    torch.testing.assert_close(d_hidden, logits @ x.head.detach(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(d_head, logits.T @ x.hidden.detach(), rtol=1e-4, atol=1e-2)


def test_out_of_memory_is_a_row_of_the_table_and_of_the_plot(tmp_path):
    case = {"shape": "toy", "dtype": "float32", "divergence": "forward_kl"}
    records = [
        {**case, "method": "ours", "round": "0", "status": "ok", "wall_s": 2.0, "cpu_s": 4.0, "growth_bytes": 1e9},
        {**case, "method": "trl full", "round": "0", "status": measure.OUT_OF_MEMORY, "seen_bytes": 19.2e9},
        {**case, "method": "trl chunked", "round": "0", "status": "ok", "wall_s": 6.0, "cpu_s": 9.0,
         "growth_bytes": 4e9},
    ]  # fmt: skip
    machine = measure.machine() | {"threads": 2}
    result = {"records": records, "agreement": [], "commands": ["command"], "machine": machine}
    result["rows"] = kd_loss.summarize(result)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["trl chunked"]["wall_over_ours"] == 3.0 and rows["trl chunked"]["growth_over_ours"] == 4.0
    assert rows["trl full"]["wall_s"] is None and rows["trl full"]["wall_over_ours"] is None
    assert "| forward_kl, trl full | 1 | – | – | out of memory at 19.2 GB |" in kd_loss.report(result)
    kd_loss.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_an_unknown_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        kd_loss.main(["--shapes", "qwen", "--out", str(tmp_path / "x")])
    assert "unknown 'qwen'; known: qwen2.5-0.5b" in capsys.readouterr().err
