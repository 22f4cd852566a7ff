"""Several teachers with tokenizers of their own: by weight and by a column, against formulas and separate runs."""

import copy

import pytest
import torch
from datasets import Dataset
from teachers.test_server import server  # noqa: F401
from tiny import tiny_llama
from tiny_tokenizers import byte_fallback, byte_level
from trainers.test_distillation import assert_same, config, logged, weights
from trainers.test_span_distillation import TEXTS, groups_of, student

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.losses.spans import SPAN_LOSSES, span_pair, takes_vocabularies
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.teachers.alignment import TokenBytes, align_vocabularies

#: Name -> tokenizer, seed and width of the model. The last one has the student's own tokenizer.
TEACHERS = {"far": (byte_fallback, 2, 48), "wide": (byte_fallback, 3, 64), "near": (byte_level, 4, 32)}


@pytest.fixture
def folders(tmp_path):
    for name, (tokenizer, seed, width) in TEACHERS.items():
        tiny_llama(seed, vocab_size=len(tokenizer()), hidden_size=width).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def start(folder, data=None, own=None, teacher=None, **options):
    trainer = DistillationTrainer(
        own or student(), teacher, config(folder / "out", **{"max_length": 128, "seed": 42, **options}),
        data or Dataset.from_dict({"text": TEXTS}), processing_class=byte_level(),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def trained(folder, data=None, **options):
    trainer = start(folder, data, **options)
    trainer.train()
    return trainer


def entry(folder, model, **more):
    return {"model": str(folder / model), **more}


def changes(trainer):
    begun = dict(student().named_parameters())
    return {name: value - begun[name].detach() for name, value in weights(trainer).items()}


def manual_loss(learner, folder, name, which, text, options, temperature):
    """The loss of one text and one teacher in float64, without padding: sum over the spans."""
    own, other, loss = byte_level(), TEACHERS[which][0](), SPAN_LOSSES[name]
    if takes_vocabularies(loss):
        found = align_vocabularies(own, other)
        options = {**options, "student_ids": found.student_ids, "teacher_ids": found.teacher_ids}
    ids, others = (torch.tensor([*t(text)["input_ids"], t.eos_token_id]) for t in (own, other))
    sides = list(zip(*groups_of(ids.tolist(), others.tolist(), TokenBytes(own), TokenBytes(other)), strict=True))
    with torch.no_grad():
        t = load_model(folder / which).double()(input_ids=others[None]).logits[0]
    z = learner(input_ids=ids[None]).logits[0]
    pair = span_pair(z, ids, list(sides[0]), t, others, list(sides[1]), temperature=temperature)
    return loss(pair, **options).sum(), len(ids) - 1


def stepped(learner, total, lr=0.5):
    total.backward()
    return {n: (p - lr * p.grad).detach().float() for n, p in learner.named_parameters()}


LOSSES = pytest.mark.parametrize(
    "name, options",
    [("uld", {}), ("gold", {"matched_weight": 0.3}), ("alm", {"tau": 5.0})],
    ids=["uld", "gold", "alm"],
)


@LOSSES
@pytest.mark.parametrize("fused", [True, False])
def test_one_step_by_weight_is_the_weighted_sum_of_the_formulas(folders, name, options, fused):
    entries = [entry(folders, "far", weight=3.0), entry(folders, "near", weight=1.0)]
    trainer = trained(
        folders, teachers=entries, loss=name, loss_options=options, kd_weight=0.7, ce_weight=0.3,
        distill_temperature=2.0, fused=fused,
    )  # fmt: skip
    learner, kd, ce, tokens = copy.deepcopy(student()).double().train(), 0.0, 0.0, 0
    for text in TEXTS:
        for which, share in (("far", 0.75), ("near", 0.25)):
            value, count = manual_loss(learner, folders, name, which, text, options, 2.0)
            kd = kd + share * value
        ids = torch.tensor([[*byte_level()(text)["input_ids"], byte_level().eos_token_id]])
        logits = learner(input_ids=ids).logits[0, :-1]
        ce, tokens = ce + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), tokens + count
    total = (0.7 * kd + 0.3 * ce) / tokens
    assert_same(weights(trainer), stepped(learner, total), atol=2e-5)
    assert logged(trainer, "kd")[0] == pytest.approx(kd.item() / tokens, rel=1e-3)
    assert logged(trainer, "loss")[0] == pytest.approx(total.item(), rel=1e-3)
    assert logged(trainer, "aligned")[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SPAN_LOSSES)
def test_by_weight_a_step_is_the_weighted_sum_of_separate_steps(folders, name):
    names, shares = ["far", "wide"], [0.25, 0.75]
    entries = [entry(folders, which, weight=share * 8) for which, share in zip(names, shares, strict=True)]
    options = {"loss": name, "loss_options": {"tau": 5.0} if name == "alm" else {}}
    both = trained(folders / "both", teachers=entries, **options)
    # Projections of the second teacher start from the next seed.
    alone = [trained(folders / one, teacher=str(folders / one), seed=42 + i, **options) for i, one in enumerate(names)]
    expected = {
        key: sum(share * changes(one)[key] for share, one in zip(shares, alone, strict=True)) for key in changes(both)
    }
    assert_same(changes(both), expected, atol=2e-5)
    found = sum(share * logged(one, "kd")[0] for share, one in zip(shares, alone, strict=True))
    assert logged(both, "kd")[0] == pytest.approx(found, rel=1e-4)
    assert set(both.frozen_bytes) == set(names) and all(both.frozen_bytes.values())
    assert both.record().config["vocabulary_alignment"].startswith("far: ") and "; wide: " in both.plan()


