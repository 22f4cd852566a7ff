from hf_transfer_ext.hub.table import comparison_plot, comparison_table
from hf_transfer_ext.measurement import Measurement

MEASURED = {
    "teacher": [Measurement("perplexity", 3.25, "exp(nats per token)", False, 10, interval=(3.0, 3.5))],
    "student": [
        Measurement("perplexity", 4.0, "exp(nats per token)", False, 10),
        Measurement("choice_accuracy", 0.75, "share of questions", True, 8, interval=(0.5, 0.9)),
    ],
}


def test_the_table_has_a_row_for_each_metric_and_a_dash_where_nothing_was_measured():
    lines = comparison_table(MEASURED).splitlines()
    assert lines[0].split() == ["metric", "teacher", "student"]
    assert lines[2].split() == ["perplexity", "↓", "(exp(nats", "per", "token))", "3.25", "4"]
    assert lines[3].split() == ["choice_accuracy", "↑", "(share", "of", "questions)", "–", "0.75"]
    assert len({len(line) for line in lines}) == 1


def test_the_plot_is_a_picture_of_its_panels(tmp_path):
    path = comparison_plot(MEASURED, tmp_path / "comparison.png", title="a title")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert width > 1.5 * height  # two panels side by side
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.png"]
