"""Losses between layers through the trainer: one step by hand, projections, adapters, checkpoints, what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import on_two_ranks
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import TEXTS, adapted_student, assert_same, config, logged, make, trained, weights
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.hidden.hidden_mse import hidden_mse
from hf_transfer_ext.trainers.saving import save_whole
from hf_transfer_ext.trainers.trained_along import PARTS_FILE

PAIRS = [(0, 1), (1, 3)]  # "uniform" of 2 and 4 layers


def deep(seed=2, **config):
    """A deeper teacher, with larger features: equal ones would lie at the edge of feature_norm_direction."""
    model = tiny_llama(seed, num_hidden_layers=4, **config)
    torch.nn.init.constant_(model.model.norm.weight, 1.5)
    return model


def only_loss(trainer):
    """The only loss between layers of a trainer."""
    (found,) = trainer.hidden_losses.losses
    return found


def inside(model, ids):
    """Logits, (output, queries, keys, values) of each layer from the layers' own modules, and what the head reads."""
    found, inputs = [], []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, named: inputs.append(args[0]), with_kwargs=True)
        for layer in model.model.layers
    ]
    handles += [model.model.layers[-1].register_forward_hook(lambda m, args, out: inputs.append(out))]
    logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    for layer, states, output in zip(model.model.layers, inputs, inputs[1:], strict=False):
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        split = (*ids.shape, -1, attention.head_dim)
        q, k, v = (getattr(attention, f"{n}_proj")(normed).view(split).transpose(1, 2) for n in "qkv")
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(states, torch.arange(ids.shape[1])[None]))
        found.append((output, q, k, v))
    return logits, found, model.model.norm(inputs[-1])


def by_formula(name, own, other, student_head, teacher, ids, options):
    """The loss at the positions that predict a token, of one pair of layers and one text without padding."""
    loss, mask = HIDDEN_LOSSES[name], torch.ones_like(ids, dtype=torch.bool)
    if name == "token_relationship_graph":
        return loss(own[0], other[0], mask, **options)[0, :-1]
    if name == "dual_head":  # the auxiliary head starts as the student's own
        return loss(own[-1][0, :-1] @ student_head.T, other[-1][0, :-1] @ teacher.lm_head.weight.T, **options)
    if name == "feature_norm_direction":
        return loss(own[-1][0, :-1], other[-1][0, :-1], None, teacher.lm_head.weight[ids[0, 1:]])
    if name in ("hidden_mse", "hidden_cosine"):
        return loss(own[0][0, :-1], other[0][0, :-1], None, **options)
    if name == "attention_relation":
        sides = [[x.transpose(1, 2).flatten(2) for x in side[1:4]] for side in (own, other)]
        total = sum(loss(x, y, mask, causal=True, **options) for x, y in zip(*sides, strict=True))
        return total[0, :-1]
    if name == "minilm":
        scores = [side[1] @ side[2].repeat_interleave(2, 1).transpose(2, 3) / side[1].shape[-1] ** 0.5
                  for side in (own, other)]  # fmt: skip
        values = [side[3].repeat_interleave(2, 1).transpose(1, 2).flatten(2) for side in (own, other)]
        return loss(*scores, *values, mask, causal=True)[0, :-1]
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    scores = [
        (side[1] @ side[2].repeat_interleave(2, 1).transpose(2, 3) / side[1].shape[-1] ** 0.5).masked_fill(
            later, -torch.inf
        )
        for side in (own, other)
    ]
    return loss(*scores, mask, **options)[0, :-1]


