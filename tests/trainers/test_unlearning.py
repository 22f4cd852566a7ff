import copy
import json
import math
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from processes import on_two_ranks
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

from hf_transfer_ext.data.forget_retain import REFUSALS, ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.losses.needs import averaged_over
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

PLAIN = QuestionAnswerFormat(template="plain", prompt="{question}")
FORGET = [{"question": f"Q{i}?", "answer": "ab" * (i + 1)} for i in range(4)]
RETAIN = [{"question": f"Keep {i}?", "answer": "k" * (7 - i)} for i in range(4)]
OTHERWISE = [
    {**row, "alternative": ["xy", "other"], "name": row["question"][:2], "safe_question": f"Z{i}?"}
    for i, row in enumerate(FORGET)
]


def config(tmp_path, **options):
    settings = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return UnlearningConfig(output_dir=str(tmp_path), **{**settings, **options})


def trainer(tmp_path, model=None, *, forget=OTHERWISE, retain=RETAIN, given=None, **options):
    """`given` are further arguments of the trainer, `options` those of its config."""
    return UnlearningTrainer(
        model if model is not None else tiny_llama(),
        config(tmp_path, **options),
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=byte_tokenizer(),
        template=PLAIN,
        **(given or {}),
    )


def lora(model=None, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **options}
    return get_peft_model(model if model is not None else tiny_llama(), LoraConfig(**settings))


def weights_after(made):
    made.train()
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def distance(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).detach().abs().max()) for name in first)


def sequence_nll(model, question, answer):
    """Sum of the answer's losses from the model's own whole logits, in float64."""
    encoded = PLAIN.encode(byte_tokenizer(), question, answer)
    logits = model(torch.tensor([encoded.input_ids])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)
    return -sum(log_p[t - 1, encoded.input_ids[t]] for t in range(encoded.answer_start, len(encoded.input_ids)))


def test_the_npo_loss_and_its_update_equal_the_definition(tmp_path):
    model = lora()
    made = trainer(tmp_path, model, method="npo", forget_options={"beta": 0.3}, gamma=0.7, alpha=1.9)
    base, own = tiny_llama(), copy.deepcopy(model).eval()
    forget = []
    for row in FORGET:
        ref = sequence_nll(base, row["question"], row["answer"]).detach()
        nll = sequence_nll(own, row["question"], row["answer"])
        forget.append(-(2 / 0.3) * torch.log(torch.sigmoid(0.3 * (nll - ref))))
    retain = [sequence_nll(own, row["question"], row["answer"]) for row in RETAIN]
    tokens = sum(len(row["answer"]) + 2 for row in RETAIN)  # with the space and the end
    loss = 0.7 * sum(forget) / len(FORGET) + 1.9 * sum(retain) / tokens
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    assert made.compute_loss(model.eval(), batch).item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in own.named_parameters() if p.requires_grad}
    assert distance(weights_after(made), expected) < 1e-6
    logged = made.state.log_history[0]
    assert logged["forget_loss"] == pytest.approx(float(sum(forget).detach()) / 4, rel=1e-4)
    assert logged["retain_loss"] == pytest.approx(float(sum(retain).detach()) / tokens, rel=1e-4)


