"""What experiment trackers are sent by two processes: each log line once, with means over the tokens of both."""

import importlib
import json
import struct

import pytest
from processes import on_two_ranks
from trainers.test_logs import distilling, unlearning

#: Name in `report_to` -> its package.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PARTS = {distilling: {"ce", "kd"}, unlearning: {"forget_loss", "retain_loss", "forget_nll"}}


def sent_to_tensorboard(folder):
    """[(step, {name: value})] of the only file of events; a record has a length, two checksums and an event."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.rglob("*tfevents*")
    data, found = path.read_bytes(), {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return sorted(found.items())


def sent_to_wandb(folder):
    """The same of the only offline run: blocks of 32 KB, of pieces with a checksum, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    data, place, message, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record, message = Record.FromString(message), b""
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                line = {name: json.loads(value) for name, value in items.items()}
                found.append((line["train/global_step"], line))
    return found


def sent_to_trackio(folder):
    """The same of the run that is named after the folder, in the data base of this session."""
    from trackio.sqlite_storage import SQLiteStorage

    return [(line["step"], line) for line in SQLiteStorage.get_logs("huggingface", folder.name)]


CASES = [
    pytest.param(tracker, make, marks=[] if (tracker, make) == ("tensorboard", distilling) else pytest.mark.slow)
    for tracker in PACKAGES
    for make in PARTS
]


@pytest.mark.parametrize("tracker, make", CASES)
def test_a_tracker_is_sent_each_log_line_once_and_as_it_is(tmp_path, tracker, make, monkeypatch):
    pytest.importorskip(PACKAGES[tracker])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)

    def rank(_):
        trainer = make(
            tmp_path / "out",
            report_to=tracker,
            logging_steps=1,
            max_steps=2,
            learning_rate=0.1,
            run_name=tmp_path.name,
        )
        trainer.train()
        if tracker == "wandb":  # else it writes its last lines as the process ends
            importlib.import_module("wandb").finish()
        return [line for line in trainer.state.log_history if "loss" in line]

    logged, _ = on_two_ranks(rank, tmp_path)
    sent = {"tensorboard": sent_to_tensorboard, "wandb": sent_to_wandb, "trackio": sent_to_trackio}[tracker](tmp_path)
    lines = [line for _, line in sent if "train/loss" in line]
    assert len(lines) == len(logged) == 2
    for line, expected in zip(lines, logged, strict=True):
        assert PARTS[make] < expected.keys()
        for part in (*PARTS[make], "loss", "tokens_per_second"):
            assert line[f"train/{part}"] == pytest.approx(expected[part], rel=1e-6), part
    assert logged[0]["loss"] != logged[1]["loss"]
