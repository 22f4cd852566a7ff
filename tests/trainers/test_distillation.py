"""The distillation trainer: what one step does to the weights, however a batch is split and whoever teaches."""

import copy
import json
import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from transformers import (  # fmt: skip
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.rows import SparseRows
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.signal import TeacherSignal
from hf_transfer_ext.tensors import next_token_view

TEXTS = ["gold is a metal", "paris", "the sea is wide and the sky is high", "iron", "a", "tin and zinc", "oak", "elm"]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
)


def config(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": 64,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 1,
    }
    return DistillationConfig(**{**defaults, **options})


def trained(folder, student=None, teacher=None, texts=TEXTS, data=None, **options):
    """The trainer after its steps; data in a fixed order."""
    data = Dataset.from_dict({"text": texts}) if data is None else data
    tokenizer = options.pop("tokenizer", None) or byte_tokenizer()
    trainer = DistillationTrainer(
        model=student if student is not None else tiny_llama(1),
        teacher=teacher if teacher is not None or options.get("teacher_adapter") else tiny_llama(2),
        args=config(folder, **options),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def manual_step(student, teacher, texts, name="forward_kl", kd_weight=1.0, ce_weight=0.0, lr=0.5, **options):
    """One SGD step on the token mean of the plain formula: full logits, padding cut off, no trainer."""
    tokenizer = byte_tokenizer()
    student, total, tokens = copy.deepcopy(student).train(), 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        z, targets, mask = next_token_view(student(input_ids=ids).logits, ids)
        with torch.no_grad():
            t = teacher(input_ids=ids).logits[:, :-1]
        ce = torch.nn.functional.cross_entropy(z.transpose(1, 2), targets, reduction="none")
        total = total + (kd_weight * DISTILLATION_LOSSES[name](z, t, **options) + ce_weight * ce).sum()
        tokens += int(mask.sum())
    (total / tokens).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= lr * p.grad
    return dict(student.named_parameters()), (total / tokens).item()


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_one_step_is_the_step_of_the_formula(tmp_path, name):
    trainer = trained(tmp_path, texts=TEXTS[:4], loss=name, kd_weight=0.7, ce_weight=0.3, distill_temperature=2.0)
    expected, loss = manual_step(tiny_llama(1), tiny_llama(2), TEXTS[:4], name, 0.7, 0.3, temperature=2.0)
    assert_same(weights(trainer), {n: p.detach() for n, p in expected.items()})
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)


