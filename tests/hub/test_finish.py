import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub import finish
from hf_transfer_ext.hub.finish import add_measurements, finish_run, stage_table
from hf_transfer_ext.hub.inputs import InputsInBackground
from hf_transfer_ext.hub.record import RunRecord, Stage, read_record
from hf_transfer_ext.measurement import Measurement


def measured(value):
    return Measurement("perplexity", value, "exp(nats per token)", False, 4)


def test_a_model_is_saved_with_card_record_and_plot(tmp_path, capsys):
    record = RunRecord("distillation", "recipes/distill.py")
    both = {"before": [measured(5.0)], "after": [measured(3.0)]}
    finish_run(tmp_path / "out", record, both, result="after", model=tiny_llama(), tokenizer=byte_tokenizer())
    read = read_record(tmp_path / "out")
    assert read.metrics[0].value == 3.0 and read.compared["before"][0].value == 5.0
    assert (tmp_path / "out" / "comparison.png").exists() and "perplexity" in capsys.readouterr().out


def test_a_report_without_weights_has_card_record_and_table(tmp_path, capsys):
    record = RunRecord("evaluation", "recipes/evaluate.py", stages=[Stage("measure", 1.0)])
    finish_run(tmp_path / "out", record, {"a": [measured(5.0)], "b": [measured(3.0)]}, plot=None, quiet=True)
    assert capsys.readouterr().out == ""
    card = (tmp_path / "out" / "README.md").read_text()
    assert "evaluation" in card and "from_pretrained" not in card and "| `perplexity` |" in card
    assert list(read_record(tmp_path / "out").compared) == ["a", "b"]
    assert "perplexity" in (tmp_path / "out" / "table.txt").read_text()


def test_without_matplotlib_the_result_is_saved_without_a_plot(tmp_path, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise ImportError("The plot needs matplotlib")

    monkeypatch.setattr(finish, "comparison_plot", missing)
    found = {"a": [measured(5.0)]}
    finish_run(tmp_path / "out", RunRecord("distillation", "r"), found, result="a", model=tiny_llama())
    assert "No plot was drawn" in capsys.readouterr().out and read_record(tmp_path / "out").metrics


def test_later_measurements_replace_those_of_their_name(tmp_path):
    assert not add_measurements(tmp_path, [measured(1.0)])
    finish_run(tmp_path / "out", RunRecord("merging", "r"), {"a": [measured(5.0)]}, result="a", model=tiny_llama())
    new = Measurement("recovered at worst", 0.5, "share", False, 4)
    assert add_measurements(tmp_path / "out", [measured(4.0), new])
    assert [(m.name, m.value) for m in read_record(tmp_path / "out").metrics] == [
        ("perplexity", 4.0), ("recovered at worst", 0.5),
    ]  # fmt: skip
    assert "recovered at worst" in (tmp_path / "out" / "README.md").read_text()


def test_inputs_are_described_beside_the_work_and_an_unreadable_record_stops_nothing(tmp_path):
    for name in ("good", "bad"):
        tiny_llama().save_pretrained(tmp_path / name)
    (tmp_path / "bad" / "hf_transfer_ext.json").write_text("{")
    record = RunRecord("merging", "r")
    with InputsInBackground([(tmp_path / "good", None, "base"), (tmp_path / "bad", None, "model")]) as inputs:
        inputs.put_into(record)
    assert [(item.name, item.role, bool(item.sha256)) for item in record.inputs] == [
        ("good", "base", True), ("bad", "model", True),
    ]  # fmt: skip
    assert "Where the input bad comes from" in record.not_measured[0]


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_the_table_of_stages_adds_up(seconds):
    assert f"{seconds + 1:.1f} s" in stage_table([Stage("a", seconds), Stage("b", 1.0)]).splitlines()[-1]
