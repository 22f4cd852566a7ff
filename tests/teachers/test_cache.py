"""A teacher cache: rows are the teacher's, found in any batch, once computed; and foreign caches are refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_level

from hf_transfer_ext.hub.teacher_cache import pull_cache, push_cache
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits
from hf_transfer_ext.losses.rows import SampledRows, SparseRows
from hf_transfer_ext.teachers import cache as cache_module
from hf_transfer_ext.teachers.cache import (
    FINGERPRINT_FILE,
    CachedTeacher,
    CacheSpec,
    TeacherCache,
    cache_teacher,
    fingerprint_of,
    open_cache,
    planned_spec,
    weights_digest,
)
from hf_transfer_ext.teachers.documents import Document, documents_of, documents_of_row, require_text_alone
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.signal import Teacher

TEXTS = [[5, 7, 9, 11, 2], [3, 2, 1], [8, 8, 4, 6]]
SPECS = [CacheSpec("top", 5), CacheSpec("top_and_samples", 5, 3), CacheSpec("samples", samples=6), CacheSpec(tau=0.8)]


def frozen(seed=2):
    return tiny_llama(seed).requires_grad_(False)


def batch(texts, *, left=False):
    """Padded inputs and the mask of all predicted tokens."""
    longest = max(map(len, texts))
    ids, attended = torch.full((len(texts), longest), 257), torch.zeros(len(texts), longest, dtype=torch.long)
    for i, text in enumerate(texts):
        part = slice(longest - len(text), None) if left else slice(len(text))
        ids[i, part], attended[i, part] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": attended}, (attended[:, :-1] * attended[:, 1:]).bool()


def packed(texts):
    ids = torch.tensor([[token for text in texts for token in text]])
    places = torch.cat([torch.arange(len(text)) for text in texts])[None]
    return {"input_ids": ids, "position_ids": places}, places[:, 1:] != 0


def expected(model, texts):
    """Logits at each predicted token, text by text."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([text])).logits[0, :-1] for text in texts])


def made(folder, model=None, spec=SPECS[0], texts=TEXTS):
    model = model or frozen()
    return cache_teacher(
        model, [{"input_ids": text} for text in texts], folder, tokenizer=byte_tokenizer(), spec=spec,
        accelerator=Accelerator(cpu=True), batch_size=2,
    )  # fmt: skip


