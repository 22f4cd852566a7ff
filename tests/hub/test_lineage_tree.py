"""The tree of a result: from records that are carried, found in folders by digest, or read from the Hub."""

import json

import pytest
from hub.folders import model_folder, record_of

from hf_transfer_ext.cli import main
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.lineage_tree import MAX_NODES, draw_tree, lineage_tree, tree_text
from hf_transfer_ext.hub.publish import push, save_result
from hf_transfer_ext.hub.record import RunInput, describe_input, read_record
from hf_transfer_ext.measurement import Measurement


def measured(name, value):
    return Measurement(name, value, "nats per token", False, 4, (value - 1, value + 1))


@pytest.fixture
def chain(tmp_path):
    """teacher -> student -> adapter on it -> merge -> unlearned, each with a number."""
    teacher = model_folder(tmp_path / "teacher", b"t")
    student = model_folder(tmp_path / "student", b"s")
    made = record_of("distillation", describe_input(teacher, role="teacher"), metrics=[measured("kl", 2.0)])
    made.compared = {"teacher": [measured("nats", 7.0)]}
    save_result(student, record=made)
    adapter = model_folder(tmp_path / "adapter", b"a", name="adapter_model.safetensors")
    made = record_of("transfer", describe_input(student, role="base"), metrics=[measured("accuracy", 3.0)])
    save_result(adapter, record=made)
    merged = model_folder(tmp_path / "merged", b"m")
    inputs = [describe_input(student, role="base"), describe_input(adapter, role="adapter")]
    save_result(merged, record=record_of("merging", *inputs, metrics=[measured("perplexity", 4.0)]))
    unlearned = model_folder(tmp_path / "unlearned", b"u")
    made = record_of("unlearning", describe_input(merged), metrics=[measured("recovered at worst", 5.0)])
    save_result(unlearned, record=made)
    return tmp_path


def test_the_whole_chain_is_shown_with_its_numbers(chain):
    node = lineage_tree(chain / "unlearned")
    assert [(one.role, one.name, one.job) for one in node] == [
        ("", "unlearned", "unlearning"), ("model", "merged", "merging"), ("base", "student", "distillation"),
        ("teacher", "teacher", None), ("adapter", "adapter", "transfer"), ("base", "student", "distillation"),
    ]  # fmt: skip
    assert [[m.value for m in one.metrics] for one in node] == [[5.0], [4.0], [2.0], [7.0], [3.0], [2.0]]
    text = tree_text(node)
    assert "└─ model: merged (merging, 20" in text and "recovered at worst 5 [4, 6] ↓ nats per token" in text
    assert text.count("teacher: teacher") == 1 and "base: student (distillation" in text and "shown above" in text
    assert str(chain) not in text