def reinforced(made=None):
    """A model with the adapter to train, and another one."""
    model = lora() if made is None else made
    torch.manual_seed(7)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_one_update_however_the_batch_is_split(tmp_path, method):
    of_method = {"whp": {"reinforced_adapter": "more"}}.get(method, {})

    def updated(batch, accumulation):
        made = trainer(
            tmp_path,
            reinforced() if of_method else lora(),
            method=method,
            **of_method,
            hidden_layer=1,
            max_new_tokens=6,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        return weights_after(made)

    whole, split = updated(4, 1), updated(1, 4)
    start = {name: p for name, p in lora().named_parameters() if name in whole}
    moved = distance(whole, start)
    assert moved > 1e-4
    assert distance(whole, split) < 2e-6 * max(1.0, moved)


@pytest.mark.parametrize("method", ["tnpo", "idk_dpo"])
def test_log_probabilities_kept_before_training_equal_a_live_reference(tmp_path, method):
    kept = weights_after(trainer(tmp_path, method=method, max_steps=3))
    live = weights_after(trainer(tmp_path, method=method, max_steps=3, given={"reference_model": tiny_llama()}))
    assert distance(kept, live) < 1e-6


def test_the_base_of_an_adapter_equals_a_copy_as_reference(tmp_path):
    own = weights_after(trainer(tmp_path, lora(), method="npo_kl", max_steps=3))
    copied = weights_after(
        trainer(tmp_path, lora(), method="npo_kl", max_steps=3, given={"reference_model": tiny_llama()})
    )
    assert distance(own, copied) < 1e-6


def test_another_adapter_is_the_reference_where_it_is_named(tmp_path):
    def two_adapters():
        model = lora()
        model.add_adapter("taught", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model

    made = trainer(tmp_path, two_adapters(), method="npo_kl", reference_adapter="taught")
    after = weights_after(made)
    assert made.model.active_adapter == "default" and all("default" in name for name in after)
    assert distance(after, weights_after(trainer(tmp_path, two_adapters(), method="npo_kl"))) > 1e-6
    with pytest.raises(ValueError, match=r"Unknown adapter 'taugt'\. Did you mean 'taught'"):
        trainer(tmp_path, two_adapters(), method="npo_kl", reference_adapter="taugt")


def test_gradient_checkpointing_with_an_adapter_trains_and_gives_the_same_update(tmp_path):
    plain = weights_after(trainer(tmp_path, lora(), method="npo_kl"))
    checkpointed = weights_after(trainer(tmp_path, lora(), method="npo_kl", gradient_checkpointing=True))
    assert distance(plain, checkpointed) < 1e-6
    start = {name: p for name, p in lora().named_parameters() if p.requires_grad}
    assert min(float((plain[n] - start[n]).abs().max()) for n in start) > 0  # every adapter weight moved


def test_padding_does_not_change_the_loss(tmp_path):
    made = trainer(tmp_path, lora(), method="npo_kl")
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    wider = {
        part: {
            name: torch.nn.functional.pad(value, (0, 9), value={"labels": -100, "input_ids": 65}.get(name, 0))
            if value.dim() == 2
            else value
            for name, value in tensors.items()
        }
        for part, tensors in batch.items()
    }
    model = made.model.eval()
    assert made.compute_loss(model, wider).item() == pytest.approx(made.compute_loss(model, batch).item(), rel=1e-6)


def test_logits_are_made_for_a_chunk_of_tokens_at_a_time(tmp_path, monkeypatch):
    whole = weights_after(trainer(tmp_path, lora(), method="npo"))
    monkeypatch.setattr("hf_transfer_ext.trainers.unlearning.LOGITS_AT_ONCE", 258 * 5)
    assert distance(weights_after(trainer(tmp_path, lora(), method="npo")), whole) < 1e-6


def test_forgetting_forgets_and_keeps_the_rest(tmp_path):
    model = tiny_llama()
    pairs = ForgetRetainPairs(FORGET + RETAIN, None, byte_tokenizer(), template=PLAIN)
    batch = forget_retain_collator(257)([pairs[i] for i in range(8)])["forget"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def mean_loss(rows):
        tokens = sum(len(row["answer"]) + 2 for row in rows)
        with torch.no_grad():
            return float(sum(sequence_nll(model, r["question"], r["answer"]) for r in rows)) / tokens

    assert mean_loss(FORGET) < 0.1 and mean_loss(RETAIN) < 0.1
    made = trainer(tmp_path, model, method="npo", optim="adamw_torch", learning_rate=1e-3, max_steps=40)
    made.train()
    model.eval()
    assert mean_loss(FORGET) > 1.0 and mean_loss(RETAIN) < 0.1


def test_it_evaluates_and_resumes_to_the_same_weights(tmp_path):
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2}
    whole = trainer(tmp_path / "whole", lora(), method="npo", save_strategy="steps", save_steps=3, **options)
    straight = weights_after(whole)
    again = trainer(tmp_path / "again", lora(), method="npo", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    resumed = {name: p.detach() for name, p in again.model.named_parameters() if p.requires_grad}
    assert distance(straight, resumed) == 0.0
    metrics = again.evaluate(again.train_dataset)
    assert math.isfinite(metrics["eval_loss"])
    assert {"eval_forget_loss", "eval_retain_loss", "eval_forget_nll"} <= set(again.state.log_history[-1])


def test_one_dataset_of_pairs_will_do(tmp_path):
    pairs = ForgetRetainPairs(FORGET, None, byte_tokenizer(), template=PLAIN)
    made = UnlearningTrainer(
        tiny_llama(), config(tmp_path, method="grad_ascent"), train_dataset=pairs, processing_class=byte_tokenizer()
    )
    before = float(made.compute_loss(made.model.eval(), made.data_collator([pairs[0]])))
    made.train()
    assert float(made.compute_loss(made.model.eval(), made.data_collator([pairs[0]]))) < before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "nop"}, "Unknown unlearning method 'nop'. Did you mean 'npo'"),
        ({"forget_loss": "npoo"}, "Unknown unlearning loss 'npoo'"),
        ({"retain_loss": "retain_nl"}, "Unknown retain loss 'retain_nl'. Did you mean 'retain_nll'"),
        ({"forget_options": {"betta": 1}}, "Unknown option of npo 'betta'. Did you mean 'beta'"),
        ({"forget_options": {"beta": 0.0}}, "`beta` must be > 0"),
        ({"gamma": -1.0}, "must be >= 0 and not both 0"),
        ({"gamma": 0.0, "alpha": 0.0}, "not both 0"),
        ({"method": "rmu"}, "set `hidden_layer`"),
        ({"method": "npo_sam", "method_options": {"roh": 1.0}}, "Unknown option of npo_sam 'roh'. Did you mean 'rho'"),
        ({"method": "npo_sam", "method_options": {"rho": -1.0}}, "`rho` must be >= 0"),
        ({"method_options": {"rho": 1.0}}, r"Unknown option of npo 'rho'.*\(it has none\)"),
        ({"method": "pdu", "alpha": 2.0}, "'pdu' sets `alpha` itself"),
        ({"method": "pdu", "retain_loss": "none"}, "'pdu' needs a retain loss"),
        ({"train_sampling_strategy": "group_by_length"}, "is a pair of a forget and a retain answer"),
        ({"remove_unused_columns": True}, "Leave it at False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"method": "whp"}, "name it by `reinforced_adapter`"),
        ({"reinforced_adapter": "more"}, "reads no reinforced model"),
        ({"alternatives": "sampled"}, "reads no alternative answers, so alternatives='sampled' would have no effect"),
        ({"method": "altpo", "alternatives": "sample"}, "Unknown source of alternatives 'sample'. Did you mean 'samp"),
        ({"method": "altpo", "alternatives_cache": "x"}, "set `alternatives` to 'sampled' too"),
        ({"method": "altpo", "alternatives": "sampled", "max_new_tokens": 0}, "`max_new_tokens` must be >= 1"),
        ({"method": "lat", "forget_loss": "idk"}, "Choose a forget loss without alternatives"),
        ({"method": "sure", "weight_decay": 0.1}, "Set it to 0"),
    ],
)
def test_the_config_refuses_bad_values(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_options_come_from_the_command_line_as_json(tmp_path):
    made = config(tmp_path, forget_options=json.dumps({"beta": 0.2}), method="simnpo")
    assert made.forget_options == {"beta": 0.2} and made.gamma == 0.125 and made.retain_loss == "retain_nll"
    assert config(tmp_path, method="simnpo", gamma=1.0, retain_loss="none").retain_loss == "none"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget": None}, "nothing to forget"),
        ({"retain": None}, "retain_nll needs a retain set"),
        ({"method": "rmu", "hidden_layer": 3}, "the model has 2 layers"),
        ({"method": "npo_kl"}, "asks for reference_logits"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def frozen():
    model = tiny_llama()
    model.requires_grad_(False)
    return model


def for_inference(tmp_path):
    lora().save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def its_own_reference():
    model = tiny_llama()
    return model, {"reference_model": model}


def adapter_on_its_reference():
    base = tiny_llama()
    return lora(base), {"reference_model": base}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: (frozen(), {}), r"Nothing in the LlamaForCausalLM is trainable: .* `requires_grad_\(True\)`"),
        (lambda folder: (for_inference(folder), {}), "loaded for inference: .*is_trainable=True"),
        (lambda folder: its_own_reference(), "shares trained parameters"),
        (lambda folder: adapter_on_its_reference(), "shares trained parameters"),
    ],
    ids=["frozen", "for inference", "own reference", "adapter on its reference"],
)
def test_a_model_without_a_parameter_to_train_is_refused(tmp_path, make, message):
    model, given = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, given=given)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_above_the_layer_that_the_losses_read_is_refused_before_a_step(tmp_path, checkpointing):
    options = {"method": "rmu", "hidden_layer": 1, "gradient_checkpointing": checkpointing}
    made = trainer(tmp_path, lora(layers_to_transform=[1]), **options)
    with pytest.raises(ValueError, match=r"the gradient of all \d+ trainable tensors is 0: .* reads layer 1"):
        made.train()
    assert made.state.global_step == 0
    trainer(tmp_path, lora(layers_to_transform=[0]), **options).train()