def loss_of(rows, student, name="forward_kl"):
    leaf = student.clone().requires_grad_()
    found = divergence_of_logits(
        leaf, rows, DISTILLATION_LOSSES[name], weights=torch.ones(len(leaf)), temperature=rows.temperature
    )
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    return found.divergence, gradient


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.tau}")
def test_stored_rows_are_the_rows_in_float16(tmp_path, spec):
    model = frozen()
    cache = made(tmp_path / "cache", model, spec)
    student = torch.randn(5, 258, generator=torch.Generator().manual_seed(0))
    document = documents_of_row({"input_ids": TEXTS[0] + [1]})[0]
    again = TeacherCache(tmp_path / "cache")
    assert document not in again
    document = documents_of_row({"input_ids": TEXTS[0]})[0]
    generator = torch.Generator().manual_seed(int.from_bytes(document.key[:7], "little"))
    wanted = spec.rows(expected(model, TEXTS[:1]), generator)
    for one in (cache, again):
        rows = one.rows([document], torch.device("cpu"))
        assert type(rows) is (SparseRows if spec.kind == "top" else SampledRows)
        for got, want in zip(loss_of(rows, student[:4]), loss_of(wanted, student[:4]), strict=True):
            torch.testing.assert_close(got, want, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize(
    "make", [batch, lambda texts: batch(texts, left=True), packed], ids=["right", "left", "packed"]
)
def test_rows_are_found_in_any_order_padding_and_packing(tmp_path, make):
    model = frozen()
    cached = CachedTeacher(made(tmp_path / "cache", model, CacheSpec("top", 258)))
    assert isinstance(cached, Teacher)
    for order in ([0, 1, 2], [2, 0], [1], [0, 2, 1]):
        texts = [TEXTS[i] for i in order]
        rows = cached.signal(model, *make(texts)).rows
        dense = torch.full((len(rows), 258), -torch.inf).scatter(1, rows.top.ids, rows.top.log_probs)
        torch.testing.assert_close(dense.exp(), expected(model, texts).softmax(-1), rtol=2e-3, atol=1e-4)


def test_the_labeled_positions_alone_are_stored_and_any_part_of_them_is_found(tmp_path):
    model, labels = frozen(), [-100, -100, 9, 11, 2]
    cache = cache_teacher(
        model, [{"input_ids": TEXTS[0], "labels": labels}], tmp_path / "c", tokenizer=byte_tokenizer(),
        spec=CacheSpec("top", 4), accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    ids = np.array(TEXTS[0])
    assert Document(ids, np.array([1, 2, 3])) in cache and Document(ids, np.array([1, 3])) in cache
    assert Document(ids, np.array([0, 1])) not in cache and Document(ids, np.array([3, 4])) not in cache
    rows = cache.rows([Document(ids, np.array([1, 3]))], torch.device("cpu"))
    wanted = SparseRows.from_logits(expected(model, TEXTS[:1])[[1, 3]], 4)
    assert rows.top.ids.equal(wanted.top.ids)
    with pytest.raises(ValueError, match="other tokens of it were labeled when the cache was filled"):
        cache.rows([Document(ids, np.array([0]))], torch.device("cpu"))


def test_a_live_teacher_runs_once_for_each_text(tmp_path):
    model = frozen()
    live = LiveTeacher(model, Accelerator(cpu=True))
    cached = open_cache(tmp_path / "c", live, byte_tokenizer(), temperature=1.0, options={"kind": "top", "top": 5})
    for epoch in ([[0, 1], [2]], [[2, 0], [1]], [[1, 2, 0]]):
        for order in epoch:
            cached.signal(model, *batch([TEXTS[i] for i in order]))
    assert cached.forwards == 2 and len(cached.cache) == 3
    cached.cache.flush()
    alone = open_cache(tmp_path / "c", None, byte_tokenizer(), temperature=1.0)
    first, second = (one.signal(model, *batch(TEXTS)).rows for one in (cached, alone))
    assert first.top.ids.equal(second.top.ids) and first.top.log_probs.equal(second.top.log_probs)
    with pytest.raises(ValueError, match=r"has no rows for a text of 2 tokens, \[1, 1\].*holds 3 other texts"):
        alone.signal(model, *batch([[1, 1]]))


def test_no_labeled_token_is_no_row(tmp_path):
    for spec in SPECS[:2]:
        cached = CachedTeacher(made(tmp_path / spec.kind, spec=spec))
        inputs, mask = batch(TEXTS)
        assert len(cached.signal(frozen(), inputs, mask & False).rows) == 0


def test_an_adapter_and_its_base_teach_through_a_cache_that_the_student_does_not_change(tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False), adapter_name="teacher")
    model.add_adapter("student", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("student")
    live = AdapterTeacher(model, "teacher", Accelerator(cpu=True))
    cached = open_cache(tmp_path / "c", live, byte_tokenizer(), temperature=1.0)
    cached.signal(model, *batch(TEXTS))
    digest = weights_digest(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".student." in name:
                parameter.add_(1)
    assert weights_digest(model) == digest
    with pytest.raises(ValueError, match="adapter is 'teacher', needed is 'base'"):
        open_cache(
            tmp_path / "c", AdapterTeacher(model, "base", Accelerator(cpu=True)), byte_tokenizer(), temperature=1
        )


def test_a_cache_of_something_else_is_refused_with_both_fingerprints(tmp_path):
    made(tmp_path / "c")
    other = byte_level()
    cases = {
        "weights is": fingerprint_of(frozen(5), byte_tokenizer(), SPECS[0]),
        "tokenizer is": fingerprint_of(frozen(), other, SPECS[0]),
        "top is 5, needed is 6": fingerprint_of(frozen(), byte_tokenizer(), CacheSpec("top", 6)),
        "temperature is 1.0, needed is 2.0": fingerprint_of(
            frozen(), byte_tokenizer(), CacheSpec("top", 5, temperature=2.0)
        ),
    }
    for message, fingerprint in cases.items():
        with pytest.raises(ValueError, match=r"\(fingerprint [0-9a-f]{16}\) is not of this .*\(fingerprint") as error:
            TeacherCache(tmp_path / "c", fingerprint)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"temperature is 1.0, needed is 3.0"):
        open_cache(tmp_path / "c", None, byte_tokenizer(), temperature=3.0)
    with pytest.raises(ValueError, match="tokenizer is"):
        open_cache(tmp_path / "c", None, other, temperature=1.0)
    with pytest.raises(FileNotFoundError, match="There is no teacher cache in"):
        open_cache(tmp_path / "none", None, other, temperature=1.0)


def test_the_same_weights_are_the_same_teacher_except_at_another_commit(tmp_path):
    def at(commit, revision=None):
        model = frozen()
        model.config._commit_hash = commit
        return fingerprint_of(model, byte_tokenizer(), SPECS[0], revision=revision)

    assert at("a" * 40, "v1")["revision"] == "a" * 40 and at(None, "v1")["revision"] == "v1"
    TeacherCache(tmp_path / "c", at("a" * 40))
    for other in (at("a" * 40, "v1"), at(None, "v1"), at(None)):
        assert TeacherCache(tmp_path / "c", other).fingerprint["revision"] == "a" * 40
    with pytest.raises(ValueError, match=r"revision is 'aaa.*, needed is 'bbb"):
        TeacherCache(tmp_path / "c", at("b" * 40))


def test_more_entries_and_draws_than_sixteen_bits_hold_are_stored(tmp_path):
    logits = torch.zeros(2, 70_001).index_fill(1, torch.tensor([3]), 20.0)
    for spec in (CacheSpec("top", 70_000), CacheSpec("samples", samples=70_000), CacheSpec(top=66_000, samples=2)):
        cache = TeacherCache(tmp_path / spec.kind, {**fingerprint_of(frozen(), byte_tokenizer(), CacheSpec()),
                                                    **asdict(spec), "vocab_size": 70_001})  # fmt: skip
        document = Document(np.array([1, 2, 3]), np.array([0, 1]))
        rows = spec.rows(logits, torch.Generator().manual_seed(0))
        cache.add(document, rows)
        cache.flush()
        found = TeacherCache(tmp_path / spec.kind).rows([document], torch.device("cpu"))
        listed, mass = (found.top, found.top.tail) if spec.kind == "top" else (found.listed, 0)
        factors = 1 if spec.kind == "top" else listed.factors
        assert listed.ids.shape[1] >= (1 if spec.kind == "samples" else 66_000)
        torch.testing.assert_close((factors * listed.log_probs.exp()).sum(1) + mass, torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": float("inf")}, "`temperature` and `tau` of a cache have to be finite and > 0"),
        ({"kind": "topp"}, "Unknown kind of teacher cache 'topp'. Did you mean 'top'"),
        ({"kind": "top", "top": 0}, "`top` of a cache of kind 'top' has to be >= 1, got 0"),
        ({"kind": "top", "samples": 3}, "`samples` of a cache of kind 'top' has to be 0, got 3"),
        ({"kind": "samples", "top": 3}, "`top` of a cache of kind 'samples' has to be 0, got 3"),
        ({"temperature": 0.0}, "`temperature` and `tau` of a cache have to be finite and > 0, got 0.0"),
        ({"tau": -1.0}, "`temperature` and `tau` of a cache have to be finite and > 0"),
        ({"kind": "top", "tau": 0.5}, "a cache of kind 'top' draws nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**options)


def test_options_of_another_type_are_refused(tmp_path):
    for options, message in (
        ({"top": "8"}, "`top` of a teacher cache has to be a whole number, got '8'"),
        ({"samples": 8.5}, "`samples` of a teacher cache has to be a whole number, got 8.5"),
        ({"tau": "1"}, "`tau` of a teacher cache has to be a number, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            planned_spec(tmp_path, 1.0, options)


def test_more_tokens_than_the_vocabulary_has_and_unfrozen_teachers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`top` is 300, but the teacher has 258 vocabulary entries"):
        made(tmp_path / "c", spec=CacheSpec("top", 300))
    with pytest.raises(ValueError, match="Freeze it"):
        fingerprint_of(tiny_llama(), byte_tokenizer(), CacheSpec())
    with pytest.raises(ValueError, match="`batch_size` has to be >= 1"):
        cache_teacher(frozen(), [], tmp_path / "c", tokenizer=byte_tokenizer(), batch_size=0)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    made(tmp_path / "one")
    shard = next((tmp_path / "one").glob("rows-*"))
    made(tmp_path / "two", frozen(6))
    (tmp_path / "two" / "rows-aa.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=r"rows-aa.safetensors .* belongs to another cache"):
        TeacherCache(tmp_path / "two")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read .*Delete it"):
        TeacherCache(tmp_path / "one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that are not a teacher cache"):
        made(tmp_path / "mine")
    stated = json.loads((tmp_path / "two" / FINGERPRINT_FILE).read_text())
    (tmp_path / "two" / FINGERPRINT_FILE).write_text(json.dumps({**stated, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        TeacherCache(tmp_path / "two")


def test_what_token_ids_do_not_tell_is_refused():
    inputs, mask = batch(TEXTS)
    with pytest.raises(ValueError, match="the student reads pixel_values"):
        require_text_alone({**inputs, "pixel_values": torch.zeros(1)}, "A teacher cache")
    with pytest.raises(ValueError, match=r"needs the usual attention mask.*got torch.Size\(\[1, 1, 2, 2\]\)"):
        documents_of({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 1, 2, 2)}, mask[:1, :1])
    with pytest.raises(ValueError, match="needs `position_ids` of the shape"):
        documents_of({"input_ids": torch.ones(1, 2).long(), "position_ids": torch.ones(3, 1, 2)}, mask[:1, :1])


def test_packed_rows_of_a_data_set_are_split_as_their_batches_are():
    inputs, mask = packed(TEXTS)
    row = {"input_ids": inputs["input_ids"][0].tolist(), "seq_lengths": [5, 3, 4]}
    row["labels"] = [-100, 7, 9, -100, 2, 3, 2, 1, 8, 8, 4, 6]
    mask[0, 2] = False  # the label of token 3
    one, two = documents_of_row(row), documents_of(inputs, mask)
    assert [d.key for d in one] == [d.key for d in two]
    assert [d.positions.tolist() for d in one] == [d.positions.tolist() for d in two] == [[0, 1, 3], [0, 1], [0, 1, 2]]
    lengths = {"input_ids": inputs["input_ids"], "cu_seq_lens_q": torch.tensor([0, 5, 8, 12])}
    assert [d.key for d in documents_of(lengths, mask)] == [d.key for d in one]


def test_what_a_killed_process_left_half_written_goes_once_it_is_old(tmp_path):
    made(tmp_path / "c", spec=SPECS[1])
    young, old = (tmp_path / "c" / f".rows-{name}.safetensors.partial" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert len(TeacherCache(tmp_path / "c")) == 3
    assert young.exists() and not old.exists()


def test_two_processes_fill_one_cache(tmp_path):
    def fill(rank):
        cache = cache_teacher(
            frozen(), [{"input_ids": text} for text in TEXTS], tmp_path / "c", tokenizer=byte_tokenizer(),
            spec=SPECS[1], batch_size=1,
        )  # fmt: skip
        return len(cache)

    (tmp_path / "ranks").mkdir()
    assert on_two_ranks(fill, tmp_path / "ranks") == [3, 3]
    both, alone = TeacherCache(tmp_path / "c"), made(tmp_path / "alone", spec=SPECS[1])
    documents = [documents_of_row({"input_ids": text})[0] for text in TEXTS]
    one, two = (cache.rows(documents, torch.device("cpu")).listed for cache in (both, alone))
    assert one.ids.equal(two.ids)  # draws depend on the text alone
    torch.testing.assert_close(one.factors, two.factors, rtol=1e-3, atol=1e-3)


def test_an_interrupt_right_after_a_file_was_written_leaves_no_second_one(tmp_path, monkeypatch):
    replace, interrupts = os.replace, iter([KeyboardInterrupt])

    def interrupted(*paths):
        replace(*paths)
        if str(paths[1]).endswith(".safetensors"):
            for interrupt in interrupts:
                raise interrupt

    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 0.0)  # a file for each text
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cache")  # the text is still in memory, and is written again on the way out
    assert len(list((tmp_path / "cache").glob("rows-*"))) == 1
    cache = made(tmp_path / "cache")
    assert len(cache) == len(list((tmp_path / "cache").glob("rows-*"))) == len(TEXTS)


def test_a_killed_capture_goes_on_where_it_was(tmp_path):
    """Killed while it writes its third file: two are whole, and the next call computes the rest alone."""
    program = f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import hf_transfer_ext.teachers.cache as cache
        from teachers.test_cache import TEXTS, made
        written = []
        own = pathlib.Path.write_bytes
        def write_bytes(path, content):
            own(path, content)
            written.append(path)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        pathlib.Path.write_bytes, cache.SHARD_BYTES = write_bytes, 1
        made({str(tmp_path / "c")!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(TeacherCache(tmp_path / "c")) == 2
    cache = made(tmp_path / "c")
    assert len(cache) == 3 and len(list((tmp_path / "c").glob("rows-*"))) == 3


def test_a_cache_is_pushed_and_pulled(tmp_path, hub):
    made(tmp_path / "c")
    push_cache(tmp_path / "c", "tester/rows", token=hub.token)
    folder = pull_cache("tester/rows", token=hub.token)
    assert len(TeacherCache(folder)) == 3
    hub_files = {path.name for path in folder.iterdir()}
    assert hub_files == {path.name for path in (tmp_path / "c").iterdir()}
    address = "hf://datasets/tester/rows"
    cached = open_cache(address, None, byte_tokenizer(), temperature=1.0)
    assert cached.cache.folder == folder and cached.form == "sparse"
    with pytest.raises(ValueError, match="on the Hub, where no rows are added"):
        open_cache(address, LiveTeacher(frozen(), Accelerator(cpu=True)), byte_tokenizer(), temperature=1.0)
    with pytest.raises(FileNotFoundError, match="There is no teacher cache"):
        push_cache(tmp_path, "me/other")