def test_the_command_prints_text_json_and_pictures(chain, capsys):
    assert main(["lineage", str(chain / "unlearned")]) == 0
    assert capsys.readouterr().out.startswith("unlearned (unlearning")
    picture = chain / "tree.svg"
    assert main(["lineage", str(chain / "unlearned"), "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parents"][0]["name"] == "merged" and found["parents"][0]["metrics"][0]["value"] == 4.0
    drawn = picture.read_text()
    assert all(name in drawn for name in ("teacher", "student", "adapter", "merged", "unlearned", "recovered"))
    assert str(chain) not in drawn
    again = draw_tree(lineage_tree(chain / "unlearned"), chain / "again.svg")
    assert again.read_text() == drawn
    assert draw_tree(lineage_tree(chain / "unlearned"), chain / "tree.png").read_bytes().startswith(b"\x89PNG")
    assert main(["lineage", str(chain / "unlearned"), "--picture", "x.gif"]) == 2
    assert "neither" in capsys.readouterr().err
    assert main(["lineage", str(chain / "absent")]) == 2


def test_a_parent_is_found_by_the_digests_of_its_files_and_by_no_path(chain, tmp_path):
    sha256 = describe_input(chain / "merged").sha256
    orphan = model_folder(tmp_path / "orphan", b"o")
    save_result(orphan, record=record_of("unlearning", RunInput("renamed", "model", sha256=sha256)))
    node = lineage_tree(orphan)
    assert node.parents[0].job is None and node.parents[0].note == "No record of it is known."
    node = lineage_tree(orphan, search=[chain])
    assert (node.parents[0].job, node.parents[0].source) == ("merging", "a searched folder")
    assert "teacher" in tree_text(node)
    (chain / "merged" / "model.safetensors").write_bytes(b"changed later")
    note = lineage_tree(orphan, search=[chain]).parents[0].note
    assert note == "The folder 'merged' has another content than its record says."
    assert "No searched folder" in lineage_tree(orphan, search=[chain / "student"]).parents[0].note


def test_a_later_measurement_of_a_parent_is_shown_where_its_folder_is_searched(chain):
    made = read_record(chain / "merged")
    made.metrics.append(measured("measured later", 9.0))
    save_result(chain / "merged", record=made, overwrite=True)
    assert "measured later" not in tree_text(lineage_tree(chain / "unlearned"))
    assert "measured later 9" in tree_text(lineage_tree(chain / "unlearned", search=[chain / "merged"]))


def test_an_audit_shows_its_numbers_at_the_models_it_compared(chain, tmp_path):
    inputs = [describe_input(chain / "unlearned", role="unlearned"), describe_input(chain / "merged", role="original")]
    found = {"unlearned": [measured("recovered by paraphrases", 0.1)], "original": [measured("answers right", 0.9)]}
    finish_run(tmp_path / "audit", record_of("audit", *inputs), found, plot=None, quiet=True)
    node = lineage_tree(tmp_path / "audit")
    assert [m.name for m in node.parents[0].metrics] == ["recovered at worst", "recovered by paraphrases"]
    assert "answers right 0.9" in tree_text(node)


def test_parents_on_the_hub_are_read_at_their_commit(hub, chain, tmp_path):
    url = push(chain / "merged", "tester/merged", token=hub.token)
    commit = url.rsplit("/", 1)[1]
    orphan = model_folder(tmp_path / "orphan", b"o")
    save_result(orphan, record=record_of("unlearning", RunInput("tester/merged", "model", True, commit)))
    node = lineage_tree(orphan)
    assert (node.parents[0].job, node.parents[0].source, node.parents[0].revision) == ("merging", "the Hub", commit)
    push(orphan, "tester/unlearned", token=hub.token)
    node = lineage_tree("tester/unlearned")
    assert node.revision == hub.commits("tester/unlearned")[0].oid and node.parents[0].job == "merging"
    missing = record_of("unlearning", RunInput("tester/gone", "model", True, "d" * 40))
    save_result(orphan, record=missing, overwrite=True)
    assert lineage_tree(orphan).parents[0].job is None
    assert lineage_tree(orphan, search=["tester/merged"]).parents[0].job is None


def test_a_model_without_a_record_shows_what_its_card_names(tmp_path):
    made = model_folder(tmp_path / "foreign", b"f", card="---\nbase_model: org/base\n---\n")
    node = lineage_tree(made)
    assert (node.name, node.role, node.job) == ("foreign", "", None)
    assert [(one.name, one.note) for one in node.parents] == [("org/base", "Named by the card alone.")]


def test_records_in_a_circle_end(tmp_path):
    """Two folders that claim to be made from each other, and a result with the same files as its input."""
    one, two = model_folder(tmp_path / "one", b"1"), model_folder(tmp_path / "two", b"2")
    digests = [describe_input(folder).sha256 for folder in (one, two)]
    save_result(one, record=record_of("merging", RunInput("two", "model", sha256=digests[1])))
    save_result(two, record=record_of("merging", RunInput("one", "model", sha256=digests[0])))
    node = lineage_tree(one, search=[tmp_path])
    assert [x.name for x in node] == ["one", "two", "one"]
    assert "that of a descendant" in node.parents[0].parents[0].note
    save_result(one, record=record_of("unlearning", RunInput("one", "model", sha256=digests[0])), overwrite=True)
    assert len(list(lineage_tree(one, search=[tmp_path]))) == 2


def test_hostile_records_are_bounded_and_do_nothing_to_a_terminal(tmp_path):
    line = record_of("distillation")
    for _ in range(30):  # 2**30 ways from the last to the first
        line = record_of("merging", RunInput("a", "model", record=line), RunInput("b", "model", record=line))
    line.write(model_folder(tmp_path / "deep", b"d"))
    assert len(list(lineage_tree(tmp_path / "deep"))) == 61
    wide = record_of("merging", *(RunInput(f"m{n}", "model") for n in range(2 * MAX_NODES)))
    wide.write(model_folder(tmp_path / "wide", b"w"))
    node = lineage_tree(tmp_path / "wide")
    assert len(list(node)) == MAX_NODES and "are not shown" in node.note
    with pytest.raises(ValueError, match="up to 150 are drawn"):
        draw_tree(node, tmp_path / "x.svg")
    odd = record_of("merging\x1b[2J", RunInput("\x1b]0;x\x07 $\\frac{}$ /home/me/secret/model\n" * 500, "model"))
    odd.write(model_folder(tmp_path / "odd", b"o"))
    text = tree_text(lineage_tree(tmp_path / "odd"))
    assert "\x1b" not in text and "\x07" not in text and "/home/me" not in text and len(text) < 1000
    draw_tree(lineage_tree(tmp_path / "odd"), tmp_path / "odd.svg")
    (tmp_path / "odd" / "hf_transfer_ext.json").write_text("[" * 5000)
    with pytest.raises(ValueError, match="nested deeper"):
        lineage_tree(tmp_path / "odd")


def test_a_broken_record_among_searched_folders_is_passed_over(chain, tmp_path, caplog):
    broken = model_folder(tmp_path / "broken", b"b")
    (broken / "hf_transfer_ext.json").write_text("{")
    sha256 = describe_input(chain / "merged").sha256
    orphan = model_folder(tmp_path / "orphan", b"o")
    save_result(orphan, record=record_of("unlearning", RunInput("x", "model", sha256=sha256)))
    assert lineage_tree(orphan, search=[tmp_path]).parents[0].job == "merging" and "not searched" in caplog.text