@pytest.mark.parametrize("name", SPAN_LOSSES)
def test_routed_rows_learn_from_their_own_teacher_as_in_separate_runs(folders, name):
    column = ["wide", "near", "near", "far"]
    data = Dataset.from_dict({"text": TEXTS, "expert": column})
    options = {"loss": name, "loss_options": {"tau": 5.0} if name == "alm" else {}}
    entries = [entry(folders, which) for which in TEACHERS]
    both = trained(folders / "both", data, teachers=entries, teachers_by="column", teacher_column="expert", **options)
    expected, kd, tokens = {}, 0.0, 0
    for place, which in enumerate(TEACHERS):
        own = data.filter(lambda row, which=which: row["expert"] == which).remove_columns("expert")
        alone = trained(folders / which, own, teacher=str(folders / which), seed=42 + place, **options)
        count = sum(len(byte_level()(text)["input_ids"]) for text in own["text"])
        for key, change in changes(alone).items():
            expected[key] = expected.get(key, 0.0) + count * change
        kd, tokens = kd + count * logged(alone, "kd")[0], tokens + count
    assert_same(changes(both), {key: change / tokens for key, change in expected.items()}, atol=2e-5)
    assert logged(both, "kd")[0] == pytest.approx(kd / tokens, rel=1e-3)
    assert logged(both, "aligned")[0] == pytest.approx(1.0)
    assert both.evaluate(both.train_dataset)["eval_kd"] > 0


def test_micro_batches_in_which_a_teacher_has_no_row_change_nothing(folders):
    data = Dataset.from_dict({"text": TEXTS, "teacher": ["far", "far", "near", "near"]})
    options = {"teachers": [entry(folders, "far"), entry(folders, "near")], "teachers_by": "column", "loss": "gold"}
    one = trained(folders / "a", data, **options)
    split = trained(folders / "b", data, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert_same(weights(one), weights(split), atol=1e-5)


@pytest.mark.parametrize("name", ["uld", "gold", "alm"])
def test_an_adapter_on_the_students_own_base_teaches_as_that_model(folders, name):
    from peft import LoraConfig, get_peft_model

    def learner():
        torch.manual_seed(0)
        base = load_model(folders / "near")
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    options = {"loss": name, "loss_options": {"tau": 5.0} if name == "alm" else {}}
    first = {"own": learner(), "teachers": [entry(folders, "far"), {"adapter": "base"}], **options}
    second = {"own": learner(), "teachers": [entry(folders, "far"), entry(folders, "near")], **options}
    one, other = trained(folders / "a", **first), trained(folders / "b", **second)
    assert one.frozen_bytes["base"] == 0 and logged(one, "kd")[0] == pytest.approx(logged(other, "kd")[0], rel=1e-5)
    assert_same(weights(one), weights(other), atol=1e-5)


def test_dskd_refuses_an_adapter_on_the_students_own_base(folders):
    from peft import LoraConfig, get_peft_model

    learner = get_peft_model(student(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"dskd adds the teacher's embeddings.*Give a model of its own"):
        start(folders, own=learner, teachers=[entry(folders, "far"), {"adapter": "base"}], loss="dskd")


def test_a_server_and_a_model_teach_likelihoods_together(folders, server):  # noqa: F811
    server.model, server.tokenizer = load_model(folders / "wide"), byte_fallback()
    served = {"server": server.url, "server_model": "big", "tokenizer": str(folders / "wide"), "name": "wide",
              "options": {"retries": 1, "pause": 0.0}}  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS, "teacher": ["wide", "near", "wide", "near"]})
    options = {"loss": "alm", "loss_options": {"tau": 5.0}, "teachers_by": "column"}
    one = trained(folders / "a", data, teachers=[served, entry(folders, "near")], **options)
    other = trained(folders / "b", data, teachers=[entry(folders, "wide"), entry(folders, "near")], **options)
    assert_same(weights(one), weights(other), atol=1e-5)
    assert len({tuple(body["prompt"]) for path, body, _ in server.requests if path == "/v1/completions"}) == 2


def test_caches_of_likelihoods_teach_as_their_models(folders):
    data = Dataset.from_dict({"text": TEXTS, "teacher": ["wide", "near", "wide", "near"]})
    options = {"loss": "alm", "loss_options": {"tau": 5.0}}
    for name in ("wide", "near"):
        cache = str(folders / f"cache-{name}")
        trained(folders / name, teacher=str(folders / name), teacher_cache=cache, **options)
    cached = [
        {"cache": str(folders / f"cache-{name}"), "tokenizer": str(folders / name), "name": name}
        for name in ("wide", "near")
    ]
    live = [entry(folders, name) for name in ("wide", "near")]
    for more in ({"teachers_by": "column"}, {}):
        rows = data if more else data.remove_columns("teacher")
        one = trained(folders / "a", rows, teachers=cached, **options, **more)
        other = trained(folders / "b", rows, teachers=live, **options, **more)
        assert_same(weights(one), weights(other), atol=1e-5)
        assert not any(one.frozen_bytes.values())


