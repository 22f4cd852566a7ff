"""A mixture with learned weights: its gate against the definition, what it learns, and its checkpoint."""

import copy

import pytest
import torch
from tiny import tiny_llama

from hf_transfer_ext.losses.rows import LogitRows, SparseRows
from hf_transfer_ext.teachers.learned import GATE_FILE, LearnedTeachers
from hf_transfer_ext.teachers.several import MixedTeachers
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal

VOCAB, LENGTH = 6, 41


class Fixed:
    """Gives the logits that a function of the labels makes."""

    form = "dense"

    def __init__(self, make):
        self.make = make

    def signal(self, student, inputs, mask):
        return TeacherSignal(LogitRows(self.make(inputs["input_ids"][:, 1:][mask])))


def knows(labels):
    return 2.0 * torch.nn.functional.one_hot(labels, VOCAB).float()


def is_sure_and_wrong(labels):
    return 5.0 * torch.nn.functional.one_hot((labels + 1) % VOCAB, VOCAB).float()


def batch(seed=0):
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids}, torch.ones(2, LENGTH - 1, dtype=torch.bool)


def learned(**options):
    return LearnedTeachers({"good": Fixed(knows), "bad": Fixed(is_sure_and_wrong)}, **options)


def test_it_starts_as_the_mean_and_does_not_learn_in_evaluation():
    teacher, student = learned(temperature=2.0), tiny_llama(1).eval()
    mean = MixedTeachers(teacher.teachers, temperature=2.0)
    for _ in range(2):
        one, two = (each.signal(student, *batch()).rows(slice(None)) for each in (teacher, mean))
        torch.testing.assert_close(one, two)
    assert not teacher.gate.weight.any() and isinstance(teacher, Teacher)


def test_one_step_of_the_gate_is_that_of_its_definition():
    teacher, student = learned(rate=0.1), tiny_llama(1).train()
    twin = copy.deepcopy(teacher.gate)
    inputs, mask = batch()
    before = teacher.signal(student, inputs, mask).rows.weights
    torch.testing.assert_close(before, torch.full_like(before, 0.5))  # of the gate before its step
    optimizer, labels, total = torch.optim.Adam(twin.parameters(), lr=0.1), inputs["input_ids"][:, 1:][mask], 0.0
    for label in labels:
        p = [make(label[None])[0].softmax(-1) for make in (knows, is_sure_and_wrong)]
        features = torch.stack([x for one in p for x in (-(one * one.log()).sum(), one.max().log())])
        w = twin(features).softmax(-1)
        total = total - (w[0] * p[0][label] + w[1] * p[1][label]).log()
    (total / len(labels)).backward()
    optimizer.step()
    torch.testing.assert_close(teacher.gate.weight, twin.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(teacher.gate.bias, twin.bias, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_is_sure_and_wrong_loses_its_weight():
    teacher, student = learned(rate=0.05), tiny_llama(1).train()
    for seed in range(40):
        rows = teacher.signal(student, *batch(seed)).rows
    assert rows.weights[:, 0].min() > 0.9


def test_a_checkpoint_goes_on_to_the_same_gate(tmp_path):
    whole, student = learned(rate=0.1), tiny_llama(1).train()
    for seed in range(6):
        if seed == 3:
            whole.save(tmp_path)
        whole.signal(student, *batch(seed))
    resumed = learned(rate=0.1)
    resumed.load(tmp_path)
    for seed in range(3, 6):
        resumed.signal(student, *batch(seed))
    assert torch.equal(resumed.gate.weight, whole.gate.weight) and resumed.gate.weight.any()
    three = LearnedTeachers({**resumed.teachers, "third": Fixed(knows)})
    with pytest.raises(ValueError, match="is for 2 teachers, needed are 3"):
        three.load(tmp_path)
    (tmp_path / GATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {GATE_FILE}"):
        resumed.load(tmp_path)


class Listed(Fixed):
    """The same, as a list of the likeliest tokens."""

    form = "sparse"

    def __init__(self, make, top):
        super().__init__(make)
        self.top = top

    def signal(self, student, inputs, mask):
        return TeacherSignal(SparseRows.from_logits(super().signal(student, inputs, mask).rows.logits, self.top))


def test_lists_of_all_tokens_train_the_gate_of_the_models():
    whole, student = learned(rate=0.05), tiny_llama(1).train()
    listed = LearnedTeachers({"good": Fixed(knows), "bad": Listed(is_sure_and_wrong, VOCAB)}, rate=0.05)
    for seed in range(5):
        one, two = (teacher.signal(student, *batch(seed)).rows for teacher in (whole, listed))
    torch.testing.assert_close(torch.stack(two.weights, 1), one.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(listed.gate.bias, whole.gate.bias, rtol=1e-3, atol=1e-5)


def test_a_short_list_neither_wins_nor_loses_by_what_it_does_not_tell():
    """The same teacher twice keeps equal weights, although one of them tells 2 of 6 tokens; a wrong one loses."""
    student = tiny_llama(1).train()

    def noisy(labels):
        noise = torch.Generator().manual_seed(int(labels.sum()))
        return knows(labels) + 1.5 * torch.randn(len(labels), VOCAB, generator=noise)

    teacher = LearnedTeachers({"all": Fixed(noisy), "two": Listed(noisy, 2)}, rate=0.05)
    for seed in range(30):
        rows = teacher.signal(student, *batch(seed)).rows
    torch.testing.assert_close(torch.stack(rows.weights, 1), torch.full((len(rows), 2), 0.5), rtol=0, atol=1e-3)
    teacher = LearnedTeachers({"good": Listed(knows, 2), "bad": Fixed(is_sure_and_wrong)}, rate=0.05)
    for seed in range(40):
        rows = teacher.signal(student, *batch(seed)).rows
    assert rows.weights[0].min() > 0.9


def test_a_bad_rate_is_refused():
    with pytest.raises(ValueError, match="`rate` and `temperature` have to be > 0"):
        learned(rate=0.0)
