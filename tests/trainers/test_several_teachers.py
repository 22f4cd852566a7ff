"""Several teachers and servers, from the config or passed directly: one step each by hand, and what is refused."""

import copy

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from teachers.test_server import server  # noqa: F401  (a fixture)
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import (
    TEXTS,
    adapted_student,
    assert_same,
    config,
    logged,
    make,
    manual_step,
    trained,
    weights,
)

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.teachers.cache import TeacherCache
from hf_transfer_ext.teachers.learned import GATE_FILE
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.server import ServerTeacher
from hf_transfer_ext.teachers.several import ConfidentTeachers, MixedTeachers, RoutedTeachers

FOUR = TEXTS[:4]


class Mixture(torch.nn.Module):
    """A model whose probabilities are a mixture of two; weights are numbers, or made of entropies."""

    def __init__(self, models, weights=None, sharpness=None, temperature=1.0):
        super().__init__()
        self.models, self.weights = models, weights
        self.sharpness, self.temperature = sharpness, temperature

    def forward(self, input_ids):
        logits = torch.stack([model(input_ids=input_ids).logits.double() for model in self.models])
        p = (logits / self.temperature).softmax(-1)
        if self.sharpness is None:
            w = torch.tensor(self.weights, dtype=torch.float64)[:, None, None] / sum(self.weights)
        else:
            q = logits.softmax(-1)
            w = ((q * q.log()).sum(-1) / self.sharpness).softmax(0)
        mixed = (w[..., None] * p).sum(0).log() * self.temperature
        return type("Output", (), {"logits": mixed.float()})