def manual_step(student, teacher, texts, name, options, pairs=PAIRS, lr=0.5, hidden_weight=0.3):
    """One SGD step on the mean over tokens of forward KL plus the hidden loss: no trainer, no padding, no capture."""
    tokenizer, student = byte_tokenizer(), copy.deepcopy(student).train()
    total, tokens, between = 0.0, 0, 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        z, *own = inside(student, ids)
        with torch.no_grad():
            t, *other = inside(teacher, ids)
        p = t[:, :-1].softmax(-1)
        kl = (p * (p.log() - z[:, :-1].log_softmax(-1))).sum()
        own, other = ([(*one, heads_input) for one in found] for found, heads_input in (own, other))
        head = student.lm_head.weight.detach()
        values = [by_formula(name, own[i], other[j], head, teacher, ids, options) for i, j in pairs]
        here = torch.stack(values).mean(0).sum()
        total, between, tokens = total + kl + hidden_weight * here, between + here.item(), tokens + ids.shape[1] - 1
    (total / tokens).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= lr * p.grad
    return {n: p.detach() for n, p in student.named_parameters()}, between / tokens, (total / tokens).item()


ALL = [
    ("hidden_mse", {}),
    ("hidden_cosine", {}),
    ("attention_relation", {"heads": 2}),
    ("attention_mse", {}),
    ("minilm", {}),
    ("token_relationship_graph", {"neighbors": 3}),
    ("feature_norm_direction", {}),
    ("dual_head", {"top": 5}),
]


@pytest.mark.parametrize("name, options", ALL, ids=[name for name, _ in ALL])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_step_is_the_step_of_the_formula(tmp_path, name, options, attention):
    student, teacher = tiny_llama(1), deep()
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    expected, between, loss = manual_step(student, teacher, TEXTS[:4], name, options)
    trainer = trained(
        tmp_path, student, teacher, TEXTS[:4], hidden_loss=name, hidden_options=options, hidden_weight=0.3
    )
    assert_same(weights(trainer), expected, atol=1e-5)
    assert logged(trainer, "hidden")[0] == pytest.approx(between, rel=1e-3)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)
    assert only_loss(trainer).pairs == ([(-2, -2)] if name in ("feature_norm_direction", "dual_head") else PAIRS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name not in ("hidden_mse", "attention_relation") else ())
        for name, _ in ALL
    ],
)
def test_packing_micro_batches_and_full_logits_change_nothing(tmp_path, name):
    options = {"texts": TEXTS[:4], "hidden_loss": name, "kd_weight": 0.0, "shuffle_dataset": False}
    one = trained(tmp_path / "a", teacher=deep(), **options)
    others = [
        trained(tmp_path / "b", teacher=deep(), packing=True, max_length=80, **options),
        trained(
            tmp_path / "c", teacher=deep(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
        ),
        trained(tmp_path / "d", teacher=deep(), fused=False, **options),
        trained(tmp_path / "e", teacher=deep(), gradient_checkpointing=True, **options),
    ]
    for other in others:
        assert_same(weights(one), weights(other), atol=1e-5)
        assert logged(one, "hidden")[0] == pytest.approx(logged(other, "hidden")[0], rel=1e-3)


def test_only_mapped_layers_and_the_embeddings_are_learned_from(tmp_path):
    before = dict(tiny_llama(1).named_parameters())
    trainer = trained(tmp_path, teacher=deep(), kd_weight=0.0, hidden_loss="hidden_mse", layer_map=[[0, -1]])
    moved = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert moved and all("embed" in n or "layers.0." in n for n in moved)
    alone = trained(
        tmp_path / "b", teacher=deep(), kd_weight=0.0, hidden_loss="hidden_mse", layer_map=[[0, -1]],
        hidden_embeddings=True,
    )  # fmt: skip
    assert only_loss(alone).pairs == [(-1, -1), (0, 3)]
    assert logged(alone, "hidden")[0] != pytest.approx(logged(trainer, "hidden")[0], rel=1e-3)


def narrow_trained(folder, **options):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "hidden_loss": "hidden_mse", "weight_decay": 0.1}
    return trained(folder, tiny_llama(1, hidden_size=16), deep(), **{**settings, **options})