PROMPTS = ["The capital of France is", "Gold has the symbol", "Numbers: 0 1 2", "the theme of"]


@pytest.mark.parametrize("on_policy", ["gkd", "distillm"])
@pytest.mark.parametrize("completions", [False, True])
@pytest.mark.parametrize("name", ["gold", "forward_kl"])
def test_what_the_student_writes_is_judged_by_the_teacher_that_the_prompts_row_names(
    folders, name, completions, on_policy
):
    tiny_llama(5, vocab_size=len(byte_level())).save_pretrained(folders / "near2")
    byte_level().save_pretrained(folders / "near2")
    column = [1, 0, 0, 1]
    rows = {"prompt": PROMPTS, **({"completion": [" one", " two", " three", " four"]} if completions else {})}
    data = Dataset.from_dict({**rows, "teacher": column})
    options = {
        "loss": name, "on_policy": on_policy, "on_policy_share": 1.0, "max_new_tokens": 5, "max_steps": 2,
    }  # fmt: skip
    if on_policy == "distillm" and completions:
        options["on_policy_share"] = 0.5
    first = "far" if name == "gold" else "near2"
    entries = [entry(folders, first), entry(folders, "near")]
    trainer = start(folders / "a", data, teachers=entries, teachers_by="column", **options)
    read = {first: [], "near": []}
    for which, teacher in trainer.teacher.teachers.items():
        live = getattr(teacher, "live", teacher)

        def signal(student, inputs, mask, which=which, plain=live.signal):
            read[which] += [tuple(ids[kept.bool()].tolist()) for ids, kept in zip(
                inputs["input_ids"], inputs["attention_mask"], strict=True)]  # fmt: skip
            return plain(student, inputs, mask)

        live.signal = signal
    trainer.train()
    assert trainer.state.global_step == 2 and min(logged(trainer, "kd")) > 0
    for which, tokenizer in ((first, TEACHERS[first][0] if first in TEACHERS else byte_level), ("near", byte_level)):
        prompts = {PROMPTS[i] for i, place in enumerate(column) if [first, "near"][place] == which}
        texts = [tokenizer().decode(ids, skip_special_tokens=True) for ids in read[which]]
        assert texts and all(any(text.lstrip().startswith(prompt) for prompt in prompts) for text in texts)


@pytest.mark.parametrize("name", ["gold", "alm", "forward_kl"])
def test_what_the_student_writes_for_one_of_several_teachers_trains_as_with_that_one_alone(folders, name):
    data = Dataset.from_dict({"prompt": PROMPTS, "teacher": ["near"] * 4})
    options = {"loss": name, "on_policy": "gkd", "on_policy_share": 1.0, "max_new_tokens": 5, "max_steps": 2}
    other = "wide" if name != "forward_kl" else "near"
    entries = [entry(folders, other, name="other"), entry(folders, "near")]
    routed = trained(folders / "a", data, teachers=entries, teachers_by="column", **options)
    alone = trained(folders / "b", data.remove_columns("teacher"), teacher=str(folders / "near"), **options)
    assert_same(weights(routed), weights(alone), atol=1e-6)
    assert routed.evaluate(data)["eval_kd"] > 0


def test_by_weight_several_teachers_judge_what_the_student_writes(folders):
    options = {"loss": "gold", "on_policy": "gkd", "on_policy_share": 1.0, "max_new_tokens": 5}
    data = Dataset.from_dict({"prompt": PROMPTS})
    entries = [entry(folders, "far", weight=1.0), entry(folders, "wide", weight=3.0)]
    both = trained(folders / "both", data, teachers=entries, **options)
    alone = [trained(folders / one, data, teacher=str(folders / one), **options) for one in ("far", "wide")]
    one, other = (changes(trainer) for trainer in alone)
    assert_same(changes(both), {key: 0.25 * one[key] + 0.75 * other[key] for key in one}, atol=2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teachers_by": "confidence"}, "does not go with `teachers_by: confidence`: its weights are those of tokens"),
        ({"teachers_by": "learned"}, "does not go with `teachers_by: learned`"),
        (
            {"teachers": [{"model": "a"}, {"server": "http://x", "server_model": "m"}]},
            "compares whole distributions with a teacher model, but the teacher 'x', a server, lists a few tokens",
        ),
        ({"teachers": [{"model": "a", "tokenizer": "b"}]}, "`tokenizer` goes with server"),
        (
            {"teachers": [{"server": "http://x", "server_model": "m", "tokenizer": "b"}], "loss": "forward_kl"},
            "The teacher 'x' has a `tokenizer`, but `loss: forward_kl` compares tokens",
        ),
    ],
)
def test_a_bad_config_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"loss": "gold", "teachers": [{"model": "a"}, {"model": "b"}], **options})