@pytest.fixture
def folders(tmp_path):
    for seed, name in ((2, "two"), (3, "three")):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def without_teacher_argument(folder, student=None, data=None, **options):
    trainer = make(folder, student, data=data or Dataset.from_dict({"text": FOUR}), **options)
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize("by", ["weight", "confidence"])
def test_one_step_of_mixed_teachers_is_the_step_of_the_formula(folders, by):
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    options = {"teachers_by": by, "distill_temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7}
    models = [tiny_llama(2), tiny_llama(3)]
    if by == "weight":
        entries[0]["weight"] = 3.0
        mixture = Mixture(models, [3.0, 1.0], temperature=2.0)
    else:
        options["teacher_sharpness"] = 0.2
        mixture = Mixture(models, sharpness=0.2, temperature=2.0)
    trainer = without_teacher_argument(folders / "out", teachers=entries, **options)
    expected, loss = manual_step(tiny_llama(1), mixture, FOUR, "forward_kl", 0.7, 0.3, temperature=2.0)
    assert_same(weights(trainer), {n: p.detach() for n, p in expected.items()}, atol=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)
    assert set(trainer.frozen_bytes) == {"two", "three"} and all(trainer.frozen_bytes.values())
    record = trainer.record()
    assert record.config["frozen_teacher_bytes"] == trainer.frozen_bytes
    assert [one.role for one in record.inputs] == ["student", "teacher-1", "teacher-2", "dataset"]


@pytest.mark.parametrize("column", [["two", "three", "three", "two"], [0, 1, 1, 0]], ids=["names", "numbers"])
def test_each_row_has_the_teacher_that_its_column_names(folders, column):
    data = Dataset.from_dict({"text": FOUR, "expert": column})
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    trainer = without_teacher_argument(
        folders / "out", data=data, teachers=entries, teachers_by="column", teacher_column="expert"
    )
    sums, tokens = {}, 0
    for text, which in zip(FOUR, (2, 3, 3, 2), strict=True):
        length = len(text.encode())
        after, _ = manual_step(tiny_llama(1), tiny_llama(which), [text], lr=1.0)
        before = dict(tiny_llama(1).named_parameters())
        for n, p in after.items():
            sums[n] = sums.get(n, 0.0) + (before[n] - p).detach() * length
        tokens += length
    expected = {n: (before[n] - 0.5 * total / tokens).detach() for n, total in sums.items()}
    assert_same(weights(trainer), expected, atol=1e-5)
    evaluated = trainer.evaluate(trainer.train_dataset)
    assert evaluated["eval_kd"] > 0


def test_adapters_of_one_base_and_the_base_itself_teach_without_memory_of_their_own(tmp_path):
    entries = [{"adapter": "teacher", "weight": 2}, {"adapter": "base", "name": "plain"}]
    trainer = without_teacher_argument(tmp_path, adapted_student(), teachers=entries)
    assert trainer.frozen_bytes == {"teacher": 0, "plain": 0} and logged(trainer, "kd")[0] > 0
    merged = copy.deepcopy(adapted_student())
    merged.set_adapter("teacher")
    models = [merged.merge_and_unload(), tiny_llama(1)]
    live = [LiveTeacher(model, trainer.accelerator) for model in models]
    twin = trained(
        tmp_path / "b", adapted_student(), MixedTeachers({"a": live[0], "b": live[1]}, {"a": 2, "b": 1}), FOUR
    )
    assert_same(weights(trainer), weights(twin), atol=1e-5)


@pytest.mark.parametrize("kind", ["mixed", "confident", "routed"])
def test_teachers_passed_directly_train_as_those_of_the_config(folders, kind):
    data = Dataset.from_dict({"text": FOUR, "teacher": [0, 1, 1, 0]})
    live = {name: LiveTeacher(tiny_llama(seed), Accelerator(cpu=True)) for seed, name in ((2, "two"), (3, "three"))}
    teacher = {
        "mixed": lambda: MixedTeachers(live),
        "confident": lambda: ConfidentTeachers(live),
        "routed": lambda: RoutedTeachers(live),
    }[kind]()
    by = {"mixed": "weight", "confident": "confidence", "routed": "column"}[kind]
    one = trained(folders / "a", teacher=teacher, data=data)
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    other = without_teacher_argument(folders / "b", data=data, teachers=entries, teachers_by=by)
    assert_same(weights(one), weights(other))


def test_a_server_teaches_from_the_config_and_each_text_is_asked_for_once(tmp_path, server):  # noqa: F811
    server.limit = 258
    options = {
        "teacher_server": server.url, "teacher_server_model": "tiny", "texts": FOUR,
        "teacher_server_options": {"top": 258, "pause": 0.01},
    }  # fmt: skip
    texts = options.pop("texts")
    data = Dataset.from_dict({"text": texts})
    one = without_teacher_argument(tmp_path / "a", data=data, **options)
    expected, _ = manual_step(tiny_llama(1), tiny_llama(2), FOUR)
    assert_same(weights(one), {n: p.detach() for n, p in expected.items()}, atol=1e-4)
    assert one.frozen_bytes == {"teacher": 0}

    server.requests.clear()
    cached = {**options, "teacher_cache": str(tmp_path / "cache"), "max_steps": 3}
    two = without_teacher_argument(tmp_path / "b", data=data, **cached)
    asked = [path for path, *_ in server.requests if path == "/v1/completions"]
    assert len(asked) == 4 and len(TeacherCache(tmp_path / "cache")) == 4 and len(logged(two, "kd")) == 3

    direct = ServerTeacher(server.url, "tiny", byte_tokenizer(), top=258)
    three = trained(tmp_path / "c", teacher=direct, texts=FOUR)
    assert_same(weights(one), weights(three), atol=1e-5)


def whole_server(server):  # noqa: F811
    """An entry for the server's model, whose list has all tokens."""
    server.limit = 258
    return {"server": server.url, "server_model": "tiny", "name": "two", "options": {"top": 258, "pause": 0.01}}


def test_a_server_in_a_route_is_the_model_behind_it(folders, server):  # noqa: F811
    """A batch of a model's rows and a server's is that of two models."""
    data = Dataset.from_dict({"text": FOUR, "teacher": ["two", "three", "three", "two"]})
    two, three = ({"model": str(folders / name)} for name in ("two", "three"))
    options = {"data": data, "teachers_by": "column", "loss": "generalized_jsd", "ce_weight": 0.3}
    models = without_teacher_argument(folders / "a", teachers=[two, three], **options)
    mixed = without_teacher_argument(folders / "b", teachers=[whole_server(server), three], **options)
    assert_same(weights(mixed), weights(models), atol=1e-5)
    assert logged(mixed, "loss")[0] == pytest.approx(logged(models, "loss")[0], rel=1e-4)
    assert mixed.teacher.forms == ("dense", "sparse")
    assert mixed.frozen_bytes["two"] == 0 < mixed.frozen_bytes["three"]
    assert "Memory of the frozen teachers: three " in mixed.plan()


@pytest.mark.parametrize("by", ["weight", "confidence", "learned"])
def test_a_server_in_a_mixture_is_the_model_behind_it(folders, server, by):  # noqa: F811
    two, three = ({"model": str(folders / name)} for name in ("two", "three"))
    options = {"teachers_by": by, "ce_weight": 0.3, "max_steps": 2, "learning_rate": 0.1}
    models = without_teacher_argument(folders / "a", teachers=[two, three], **options)
    mixed = without_teacher_argument(folders / "b", teachers=[whole_server(server), three], **options)
    assert_same(weights(mixed), weights(models), atol=1e-5)
    assert logged(mixed, "kd")[0] > logged(models, "kd")[0] > 0  # by what the teachers differ from their mixture
    assert mixed.teacher.form == "mixture"


def test_models_adapters_caches_and_servers_teach_together(folders, server):  # noqa: F811
    """Routed with lists of all lengths, and mixed."""
    for seed, kind in ((3, "top"), (4, "top_and_samples")):
        options = {"teacher_cache": str(folders / kind), "teacher_cache_options": {"kind": kind, "top": seed}}
        trained(folders / "out", teacher=tiny_llama(seed), texts=FOUR, **options)
    entries = [
        {"server": server.url, "server_model": "tiny", "name": "far", "options": {"top": 20}},
        {"cache": str(folders / "top")},
        {"cache": str(folders / "top_and_samples")},
        {"model": str(folders / "two")},
        {"adapter": "teacher"},
        {"adapter": "base"},
    ]
    names = ["far", "top", "top_and_samples", "two", "teacher", "base"]
    data = Dataset.from_dict({"text": [*FOUR, "tin", "elm"], "teacher": names})
    routed = without_teacher_argument(
        folders / "r", adapted_student(), data, teachers=entries, teachers_by="column", per_device_train_batch_size=6,
        loss="reverse_kl",
    )  # fmt: skip
    assert logged(routed, "kd")[0] > 0 and routed.teacher.forms == ("dense", "sparse", "sampled")
    for by in ("weight", "confidence", "learned"):
        trainer = without_teacher_argument(folders / by, adapted_student(), teachers=entries, teachers_by=by)
        assert logged(trainer, "kd")[0] > 0 and trainer.teacher.forms == ("dense", "sparse", "sampled", "mixture")
        assert [name for name, size in trainer.frozen_bytes.items() if size] == ["two"]


def test_a_mixture_is_captured_once_and_then_teaches_without_its_models(folders):
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    stored = {
        "teacher_cache": str(folders / "cache"), "teacher_cache_options": {"kind": "top", "top": 258}, "max_steps": 3,
        "ce_weight": 0.3,
    }  # fmt: skip
    live = without_teacher_argument(folders / "a", teachers=entries, max_steps=3, ce_weight=0.3)
    filling = without_teacher_argument(folders / "b", teachers=entries, **stored)
    assert filling.teacher.forwards == 1 and filling.teacher.form == "sparse"
    assert_same(weights(filling), weights(live), atol=1e-3)
    assert filling.frozen_bytes == live.frozen_bytes and filling.plan() == live.plan()
    assert [one.role for one in filling.record().inputs] == ["student", "teacher-1", "teacher-2", "dataset"]
    alone = without_teacher_argument(folders / "c", **stored)
    assert_same(weights(alone), weights(filling))
    other = [entries[0], {**entries[1], "weight": 2}]
    with pytest.raises(ValueError, match="is not of this teacher and setting"):
        without_teacher_argument(folders / "d", teachers=other, **stored)
    passed = MixedTeachers(
        {name: LiveTeacher(tiny_llama(seed), live.accelerator) for seed, name in ((2, "x"), (3, "y"))}
    )
    again = trained(folders / "e", teacher=passed, texts=FOUR, **stored)
    assert again.teacher.forwards == 0  # the same mixture, given as an object
    assert_same(weights(again), weights(filling))


def test_learned_weights_train_along_and_resume(folders):
    options = {
        "teachers": [{"model": str(folders / name)} for name in ("two", "three")], "teachers_by": "learned",
        "ce_weight": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1,
    }  # fmt: skip
    whole = without_teacher_argument(folders / "whole", **options)
    assert whole.teacher.gate.weight.any() and (folders / "whole" / "checkpoint-2" / GATE_FILE).is_file()
    again = make(folders / "again", data=Dataset.from_dict({"text": FOUR}), **options)
    again._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(again.train_dataset)
    again.train(resume_from_checkpoint=str(folders / "whole" / "checkpoint-2"))
    assert torch.equal(again.teacher.gate.weight, whole.teacher.gate.weight)
    assert_same(weights(again), weights(whole), atol=0.0)
    before = whole.teacher.gate.weight.clone()
    whole.evaluate(whole.train_dataset)
    assert torch.equal(whole.teacher.gate.weight, before)


TWO = [{"model": "a"}, {"model": "b"}]
FAR = {"server": "http://x", "server_model": "m", "name": "far"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teachers": []}, "need different names, got no entry"),
        ({"teachers": ["a"]}, "Entry 0 of `teachers` has to be a mapping"),
        ({"teachers": [{"modle": "a"}]}, "Unknown setting 'modle'. Did you mean 'model'"),
        ({"teachers": [{"model": "a", "adapter": "b"}]}, "needs one of model, adapter, cache, server, got model and"),
        ({"teachers": [{"adapter": "a", "revision": "main"}]}, "`revision` goes with model, not with adapter"),
        ({"teachers": [{"server": "http://x"}]}, "needs `server_model`"),
        ({"teachers": [{"model": "a", "weight": 0}]}, "`weight` has to be a number > 0, got 0"),
        ({"teachers": [{"model": "a", "weight": float("inf")}]}, "`weight` has to be a number > 0, got inf"),
        ({"teachers": [{"model": "a", "weight": True}]}, "`weight` has to be a number > 0, got True"),
        ({"teachers": [{"model": "x/a"}, {"model": "y/a"}]}, r"need different names, got \['a', 'a'\]"),
        ({"teachers": TWO, "teachers_by": "colum"}, "Unknown way to combine teachers 'colum'. Did you mean 'column'"),
        ({"teachers": [{**TWO[0], "weight": 2}, TWO[1]], "teachers_by": "column"}, "'a' has a `weight`, but"),
        ({"teachers": TWO, "teacher_column": "expert"}, "`teacher_column` is given, but `teachers_by` is 'weight'"),
        ({"teachers": TWO, "teachers_by": "column", "packing": True}, "which has no single teacher"),
        (
            {"teachers": TWO, "teachers_by": "learned", "teacher_cache": "c"},
            "mixed by weight or by confidence; got `teachers_by: learned`. Leave `teacher_cache` out",
        ),
        (
            {"teachers": [TWO[0], FAR], "teacher_cache": "c"},
            r"got `teachers_by: weight`, a cache or a server\. .* run `cache-teacher` for each",
        ),
        (
            {"teachers": TWO, "teachers_by": "learned", "on_policy": "gkd", "max_new_tokens": 8},
            "`teachers_by: learned` trains its gate on the tokens of the text, but with `on_policy` the student",
        ),
        (
            {"teachers": TWO, "teachers_by": "learned", "on_policy_share": 0.5, "max_new_tokens": 8},
            "Combine the teachers by weight or by confidence, or leave `on_policy` out",
        ),
        ({"teachers": TWO, "teacher_model_name_or_path": "c"}, "Name one teacher: got `teacher_model"),
        ({"teachers": TWO, "hidden_loss": "hidden_mse"}, "but several are named"),
        ({"teachers": TWO, "loss": "uld", "teachers_by": "confidence"}, "does not go with `teachers_by: confidence`"),
        ({"teachers": TWO, "loss": "alm", "teachers_by": "learned"}, "does not go with `teachers_by: learned`"),
        (
            {"teachers": [TWO[0], FAR], "loss": "reverse_kl"},
            "reverse_kl needs the probability of each token in the mixture of several teachers, but a cache or a",
        ),
        (
            {"teachers": [TWO[0], FAR], "teachers_by": "column", "loss": "adaptive_kl"},
            "adaptive_kl needs dense teacher rows, but the teacher 'far' gives sparse ones",
        ),
        (
            {"teachers": [TWO[0], FAR], "teachers_by": "column", "distill_temperature": 2.0},
            "lists probabilities at temperature 1",
        ),
        ({"teachers_by": "column"}, "`teachers_by` is given, but no `teachers`"),
        ({"teacher_server": "http://x"}, "needs both, `teacher_server` and `teacher_server_model`"),
        ({"teacher_server": "http://x", "teacher_server_model": "m", "distill_temperature": 2.0}, "at temperature 1"),
        (
            {"teacher_server": "http://x", "teacher_server_model": "m", "loss": "adaptive_kl"},
            "needs dense teacher rows",
        ),
        ({"teacher_server_options": {"topp": 3}}, "`teacher_server_options` are given, but no `teacher_server`"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "values, message",
    [
        (None, r"The training data has text\. Add it, or set `teacher_column`"),
        (["two", "thre", "two", "two"], r"Row 1 of the training data: Unknown .* 'thre'\. Did you mean 'three'"),
        (
            ["two", "two", "two", None],
            "Row 3 of the training data: the column 'teacher' is None, which names no teach",
        ),
        ([0, 1, -1, 0], "Row 2 of the training data: The column 'teacher' names teacher -1, but there are 2: two, th"),
        ([0, 2, 1, 0], "Row 1 of the training data: The column 'teacher' names teacher 2, but there are 2"),
        ([0.0, 1.0, 0.5, 1.0], r"Row 0 of the training data: the column 'teacher' is 0\.0, which names no teacher"),
        ([True, False, True, True], "Row 0 of the training data: the column 'teacher' is True, which names no"),
    ],
    ids=["missing", "typo", "null", "negative", "beyond", "fraction", "bool"],
)
def test_routes_are_checked_before_anything_is_trained(folders, values, message):
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    options = {"teachers": entries, "teachers_by": "column"}
    content = {"text": FOUR} if values is None else {"text": FOUR, "teacher": values}
    with pytest.raises(ValueError, match=message):
        make(folders / "out", data=Dataset.from_dict(content), **options)
    good = Dataset.from_dict({"text": FOUR, "teacher": [0, 1, 0, 1]})
    for evaluated, what in ((Dataset.from_dict(content), ""), ({"own": Dataset.from_dict(content)}, " 'own'")):
        with pytest.raises(ValueError, match=message.replace("training data", f"evaluation data{what}")):
            DistillationTrainer(
                tiny_llama(1), None, config(folders / "out", **options), good, byte_tokenizer(), eval_dataset=evaluated
            )
    routed = RoutedTeachers({name: LiveTeacher(tiny_llama(2), Accelerator(cpu=True)) for name in ("two", "three")})
    with pytest.raises(ValueError, match=message):
        make(folders / "out", teacher=routed, data=Dataset.from_dict(content))
    streamed = Dataset.from_dict(content).to_iterable_dataset()
    trainer = make(folders / "out", data=streamed, **options)
    at_batch = message.split(": ")[-1].replace(
        "The training data has text", "A row of the batch has input_ids, labels"
    )
    with pytest.raises(ValueError, match=at_batch):
        trainer.train()


def test_what_only_the_models_and_the_data_show_is_refused(folders):
    entries = [{"model": str(folders / name)} for name in ("two", "three")]
    with pytest.raises(ValueError, match="Two teachers are named: `teacher`"):
        make(folders / "out", teacher=tiny_llama(2), teachers=entries)
    tiny_llama(4, vocab_size=300).save_pretrained(folders / "large")
    larger = byte_tokenizer()
    larger.add_tokens(["<extra>"])
    larger.save_pretrained(folders / "large")
    with pytest.raises(ValueError, match="exist only in the teacher"):
        without_teacher_argument(folders / "out", teachers=[*entries, {"model": str(folders / "large")}])