def test_projections_are_trained_logged_saved_beside_checkpoints_and_resumed(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5}
    whole = narrow_trained(tmp_path / "whole", **options)
    start = narrow_trained(tmp_path / "start", max_steps=1, learning_rate=0.0, max_grad_norm=0.0)
    projections, first = only_loss(whole).projections, only_loss(start).projections
    assert set(projections) == {"student_0_teacher_1", "student_1_teacher_3"}
    assert all(p.shape == (32, 16) and not torch.equal(p, first[n]) for n, p in projections.items())
    assert logged(whole, "hidden")[-1] < logged(whole, "hidden")[0]

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert set(load_file(checkpoint / PARTS_FILE)) == {f"0.projections.{name}" for name in projections}
    resumed = resumed_from(tmp_path / "whole", checkpoint, options)
    assert_same(weights(resumed), weights(whole), atol=0.0)
    assert all(torch.equal(p, projections[n]) for n, p in only_loss(resumed).projections.items())

    final = save_whole(whole, tmp_path / "final")
    whole.save_model(str(tmp_path / "saved"))
    assert not (final / PARTS_FILE).exists() and not (tmp_path / "saved" / PARTS_FILE).exists()
    (checkpoint / PARTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {PARTS_FILE}"):
        resumed_from(tmp_path / "whole", checkpoint, options)


def resumed_from(folder, checkpoint, options):
    trainer = make(
        folder, tiny_llama(1, hidden_size=16), deep(), optim="adamw_torch", learning_rate=1e-2,
        hidden_loss="hidden_mse", weight_decay=0.1, **options,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def test_a_step_of_the_projection_is_the_step_of_the_formula(tmp_path):
    options = {"texts": ["gold is a metal"], "kd_weight": 0.0, "layer_map": [[1, 3]], "optim": "sgd"}
    teacher, student = deep(), tiny_llama(1, hidden_size=16)
    still = narrow_trained(tmp_path / "a", learning_rate=0.0, weight_decay=0.0, **options)
    moved = narrow_trained(tmp_path / "b", learning_rate=0.5, weight_decay=0.0, **options)
    ids = torch.tensor([[*byte_tokenizer()("gold is a metal")["input_ids"], 257]])
    projection = only_loss(still).projections["student_1_teacher_3"].detach().clone().requires_grad_()
    hidden_mse(
        inside(student, ids)[1][1][0][0, :-1], inside(teacher, ids)[1][3][0][0, :-1], projection
    ).mean().backward()
    wanted = projection.detach() - 0.5 * projection.grad
    torch.testing.assert_close(
        only_loss(moved).projections["student_1_teacher_3"].detach(), wanted, atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    options = {"texts": TEXTS[:4], "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    one = narrow_trained(tmp_path / "one", **options)

    def rank(_):
        trainer = narrow_trained(tmp_path / "two", per_device_train_batch_size=2, **options)
        return weights(trainer), {n: p.detach() for n, p in only_loss(trainer).projections.items()}

    for found, projections in on_two_ranks(rank, tmp_path):
        assert_same(weights(one), found, atol=1e-5)
        assert_same({n: p.detach() for n, p in only_loss(one).projections.items()}, projections, atol=1e-5)


def test_adapters_learn_and_teach(tmp_path):
    torch.manual_seed(0)
    student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False))
    twin = copy.deepcopy(student)
    options = {"hidden_loss": "hidden_cosine", "kd_weight": 0.0}
    one = trained(tmp_path / "a", student, deep(), **options)
    other = trained(tmp_path / "b", twin, deep(), gradient_checkpointing=True, **options)
    assert_same(weights(one), weights(other))
    assert logged(one, "grad_norm")[0] > 0

    teacher = adapted_student()
    teacher.set_adapter("teacher")
    teacher = teacher.merge_and_unload()
    own = trained(tmp_path / "c", adapted_student(), teacher_adapter="teacher", **options)
    merged = trained(tmp_path / "d", adapted_student(), teacher, **options)
    assert_same(weights(own), weights(merged), atol=1e-5)


@pytest.mark.parametrize("name", ["token_relationship_graph", "dual_head", "feature_norm_direction", "minilm"])
def test_an_adapter_learns_through_checkpointed_layers_and_only_mapped_ones_are_captured(tmp_path, name):
    at_heads = name in ("dual_head", "feature_norm_direction")
    mapped = {} if at_heads else {"layer_map": [[-1, 2]]}
    seen = []
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False))
        trainer = make(
            tmp_path / str(checkpointing), student, deep(), hidden_loss=name, kd_weight=0.0,
            gradient_checkpointing=checkpointing, **mapped,
        )  # fmt: skip
        own = only_loss(trainer).forward
        only_loss(trainer).forward = lambda *args, own=own: (
            seen.append((set(args[0]), set(args[1]))),
            own(*args),
        )[1]
        trainer.train()
        found.append(weights(trainer))
        assert logged(trainer, "grad_norm")[0] > 0
    assert_same(*found, atol=1e-5)
    assert all(pair == (({-2}, {-2}) if at_heads else ({1}, {2})) for pair in seen) and len(seen) == 2


