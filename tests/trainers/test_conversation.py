"""`hidden_loss: talking_models` through the trainer: one step by hand, what is trained, what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import TEXTS, adapted_student, assert_same, logged, make, trained, weights
from trainers.test_hidden_loss import deep, inside, only_loss

from hf_transfer_ext.losses.hidden import talking_models
from hf_transfer_ext.losses.hidden.talking_models import Speaker

PAIR = (0, 1)
DATA = Dataset.from_dict({"text": TEXTS[:4]})
OPTIONS = {"message_size": 8, "rounds": 2, "message_weight": 0.5}


def upper(model, layer, ids):
    """The layers above one, run by hand."""

    def run(states):
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(states, positions)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for block in model.model.layers[layer + 1 :]:
            states = block(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return model.model.norm(states)

    return run


def manual_step(student, teacher, texts, begun, options, lr=0.5, hidden_weight=0.3):
    """One SGD step on cross entropy plus the conversation, text by text."""
    tokenizer, learner = byte_tokenizer(), copy.deepcopy(student).train()
    for model in (learner, teacher):
        model.set_attn_implementation("eager")

    def size(states):
        return states.square().mean(-1, keepdim=True).sqrt()

    def network(role, part, states):
        """The encoder reads states of mean square 1; the decoder's are as large as those at the cut."""
        into, out = (begun[f"{role}_{part}_{end}"] for end in ("in", "out"))
        if part == "encoder":
            return lambda x: torch.nn.functional.gelu(x / size(x) @ into.T) @ out.T
        return lambda x: size(states.detach()) * (torch.nn.functional.gelu(x @ into.T) @ out.T)

    total, between, tokens = 0.0, 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        z, own, _ = inside(learner, ids)
        with torch.no_grad():
            _, other, _ = inside(teacher, ids)
        states = own[PAIR[0]][0], other[PAIR[1]][0].detach()
        models = {"student": (learner, PAIR[0], states[0]), "teacher": (teacher, PAIR[1], states[1])}
        pair = [
            Speaker(
                h,
                network(role, "encoder", h),
                network(role, "decoder", h),
                upper(model, layer, ids),
                torch.tanh(begun["student_gate"][0, 0]) if role == "student" and "student_gate" in begun else None,
            )
            for role, (model, layer, h) in models.items()
        ]

        def ce(logits, labels=ids[0, 1:]):
            return torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="none")

        here = talking_models(*pair, lambda x: ce(learner.lm_head(x)), lambda x: x[0, :-1], **options)
        total, between = total + ce(z).sum() + hidden_weight * here.sum(), between + here.sum().item()
        tokens += ids.shape[1] - 1
    (total / tokens).backward()
    with torch.no_grad():
        for p in (*learner.parameters(), *begun.values()):
            p -= lr * p.grad
    return {n: p.detach() for n, p in learner.named_parameters()}, between / tokens


def settings(**options):
    return {
        "kd_weight": 0.0, "ce_weight": 1.0, "hidden_loss": "talking_models", "hidden_weight": 0.3,
        "hidden_options": OPTIONS, "layer_map": [list(PAIR)], "max_grad_norm": 0.0, "optim": "sgd",
        "learning_rate": 0.5, **options,
    }  # fmt: skip


def narrow(seed=1):
    return tiny_llama(seed, hidden_size=16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gate", [None, 0.0, 0.4])
def test_one_step_is_the_step_of_the_formula(tmp_path, checkpointing, gate):
    teacher, options = deep(), {**OPTIONS, "gated": gate is not None}
    trainer = make(
        tmp_path, narrow(), teacher, data=DATA, gradient_checkpointing=checkpointing,
        **settings(hidden_options=options),
    )  # fmt: skip
    if gate is not None:
        assert only_loss(trainer).projections["student_gate"].item() == 0.0
        torch.nn.init.constant_(only_loss(trainer).projections["student_gate"], gate)
    begun = {name: p.detach().clone().requires_grad_() for name, p in only_loss(trainer).projections.items()}
    assert len(begun) == (8 if gate is None else 9) and begun["teacher_decoder_out"].shape == (32, 8)
    trainer.train()
    expected, between = manual_step(narrow(), deep(), TEXTS[:4], begun, options)
    assert_same(weights(trainer), expected, atol=2e-5)
    found = {name: p.detach() for name, p in only_loss(trainer).projections.items()}
    assert_same(found, {name: p.detach() for name, p in begun.items()}, atol=2e-5)
    assert logged(trainer, "hidden")[0] == pytest.approx(between, rel=1e-3)
    assert all(p.grad is None for p in teacher.parameters())


def test_an_adapter_learns_to_talk(tmp_path):
    torch.manual_seed(0)
    student = get_peft_model(narrow(), LoraConfig(r=2, target_modules="all-linear"))
    trainer = trained(
        tmp_path, student, deep(), gradient_checkpointing=True,
        **settings(max_steps=20, optim="adamw_torch", learning_rate=1e-2),
    )  # fmt: skip
    assert logged(trainer, "hidden")[-1] < 0.8 * logged(trainer, "hidden")[0]
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_hidden"] > 0


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    options = settings(max_steps=2, learning_rate=0.1)
    one = trained(tmp_path / "one", narrow(), deep(), texts=TEXTS[:4], **options)

    def rank(_):
        trainer = trained(
            tmp_path / "two", narrow(), deep(), texts=TEXTS[:4], per_device_train_batch_size=2, **options
        )
        return weights(trainer), {n: p.detach() for n, p in only_loss(trainer).projections.items()}

    for found, projections in on_two_ranks(rank, tmp_path):
        assert_same(weights(one), found, atol=1e-5)
        assert_same({n: p.detach() for n, p in only_loss(one).projections.items()}, projections, atol=1e-5)


def test_what_cannot_talk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cuts both models at one layer, but `layer_map` names 2 pairs\. Name one"):
        make(tmp_path, narrow(), deep(), **settings(layer_map="uniform"))
    with pytest.raises(ValueError, match="which cannot be an adapter of the student"):
        trained(tmp_path, adapted_student(), teacher_adapter="teacher", **settings(layer_map=[[0, 1]]))
