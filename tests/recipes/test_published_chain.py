"""The whole chain through the Hub on loopback and the real clients, each step in a cache of its own.

Distill, push, pull, transfer an adapter, push, merge, push, unlearn, audit, push, lineage, reproduce.
"""

import json

import pytest
import torch
from huggingface_hub import HfApi, constants
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.cli import main
from hf_transfer_ext.hub.lineage_tree import lineage_tree, tree_text
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.reproduce import reproduce
from hf_transfer_ext.weights.lora import LoraFactors, save_lora

pytestmark = pytest.mark.slow
QUICK = [
    *(
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ),
    *("--per_device_train_batch_size", "2", "--gradient_checkpointing", "false"),
]


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A function after which nothing of the Hub is in the cache."""
    caches = iter(range(100))

    def clear():
        folder = tmp_path / "caches" / str(next(caches))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(folder))
        monkeypatch.setenv("HF_HUB_CACHE", str(folder))

    clear()
    return clear


def run(*words):
    assert main([str(word) for word in words]) == 0, words


def test_distilled_transferred_merged_unlearned_audited_published_and_reproduced(
    hub, tmp_path, monkeypatch, fresh_cache, capsys
):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    tiny_llama(1).save_pretrained("teacher")
    byte_tokenizer().save_pretrained("teacher")
    hub.seed("tester/teacher", tmp_path / "teacher", private=True)
    tiny_llama(2).save_pretrained("source")
    byte_tokenizer().save_pretrained("source")
    hub.seed("tester/source", tmp_path / "source")
    factors = {
        f"model.layers.{i}.self_attn.q_proj": LoraFactors(torch.randn(32, 2), torch.randn(2, 32)) for i in (0, 1)
    }
    (tmp_path / "task").mkdir()
    save_lora(
        tmp_path / "task", factors, base_model="tester/source", revision=None, target_modules=["q_proj"], rank=2,
        replaced={}, modules_to_save=[], fan_in_fan_out=False, dtype=torch.float32,
    )  # fmt: skip
    hub.seed("tester/tasks", {f"english/{p.name}": p.read_bytes() for p in (tmp_path / "task").iterdir()})
    rows = [
        {"question": f"What is {n}?", "answer": f"It is {n} and {n}."} for n in ("gold", "iron", "tin", "lead")
    ] * 4
    for name in ("forget", "retain", "holdout"):
        text = "".join(json.dumps({**row, "question": f"{name}: {row['question']}"}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    fresh_cache()
    run("distill", "--teacher", "tester/teacher", "--dataset", "retain.jsonl", "--output_dir", "student",
        "--student_layers", 2, "--max_steps", 2, "--max_length", 64, *QUICK, "--push_to_hub", "true", "--hub_model_id",
        "tester/student", "--hub_private_repo", "true")  # fmt: skip
    fresh_cache()
    run("pull", "tester/student", "pulled")
    assert "Its record: distillation" in capsys.readouterr().out
    run("transfer", "tester/tasks:english", "tester/student", "adapter", "--method", "cross_lora",
        "--push_to_hub", "tester/adapters:english")  # fmt: skip
    fresh_cache()
    (tmp_path / "merge.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: tester/student\ndtype: float32\nparameters: {normalize: false}\n"
        "models: [{model: tester/student+tester/adapters:english, parameters: {weight: 0.7}}]\n"
    )
    run("merge", "merge.yml", "merged", "--push_to_hub", "tester/merged")
    fresh_cache()
    run("unlearn", "--model_name_or_path", "tester/merged", "--forget_data", "forget.jsonl", "--retain_data",
        "retain.jsonl", "--template", "plain", "--lora_rank", 2, "--max_steps", 2, "--output_dir", "unlearned",
        *QUICK)  # fmt: skip
    run("audit", "--unlearned", "unlearned", "--original", "tester/merged", "--forget_data", "forget.jsonl",
        "--retain_data", "retain.jsonl", "--holdout_data", "holdout.jsonl", "--template", "plain", "--attacks",
        "plain_question", "--membership", "loss_attack", "--limit", 4, "--max_new_tokens", 4, "--output_dir", "audit",
        "--push_to_hub", "tester/unlearned:audit")  # fmt: skip
    run("push", "unlearned", "tester/unlearned")

    fresh_cache()
    node = lineage_tree("tester/unlearned")
    text = tree_text(node)
    jobs = {one.name: one.job for one in node if one.job}
    assert [jobs[name] for name in ("tester/unlearned", "tester/merged", "tester/student", "tester/adapters")] == [
        "unlearning", "merging", "distillation", "transfer",
    ], text  # fmt: skip
    assert {one.name for one in node} >= {"tester/teacher", "tester/source", "tester/tasks", "forget.jsonl"}, text
    for name in ("tester/unlearned", "tester/student", "tester/teacher"):
        assert any(one.metrics for one in node if one.name == name), (name, text)
    audited = lineage_tree("tester/unlearned:audit")
    assert audited.job == "audit" and "unlearned: unlearned (unlearning" in tree_text(audited)
    run("lineage", "tester/unlearned", "--picture", tmp_path / "lineage.svg")
    assert "tester/teacher" in (tmp_path / "lineage.svg").read_text()

    for name in ("tester/merged", "tester/adapters:english"):
        found = reproduce(name)
        assert found.verdict == "equal" and found.by == "bytes", found.text()
    found = reproduce("tester/student", search=[str(tmp_path)])
    assert found.verdict in ("equal", "within intervals"), found.text()
    found = reproduce("tester/unlearned", search=[str(tmp_path)])
    assert found.verdict in ("equal", "within intervals"), found.text()

    found = reproduce("tester/unlearned:audit", search=[str(tmp_path)])
    assert found.by == "measurements" and found.verdict in ("equal", "within intervals"), found.text()

    # Nothing of this machine was published, and every push was one commit on top of the first.
    for repo in ("student", "adapters", "merged", "unlearned"):
        info = HfApi(token=hub.token).model_info(f"tester/{repo}")
        assert len(hub.commits(f"tester/{repo}")) == (3 if repo == "unlearned" else 2)
        for path, data in hub.files(f"tester/{info.id.split('/')[1]}").items():
            for secret in (str(tmp_path), hub.token):
                assert secret.encode() not in data, (repo, path)
    assert read_record("tester/merged").inputs[0].name == "tester/student"