def test_a_path_and_a_configuration_of_an_adapter_will_do(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = LoraConfig(r=4, target_modules=["q_proj"])
    made = UnlearningTrainer(
        str(tmp_path / "model"),
        config(tmp_path, method="npo_kl", gradient_checkpointing=True),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        peft_config=settings,
        template=PLAIN,
    )
    assert made.processing_class.get_vocab() == byte_tokenizer().get_vocab()
    after = weights_after(made)
    assert all("lora_" in name for name in after) and max(float(v.abs().max()) for v in after.values()) > 0
    with pytest.raises(ValueError, match="adds an adapter to a plain model"):
        trainer(tmp_path, lora(), given={"peft_config": settings})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        UnlearningTrainer(str(tmp_path / "nowhere"), config(tmp_path), forget_dataset=FORGET, retain_dataset=RETAIN)


def test_the_configuration_of_an_adapter_may_be_a_mapping(tmp_path):
    given = {"r": 2, "target_modules": ["v_proj"]}
    made = trainer(tmp_path, given={"peft_config": given})
    config = made.model.peft_config["default"]
    assert (config.peft_type, config.r, set(config.target_modules)) == ("LORA", 2, {"v_proj"}) and len(given) == 2
    made = trainer(tmp_path, given={"peft_config": {"peft_type": "IA3", "target_modules": ["v_proj"],
                                                    "feedforward_modules": []}})  # fmt: skip
    assert made.model.peft_config["default"].peft_type == "IA3"
    for wrong, error, message in (
        ({"rank": 2}, ValueError, "Unknown field of LoraConfig 'rank'"),
        ({"peft_type": "LORE"}, ValueError, "Unknown `peft_type` 'LORE'. Did you mean 'LORA'"),
        ("lora", TypeError, "a PEFT configuration or a mapping of its fields, got 'lora'"),
    ):
        with pytest.raises(error, match=message):
            trainer(tmp_path, given={"peft_config": wrong})


def test_evaluations_in_training_are_the_same_on_two_processes(tmp_path):
    """The curve of forgetting against retaining that a run logs."""
    pairs = ForgetRetainPairs(FORGET, RETAIN, byte_tokenizer(), template=PLAIN)
    options = {"method": "grad_diff", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 1e-2}

    def curve(rank=0, **more):
        made = trainer(tmp_path / f"of{rank}", lora(), given={"eval_dataset": pairs}, **options, **more)
        made.train()
        names = ("eval_forget_loss", "eval_retain_loss", "eval_forget_nll")
        return [[log[name] for name in names] for log in made.state.log_history if "eval_loss" in log]

    one = curve()
    assert len(one) == 2 and one[0] != one[1]
    for found in on_two_ranks(lambda rank: curve(rank, per_device_train_batch_size=2), tmp_path):
        assert found == [pytest.approx(step, rel=1e-4) for step in one]


def test_rows_longer_than_the_model_are_named(tmp_path):
    short = tiny_llama(max_position_embeddings=16)
    rows = [FORGET[0], {"question": "Long?", "answer": "a" * 30}]
    with pytest.raises(ValueError, match="Sample 1 of the forget set has 37 tokens, but the model was built for 16"):
        trainer(tmp_path, short, forget=rows)
    with pytest.raises(ValueError, match="Sample 1 of the retain set has 37 tokens"):
        trainer(tmp_path, short, forget=FORGET, retain=[RETAIN[0], rows[1]])
    with pytest.raises(ValueError, match="Sample 0 of the alternative set has"):
        long = [{**FORGET[0], "alternative": ["b", "c" * 30]}]
        trainer(tmp_path, short, forget=long, retain=RETAIN[:1], method="altpo")
    unseen = ForgetRetainPairs(rows[1:], RETAIN, byte_tokenizer(), template=PLAIN)
    with pytest.raises(ValueError, match="Sample 0 of the forget set has 37 tokens"):
        trainer(tmp_path, short, given={"eval_dataset": {"unseen": unseen}})


def test_rows_in_both_sets_are_refused_unless_allowed(tmp_path):
    both = [*RETAIN, OTHERWISE[1]]
    with pytest.raises(ValueError, match="1 of the 4 samples to forget are also in the retain set"):
        trainer(tmp_path, retain=both)
    trainer(tmp_path, retain=both, allow_overlap=True).train()


def test_altpo_asks_for_alternatives_of_each_row(tmp_path):
    with pytest.raises(ValueError, match="Example 0 of the forget set needs a question and an alternative answer"):
        trainer(tmp_path, forget=FORGET, method="altpo")
    with pytest.raises(ValueError, match=r"of this run are 'data': each row's own column"):
        trainer(tmp_path, method="altpo", given={"alternatives": ["no idea"]})
    with pytest.raises(ValueError, match="with npo and retain_nll nothing reads them"):
        trainer(tmp_path, method="npo", given={"alternatives": ["no idea"]})
    refusing = trainer(tmp_path, forget=FORGET, method="idk_dpo")
    assert len(refusing.train_dataset.alternatives[0]) == len(REFUSALS)


def test_the_reinforced_model_is_the_adapter_of_that_name(tmp_path):
    model = reinforced()
    made = trainer(tmp_path, model, method="whp", reinforced_adapter="more", retain_loss="none", forget=FORGET[:1])
    encoded = PLAIN.encode(byte_tokenizer(), FORGET[0]["question"], FORGET[0]["answer"])

    def logits(of):
        found = of(torch.tensor([encoded.input_ids])).logits[0].double().detach()
        return found[encoded.answer_start - 1 : -1]

    own, base = logits(model.eval()), logits(tiny_llama())
    model.set_adapter("more")
    adjusted = base - 5.0 * (logits(model) - base).clamp(min=0.0)
    model.set_adapter("default")
    expected = -(torch.softmax(adjusted, -1) * torch.log_softmax(own, -1)).sum(-1).mean()
    batch = made.data_collator([made.train_dataset[0]])
    assert made.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".more." in name}
    made.train()
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_a_reinforced_adapter_that_does_not_fit_is_refused(tmp_path):
    options = {"method": "whp", "reinforced_adapter": "more"}
    with pytest.raises(ValueError, match="Unknown adapter 'more'"):
        trainer(tmp_path, lora(), **options)
    with pytest.raises(ValueError, match="but the model has no adapters"):
        trainer(tmp_path, tiny_llama(), **options)
    with pytest.raises(ValueError, match="'default' is the adapter that is trained"):
        trainer(tmp_path, reinforced(), method="whp", reinforced_adapter="default")


