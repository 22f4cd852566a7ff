"""Distillation from a teacher with another tokenizer: one step by hand, odd texts, packing, what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from teachers.test_alignment import ADVERSARIAL
from teachers.test_server import server  # noqa: F401
from tiny import tiny_llama
from tiny_tokenizers import byte_fallback, byte_level, wordpiece
from trainers.test_distillation import assert_same, config, logged, weights

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.losses.spans import SPAN_LOSSES, span_pair, takes_vocabularies
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.teachers.alignment import TokenBytes, align_vocabularies

TEXTS = ["The capital of France is Paris.", "日本の首都は東京です。 🙂🙃", "a    b\t\tc\n\n   d", "naïve café Zürich"]


def student(seed=1):
    return tiny_llama(seed, vocab_size=len(byte_level()))


def teacher(seed=2):
    return tiny_llama(seed, vocab_size=len(byte_fallback()), hidden_size=48)


def start(folder, texts=TEXTS, own=None, data=None, teacher_tokenizer=byte_fallback, **options):
    trainer = DistillationTrainer(
        own or student(), options.pop("teacher", None) or teacher(), config(folder, **{"max_length": 128, **options}),
        data or Dataset.from_dict({"text": texts}), processing_class=byte_level(),
        teacher_processing_class=teacher_tokenizer() if teacher_tokenizer else None,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def trained(folder, texts=TEXTS, **options):
    trainer = start(folder, texts, **options)
    trainer.train()
    return trainer


def groups_of(ids, other, known, known_other):
    """Groups between the byte offsets that are ends of tokens on both sides; special tokens each on their own."""
    sides = []
    for tokens, table in ((ids, known), (other, known_other)):
        ends, total = {}, 0
        for i, token in enumerate(tokens):
            total += len(table[token]) if table[token] else 0
            if table[token]:
                ends[total] = i + 1
        sides.append(ends)
    common = sorted(sides[0].keys() & sides[1].keys())
    found = [
        ((sides[0][a] if a else 1, sides[0][b]), (sides[1][a] if a else 1, sides[1][b]))
        for a, b in zip([0, *common], common, strict=False)
    ]
    return [*found, ((len(ids) - 1, len(ids)), (len(other) - 1, len(other)))]  # the end of the text


def manual_step(name, options, kd_weight=0.7, ce_weight=0.3, lr=0.5, temperature=2.0):
    own, other = byte_level(), byte_fallback()
    known, known_other, loss = TokenBytes(own), TokenBytes(other), SPAN_LOSSES[name]
    if takes_vocabularies(loss):
        found = align_vocabularies(own, other)
        options = {**options, "student_ids": found.student_ids, "teacher_ids": found.teacher_ids}
    learner, master = copy.deepcopy(student()).train(), teacher()
    total, kd, tokens = 0.0, 0.0, 0
    for text in TEXTS:
        ids, others = ([*t(text)["input_ids"], t.eos_token_id] for t in (own, other))
        one, two = torch.tensor([ids]), torch.tensor([others])
        z = learner(input_ids=one).logits[0]
        with torch.no_grad():
            t = master(input_ids=two).logits[0]
        pairs = groups_of(ids, others, known, known_other)
        sides = zip(*pairs, strict=True)
        pair = span_pair(z, one[0], list(next(sides)), t, two[0], list(next(sides)), temperature=temperature)
        values = loss(pair, **options)
        assert len(values) == len(pairs)
        ce = torch.nn.functional.cross_entropy(z[:-1], one[0, 1:], reduction="sum")
        total = total + kd_weight * values.sum() + ce_weight * ce
        kd, tokens = kd + values.sum().item(), tokens + len(ids) - 1
    (total / tokens).backward()
    with torch.no_grad():
        for p in learner.parameters():
            p -= lr * p.grad
    return {n: p.detach() for n, p in learner.named_parameters()}, kd / tokens, (total / tokens).item()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name, options",
    [("uld", {}), ("gold", {"matched_weight": 0.3}), ("alm", {"tau": 10.0})],
    ids=["uld", "gold", "alm"],
)
def test_one_step_is_the_step_of_the_formula(tmp_path, name, options, fused):
    expected, kd, loss = manual_step(name, options)
    trainer = trained(
        tmp_path, loss=name, loss_options=options, kd_weight=0.7, ce_weight=0.3, distill_temperature=2.0, fused=fused
    )
    assert_same(weights(trainer), expected, atol=2e-5)
    assert logged(trainer, "kd")[0] == pytest.approx(kd, rel=1e-3)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)
    assert logged(trainer, "aligned")[0] == pytest.approx(1.0)
    assert "tokens match exactly" in trainer.record().config["vocabulary_alignment"]


@pytest.mark.parametrize("name", SPAN_LOSSES)
def test_packing_and_micro_batches_change_nothing(tmp_path, name):
    options = {"loss": name, "shuffle_dataset": False}
    one = trained(tmp_path / "a", **options)
    packed = trained(tmp_path / "b", packing=True, max_length=256, **options)
    split = trained(tmp_path / "c", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert len(packed.train_dataset) < 4
    assert_same(weights(one), weights(packed), atol=1e-5)
    assert_same(weights(one), weights(split), atol=1e-5)


def adapted(folder):
    """A teacher with an adapter, saved without a tokenizer of its own, and the model that both are when merged."""
    teacher().save_pretrained(folder / "base")
    byte_fallback().save_pretrained(folder / "base")
    model = get_peft_model(load_model(folder / "base"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), load_model(folder / "adapter").merge_and_unload()


WRITTEN = {"on_policy": "gkd", "on_policy_share": 1.0, "max_new_tokens": 6}


@pytest.mark.parametrize("name", SPAN_LOSSES)
def test_an_adapter_on_another_model_teaches_as_the_merged_model(tmp_path, name):
    adapter, merged = adapted(tmp_path)
    both = {"loss": name, "loss_options": {"tau": 5.0} if name == "alm" else {}}
    one = trained(tmp_path / "a", teacher=adapter, teacher_tokenizer=None, **both)
    assert any("lora" in name for name, _ in one.teacher.network.named_parameters())
    assert_same(weights(one), weights(trained(tmp_path / "b", teacher=merged, **both)), atol=1e-5)
    base = trained(tmp_path / "c", **both)
    assert max((a - weights(base)[name]).abs().max() for name, a in weights(one).items()) > 1e-3


@pytest.mark.parametrize("name", ["gold", "alm"])
def test_an_adapter_on_another_model_judges_what_the_student_writes_as_the_merged_model(tmp_path, name):
    adapter, merged = adapted(tmp_path)
    both = {"data": Dataset.from_dict({"prompt": TEXTS}), "loss": name, "max_steps": 2, **WRITTEN}
    one = trained(tmp_path / "a", teacher=adapter, teacher_tokenizer=None, **both)
    other = trained(tmp_path / "b", teacher=merged, **both)
    assert_same(weights(one), weights(other), atol=1e-5)
    assert logged(one, "rollout_tokens") == logged(other, "rollout_tokens") and min(logged(one, "kd")) > 0


def test_odd_texts_cut_rows_and_completions_alone_train(tmp_path):
    texts = [text for text in ADVERSARIAL if text]
    trainer = trained(tmp_path / "a", texts, loss="gold", max_length=9, max_steps=3)
    assert all(0 < share <= 1 for share in logged(trainer, "aligned"))
    data = Dataset.from_dict({"prompt": ["2+2="] * 4, "completion": ["4", "four", "🙂", "  IV"]})
    completions = trained(tmp_path / "b", data=data, loss="uld")
    assert 0.5 < logged(completions, "aligned")[0] <= 1


def test_many_steps_bring_the_student_to_the_teacher(tmp_path):
    trainer = trained(tmp_path, loss="gold", max_steps=30, optim="adamw_torch", learning_rate=1e-2)
    assert logged(trainer, "kd")[-1] < 0.7 * logged(trainer, "kd")[0]


def test_the_padding_token_that_one_side_lacks_is_fine(tmp_path):
    def with_padding():
        tokenizer = byte_fallback()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer

    master = tiny_llama(2, vocab_size=len(with_padding()))
    assert trained(tmp_path, loss="gold", teacher=master, teacher_tokenizer=with_padding).state.global_step == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "golld"}, "Unknown distillation loss 'golld'. Did you mean 'gold'"),
        ({"loss": "gold", "loss_options": {"beeta": 0.5}}, "Unknown option of gold 'beeta'. Did you mean 'beta'"),
        ({"loss": "gold", "loss_options": {"matched_weight": 2.0}}, "`matched_weight` in"),
        ({"loss": "alm", "loss_options": {"tau": 0.0}}, "`tau` and `epsilon` of alm have to be > 0"),
        ({"loss": "uld", "teacher_cache": "x"}, "does not go with `teacher_cache`: a cache would hold the whole"),
        ({"loss": "dskd", "teachers": [{"cache": "x"}]}, "does not go with the cache 'x' among `teachers`"),
        (
            {"loss": "alm", "teacher_cache": "x", "teacher_cache_options": {"kind": "top"}},
            "alm reads likelihoods of texts alone, and its cache is of kind likelihoods",
        ),
        (
            {"loss": "alm", "teacher_cache": "x", "teachers": [{"model": "a"}]},
            "`teacher_cache` stores several teachers as one where .* got teachers with tokens of their own",
        ),
        ({"loss": "alm", "teacher_tokenizer": "x"}, "`teacher_tokenizer` is for a span loss with `teacher_server` or"),
        ({"teacher_cache": "x", "teacher_tokenizer": "x"}, "`teacher_tokenizer` is for a span loss with"),
        ({"loss": "uld", "teacher_adapter": "base"}, "does not go with `teacher_adapter`"),
        ({"loss": "uld", "float32_logits": False}, "`float32_logits` is off, which has no effect with `loss: uld`"),
        ({"loss": "forward_kl", "fused": False, "float32_logits": False}, "has no effect with `fused=False`"),
        (
            {"loss": "uld", "teacher_server": "http://127.0.0.1:9", "teacher_server_model": "big"},
            "compares whole distributions with a teacher model, but `teacher_server` lists a few tokens alone",
        ),
        ({"loss": "uld", "hidden_loss": "hidden_mse"}, "does not go with `hidden_loss`"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def start_served(folder, server, tokenizer=byte_fallback, data=None, **options):  # noqa: F811
    settings = {"teacher_server": server.url, "teacher_server_model": "big", "loss": "alm", "max_length": 128}
    settings["teacher_server_options"] = {"retries": 1, "pause": 0.0}
    trainer = DistillationTrainer(
        student(), None, config(folder, **{**settings, **options}), data or Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_level(), teacher_processing_class=tokenizer and tokenizer(),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_a_server_of_another_tokenizer_teaches_likelihoods_as_the_model_itself_does(tmp_path, server, style):  # noqa: F811
    server.model, server.tokenizer, server.style = teacher(), byte_fallback(), style
    options = {"max_steps": 2, "loss_options": {"tau": 5.0}}
    served = start_served(tmp_path / "served", server, **options)
    served.train()
    live = trained(tmp_path / "live", loss="alm", **options)
    assert_same(weights(served), weights(live), atol=1e-5)
    assert logged(served, "kd") == pytest.approx(logged(live, "kd"), abs=1e-4)
    assert logged(served, "aligned") == logged(live, "aligned")
    asked = [body for path, body, _ in server.requests if path == "/v1/completions"]
    assert asked[0]["prompt"] == byte_fallback()(TEXTS[0])["input_ids"] + [byte_fallback().eos_token_id]
    assert {body.get("prompt_logprobs", body.get("logprobs")) for body in asked} == {1}


def test_a_student_writes_and_a_server_of_another_tokenizer_reads(tmp_path, server):  # noqa: F811
    server.model, server.tokenizer = teacher(), byte_fallback()
    served = start_served(tmp_path, server, data=Dataset.from_dict({"prompt": TEXTS}), **WRITTEN)
    served.train()
    assert served.state.global_step == 1 and logged(served, "kd")[0] > 0


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_likelihoods_teaches_as_the_model_and_runs_it_once_for_each_text(tmp_path, temperature):
    options = {"loss": "alm", "loss_options": {"tau": 5.0}, "max_steps": 3, "distill_temperature": temperature}
    live = trained(tmp_path / "live", **options)
    cached = trained(tmp_path / "cached", teacher_cache=str(tmp_path / "cache"), **options)
    assert cached.teacher.source.forwards == 1 and len(cached.teacher.source.cache) == len(TEXTS)
    assert_same(weights(cached), weights(live), atol=1e-5)
    assert logged(cached, "kd") == pytest.approx(logged(live, "kd"), abs=1e-4)
    assert logged(cached, "aligned") == logged(live, "aligned")
    assert cached.frozen_bytes == live.frozen_bytes and cached.frozen_bytes["teacher"] > 0
    before = files_of(tmp_path / "cache")
    again = trained(tmp_path / "again", teacher_cache=str(tmp_path / "cache"), **options)
    assert again.teacher.source.forwards == 0 and files_of(tmp_path / "cache") == before
    byte_fallback().save_pretrained(tmp_path / "tokenizer")
    for given in ({"teacher_tokenizer": str(tmp_path / "tokenizer")}, {"processing": byte_fallback()}):
        alone = DistillationTrainer(
            student(), None,
            config(tmp_path / "alone", teacher_cache=str(tmp_path / "cache"), max_length=128, **options,
                   **{name: value for name, value in given.items() if name != "processing"}),
            Dataset.from_dict({"text": TEXTS}), processing_class=byte_level(),
            teacher_processing_class=given.get("processing"),
        )  # fmt: skip
        alone._get_train_sampler = lambda *a, one=alone: torch.utils.data.SequentialSampler(one.train_dataset)
        alone.train()
        assert_same(weights(alone), weights(again), atol=0)
        assert not any(alone.frozen_bytes.values())


def test_a_cache_of_likelihoods_serves_other_masks_and_texts_that_the_teacher_cuts(tmp_path):
    data = Dataset.from_dict({"prompt": ["The capital of France is"] * 2, "completion": [" Paris.", " far away."]})
    short = tiny_llama(2, vocab_size=len(byte_fallback()), max_position_embeddings=12)
    options = {"data": data, "teacher": short, "loss": "alm", "loss_options": {"tau": 5.0}}
    live = trained(tmp_path / "a", **options)
    whole = trained(tmp_path / "b", teacher_cache=str(tmp_path / "c"), completion_only_loss=False, **options)
    masked = trained(tmp_path / "d", teacher_cache=str(tmp_path / "c"), **options)
    assert (whole.teacher.source.forwards, masked.teacher.source.forwards) == (1, 0)
    assert 0 < logged(live, "aligned")[0] < 1
    assert_same(weights(masked), weights(live), atol=1e-5)


def test_a_cache_of_another_teacher_tokenizer_or_text_is_refused_with_both_fingerprints(tmp_path):
    cache = str(tmp_path / "cache")
    trained(tmp_path / "a", loss="alm", teacher_cache=cache)
    with pytest.raises(
        ValueError, match=r"\(fingerprint \w+\) is not of this teacher .*\(fingerprint \w+\): weights is"
    ):
        start(tmp_path / "b", loss="alm", teacher_cache=cache, teacher=teacher(3))
    own = tiny_llama(2, vocab_size=len(byte_level()))
    with pytest.raises(ValueError, match=r"is not of this teacher .* tokenizer is .* needed is"):
        start(tmp_path / "c", loss="alm", teacher_cache=cache, teacher=own, teacher_tokenizer=byte_level)
    with pytest.raises(ValueError, match=r"is not of this teacher .* temperature is 1.0, needed is 2.0"):
        start(tmp_path / "d", loss="alm", teacher_cache=cache, distill_temperature=2.0)

    def alone(data, tokenizer, **options):
        return DistillationTrainer(
            student(), None, config(tmp_path / "e", **{"loss": "alm", "teacher_cache": cache, **options}),
            Dataset.from_dict({"text": data}), processing_class=byte_level(), teacher_processing_class=tokenizer,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"is not of this teacher .*: tokenizer is"):
        alone(TEXTS, byte_level())
    with pytest.raises(ValueError, match=r"does not hold the tokenizer\. Name it by `teacher_tokenizer`"):
        alone(TEXTS, None)
    with pytest.raises(ValueError, match=r"\(fingerprint \w+\) has no rows .* its fingerprint is \w+, and the cache"):
        alone(["something else"], byte_fallback()).train()
    with pytest.raises(ValueError, match=r"forward_kl needs .* tells the likelihoods of the tokens of a text alone"):
        config(tmp_path / "f", teacher_cache=cache)
    trained_rows = {"teacher_cache": str(tmp_path / "rows"), "teacher": tiny_llama(2, vocab_size=len(byte_level()))}
    trained(tmp_path / "g", loss="forward_kl", teacher_tokenizer=byte_level, **trained_rows)
    with pytest.raises(ValueError, match=r"kind is 'top_and_samples', needed is 'likelihoods'"):
        start(tmp_path / "h", loss="alm", teacher_tokenizer=byte_level, **trained_rows)


def test_a_server_is_asked_once_for_each_text(tmp_path, server):  # noqa: F811
    server.model, server.tokenizer = teacher(), byte_fallback()
    options = {"max_steps": 3, "loss_options": {"tau": 5.0}}
    asked = start_served(tmp_path / "a", server, **options)
    asked.train()
    cached = start_served(tmp_path / "b", server, teacher_cache=str(tmp_path / "cache"), **options)
    server.requests.clear()
    cached.train()
    assert len([path for path, _, _ in server.requests if path == "/v1/completions"]) == len(TEXTS)
    assert_same(weights(cached), weights(asked), atol=1e-6)
    again = start_served(tmp_path / "c", server, teacher_cache=str(tmp_path / "cache"), **options)
    server.requests.clear()
    again.train()
    assert not server.requests
    assert_same(weights(again), weights(asked), atol=1e-6)


def test_a_server_whose_tokenizer_is_unknown_or_another_one_is_refused(tmp_path, server):  # noqa: F811
    server.model, server.tokenizer = teacher(), byte_fallback()
    with pytest.raises(ValueError, match=r"the name there, 'big', is not a folder or Hub id with one.*Pass it as"):
        start_served(tmp_path, server, tokenizer=None)
    with pytest.raises(ValueError, match=r"has another tokenizer.*`loss: alm` compares texts, and needs the server's"):
        start_served(tmp_path, server, tokenizer=byte_level)
    byte_fallback().save_pretrained(tmp_path / "big")
    server.models[str(tmp_path / "big")] = {"max_model_len": 512}
    found = start_served(tmp_path, server, tokenizer=None, teacher_server_model=str(tmp_path / "big"))
    assert "tokens match exactly" in str(found.teacher.vocabularies) and not any(found.frozen_bytes.values())


def test_tokenizers_that_cannot_be_aligned_or_are_missing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not stand for the bytes of a text"):
        start(tmp_path, loss="uld", teacher_tokenizer=wordpiece)
    with pytest.raises(ValueError, match=r"has no tokenizer beside it\. Pass it as `teacher_processing_class`"):
        start(tmp_path, loss="uld", teacher_tokenizer=None)
