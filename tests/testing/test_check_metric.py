import numpy as np
import pytest

from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS
from hf_transfer_ext.evals.metric import Metric, metric
from hf_transfer_ext.evals.metrics import COMPARISONS, METRICS
from hf_transfer_ext.evals.suite import Suite
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.testing import check_metric


@pytest.mark.parametrize("name", METRICS)
def test_every_registered_metric_keeps_the_contract(name):
    check_metric(METRICS[name])


def declared(function, *, source="Source: this package's own definition.", **changes):
    function.__doc__ = source
    return Metric(function, **{"unit": "share", "higher_is_better": True, **changes})


def undeclared_column(example):
    return float(len(example.texts["perturbed_answer"]))


def undeclared_need(example):
    return float(example.answer.known("reference_kl").mean())


def not_finite(example):
    return float("inf")


def a_list(example):
    return example.answer.log_probs.tolist()


def no_weight(example):
    return 1.0, 0.0


calls = []


def by_order(example):
    calls.append(example)
    return float(len(calls))


def of_the_answer(example):
    return example.answer.loss


def first_value(values, weights):
    return float(values[0])


turns = []


def far_away(values, weights):
    """Another number for the set itself than for each of its 200 resamples."""
    turns.append(values)
    return 100.0 if len(turns) % 201 == 1 else 0.0


def swallows(example):
    return 0.5


@pytest.mark.parametrize(
    "broken, message",
    [
        (of_the_answer, "is not a `Metric`"),
        (declared(of_the_answer, source="Says nothing."), "has no `Source:`"),
        (declared(undeclared_column), "leaves out examples .* KeyError"),
        (declared(undeclared_need), "leaves out examples .*must declare the need"),
        (declared(not_finite), "leaves out examples .*not finite"),
        (declared(a_list), "a metric returns a number"),
        (declared(no_weight), "a weight is > 0"),
        (declared(by_order), "depends on"),
        (declared(of_the_answer, summary=first_value), "depends on the order"),
        (declared(of_the_answer, summary=far_away), "does not contain its value"),
        (declared(swallows, needs=(), texts=()), "gives .* for a model whose logits are NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_metric_is_caught(broken, message):
    with pytest.raises(AssertionError, match=message), np.errstate(all="ignore"):
        check_metric(broken)


def test_what_the_engine_cannot_give_is_refused_with_what_it_can():
    with pytest.raises(ValueError, match=r"needs 'attention', which the engine does not provide. It provides tok"):
        metric(unit="share", higher_is_better=True, needs=("attention",))(lambda example: 1.0)
    with pytest.raises(ValueError, match=r"uses the column 'title'; the engine only scores answer, paraphrased"):
        metric(unit="share", higher_is_better=True, texts=("title",))(lambda example: 1.0)
    with pytest.raises(ValueError, match="declare its unit"):
        metric(unit=" ", higher_is_better=True)(lambda example: 1.0)
    with pytest.raises(ValueError, match="declares no `needs`"):
        metric(unit="share", higher_is_better=True, needs=())(lambda example: 1.0)


def plain(example):
    return 1.0


def test_a_registry_refuses_at_the_door_what_could_not_be_used():
    for registry, thing, message in (
        (METRICS, plain, "Declare a metric with `@metric"),
        (COMPARISONS, plain, "returns a `Measurement` or a list of them"),
        (ATTACKS, plain, "Declare an attack with `@attack"),
        (MEMBERSHIP_ATTACKS, plain, r"must take \(subject, rows, references\), but plain takes \(example\)"),
        (SUITES, plain, "Declare a suite with `@suite"),
        (SUITES, Suite(plain, load=plain), "needs the argument 'model'"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.register(thing)
        assert "plain" not in registry
    changed = declared(of_the_answer)
    changed.needs = frozenset({"attention"})
    with pytest.raises(ValueError, match="does not provide"):
        METRICS.register(changed)


@pytest.mark.parametrize("compares_with, message", [("other", "retrained or before"), ("before", "no such argument")])
def test_a_suite_takes_the_result_that_it_compares_with(compares_with, message):
    def measure(model, tokenizer, sets):
        """Does nothing."""

    with pytest.raises(ValueError, match=message):
        SUITES.register(Suite(measure, load=plain, compares_with=compares_with))
