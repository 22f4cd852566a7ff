"""The benchmark of distillation: every signal is in it, and its tables say what its records say."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from benchmarks.distilled_facts import ALONE, SIGNALS, WRITERS, remember, report, steps_of, task_settings
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.spans import SPAN_LOSSES
from hf_transfer_ext.trainers.on_policy import ON_POLICY_METHODS


def test_every_loss_and_method_is_measured():
    assert {one.get("loss") for one in SIGNALS.values()} >= {*DISTILLATION_LOSSES, *SPAN_LOSSES}
    assert {one.get("hidden_loss") for one in SIGNALS.values()} >= set(HIDDEN_LOSSES)
    assert {one.get("on_policy") for one in WRITERS.values()} >= set(ON_POLICY_METHODS)


@pytest.mark.parametrize("writer", WRITERS)
def test_settings_of_a_writer(writer, tmp_path):
    found = task_settings(tmp_path, writer, 0)
    assert found.on_policy == WRITERS[writer].get("on_policy") and found.is_taught == (writer != "data")


def test_equal_time():
    result = {"step_s": {"forward_kl": 2.0, "near": 2.1, "slow": 4.0, "fast": 1.0}}
    found = [steps_of(result, name, 60, "time") for name in ("forward_kl", "near", "slow", "fast", "unknown")]
    assert found == [None, None, 30, 120, None]
    assert steps_of(result, "slow", 60, "steps") == 60


def test_a_remembering_teacher_gives_what_it_gave(monkeypatch):
    model, plain = remember(tiny_llama(0).eval()), tiny_llama(0).eval()
    documents = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    rows = torch.tensor([document + [0] * (4 - len(document)) for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (4 - len(document)) for document in documents])
    packed = torch.tensor([[token for document in reversed(documents) for token in document]])
    positions = torch.tensor([[position for document in reversed(documents) for position in range(len(document))]])
    with torch.no_grad():
        expected = plain(rows, attention_mask=mask).logits
        torch.testing.assert_close(model(rows, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
        monkeypatch.setattr(model.model.layers[0], "forward", None)  # from here on it cannot run
        again = model(rows, attention_mask=mask).logits
        torch.testing.assert_close(again[mask.bool()], expected[mask.bool()])
        in_one_row = model(packed, attention_mask=None, position_ids=positions).logits
    torch.testing.assert_close(in_one_row, plain(packed, position_ids=positions, use_cache=False).logits)
    with pytest.raises(ValueError, match="padded on the left"):
        model(rows, attention_mask=mask.flip(1))


def test_the_tables():
    tokens = [10, 30]

    def texts(nats, right, compared=True):
        more = {"kl_to_reference": [1.0, 3.0], "token_agreement": [0.5, 0.5]} if compared else {}
        return {"nats_per_token": nats, "tokens": tokens, "choice_accuracy": right, **more}

    result = {
        "texts": {
            "teacher": texts([1.0, 1.0], [1, 1, 1, 0], compared=False),
            f"{ALONE} | steps | 0": texts([2.0, 2.0], [0, 0, 0, 1]),
            f"{ALONE} | steps | 1": texts([2.0, 2.0], [0, 0, 0, 1]),
            f"{ALONE} | time | 0": texts([1.8, 1.8], [0, 0, 0, 1]),
            "forward_kl | steps | 0": texts([1.5, 1.9], [0, 0, 1, 1]),
            "forward_kl | steps | 1": texts([1.5, 1.5], [0, 1, 1, 1]),
        },
        "step_s": {"forward_kl": 2.0, ALONE: 1.0},
        "steps": {f"{ALONE} | steps | 0": 60, "forward_kl | steps | 0": 60, "forward_kl | steps | 1": 60},
        "answers": {"data | 0": {"right": [1, 0, 1, 1], "cpu_s": 10.0}},
    }
    text = report(result, "command")
    row = next(line for line in text.splitlines() if line.startswith("| forward_kl |"))
    cells = [cell.split(" (")[0].strip() for cell in row.split("|")[1:11]]
    # (10 * 1.5 + 30 * 1.7) / 40 = 1.65 nats; KL (10 * 1 + 30 * 3) / 40
    assert cells == ["forward_kl", "2", "60", "2.00", "5.2", "0.350", "0.200 to 0.500", "2.500", "0.500", "0.625"]
    # at equal time: 1.8 and 2.0 of cross entropy, and forward KL as above
    row = [line for line in text.splitlines() if line.startswith("| forward_kl |")][1]
    assert [cell.split(" (")[0].strip() for cell in row.split("|")[6:8]] == ["0.250", "0.000 to 0.500"]
    assert "| data | 1 | 75.0%" in text and "Not measured." not in text
