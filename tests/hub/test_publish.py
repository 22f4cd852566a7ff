import io
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hub_server import _Handler, check_card, front_matter
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.utils import _http
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_transfer_ext.adapters.transfer.trans_lora import read_discriminator
from hf_transfer_ext.hub import access
from hf_transfer_ext.hub.card import END, START
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.publish import pull, push, save_result
from hf_transfer_ext.hub.record import RunInput, RunRecord, describe_input, read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.weights.checkpoints import write_checkpoint

IDS = torch.arange(24).reshape(2, 12)


def record(*inputs, job="distillation", **fields):
    return RunRecord(**{"job": job, "recipe": "recipes/distill.py", "inputs": list(inputs), **fields})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora(base, seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(base, config)


def test_a_full_model_comes_back_from_the_hub_as_it_was(hub, tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer(CHAT_TEMPLATE)
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"png")
    made = record(
        RunInput("org/teacher", "teacher", True, "c" * 40),
        metrics=[Measurement("perplexity", 3.5, "perplexity", False, 7, dataset="held-out")],
        config={"output_dir": str(tmp_path / "out")},
    )
    out = save_result(
        tmp_path / "out", model=model, tokenizer=tokenizer, record=made, extra_files={"figures/plot.png": plot}
    )
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "hf_transfer_ext.json", "figures",
    }  # fmt: skip
    url = push(out, "tester/student", token=hub.token)
    assert url == f"{hub.endpoint}/tester/student/commit/{hub.commits('tester/student')[0].oid}"
    back = pull("tester/student")
    for loaded in (load_model("tester/student"), load_model(back), AutoModelForCausalLM.from_pretrained(out)):
        assert torch.equal(logits(loaded), logits(model))
    assert load_tokenizer("tester/student").chat_template == CHAT_TEMPLATE
    assert read_record("tester/student").to_dict() == made.to_dict()
    card = ModelCard.load("tester/student")
    card.validate()
    assert card.data.base_model == "org/teacher" and card.data.eval_results[0].metric_value == 3.5
    assert 'from_pretrained("tester/student")' in card.text and "apply_chat_template" in card.text
    assert hub.files("tester/student")["figures/plot.png"] == b"png"


def test_an_adapter_comes_back_from_the_hub_as_it_was(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    hub.seed("tester/base", tmp_path / "base")
    model = lora(load_model("tester/base"))
    made = record(describe_input("tester/base", model=model), job="unlearning")
    out = save_result(tmp_path / "adapter", model=model, tokenizer=byte_tokenizer(), record=made)
    data = front_matter((out / "README.md").read_text())
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        "peft",
        "tester/base",
        "adapter",
    )
    push(out, "tester/adapter", token=hub.token, private=True)
    assert HfApi(token=hub.token).model_info("tester/adapter").private
    HfApi(token=hub.token).update_repo_settings("tester/adapter", private=False)
    loaded = load_model("tester/adapter")
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(load_model("tester/base")))