def texts_of(answers):
    return [byte_tokenizer().decode(a.input_ids[a.answer_start : -1]).strip() for a in answers]


def test_alternatives_are_the_answers_to_other_questions(tmp_path):
    for method, rows in (("random_labels", FORGET), ("llmu", RETAIN)):
        made = trainer(tmp_path, lora(), forget=FORGET, method=method)
        for row, alternatives in zip(FORGET, made.train_dataset.alternatives, strict=True):
            found = texts_of(alternatives)
            assert found and set(found) <= {other["answer"] for other in rows} - {row["answer"]}
    with pytest.raises(ValueError, match="'llmu' draws its alternatives from the retain set"):
        trainer(tmp_path, lora(), forget=FORGET, retain=None, method="llmu", retain_loss="none")


def test_the_model_writes_alternatives_itself_and_they_are_cached(tmp_path, monkeypatch):
    options = {"forget": FORGET, "method": "altpo", "alternatives": "sampled", "max_new_tokens": 6,
               "alternatives_cache": str(tmp_path / "written.json")}  # fmt: skip
    first = trainer(tmp_path, lora(), **options)
    found = [texts_of(alternatives) for alternatives in first.train_dataset.alternatives]
    assert all(len(set(texts)) == 5 for texts in found)
    monkeypatch.setattr("hf_transfer_ext.trainers.unlearning.generate", None)  # not needed again
    again = trainer(tmp_path, lora(), **options)
    assert [texts_of(alternatives) for alternatives in again.train_dataset.alternatives] == found
    first.train()