def test_the_way_over_full_logits_is_the_same(tmp_path):
    one = trained(tmp_path / "a", loss="generalized_jsd", loss_options={"beta": 0.3}, ce_weight=0.5)
    other = trained(tmp_path / "b", loss="generalized_jsd", loss_options={"beta": 0.3}, ce_weight=0.5, fused=False)
    assert_same(weights(one), weights(other))
    assert logged(one, "kd")[0] == pytest.approx(logged(other, "kd")[0], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_four_micro_batches_of_one_are_one_batch_of_four(tmp_path, lora):
    def student():
        model = tiny_llama(1)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)) if lora else model

    torch.manual_seed(0)
    first = student()
    second = copy.deepcopy(first)
    one = trained(tmp_path / "a", first, texts=TEXTS[:4], ce_weight=0.5)
    other = trained(
        tmp_path / "b", second, texts=TEXTS[:4], ce_weight=0.5, per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert_same(weights(one), weights(other))
    assert logged(one, "loss")[0] == pytest.approx(logged(other, "loss")[0], rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_two_processes_are_one(tmp_path, fused):
    whole = weights(trained(tmp_path / "one", texts=TEXTS[:4], ce_weight=0.5, fused=fused))

    def rank(_):
        trainer = trained(tmp_path / "two", texts=TEXTS[:4], ce_weight=0.5, fused=fused, per_device_train_batch_size=2)
        assert trainer.accelerator.num_processes == 2
        return weights(trainer)

    for part in on_two_ranks(rank, tmp_path):
        assert_same(whole, part)


def adapted_student():
    """One base with a teacher adapter and a student adapter, both with random weights."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False), adapter_name="teacher")
    model.add_adapter("student", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("student")
    return model


def test_a_teacher_adapter_teaches_as_its_merged_model_does(tmp_path):
    teacher = adapted_student()
    teacher.set_adapter("teacher")
    teacher = teacher.merge_and_unload()
    student, twin = adapted_student(), adapted_student()
    one = trained(tmp_path / "a", student, teacher_adapter="teacher")
    other = trained(tmp_path / "b", twin, teacher)
    assert_same(weights(one), weights(other), atol=1e-5)
    untouched = {n: p for n, p in adapted_student().named_parameters() if ".teacher." in n}
    assert untouched and all(torch.equal(weights(one)[n], p) for n, p in untouched.items())
    moved = [n for n, p in adapted_student().named_parameters() if not torch.equal(weights(one)[n], p)]
    assert moved and all(".student." in n for n in moved)


def test_a_teacher_adapter_under_two_processes(tmp_path):
    whole = weights(trained(tmp_path / "one", adapted_student(), texts=TEXTS[:4], teacher_adapter="teacher"))

    def rank(_):
        return weights(
            trained(
                tmp_path / "two", adapted_student(), texts=TEXTS[:4], teacher_adapter="teacher",
                per_device_train_batch_size=2,
            )
        )  # fmt: skip

    for part in on_two_ranks(rank, tmp_path):
        assert_same(whole, part)


def test_a_lora_student_with_a_full_teacher_and_gradient_checkpointing(tmp_path):
    torch.manual_seed(0)
    student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False))
    twin = copy.deepcopy(student)
    one = trained(tmp_path / "a", student)
    other = trained(tmp_path / "b", twin, gradient_checkpointing=True)
    assert_same(weights(one), weights(other))
    assert logged(one, "grad_norm")[0] > 0


def test_an_adapted_head_goes_over_full_logits(tmp_path):
    torch.manual_seed(0)
    student = get_peft_model(
        tiny_llama(1), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    )
    before = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    after = weights(trained(tmp_path, student))
    assert any("lm_head" in n for n in before)
    assert all(not torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.parametrize("tied", [True, False])
def test_soft_capped_and_tied_heads_are_the_models_own(tmp_path, tied):
    def gemma(seed):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.3,
                max_position_embeddings=128, tie_word_embeddings=tied, pad_token_id=257, sliding_window=64,
            )
        ).eval()  # fmt: skip

    one = trained(tmp_path / "a", gemma(1), gemma(2), ce_weight=0.5)
    other = trained(tmp_path / "b", gemma(1), gemma(2), ce_weight=0.5, fused=False)
    assert_same(weights(one), weights(other))


def test_another_architecture_with_another_width_teaches(tmp_path):
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=128, n_embd=48, n_layer=1, n_head=2))
    one = trained(tmp_path / "a", teacher=teacher)
    other = trained(tmp_path / "b", teacher=teacher, fused=False)
    assert_same(weights(one), weights(other))


def test_without_a_teacher_it_is_fine_tuning(tmp_path):
    trainer = trained(tmp_path, teacher=None, kd_weight=0.0, ce_weight=1.0, texts=TEXTS[:4])
    expected, _ = manual_step(tiny_llama(1), tiny_llama(2), TEXTS[:4], kd_weight=0.0, ce_weight=1.0)
    assert_same(weights(trainer), {n: p.detach() for n, p in expected.items()})
    assert not logged(trainer, "kd") and logged(trainer, "ce")


def test_packing_teaches_each_document_as_if_it_stood_alone(tmp_path):
    one = trained(tmp_path / "a", texts=TEXTS[:4], shuffle_dataset=False)
    other = trained(tmp_path / "b", texts=TEXTS[:4], packing=True, max_length=80, shuffle_dataset=False)
    assert len(other.train_dataset) < 4
    assert_same(weights(one), weights(other), atol=1e-5)


def seen_labels(trainer):
    return [[label for label in row if label != -100] for row in trainer.train_dataset["labels"]]


def test_completion_only_learns_the_completion(tmp_path):
    data = Dataset.from_dict({"prompt": ["2+2="] * 4, "completion": ["4", "four", "4.0", "IV"]})
    trainer = trained(tmp_path, data=data)
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(row) for row in seen_labels(trainer)] == ["4</s>", "four</s>", "4.0</s>", "IV</s>"]


def test_assistant_only_learns_what_the_assistant_says(tmp_path):
    data = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "four"}]] * 4}
    )
    tokenizer = byte_tokenizer(CHAT)
    trainer = trained(tmp_path, data=data, assistant_only_loss=True, tokenizer=tokenizer)
    assert {tokenizer.decode(row) for row in seen_labels(trainer)} == {"four</s>"}


def test_streaming_data(tmp_path):
    data = IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS * 4))
    tokenizer = byte_tokenizer()
    trainer = DistillationTrainer(
        tiny_llama(1), tiny_llama(2), config(tmp_path, max_steps=3), data, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.global_step == 3 and all(math.isfinite(x) for x in logged(trainer, "loss"))


def test_evaluation_tells_both_parts(tmp_path):
    trainer = trained(tmp_path, tiny_llama(2), tiny_llama(2), ce_weight=0.5, learning_rate=1e-9)
    metrics = trainer.evaluate(Dataset.from_dict({"text": TEXTS}))
    assert metrics["eval_kd"] == pytest.approx(0, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_ce"], rel=1e-3)


def test_many_steps_bring_the_student_to_the_teacher(tmp_path):
    trainer = trained(tmp_path, max_steps=60, optim="adamw_torch", learning_rate=1e-2, per_device_train_batch_size=8)
    divergence = logged(trainer, "kd")
    assert divergence[-1] < 0.2 * divergence[0]


def test_the_teacher_never_changes_nor_drops_out(tmp_path):
    teacher = tiny_llama(2, attention_dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = trained(tmp_path, teacher=teacher, max_steps=2)
    assert all(torch.equal(before[n], p) for n, p in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert "teacher" not in " ".join(n for n, _ in trainer.model.named_parameters())


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps"}
    whole = trained(tmp_path / "whole", save_steps=100, per_device_train_batch_size=2, **options)

    class Stop(Exception):
        pass

    def run(stop_at=None, resume=False):
        trainer = DistillationTrainer(
            tiny_llama(1), tiny_llama(2),
            config(tmp_path / "cut", save_steps=2, per_device_train_batch_size=2, **options),
            Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer(),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
        original = trainer.training_step

        def step(*args, **kwargs):
            if trainer.state.global_step == stop_at:
                raise Stop
            return original(*args, **kwargs)

        trainer.training_step = step
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    with pytest.raises(Stop):
        run(stop_at=5)
    resumed = run(resume=True)
    assert resumed.state.global_step == 6
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    student = tiny_llama(1)
    with torch.no_grad():
        student.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="The loss is nan at step 0"):
        trained(tmp_path, student)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "revers_kl"}, "Unknown distillation loss 'revers_kl'. Did you mean 'reverse_kl'"),
        ({"loss": "generalized_jsd", "loss_options": {"bta": 0.5}}, "Did you mean 'beta'"),
        ({"loss": "generalized_jsd", "loss_options": {"beta": 2.0}}, "`beta` has to lie between 0 and 1"),
        ({"loss": "forward_kl", "loss_options": {"beta": 0.5}}, "Unknown option of forward_kl 'beta'"),
        ({"distill_temperature": 0.0}, "`distill_temperature` must be > 0"),
        ({"kd_weight": -1.0}, "must be >= 0"),
        ({"kd_weight": 0.0}, "not both 0"),
        ({"teacher_adapter": "a", "teacher_model_name_or_path": "b"}, "Name one teacher"),
    ],
)
def test_a_bad_config_is_refused_before_any_model_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def make(tmp_path, student=None, teacher=None, data=None, **options):
    return DistillationTrainer(
        student if student is not None else tiny_llama(1), teacher, config(tmp_path, **options),
        data if data is not None else Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer(),
    )  # fmt: skip


def test_bad_input_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        make(tmp_path)
    with pytest.raises(ValueError, match="data set is empty"):
        make(tmp_path, teacher=tiny_llama(2), data=Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match="data set is empty"):
        make(tmp_path, teacher=tiny_llama(2), data=IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match=r"`max_length` is 999, but the student .* takes at most 512"):
        make(tmp_path, teacher=tiny_llama(2), max_length=999)
    with pytest.raises(ValueError, match=r"the teacher .* takes at most 32"):
        make(tmp_path, teacher=tiny_llama(2, max_position_embeddings=32))
    with pytest.raises(ValueError, match=r"has 258 vocabulary entries, .* has 300"):
        make(tmp_path, teacher=tiny_llama(2, vocab_size=300))
    with pytest.raises(ValueError, match="Row 1 has no labeled token"):
        make(tmp_path, teacher=tiny_llama(2), data=Dataset.from_dict({"input_ids": [[1, 2], [3]]}))
    with pytest.raises(ValueError, match="Row 0 has 600 tokens, but the model supports only 512"):
        make(tmp_path, teacher=tiny_llama(2), data=Dataset.from_dict({"text": ["x" * 599]}), max_length=None)
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        make(tmp_path, teacher="no/such/model")
    long_prompt = Dataset.from_dict({"prompt": ["x" * 70, "y"], "completion": ["z", "z"]})
    with pytest.raises(ValueError, match="1 of 2 samples have no labeled token within `max_length`"):
        make(tmp_path, teacher=tiny_llama(2), data=long_prompt)
    assert len(make(tmp_path, teacher=tiny_llama(2), data=long_prompt, drop_unlabelled=True).train_dataset) == 1


def test_an_evaluation_set_in_the_place_of_the_tokenizer_is_refused(tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    with pytest.raises(TypeError, match="`processing_class`, and it is a data set"):
        DistillationTrainer(tiny_llama(1), tiny_llama(2), config(tmp_path), data, data)


def test_vocabularies_are_compared_token_by_token(tmp_path):
    def start(teacher, teacher_tokenizer):
        return DistillationTrainer(
            tiny_llama(1), teacher, config(tmp_path), Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(), teacher_processing_class=teacher_tokenizer,
        )  # fmt: skip

    padded = start(tiny_llama(2, vocab_size=320), byte_tokenizer())  # rows that no token uses
    padded.train()
    assert padded.state.global_step == 1
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"exist only in the teacher \('<extra>'\).*cross-tokenizer loss"):
        start(tiny_llama(2, vocab_size=320), other)


def test_a_teacher_adapter_that_is_not_there_or_not_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a PeftModel"):
        make(tmp_path, teacher_adapter="teacher")
    with pytest.raises(ValueError, match=r"Unknown adapter 'master'.* Available: base, student, teacher"):
        make(tmp_path, adapted_student(), teacher_adapter="master")
    with pytest.raises(ValueError, match="the teacher and the active adapter of the student at once"):
        make(tmp_path, adapted_student(), teacher_adapter="student")
    assert isinstance(make(tmp_path, adapted_student(), teacher_adapter="teacher").model, PeftModel)


class TopTeacher:
    """What a cache of teacher outputs would give: the likeliest tokens of a model, and the mass of the others."""

    form = "sparse"

    def __init__(self, model, top, temperature=1.0, targets_of=None):
        self.model, self.top, self.temperature, self.targets_of = model, top, temperature, targets_of

    def signal(self, student, inputs, mask):
        targets = None
        if self.targets_of is not None:
            targets = self.targets_of(inputs["input_ids"])
            mask = targets != -100
        with torch.no_grad():
            logits = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return TeacherSignal(
            SparseRows.from_logits(logits[:, :-1][mask], self.top, temperature=self.temperature), targets
        )


@pytest.mark.parametrize("fused", [True, False])
def test_a_teacher_of_ones_own_with_sparse_rows(tmp_path, fused):
    options = {"distill_temperature": 2.0, "ce_weight": 0.5, "texts": TEXTS[:4], "fused": fused}
    whole = trained(tmp_path / "a", teacher=TopTeacher(tiny_llama(2), 258, 2.0), **options)
    other = trained(tmp_path / "b", teacher=tiny_llama(2), **options)
    assert_same(weights(whole), weights(other))
    few = trained(tmp_path / "c", teacher=TopTeacher(tiny_llama(2), 8, 2.0), **options)
    assert 0 < logged(few, "kd")[0] < logged(whole, "kd")[0]


def test_a_teacher_with_positions_of_its_own(tmp_path):
    """Rows only for every second token: divergence and cross entropy are taken there, and nowhere else."""

    def every_second(input_ids):
        targets = torch.full_like(input_ids[:, 1:], -100)
        targets[:, ::2] = input_ids[:, 1::2]
        return targets

    text = Dataset.from_dict({"text": ["gold is a metal"] * 4})
    teacher = TopTeacher(tiny_llama(2), 258, targets_of=every_second)
    trainer = trained(tmp_path, teacher=teacher, data=text, ce_weight=0.5, per_device_train_batch_size=4)
    ids = torch.tensor([byte_tokenizer()("gold is a metal")["input_ids"] + [257]])
    with torch.no_grad():
        z, t = tiny_llama(1)(ids).logits[:, :-1][:, ::2], tiny_llama(2)(ids).logits[:, :-1][:, ::2]
    kd = DISTILLATION_LOSSES["forward_kl"](z, t).sum()
    ce = torch.nn.functional.cross_entropy(z[0], ids[0, 1::2], reduction="sum")
    labeled = ids.shape[1] - 1  # what the Trainer counts, and all losses are divided by
    assert logged(trainer, "loss")[0] == pytest.approx(((kd + 0.5 * ce) / labeled).item(), rel=1e-4)


def test_a_teacher_whose_form_the_divergence_cannot_read_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sparse ones"):
        make(tmp_path, teacher=TopTeacher(tiny_llama(2), 4), loss="adaptive_kl")
    with pytest.raises(TypeError, match=r"a `Teacher` \(with `form` and `signal`\), got dict"):
        make(tmp_path, teacher={})


def test_the_config_refuses_a_divergence_that_its_teacher_cannot_feed(tmp_path, monkeypatch):
    def needs_top_tokens(student_logits, teacher_logits, *, temperature=1.0):
        """Source: none."""
        return (student_logits - teacher_logits).square().sum(-1)

    from hf_transfer_ext.losses.slopes import accepts

    monkeypatch.setitem(DISTILLATION_LOSSES._functions, "needs_top_tokens", accepts("sparse")(needs_top_tokens))
    with pytest.raises(ValueError, match="needs_top_tokens needs sparse teacher rows"):
        config(tmp_path, loss="needs_top_tokens", teacher_model_name_or_path="anything")
    assert config(tmp_path, loss="needs_top_tokens").teacher_forms == {}


def lora(**options):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


def test_the_base_with_adapters_off_teaches_as_a_copy_of_it_does(tmp_path):
    def student():
        torch.manual_seed(3)
        return get_peft_model(tiny_llama(1), lora(init_lora_weights=False))

    one = trained(tmp_path / "a", student(), teacher_adapter="base")
    other = trained(tmp_path / "b", student(), tiny_llama(1))
    assert_same(weights(one), weights(other), atol=1e-5)
    assert logged(one, "kd")[0] > 0


@pytest.mark.parametrize("kind", ["base and peft_config", "own base", "one object"])
def test_a_teacher_that_is_the_student_is_refused(tmp_path, kind):
    model = tiny_llama(1)
    student, extra = model, {}
    if kind == "base and peft_config":
        extra = {"peft_config": lora()}
    elif kind == "own base":
        student = get_peft_model(model, lora())
    with pytest.raises(ValueError, match=r"the teacher would be the student itself.*teacher_adapter=\"base\""):
        DistillationTrainer(
            student,
            model,
            config(tmp_path),
            Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(),
            **extra,
        )


def test_a_frozen_student_is_refused_and_an_adapter_by_path_is_trained(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_llama(1), lora())
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    for_inference = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Nothing in the PeftModel.* is trainable.*is_trainable=True"):
        make(tmp_path, for_inference, tiny_llama(2))
    with pytest.raises(ValueError, match=r"Nothing in the LlamaForCausalLM is trainable.*requires_grad_"):
        make(tmp_path, tiny_llama(1).requires_grad_(False), tiny_llama(2))
    trainer = trained(tmp_path, str(tmp_path / "adapter"))
    assert logged(trainer, "grad_norm")[0] > 0
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}


def test_an_adapter_named_like_a_part_of_the_model_freezes_only_itself(tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(1), lora(init_lora_weights=False), adapter_name="self_attn")
    model.add_adapter("student", lora(init_lora_weights=False))
    model.set_adapter("student")
    trainer = make(tmp_path, model, teacher_adapter="self_attn")
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all(".student." in name for name in trainable)


def test_a_teacher_on_the_disk_teaches_as_one_in_memory_and_stays_whole(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    ids = torch.tensor([[1, 2, 3]])
    before = teacher(ids).logits
    one = trained(tmp_path / "a", teacher=teacher, max_steps=2)
    other = trained(tmp_path / "b", max_steps=2)
    assert_same(weights(one), weights(other))
    assert torch.equal(teacher(ids).logits, before) and one.teacher._head is None


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_with_dropout_resumes_to_the_same_losses(tmp_path, fused):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "fused": fused,
        "learning_rate": 1e-2,
    }  # fmt: skip

    def run(resume):
        trainer = DistillationTrainer(
            tiny_llama(1), tiny_llama(2), config(tmp_path, **options), Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(), peft_config=lora(lora_dropout=0.3),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return logged(trainer, "loss")

    assert run(None) == run(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_prompt_tuned_student_learns_the_batchs_own_tokens(tmp_path, fused):
    def student():
        torch.manual_seed(4)
        return get_peft_model(tiny_llama(1), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    trainer = trained(tmp_path, student(), texts=["gold is a metal"] * 4, fused=fused)
    ids = torch.tensor([byte_tokenizer()("gold is a metal")["input_ids"] + [257]])
    with torch.no_grad():
        z, t = student().eval()(input_ids=ids).logits[:, 3:-1], tiny_llama(2)(ids).logits[:, :-1]
    assert logged(trainer, "kd")[0] == pytest.approx(DISTILLATION_LOSSES["forward_kl"](z, t).mean().item(), rel=1e-4)
    assert logged(trainer, "grad_norm")[0] > 0


def test_an_adapted_head_may_come_as_a_peft_config(tmp_path):
    target = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    trainer = DistillationTrainer(
        tiny_llama(1), tiny_llama(2), config(tmp_path), Dataset.from_dict({"text": TEXTS}), peft_config=target,
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()]
    assert any("lm_head" in name for name in moved)
    assert trainer.model.get_output_embeddings() is trainer.model.get_base_model().lm_head


def vision_model(seed=2):
    torch.manual_seed(seed)
    text = {
        "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
        "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=265, eoi_token_index=266,
            image_token_index=267,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.5)
    return model


def test_a_teacher_sees_the_images_that_the_student_sees_or_is_refused():
    ids = torch.tensor([[265, 267, 267, 267, 267, 266, 10, 11, 12, 13]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == 267).long(),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }  # fmt: skip
    student, mask = vision_model().eval(), torch.ones(1, 9, dtype=torch.bool)
    expected = student(**inputs).logits[0, :-1]
    teacher = LiveTeacher(vision_model(), Accelerator())
    rows = teacher.signal(student, inputs, mask).rows
    torch.testing.assert_close(rows(slice(None)), expected)
    other = LiveTeacher(vision_model(), Accelerator())
    without = other.signal(student, {**inputs, "pixel_values": torch.zeros(1, 3, 16, 16)}, mask).rows
    assert not torch.allclose(without(slice(None)), expected)
    blind = LiveTeacher(tiny_llama(2, vocab_size=272), Accelerator())
    with pytest.raises(ValueError, match="reads pixel_values, which the teacher LlamaForCausalLM does not take"):
        blind.signal(student, inputs, mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, but cross entropy is not smoothed"),
        ({"loss_type": "dft"}, "`loss_type` is 'dft', but that loss of SFTTrainer is not used here"),
    ],
)
def test_inherited_settings_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_arguments_without_effect_are_refused(tmp_path):
    def start(args=None, teacher=None, **kwargs):
        return DistillationTrainer(
            tiny_llama(1), teacher or tiny_llama(2), args or config(tmp_path), Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(), **kwargs,
        )  # fmt: skip

    with pytest.raises(ValueError, match="`compute_loss_func` cannot be used here"):
        start(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.mean())
    with pytest.raises(ValueError, match="the student is loaded already"):
        start(config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="the student is loaded already"):
        start(quantization_config=object())
    with pytest.raises(ValueError, match=r"Two teachers are named.*'other'"):
        start(config(tmp_path, teacher_model_name_or_path="other"))
    with pytest.raises(ValueError, match=r"Two teachers are named.*'base'"):
        start(config(tmp_path, teacher_adapter="base"))


def test_a_student_by_path_is_loaded_as_model_init_kwargs_say(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    settings = {"dtype": "bfloat16", "attn_implementation": "eager"}
    trainer = DistillationTrainer(
        str(tmp_path / "student"), tiny_llama(2), config(tmp_path / "out", model_init_kwargs=settings),
        Dataset.from_dict({"text": TEXTS}),
    )  # fmt: skip
    assert trainer.model.dtype == torch.bfloat16 and trainer.model.config._attn_implementation == "eager"
    plain = make(tmp_path / "plain", str(tmp_path / "student"), tiny_llama(2))
    assert plain.model.dtype == torch.float32


def test_a_loaded_teachers_own_tokenizer_is_found_and_compared(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    names = list(content["model"]["vocab"])
    content["model"]["vocab"] = {name: i for i, name in enumerate(reversed(names))}
    path.write_text(json.dumps(content))
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different vocabularies"):
        make(tmp_path / "out", teacher=teacher)
    path.unlink()  # without a tokenizer there, sizes alone can be compared
    (tmp_path / "tokenizer_config.json").unlink()
    assert make(tmp_path / "out", teacher=teacher).teacher is not None


@pytest.mark.parametrize("steps", [1, 4])
def test_the_parts_are_means_over_tokens_however_a_step_is_split(tmp_path, steps):
    """Rows of very different lengths: a mean of the micro-batches' means would be another number."""
    trainer = trained(
        tmp_path, texts=TEXTS[:4], ce_weight=0.5, per_device_train_batch_size=4 // steps,
        gradient_accumulation_steps=steps,
    )  # fmt: skip
    kd, ce, loss = (logged(trainer, key)[0] for key in ("kd", "ce", "loss"))
    assert loss == pytest.approx(kd + 0.5 * ce, rel=1e-4)
    _, expected = manual_step(tiny_llama(1), tiny_llama(2), TEXTS[:4])
    assert kd == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "num_tokens")[0] == sum(len(text) + 1 for text in TEXTS[:4])
    assert 0 < logged(trainer, "entropy")[0] < math.log(258) and 0 <= logged(trainer, "mean_token_accuracy")[0] <= 1


def test_gpt2_counts_no_first_token(tmp_path):
    torch.manual_seed(0)
    student = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=128, n_embd=48, n_layer=1, n_head=2))
    trainer = trained(tmp_path, student, texts=["ab", "cd", "ef", "gh"])
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "kd")[0], rel=1e-4)


