import pytest

from hf_transfer_ext.evals import suite_run
from hf_transfer_ext.evals.suite import SuiteResult, suite
from hf_transfer_ext.evals.suite_run import SuiteRun
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.registry import Registry

seen = []


def load_small(source, split="first"):
    return {"rows": [source, split]}


def made(role, fails=False):
    def sequence(results):
        if fails:
            raise ValueError("there is nothing to tell")
        return [Measurement("+".join(results), len(results), "models", True, 1)]

    @suite(load=load_small, source="tester/small", compares_with=role, sequence=sequence)
    def small(model, tokenizer, sets, *, retrained=None, before=None, encoder=None, limit=None, **options):
        seen.append([model, (retrained or before), encoder, limit, sets["rows"], sorted(options)])
        return SuiteResult([Measurement("told", 1.0, "share", True, 1)], {})

    return small


@pytest.fixture
def register(monkeypatch):
    def put(*args, **options):
        monkeypatch.setattr(suite_run, "SUITES", Registry("suite", [made(*args, **options)]))

    return put


@pytest.mark.parametrize("role", ["retrained", "before"])
def test_the_first_model_is_what_the_others_are_compared_with(register, role):
    register(role)
    run = SuiteRun("small", comparing=True, limit=3, suite_options={"split": "second"}, seed=1)
    first = run.evaluate("a", None, role, adapter="base")
    assert seen[-1] == ["a", None, None, 3, ["tester/small", "second"], ["adapter", "seed"]]
    run.evaluate("b", None, "b")
    assert seen[-1][1] is first
    assert run.together() == ([], []) if role == "retrained" else ([Measurement("before+b", 2, "models", True, 1)], [])
    run.evaluate("c", None, "c")
    told, problems = run.together()
    assert told[0].name == ("b+c" if role == "retrained" else "before+b+c") and not problems


def test_what_the_models_cannot_tell_together_is_said_and_voids_nothing(register):
    register(None, fails=True)
    run = SuiteRun("small", "here")
    for name in "ab":
        run.evaluate(name, None, name)
        assert seen[-1][1] is None
    assert run.together() == ([], ["small: there is nothing to tell"])
    with pytest.raises(ValueError, match="does not compare with another model"):
        SuiteRun("small", "here", comparing=True)


def test_an_encoder_is_loaded_by_its_name_and_an_unknown_option_told(register, monkeypatch):
    register(None)
    monkeypatch.setattr(suite_run, "sentence_encoder", lambda name: f"encoder {name}")
    run = SuiteRun("small", suite_options={"encoder": "mini"})
    run.evaluate("a", None, "a")
    assert seen[-1][2] == "encoder mini"
    with pytest.raises(ValueError, match=r"Unknown option of the suite small 'encodr'\. Did you mean 'encoder'"):
        SuiteRun("small", suite_options={"encodr": "mini"})