def test_an_adapter_of_a_local_base_is_published_without_its_path(hub, tmp_path, caplog):
    base = tmp_path / "secret-folder" / "base"
    tiny_llama().save_pretrained(base)
    model = lora(load_model(base))
    out = save_result(tmp_path / "adapter", model=model, record=record(describe_input(base), job="unlearning"))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(logits(load_model(out)), logits(model))
    push(out, "tester/adapter", token=hub.token)
    sent = hub.files("tester/adapter")
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert "only a local folder" in caplog.text
    for path, data in sent.items():
        assert b"secret-folder" not in data and str(tmp_path).encode() not in data, path
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_card_and_record_are_added_to_what_another_writer_wrote(hub, tmp_path):
    out = tmp_path / "merged"
    tiny_llama().save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    made = record(RunInput("a/x", "model", True), RunInput("a/y", "model", True), job="merging")
    save_result(out, record=made)
    assert front_matter((out / "README.md").read_text())["base_model"] == ["a/x", "a/y"]
    assert (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(FileExistsError, match="overwrite"):
        save_result(out, record=made)
    save_result(out, record=record(job="merging", seed=5), overwrite=True)
    assert read_record(out).seed == 5
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        save_result(tmp_path / "nothing", record=made)
    assert not (tmp_path / "nothing").exists()


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record(seed=1))
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_result(out, model=tiny_llama(1), record=record())
    with pytest.raises(ValueError, match="leads out"):
        save_result(out, model=tiny_llama(1), record=record(), overwrite=True, extra_files={"../x": __file__})
    with pytest.raises(FileNotFoundError, match="extra file"):
        save_result(out, model=tiny_llama(1), record=record(), overwrite=True, extra_files={"x": tmp_path / "none"})
    monkeypatch.setattr(RunRecord, "write", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_result(out, model=tiny_llama(1), record=record(seed=2), overwrite=True)
    assert read_record(out).seed == 1 and torch.equal(logits(load_model(out)), logits(tiny_llama()))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_name_alone_goes_to_the_own_account(hub, tmp_path):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    assert push(out, "mine", token=hub.token).startswith(f"{hub.endpoint}/tester/mine/commit/")
    assert b'from_pretrained("tester/mine")' in hub.files("tester/mine")["README.md"]
    with pytest.raises(PermissionError, match="hf auth login"):
        push(out, "mine")


def test_pickles_checkpoints_and_hidden_files_stay_here(hub, tmp_path):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    for name in ("training_args.bin", "optimizer.pt", ".env", "runs/events", "checkpoint-5/model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
    push(out, "tester/a", token=hub.token)
    assert set(hub.files("tester/a")) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "hf_transfer_ext.json",
        "model.safetensors",
    }  # fmt: skip


def test_a_token_in_any_text_stops_the_push(hub, tmp_path):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    (out / "notes").mkdir()
    (out / "notes" / "how.md").write_text(f"Log in with {hub.token}")
    with pytest.raises(ValueError, match=r"notes/how\.md.*access token") as error:
        push(out, "tester/a", token=hub.token, include=["notes/*.md"])
    assert hub.token not in str(error.value) and not hub.repos


def test_revisions_are_branches_and_existing_repositories_are_taken(hub, tmp_path):
    first = save_result(tmp_path / "first", model=tiny_llama(1), record=record(seed=1))
    second = save_result(tmp_path / "second", model=tiny_llama(2), record=record(seed=2))
    push(first, "tester/a", token=hub.token)
    push(second, "tester/a", token=hub.token, revision="try/two", commit_message="The second")
    assert (read_record(pull("tester/a")).seed, read_record(pull("tester/a", "try/two")).seed) == (1, 2)
    assert hub.commits("tester/a", "try/two")[0].title == "The second"
    push(second, "tester/a", token=hub.token)
    assert read_record(pull("tester/a")).seed == 2
    assert torch.equal(logits(load_model("tester/a")), logits(tiny_llama(2)))
    old = hub.commits("tester/a")[1].oid
    assert torch.equal(logits(load_model("tester/a", revision=old)), logits(tiny_llama(1)))


@pytest.mark.parametrize("token", [None, "hf_" + "w" * 34, "reader"], ids=["none", "wrong", "no-right"])
def test_who_may_not_write_is_told_what_to_do(hub, tmp_path, token):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    token = hub.reader_token if token == "reader" else token
    with pytest.raises(PermissionError, match="hf auth login") as error:
        push(out, "tester/a", token=token)
    assert token is None or token not in str(error.value)
    assert not hub.repos


def test_a_folder_without_card_record_or_weights_is_not_published(hub, tmp_path):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    for name in ("README.md", "hf_transfer_ext.json", "model.safetensors"):
        kept = (out / name).read_bytes()
        os.remove(out / name)
        with pytest.raises(FileNotFoundError, match=r"README.md|hf_transfer_ext.json|safetensors"):
            push(out, "tester/a", token=hub.token)
        (out / name).write_bytes(kept)
    assert not hub.repos


def test_two_pushes_at_once_both_arrive(hub, tmp_path):
    folders = [save_result(tmp_path / str(n), model=tiny_llama(n), record=record(seed=n)) for n in range(2)]
    for names in (["tester/a", "tester/b"], ["tester/same", "tester/same"]):
        with ThreadPoolExecutor(2) as pool:
            urls = list(pool.map(lambda pair: push(*pair, token=hub.token), zip(folders, names, strict=True)))
        assert len(set(urls)) == 2
        for name, url in zip(names, urls, strict=True):
            pulled = pull(name, url.rsplit("/", 1)[-1])
            seed = read_record(pulled).seed
            assert torch.equal(logits(load_model(pulled)), logits(tiny_llama(seed)))
    assert len(hub.commits("tester/same")) == 3


def test_the_trainer_pushes_to_the_same_server(hub, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"input_ids": IDS[0], "labels": IDS[0]}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        push_to_hub=True, hub_model_id="tester/trained", hub_token=hub.token, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(tiny_llama(), arguments, train_dataset=Rows(), processing_class=byte_tokenizer())
    trainer.train()
    trainer.push_to_hub()
    assert torch.equal(logits(load_model("tester/trained")), logits(trainer.model))
    sent = hub.files("tester/trained")
    assert check_card(sent["README.md"].decode())[0] == []
    # Our own push afterwards replaces the card and adds the record.
    save_result(tmp_path / "out", record=record(seed=9), overwrite=True)
    push(tmp_path / "out", "tester/trained", token=hub.token)
    assert read_record("tester/trained").seed == 9
    assert AutoTokenizer.from_pretrained("tester/trained")("ab").input_ids == byte_tokenizer()("ab").input_ids


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_by_its_id(hub, tmp_path, streaming):
    from datasets import Dataset, load_dataset

    rows = [{"text": f"line {n}", "number": n} for n in range(5)]
    Dataset.from_list(rows).push_to_hub("tester/parquet", token=hub.token)
    hub.seed(
        "tester/lines",
        {
            "train.jsonl": "\n".join(json.dumps(row) for row in rows),
            "test.jsonl": json.dumps(rows[0]),
            "README.md": "---\nlicense: mit\n---\n",
        },
        repo_type="dataset",
    )
    for name in ("tester/parquet", "tester/lines"):
        assert list(load_dataset(name, split="train", streaming=streaming)) == rows
    assert list(load_dataset("tester/lines", split="test", streaming=streaming)) == rows[:1]
    found = describe_input("tester/parquet", role="dataset")
    assert found.on_hub and found.revision == hub.commits("tester/parquet", repo_type="dataset")[0].oid
    assert any(name.endswith(".parquet") for name in found.sha256)
    assert snapshot_download("tester/lines", repo_type="dataset")


def test_files_that_are_not_of_a_result_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"notes\.txt"):
            save_result(tmp_path / "out", model=tiny_llama(1), record=record(), overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_result_with_extra_files_is_replaced_by_one_with_the_same(tmp_path):
    (tmp_path / "plot.png").write_text("")
    for _ in range(2):
        save_result(
            tmp_path / "out",
            model=tiny_llama(1),
            record=record(),
            overwrite=True,
            extra_files={"plots/loss.png": tmp_path / "plot.png"},
        )
    assert (tmp_path / "out" / "plots" / "loss.png").exists()


def sharded(folder, model, **fields):
    """A result in several files."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    write_checkpoint(folder, model.state_dict(), max_shard_bytes=20_000)
    return save_result(folder, tokenizer=byte_tokenizer(), record=record(**fields))


def test_a_push_makes_the_repository_what_the_folder_is(hub, tmp_path, caplog):
    tiny_llama(7).save_pretrained(tmp_path / "base")
    hub.seed("tester/base", tmp_path / "base")
    base = load_model("tester/base")
    adapter = lora(base)
    full, other = tiny_llama(1), tiny_llama(2)
    folders = {
        "one": (save_result(tmp_path / "one", model=full, tokenizer=byte_tokenizer(), record=record()), full),
        "shards": (sharded(tmp_path / "shards", other), other),
        "adapter": (
            save_result(tmp_path / "adapter", model=adapter, record=record(describe_input("tester/base"))),
            adapter,
        ),
    }
    hub.seed("tester/a", {"notes.md": "mine", "figures/a.png": b"mine"})
    for name in ("one", "shards", "one", "adapter", "shards", "adapter", "one"):
        folder, model = folders[name]
        caplog.clear()
        before = len(hub.commits("tester/a"))
        push(folder, "tester/a", token=hub.token)
        assert len(hub.commits("tester/a")) == before + 1
        sent = {p.name for p in folder.iterdir()} - {"figures"}
        assert set(hub.files("tester/a")) == sent | {"notes.md", "figures/a.png"}
        assert "stay there: figures/a.png, notes.md" in caplog.text
        assert torch.equal(logits(load_model("tester/a")), logits(model)), name
        assert torch.equal(logits(load_model(pull("tester/a"))), logits(model)), name


def test_weights_of_others_are_not_loaded_in_the_place_of_what_was_pushed(hub, tmp_path, caplog):
    tiny_llama(1).save_pretrained(tmp_path / "theirs")
    torch.save({}, tmp_path / "theirs" / "pytorch_model.bin")
    hub.seed("tester/a", tmp_path / "theirs")
    push(sharded(tmp_path / "shards", tiny_llama(2)), "tester/a", token=hub.token)
    assert {"model.safetensors", "pytorch_model.bin"}.isdisjoint(hub.files("tester/a"))
    assert "Removed from tester/a in this commit: model.safetensors, pytorch_model.bin" in caplog.text
    assert torch.equal(logits(load_model("tester/a")), logits(tiny_llama(2)))


@pytest.mark.parametrize("change", ["weights", "missing", "added"])
def test_pull_refuses_what_the_record_does_not_state(hub, tmp_path, change):
    out = save_result(tmp_path / "out", model=tiny_llama(), tokenizer=byte_tokenizer(), record=record())
    push(out, "tester/a", token=hub.token)
    assert pull("tester/a").is_dir()
    files = dict(hub.files("tester/a"))
    if change == "weights":
        tiny_llama(1).save_pretrained(tmp_path / "other")
        files["model.safetensors"] = (tmp_path / "other" / "model.safetensors").read_bytes()
    elif change == "missing":
        del files["tokenizer.json"]
    else:
        files["adapter_config.json"] = b"{}"
    hub.seed("tester/a", files)
    name = {"weights": "model.safetensors", "missing": "tokenizer.json", "added": "adapter_config.json"}[change]
    with pytest.raises(ValueError, match=f"not those of its record: {name}"):
        pull("tester/a")


def test_a_file_that_arrived_as_another_one_is_fetched_again(hub, tmp_path, monkeypatch, caplog):
    """A proxy gives the ETag and the content of an older file, once."""
    push(save_result(tmp_path / "old", model=tiny_llama(1), record=record()), "tester/a", token=hub.token)
    old = hub.repos[("models", "tester/a")].find("main").files["model.safetensors"]
    push(save_result(tmp_path / "new", model=tiny_llama(2), record=record(seed=2)), "tester/a", token=hub.token)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original, left = _Handler._send_range, ["HEAD", "GET"]

    def stale(handler, data, headers):
        if handler.path.endswith("model.safetensors") and handler.command in left:
            left.remove(handler.command)
            data, headers = old.data, {**headers, "ETag": f'"{old.sha256}"', "X-Linked-Etag": f'"{old.sha256}"'}
        original(handler, data, headers)

    monkeypatch.setattr(_Handler, "_send_range", stale)
    assert torch.equal(logits(load_model(pull("tester/a"))), logits(tiny_llama(2)))
    assert not left and "is not the file that its record states. Fetching it again." in caplog.text
    assert torch.equal(logits(load_model(pull("tester/a"))), logits(tiny_llama(2)))


def test_only_what_a_result_consists_of_is_sent(hub, tmp_path, caplog):
    out = save_result(tmp_path / "out", model=tiny_llama(), tokenizer=byte_tokenizer(), record=record())
    private = tmp_path / "private"
    private.mkdir()
    (private / "id_rsa").write_text("PRIVATE")
    (out / "data").symlink_to(private)
    (out / "loop").symlink_to(out)
    (out / "notes.md").write_text("notes")
    (out / "table.csv").write_text("a,b")
    push(out, "tester/a", token=hub.token, include=["notes.md"])
    sent = hub.files("tester/a")
    assert "notes.md" in sent and "table.csv" not in sent and not any(b"PRIVATE" in data for data in sent.values())
    assert "'data', 'loop', 'table.csv'" in caplog.text
    with pytest.raises(FileNotFoundError, match="include"):
        push(out, "tester/a", token=hub.token, include=["nothing.md"])
    for name in ("data/id_rsa", "data/*"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"link|leads out|include"):
            push(out, "tester/a", token=hub.token, include=[name])
    (out / "tokenizer_config.json").rename(private / "t.json")
    (out / "tokenizer_config.json").symlink_to(private / "t.json")
    with pytest.raises(ValueError, match=r"link|leads out"):
        push(out, "tester/a", token=hub.token)


def test_a_file_that_changed_since_it_was_saved_is_not_published(hub, tmp_path):
    out = save_result(tmp_path / "out", model=tiny_llama(), tokenizer=byte_tokenizer(), record=record(seed=3))
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"generation_config\.json.*has changed"):
        push(out, "tester/a", token=hub.token)
    save_result(out, record=read_record(out), overwrite=True)
    push(out, "tester/a", token=hub.token)
    assert hub.files("tester/a")["chat_template.jinja"] == b"{{ messages }}" and read_record("tester/a").seed == 3


@pytest.mark.parametrize("name", ["page.html", "NOTES", "run.ipynb", "x.csv", "big.json", "config.json"])
def test_secrets_are_found_in_every_file_that_is_sent(hub, tmp_path, name):
    out = save_result(tmp_path / "out", model=tiny_llama(), record=record())
    config = json.loads((out / "config.json").read_text())
    content = json.dumps({**config, "note": f"x_{hub.token}", "long": "x" * 5_000_000 if name == "big.json" else ""})
    (out / name).write_text(content, encoding="utf-16" if name == "NOTES" else "utf-8")
    save_result(out, record=record(), overwrite=True)
    with pytest.raises(ValueError, match="access token"):
        push(out, "tester/a", token=hub.token, include=[name])
    assert not hub.repos


def test_results_on_the_hubs_data_are_published_beside_the_card(hub, tmp_path):
    data = RunInput("org/data", "dataset", True, "c" * 40)
    found = Measurement("perplexity", 12.5, "perplexity", False, 10, dataset="org/data, test")
    made = RunRecord("distillation", "recipes/distill.py", inputs=[data], metrics=[found])
    save_result(tmp_path / "out", model=tiny_llama(), tokenizer=byte_tokenizer(), record=made)
    push(tmp_path / "out", "tester/measured", token=hub.token)
    assert b"id: org/data" in hub.files("tester/measured")[".eval_results/hf_transfer_ext.yaml"]
    made.metrics = []
    save_result(tmp_path / "out", record=made, overwrite=True)
    push(tmp_path / "out", "tester/measured", token=hub.token)
    assert ".eval_results/hf_transfer_ext.yaml" not in hub.files("tester/measured")


def adapter_folder(folder, base="org/base", seed=0, job="unlearning", **fields):
    made = record(RunInput(base, "model", True, "c" * 40), job=job, **fields)
    return save_result(folder, model=lora(tiny_llama(), seed), record=made)


def test_what_the_next_transfer_needs_travels_without_local_paths(hub, tmp_path):
    folder = adapter_folder(tmp_path / "lora", job="transfer")
    adapter_folder(folder / "discriminator", seed=1)
    config = json.loads((folder / "discriminator" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "discriminator" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "transfer_seeds.json").write_text('{"seeds": ["a question"]}')
    (folder / "transfer.json").write_text('{"method": "trans_lora"}')
    save_result(folder, record=read_record(folder), overwrite=True)
    push(folder, "tester/lora", token=hub.token)
    pulled = pull("tester/lora")
    assert read_discriminator(pulled).seeds == ["a question"] and (pulled / "transfer.json").is_file()
    assert (pulled / "discriminator" / "adapter_model.safetensors").is_file()
    config = json.loads((pulled / "discriminator" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_adapters_of_several_jobs_stand_in_subfolders_of_one_repository(hub, tmp_path):
    worst = Measurement("recovered at worst", 0.4, "share", False, 4)
    one = adapter_folder(tmp_path / "one", metrics=[worst])
    two = adapter_folder(tmp_path / "two", seed=1, job="transfer")
    push(one, "tester/many:forget/one", token=hub.token)
    push(two, "tester/many:two", token=hub.token)
    files = hub.files("tester/many")
    assert len(hub.commits("tester/many")) == 3  # the one that creates it, and one for each adapter
    assert {"forget/one/adapter_model.safetensors", "two/README.md", "two/hf_transfer_ext.json"} <= set(files)
    card = files["README.md"].decode()
    assert check_card(card) == ([], []) and front_matter(card)["base_model"] == "org/base"
    assert "| `forget/one` | unlearning | `org/base` | `recovered at worst` 0.4 |" in card and "| `two` |" in card
    assert 'from_pretrained(base, "tester/many", subfolder="two")' in files["two/README.md"].decode()
    loaded = PeftModel.from_pretrained(tiny_llama(), "tester/many", subfolder="two")
    assert torch.equal(logits(loaded), logits(lora(tiny_llama(), 1)))
    assert (pull("tester/many:two") / "adapter_model.safetensors").is_file()
    assert read_record("tester/many:forget/one").job == "unlearning"
    # Only the subfolder is replaced, and a card of somebody's own is left alone.
    hub.seed("tester/many", {**files, "README.md": "My adapters.", "two/vocab.json": "{}"})
    save_result(two, record=read_record(two), overwrite=True)
    push(two, "tester/many:two", token=hub.token)
    after = hub.files("tester/many")
    assert after["README.md"] == b"My adapters." and "forget/one/adapter_model.safetensors" in after


def test_branches_and_pull_requests(hub, tmp_path):
    out = adapter_folder(tmp_path / "one")
    push(out, "tester/a@trial", token=hub.token)
    assert "adapter_config.json" in hub.files("tester/a", "trial")
    assert "adapter_config.json" not in hub.files("tester/a")
    url = push(out, "tester/a", create_pr=True, token=hub.token)
    assert url.endswith("/tester/a/discussions/1") and "adapter_config.json" not in hub.files("tester/a")
    assert "adapter_config.json" in hub.files("tester/a", "refs/pr/1")
    push(adapter_folder(tmp_path / "two", seed=1), "tester/a", revision="refs/pr/1", token=hub.token)
    new = (tmp_path / "two" / "adapter_model.safetensors").read_bytes()
    assert hub.files("tester/a", "refs/pr/1")["adapter_model.safetensors"] == new
    with pytest.raises(ValueError, match="leave the branch out"):
        push(out, "tester/a@trial", create_pr=True, token=hub.token)


def test_what_a_user_wrote_in_the_card_survives(hub, tmp_path):
    out = adapter_folder(tmp_path / "one")
    path = out / "README.md"
    own = path.read_text().replace("tags:", "language: en\nmine: 3\ntags:\n- custom", 1)
    own = own.replace(START, f"My words above.\n\n{START}") + "\nMy words below.\n"
    path.write_text(own)
    save_result(out, record=record(RunInput("org/b2", "model", True), job="unlearning", seed=9), overwrite=True)
    card = path.read_text()
    front = front_matter(card)
    assert (front["language"], front["mine"], front["base_model"]) == ("en", 3, "org/b2") and "custom" in front["tags"]
    assert card.index("My words above.") < card.index(START) < card.index("`9`") < card.index(END)
    assert card.index(END) < card.index("My words below.") and card.count(START) == 1
    save_result(out, model=lora(tiny_llama()), record=read_record(out), overwrite=True)
    assert "My words below." in path.read_text() and front_matter(path.read_text())["mine"] == 3
    # On the Hub too, where the folder's own card holds none; and the folder's own text comes before it.
    plain = adapter_folder(tmp_path / "plain")
    push(plain, "tester/a", token=hub.token)
    there = hub.files("tester/a")
    hub.seed("tester/a", {**there, "README.md": there["README.md"].decode() + "\nWritten on the Hub.\n"})
    push(plain, "tester/a", token=hub.token)
    assert "Written on the Hub." in hub.files("tester/a")["README.md"].decode()
    push(out, "tester/a", token=hub.token)
    sent = hub.files("tester/a")["README.md"].decode()
    assert "My words above." in sent and "Written on the Hub." not in sent


def test_a_model_of_a_llama_should_be_called_llama(hub, tmp_path, caplog):
    made = record(RunInput("org/l", "teacher", True, license={"license": "llama3.2"}))
    out = save_result(tmp_path / "out", model=tiny_llama(), record=made)
    assert "Built with Llama" in (out / "README.md").read_text()
    push(out, "tester/Llama-small", token=hub.token)
    assert "begins with" not in caplog.text
    push(out, "tester/small", token=hub.token)
    assert "begins with 'Llama'" in caplog.text


def test_a_report_is_published_without_the_rows_that_it_quotes(hub, tmp_path):
    out = tmp_path / "audit"
    out.mkdir()
    (out / "report.html").write_text("a row to forget")
    (out / "plot.png").write_bytes(b"png")
    found = {"unlearned": [Measurement("recovered at worst", 0.5, "share", False, 4)]}
    finish_run(out, record(job="audit"), found, plot=None, quiet=True, push_to="tester/a:audit", token=hub.token)
    sent = hub.files("tester/a")
    assert {"audit/README.md", "audit/hf_transfer_ext.json", "audit/plot.png", "audit/table.txt"} <= set(sent)
    assert "audit/report.html" not in sent and "The audit failed" in sent["audit/README.md"].decode()


def killed_after(hub, monkeypatch, place, count, *, back_after=None):
    """The server dies in the middle of the `count`-th request whose address holds `place`."""
    answer, seen = _Handler._answer, []

    def dies(handler):
        if place in handler.path and handler.command in ("PUT", "POST"):
            seen.append(handler.path)
            if len(seen) == count:
                handler.rfile.read(100)
                threading.Thread(target=hub.close).start()
                if back_after is not None:
                    threading.Timer(back_after, hub.start, [hub.port]).start()
                handler.close_connection = True
                return
        answer(handler)

    monkeypatch.setattr(_Handler, "_answer", dies)
    return seen


@pytest.fixture
def impatient(monkeypatch):
    """The waits of the push and of the client, cut short."""
    monkeypatch.setattr(access, "WAITS", (0.3, 0.3, 0.3))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.05)), time=time.time))


def in_shards(folder):
    made = record(RunInput("org/b", "model", True), job="distillation")
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    return save_result(folder, record=made)


@pytest.mark.parametrize("place, count", [("/lfs/", 2), ("/commit/", 1), ("/preupload/", 1)])
def test_a_push_goes_on_after_the_server_was_killed(hub, tmp_path, monkeypatch, impatient, place, count):
    out = in_shards(tmp_path / "out")
    push(adapter_folder(tmp_path / "old"), "tester/a", token=hub.token)
    killed_after(hub, monkeypatch, place, count, back_after=0.5)
    push(out, "tester/a", token=hub.token)
    assert len(hub.commits("tester/a")) == 3
    for path in out.iterdir():
        assert path.name == "README.md" or hub.files("tester/a")[path.name] == path.read_bytes()


def test_after_a_kill_the_old_result_is_whole_and_the_next_push_is_one_commit(hub, tmp_path, monkeypatch, impatient):
    out = in_shards(tmp_path / "out")
    shards = len(list(out.glob("*.safetensors")))
    assert shards > 2
    push(adapter_folder(tmp_path / "old"), "tester/a", token=hub.token)
    before = hub.files("tester/a")
    with monkeypatch.context() as patched:
        killed_after(hub, patched, "/lfs/", 2)
        try:
            with pytest.raises(ConnectionError, match="was not changed"):
                push(out, "tester/a", token=hub.token)
        finally:
            time.sleep(0.2)
            hub.start(hub.port)
    assert hub.files("tester/a") == before and len(hub.commits("tester/a")) == 2
    sent, stored = len(hub.requests), set(hub.large)
    push(out, "tester/a", token=hub.token)
    assert len(hub.commits("tester/a")) == 3
    uploaded = {request.rsplit("/", 1)[1] for request in hub.requests[sent:] if request.startswith("PUT /lfs/")}
    assert not uploaded & stored and set(hub.files("tester/a")) >= {path.name for path in out.iterdir()}


def test_an_answer_that_is_lost_after_the_commit_makes_no_second_one(hub, tmp_path, monkeypatch, impatient):
    out = adapter_folder(tmp_path / "one")
    answer, lost = _Handler._answer, []

    def loses(handler):
        if "/commit/" in handler.path and not lost:
            lost.append(handler.path)
            handler.wfile = io.BytesIO()  # the commit is made, and nobody hears of it
            answer(handler)
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        answer(handler)

    monkeypatch.setattr(_Handler, "_answer", loses)
    push(out, "tester/a", token=hub.token)
    assert lost and len(hub.commits("tester/a")) == 2