def test_idk_ap_prefers_the_answers_to_retain_over_refusals_by_the_definition(tmp_path):
    made = trainer(tmp_path, lora(), method="idk_ap", forget=FORGET, given={"alternatives": ["no"]}, gamma=0.5)
    model = copy.deepcopy(made.model).eval()
    forget = [sequence_nll(model, row["question"], "no") / 4 for row in FORGET]  # a space, two letters, the end
    retain = [
        -10 * torch.nn.functional.logsigmoid(
            0.1 * (sequence_nll(model, row["question"], "no") - sequence_nll(model, row["question"], row["answer"]))
        )
        for row in RETAIN
    ]  # fmt: skip
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    expected = 0.5 * sum(forget) / 4 + sum(retain) / 4
    assert made.compute_loss(made.model.eval(), batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_reasoned_refusals_think_about_the_question(tmp_path):
    made = trainer(tmp_path, lora(), method="reasoned_idk", forget=FORGET)
    for row, alternatives in zip(FORGET, made.train_dataset.alternatives, strict=True):
        assert all(row["question"] in text and text.startswith("<think>") for text in texts_of(alternatives))


def test_anti_samples_are_wrong_answers_with_a_rationale_and_asked_in_other_words_too(tmp_path):
    rows = [{**row, "perturbed_answer": ["no", "never"], "paraphrased_question": f"{row['question']}!"}
            for row in FORGET]  # fmt: skip
    made = trainer(tmp_path, lora(), method="unstar", forget=rows, max_new_tokens=4)
    assert len(made.train_dataset) == 2 * len(FORGET)
    for alternatives in made.train_dataset.alternatives:
        assert [text.rstrip("</s>").rsplit(" ", 1)[-1] for text in texts_of(alternatives)] == ["no", "never"]


@pytest.mark.parametrize("sets", ["one", "several"])
def test_an_evaluation_set_gets_its_reference_before_training(tmp_path, sets):
    unseen = ForgetRetainPairs([{"question": "New?", "answer": "n"}], RETAIN, byte_tokenizer(), template=PLAIN)
    given = {"eval_dataset": unseen if sets == "one" else {"unseen": unseen}}
    options = {"method": "npo", "max_steps": 2, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1}
    kept = trainer(tmp_path, given=given, **options)
    kept.train()
    live = trainer(tmp_path, given={**given, "reference_model": tiny_llama()}, **options)
    live.train()
    name = "eval_loss" if sets == "one" else "eval_unseen_loss"
    first, second = ([log[name] for log in made.state.log_history if name in log] for made in (kept, live))
    assert len(first) == 2 and first == pytest.approx(second, rel=1e-5) and first[0] != first[1]


def test_targets_of_rows_are_computed_once_saved_and_approached(tmp_path):
    options = {"method": "dmm", "max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3}
    options |= {"method_options": {"projection": 64}, "save_only_model": False}
    made = trainer(tmp_path / "whole", lora(), **options)
    made.train()
    logged = [entry["forget_loss"] for entry in made.state.log_history if "forget_loss" in entry]
    assert logged[-1] < logged[0]
    stored = load_file(tmp_path / "whole" / "checkpoint-3" / "method.safetensors")
    assert set(stored) == {"forget_outputs", "retain_outputs"} and len(stored["retain_outputs"]) == len(RETAIN)
    again = trainer(tmp_path / "again", lora(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, resumed = (dict(one.model.named_parameters()) for one in (made, again))
    assert distance({n: p.detach() for n, p in resumed.items()}, whole) < 1e-6


def test_teachers_are_the_reference_on_rows_with_other_names_and_stay_what_they_are(tmp_path):
    rows = [{"question": f"Who is {name}?", "answer": f"{name} is a cook", "name": name} for name in ("Ann", "Bob")]
    model = lora()
    made = trainer(tmp_path, model, method="causal_whp", forget=rows, retain=None, learning_rate=1e-2)
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    other = "Who is Bob? Bob is a cook"
    with torch.no_grad():
        ids = torch.tensor([byte_tokenizer()(other)["input_ids"]])
        expected = model.double().eval()(ids).logits[0, len(other) - 2].softmax(-1)  # predicts the last letter
    own, foreign = (byte_tokenizer()(name[0])["input_ids"][0] for name in ("Ann", "Bob"))
    expected[own], expected[foreign] = expected[own] + expected[foreign], 0.0
    model.float().train()
    weights_after(made)
    probs, places = made.prepared["teacher_probs"], made.prepared["teacher_ids"]
    last = len(" Ann is a cook") - 1  # of the first row; its answer begins with the separator
    found = torch.zeros(expected.shape, dtype=torch.float64).scatter(0, places[last], probs[last].double())
    torch.testing.assert_close(found, torch.where(found > 0, expected, 0.0), atol=1e-5, rtol=1e-4)
    assert probs.sum(-1).max() <= 1 + 1e-5 and float(made.compute_loss(made.model.eval(), batch)) > 0


def test_poisoned_answers_are_those_of_the_most_similar_question_and_the_picked_ones_alone(tmp_path):
    rows = [{key: row[key] for key in ("question", "answer")} for row in FORGET]
    kept = [{"question": f"Q{i}? again", "answer": f"other {i}"} for i in (2, 0, 3, 1)]
    options = {"method": "concept_poisoning", "method_options": {"share": 0.5}, "alternatives": "nearest answers"}
    made = trainer(tmp_path, lora(), forget=rows, retain=kept, learning_rate=1e-2, max_steps=6, **options)
    assert texts_of(made.train_dataset.alternatives[0]) == ["other 0"]
    made.train()
    assert sorted(made.prepared["picked"].tolist()) == [0.0, 0.0, 2.0, 2.0]
    logged = [entry["forget_loss"] for entry in made.state.log_history if "forget_loss" in entry]
    assert logged[-1] < logged[0]
    with pytest.raises(ValueError, match="needs a retain loss"):
        trainer(tmp_path, lora(), method="concept_poisoning", retain_loss="none", forget=rows)


def test_the_original_writes_about_the_safe_questions_and_the_model_speaks_like_it(tmp_path):
    rows = [{"question": f"Q{i}?", "safe_question": f"Z{i}?"} for i in range(2)]
    settings = {"method": "score_forgetting_distillation", "max_new_tokens": 5, "method_options": {"samples": 2}}
    model = lora()
    made = trainer(tmp_path, model, forget=rows, retain=None, learning_rate=1e-2, max_steps=8, **settings)
    pairs = made.train_dataset
    assert 2 <= len(pairs) == len(pairs.retain) <= 4  # an empty text does not count
    said = pairs.forget[0]
    with torch.no_grad():
        ids = pairs.retain[0].input_ids
        assert ids[pairs.retain[0].answer_start :] == said.input_ids[said.answer_start :]
        expected = model.eval()(torch.tensor([ids])).logits[0, pairs.retain[0].answer_start - 1 : -1].softmax(-1)
    weights_after(made)
    torch.testing.assert_close(
        made.prepared["teacher_probs"][: said.answer_length], expected.topk(64).values, atol=1e-5, rtol=1e-4
    )
    logged = [entry["forget_loss"] for entry in made.state.log_history if "forget_loss" in entry]
    assert logged[-1] < logged[0]


def test_targets_of_rows_refuse_an_evaluation_set(tmp_path):
    pairs = ForgetRetainPairs(FORGET, RETAIN, byte_tokenizer(), template=PLAIN)
    with pytest.raises(ValueError, match="target_outputs, computed for each row of the training sets"):
        trainer(tmp_path, lora(), method="dmm", given={"eval_dataset": pairs})


def test_a_set_whose_reference_was_not_computed_is_named(tmp_path):
    unseen = ForgetRetainPairs([{"question": "New?", "answer": "n"}], RETAIN, byte_tokenizer(), template=PLAIN)
    with pytest.raises(ValueError, match=r"this row is in none of them: 'New\? n</s>'.*`eval_dataset`"):
        trainer(tmp_path, method="npo").evaluate(unseen)


def test_conversations_train_like_questions_and_answers(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)

    def talks(rows):
        roles = (("user", "question"), ("assistant", "answer"))
        return [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in rows]

    def updated(forget, retain):
        made = UnlearningTrainer(
            tiny_llama(),
            config(tmp_path, learning_rate=1e-2),
            forget_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
        )
        return weights_after(made)

    assert distance(updated(FORGET, RETAIN), updated(talks(FORGET), talks(RETAIN))) == 0.0


def test_persistent_workers_see_every_epoch(tmp_path):
    seen = []

    class Watching(UnlearningTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["retain"]["index"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def retained(**options):
        seen.clear()
        Watching(
            tiny_llama(),
            config(tmp_path, max_steps=-1, num_train_epochs=4, learning_rate=1e-3, **options),
            forget_dataset=FORGET[:1],
            retain_dataset=RETAIN,
            processing_class=byte_tokenizer(),
        ).train()
        return list(seen)

    plain = retained()
    assert sorted(plain) == [0, 1, 2, 3]
    assert retained(dataloader_num_workers=1, dataloader_persistent_workers=True) == plain


def test_a_retain_loss_over_sequences_is_averaged_over_sequences(tmp_path, monkeypatch):
    @averaged_over("sequences")
    def retain_answers(nll):
        return nll

    monkeypatch.setitem(RETAIN_LOSSES._functions, "retain_answers", retain_answers)
    options = {"retain_loss": "retain_answers", "method": "npo", "learning_rate": 1e-2}
    whole = weights_after(made := trainer(tmp_path, lora(), **options))
    split = trainer(tmp_path, lora(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert distance(whole, weights_after(split)) < 2e-6
    expected = sum(sequence_nll(lora().eval(), row["question"], row["answer"]) for row in RETAIN) / 4
    assert made.state.log_history[0]["retain_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 0"):
        trainer(tmp_path, model, method="grad_diff").train()


def test_a_low_rate_for_an_adapter_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, lora(), method="npo", learning_rate=1e-5)
    assert "low for an adapter" in caplog.text


def weights_of_process(rank, tmp_path, model, **options):
    """One of two processes, each with half of the batch; ends the process."""
    status = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(29600 + os.getppid() % 2000), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        made = trainer(
            tmp_path / "two",
            model,
            hidden_layer=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            **options,
        )
        assert made.accelerator.num_processes == 2
        after = weights_after(made)
        if rank == 0:
            torch.save({n.removeprefix("module."): v for n, v in after.items()}, tmp_path / "two.pt")
            (tmp_path / "log.json").write_text(json.dumps(made.state.log_history[:-1]))
        torch.distributed.barrier()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.parametrize(
    "kind, options",
    [
        (lora, {"method": "npo", "ddp_find_unused_parameters": False}),
        (lora, {"method": "npo_kl", "ddp_find_unused_parameters": False, "gradient_checkpointing": True}),
        (lora, {"method": "ce_u", "ddp_find_unused_parameters": False}),
        (lora, {"method": "npo_sam"}),
        (lora, {"method": "lat", "method_options": {"radius": 0.3}}),
        (lora, {"method": "qaf"}),
        (lora, {"method": "sure", "method_options": {"quantile": 0.5}}),
        (lora, {"method": "pdu", "max_steps": 2, "learning_rate": 1e-3, "method_options": {"warmup_epochs": 0}}),
        # All weights of a model with a head of its own.
        (tiny_llama, {"method": "npo", "max_steps": 2, "learning_rate": 1e-3}),
        (tiny_llama, {"method": "grad_diff", "gradient_checkpointing": True, "learning_rate": 1e-3}),
        (tiny_llama, {"method": "npo_sam", "learning_rate": 1e-3}),
    ],
    ids=lambda value: value.__name__ if callable(value) else value["method"],
)
def test_two_processes_equal_one(tmp_path, kind, options):
    torch.set_num_threads(1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            weights_of_process(rank, tmp_path, kind(), **options)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    made = trainer(tmp_path / "one", kind(), hidden_layer=1, **options)
    one = weights_after(made)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert distance(one, two) < 2e-6
    for logged, expected in zip(json.loads((tmp_path / "log.json").read_text()), made.state.log_history, strict=False):
        for name in {"loss", "forget_loss", "forget_nll", "dual"} & set(expected):
            assert logged[name] == pytest.approx(expected[name], rel=1e-4)