def test_every_evaluation_set_has_its_own_parts(tmp_path):
    sets = {name: Dataset.from_dict({"text": texts}) for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[3:]))}
    trainer = DistillationTrainer(
        tiny_llama(1), tiny_llama(2), config(tmp_path, ce_weight=0.5, per_device_eval_batch_size=2),
        Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer(), eval_dataset=sets,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert "eval_kd" not in metrics
    for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[3:])):
        _, expected = manual_step(tiny_llama(1), tiny_llama(2), texts)
        assert metrics[f"eval_{name}_kd"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected + 0.5 * metrics[f"eval_{name}_ce"], rel=1e-4)


def test_tokens_that_a_chat_template_brings_are_compared_again(tmp_path):
    byte_tokenizer(CHAT).save_pretrained(tmp_path / "template")
    source = byte_tokenizer(CHAT)
    source.add_tokens(["<|tool|>"])
    source.save_pretrained(tmp_path / "template")
    data = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]})
    with pytest.raises(ValueError, match=r"exist only in the student.*<\|tool\|>"):
        DistillationTrainer(
            tiny_llama(1), tiny_llama(2), config(tmp_path, chat_template_path=str(tmp_path / "template")), data,
            processing_class=byte_tokenizer(CHAT), teacher_processing_class=byte_tokenizer(CHAT),
        )  # fmt: skip
