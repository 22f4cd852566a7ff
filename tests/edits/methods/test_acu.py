import json

import pytest
import torch
from edits.edited_models import FORGET, RETAIN, subject_of, write_base
from merging.tiny_models import load
from transformers import AutoModelForCausalLM

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.methods.acu import STATE_FILE, Ridge
from hf_transfer_ext.edits.requests import add_request, apply_requests, revoke_request
from hf_transfer_ext.edits.subject import mean_loss


def refit(rows, targets, gamma):
    gram = rows.T @ rows + gamma * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, rows.T @ targets)


def data(count=700, features=12, targets=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return rows, torch.randn(count, targets, generator=generator, dtype=torch.float64)


def test_removal_equals_a_refit_without_the_rows():
    rows, targets = data()
    fitted = Ridge.empty(12, 5, 0.5).add(rows, targets)
    torch.testing.assert_close(fitted.weights, refit(rows, targets, 0.5), rtol=0, atol=1e-10)
    rest = fitted.remove(rows[:600], targets[:600])  # more than one block
    torch.testing.assert_close(rest.weights, refit(rows[600:], targets[600:], 0.5), rtol=0, atol=1e-10)


def test_requests_in_any_order_are_one_request():
    rows, targets = data()
    fitted = Ridge.empty(12, 5, 0.5).add(rows, targets)
    a, b = slice(0, 40), slice(100, 130)
    one = fitted.remove(rows[a], targets[a]).remove(rows[b], targets[b])
    other = fitted.remove(rows[b], targets[b]).remove(rows[a], targets[a])
    left = torch.cat([rows[40:100], rows[130:]]), torch.cat([targets[40:100], targets[130:]])
    for found in (one, other):
        torch.testing.assert_close(found.weights, refit(*left, 0.5), rtol=0, atol=1e-10)


def test_adding_and_removing_is_nothing():
    rows, targets = data(60)
    start = Ridge.empty(12, 5, 1.0).add(rows[:40], targets[:40])
    again = start.add(rows[40:], targets[40:]).remove(rows[40:], targets[40:])
    torch.testing.assert_close(again.inverse, start.inverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.weights, start.weights, rtol=0, atol=1e-12)


def test_an_example_by_hand():
    # One feature: sum of squares 1 + 4 + 1 = 6 with gamma, products 3 + 2 * 5 = 13. Without the second row: 3 / 2.
    rows = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    targets = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    fitted = Ridge.empty(1, 1, 1.0).add(rows, targets)
    assert float(fitted.weights) == pytest.approx(13 / 6)
    assert float(fitted.remove(rows[1:], targets[1:]).weights) == pytest.approx(3 / 2)


def test_rows_that_were_never_added_are_refused():
    rows, targets = data(10)
    with pytest.raises(ValueError, match="never a part of it"):
        Ridge.empty(12, 5, 0.1).add(rows, targets).remove(5 * rows, targets)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_forgets_as_if_it_had_never_been_fitted_to_the_rows(tmp_path, tied):
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    first, second = FORGET
    apply_edit(base, tmp_path / "one", method="acu", forget=[first], retain=[second, *RETAIN])
    apply_edit(tmp_path / "one", tmp_path / "two", method="acu", forget=[second])
    apply_edit(base, tmp_path / "other", method="acu", forget=[second, first], retain=RETAIN)
    two, other, start = load_model(tmp_path / "two"), load_model(tmp_path / "other"), load(base)
    name = "lm_head.weight"
    torch.testing.assert_close(two.pop(name), other.pop(name), rtol=0, atol=1e-6)
    assert all(torch.equal(two[one], start[one]) for one in two)
    assert not torch.equal(load_model(tmp_path / "two")[name], start.get(name, start["model.embed_tokens.weight"]))
    assert json.loads((tmp_path / "two" / "config.json").read_text()).get("tie_word_embeddings") is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(model.lm_head.weight, load_model(tmp_path / "two")[name])


def load_model(folder):
    return {name: tensor for name, tensor in load(folder).items() if "." in name}


def test_the_head_learned_the_answers_and_forgot_one(tmp_path):
    """Fitted without anything to forget but one row, the retain answers are raised against the base."""
    base = write_base(tmp_path / "base")
    report = apply_edit(
        base, tmp_path / "out", method="acu", forget=FORGET[:1], retain=RETAIN, options={"gamma": 1e-3, "margin": 20.0}
    )
    losses = []
    for folder in (base, tmp_path / "out"):
        subject = subject_of(str(folder), retain_rows=RETAIN)
        losses.append(mean_loss(subject.live, subject.retain, 0))
    assert losses[1] < 0.7 * losses[0]
    assert (report.found["answers_removed"], report.found["answers_left"]) == (1, 4)
    assert (report.found["gamma"], report.found["margin"]) == (1e-3, 20.0)


def test_margin_0_leaves_every_byte(tmp_path):
    base = write_base(tmp_path / "base")
    apply_edit(base, tmp_path / "out", method="acu", forget=FORGET, retain=RETAIN, options={"margin": 0})
    start, found = load(base), load_model(tmp_path / "out")
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_requests_that_cannot_be_exact_are_refused(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match="needs rows to retain"):
        apply_edit(base, tmp_path / "one", method="acu", forget=FORGET)
    with pytest.raises(ValueError, match="cannot be written as a LoRA"):
        apply_edit(base, tmp_path / "one", method="acu", forget=FORGET, retain=RETAIN, lora_rank=2)
    apply_edit(base, tmp_path / "one", method="acu", forget=FORGET, retain=RETAIN)
    with pytest.raises(ValueError, match="Answer 0 of the forget set is not among those"):
        apply_edit(tmp_path / "one", tmp_path / "two", method="acu", forget=FORGET)  # a second time
    with pytest.raises(ValueError, match=r"fitted with gamma=1, and gamma=2.0 would have no effect"):
        apply_edit(tmp_path / "one", tmp_path / "two", method="acu", forget=RETAIN[:1], options={"gamma": 2.0})
    with pytest.raises(ValueError, match="Leave `retain` out"):
        apply_edit(tmp_path / "one", tmp_path / "two", method="acu", forget=RETAIN[:1], retain=RETAIN)
    (tmp_path / "one" / STATE_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not the state of an earlier"):
        apply_edit(tmp_path / "one", tmp_path / "two", method="acu", forget=RETAIN[:1])


def refitted_head(base, rows, learned):
    """The head of a fit to `rows` alone, with the rows of the head that a fit to `learned` changes."""
    subject = subject_of(base, forget_rows=learned, retain_rows=rows)
    tokens = torch.cat([subject.head_inputs(answer)[1] for answer in subject.forget]).unique()
    read = [subject.head_inputs(answer) for answer in subject.retain]
    features, targets = torch.cat([x for x, _ in read]), torch.cat([y for _, y in read])
    weight = subject.live.get_output_embeddings().weight.detach().double().clone()
    weight[tokens] += refit(features, 10.0 * (targets[:, None] == tokens).double(), 1.0).T
    return weight


@pytest.mark.parametrize("tied", [False, True])
def test_requests_equal_a_refit_without_what_those_that_stand_removed(tmp_path, tied):
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    first, second, third, *rest = [*FORGET, *RETAIN]
    store, start, results = tmp_path / "store", load(base), iter(range(9))

    def is_refit_on(*rows):
        folder = tmp_path / f"out{next(results)}"
        apply_requests(store, folder)
        found = load_model(folder)
        expected = refitted_head(base, rows, [first, second, third, *rest])
        torch.testing.assert_close(found.pop("lm_head.weight").double(), expected, rtol=0, atol=1e-6)
        assert all(torch.equal(found[name], start[name]) for name in found)
        assert not list(folder.glob("acu*"))
        return True

    add_request(store, "a", base=base, method="acu", forget=[first], retain=[second, third, *rest])
    assert is_refit_on(second, third, *rest)
    add_request(store, "b", method="acu", forget=[second])
    assert is_refit_on(third, *rest)
    revoke_request(store, "a")  # the one that brought the fit
    assert is_refit_on(first, third, *rest)
    add_request(store, "c", method="acu", forget=[third])
    assert is_refit_on(first, *rest)
    add_request(store, "a", method="acu", forget=[first])
    assert is_refit_on(*rest)
    for name in ("a", "b", "c"):
        revoke_request(store, name)
    apply_requests(store, tmp_path / "none")
    assert all(torch.equal(tensor, start[name]) for name, tensor in load(tmp_path / "none").items())
    assert not list((store / "artifacts").iterdir())  # no feature of a row is left


def test_requests_that_cannot_stand_together_are_refused_and_leave_the_others(tmp_path):
    base, store = write_base(tmp_path / "base"), tmp_path / "store"
    first, second = FORGET
    with pytest.raises(ValueError, match="needs rows to retain"):
        add_request(store, "a", base=base, method="acu", forget=[first])
    assert not store.exists()
    add_request(store, "a", base=base, method="acu", forget=[first], retain=[second, *RETAIN])
    state = (store / "requests.json").read_text()
    for settings, message in (
        ({"method": "acu", "forget": [first]}, "Answer 0 of the forget set is not among those"),
        ({"method": "acu", "forget": [second], "retain": RETAIN}, "`retain` belongs to the first"),
        ({"method": "acu", "forget": [second], "options": {"gamma": 2.0}}, "`options` belongs to the first"),
        ({"method": "acu", "forget": [second], "lora_rank": 2}, "`lora_rank` cannot be used with `acu`"),
        ({"method": "wanda", "forget": [second], "retain": RETAIN}, "cannot stand together"),
    ):
        with pytest.raises(ValueError, match=message):
            add_request(store, "b", **settings)
    assert (store / "requests.json").read_text() == state and len(list((store / "artifacts").iterdir())) == 2
    with pytest.raises(ValueError, match="cannot be written as a LoRA"):
        apply_requests(store, tmp_path / "out", lora_rank=2)
    (shared,) = (store / "artifacts").glob("acu-*/model.safetensors")
    shared.write_bytes(shared.read_bytes()[:-1])
    with pytest.raises(ValueError, match="which all requests share, are not those"):
        apply_requests(store, tmp_path / "out")