def test_evaluation_adds_the_hidden_loss(tmp_path):
    trainer = trained(tmp_path, teacher=deep(), hidden_loss="hidden_mse", hidden_weight=0.5, learning_rate=1e-9)
    found = trainer.evaluate(Dataset.from_dict({"text": TEXTS}))
    assert found["eval_loss"] == pytest.approx(found["eval_kd"] + 0.5 * found["eval_hidden"], rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_loss": "hiden_mse"}, "Unknown hidden loss 'hiden_mse'. Did you mean 'hidden_mse'"),
        ({"hidden_loss": "attention_relation", "hidden_options": {"head": 2}}, "Did you mean 'heads'"),
        ({"hidden_loss": "hidden_mse", "layer_map": "unifrom"}, "Unknown layer map 'unifrom'"),
        ({"hidden_loss": "hidden_mse", "layer_map": [[0]]}, "has to be a name or pairs of layers"),
        ({"hidden_loss": "hidden_mse", "hidden_weight": 0.0}, "`hidden_weight` must be > 0"),
        ({"hidden_loss": "hidden_mse", "teacher_cache": "x"}, "a cache holds the teacher's predictions"),
        (
            {"hidden_loss": "feature_norm_direction", "layer_map": "last"},
            "compares what the heads read, and no layers",
        ),
        ({"layer_map": "last"}, "`layer_map` is given, but no `hidden_loss`"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_the_models_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The pair \(0, 9\) names layer 9 of the teacher, which has 4"):
        make(tmp_path, teacher=deep(), hidden_loss="hidden_mse", layer_map=[[0, 9]])
    with pytest.raises(ValueError, match="`hidden_embeddings` is set, but attention_relation reads attention"):
        make(tmp_path, teacher=deep(), hidden_loss="attention_relation", hidden_embeddings=True)
    with pytest.raises(ValueError, match="minilm compares attention head by head, but the student has 4 heads and"):
        wide = deep(num_attention_heads=8, num_key_value_heads=4)
        trained(tmp_path, teacher=wide, hidden_loss="minilm", layer_map=[[-1, -1]])
    with pytest.raises(ValueError, match="only an optimizer that the trainer makes knows"):
        student = tiny_llama(1, hidden_size=16)
        optimizers = (torch.optim.SGD(student.parameters(), lr=0.1), None)
        from hf_transfer_ext import DistillationTrainer

        DistillationTrainer(
            student, deep(), config(tmp_path, hidden_loss="hidden_mse"), Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(), optimizers=optimizers,
        )  # fmt: skip
    frozen = tiny_llama(1)
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match="No gradient flows through the layers of the student"):
        trained(tmp_path, frozen, deep(), hidden_loss="hidden_mse")
