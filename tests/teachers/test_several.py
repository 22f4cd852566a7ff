"""Several teachers: mixtures against their definition, routes against each teacher alone."""

import math

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from teachers.test_cache import TEXTS, batch, expected
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits
from hf_transfer_ext.losses.rows import CombinedRows, LogitRows, SampledRows, SparseRows
from hf_transfer_ext.losses.slopes import require_form
from hf_transfer_ext.teachers.cache import CachedTeacher, CacheSpec, cache_teacher, open_cache
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.several import (
    ConfidentTeachers,
    MixedTeachers,
    MixtureRows,
    RoutedTeachers,
    frozen_bytes,
    open_combined_cache,
    views_of,
)
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal

STUDENT = tiny_llama(1)


def live(seed):
    return LiveTeacher(tiny_llama(seed), Accelerator(cpu=True))


def test_a_mixture_is_the_weighted_log_sum_exp_of_its_members():
    """Against float64 loops."""
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(3, 5, generator=generator) for _ in range(2)]
    weights, temperature = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]), 1.7
    rows = MixtureRows([LogitRows(one) for one in logits], weights, temperature=temperature)
    got = (rows(slice(1, 3)) / temperature).log_softmax(-1)
    for i in (1, 2):
        for v in range(5):
            p = 0.0
            for member, one in enumerate(logits):
                powers = [math.exp(x / temperature) for x in one[i].tolist()]
                p += weights[i, member].item() * powers[v] / sum(powers)
            assert got[i - 1, v].item() == pytest.approx(math.log(p), rel=1e-5)
    torch.testing.assert_close(rows.reader()(slice(None)), rows(slice(None)))
    with pytest.raises(ValueError, match="have to be >= 0 and sum to 1"):
        MixtureRows([LogitRows(one) for one in logits], 2 * weights)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_mixed_teachers_is_that_of_their_mean_probabilities(temperature):
    mixed = MixedTeachers({"a": live(2), "b": live(3)}, {"a": 3, "b": 1}, temperature=temperature)
    rows = mixed.signal(STUDENT, *batch(TEXTS)).rows
    p = sum(w * (expected(tiny_llama(s), TEXTS) / temperature).softmax(-1) for w, s in ((0.75, 2), (0.25, 3)))
    kl, z = DISTILLATION_LOSSES["forward_kl"], expected(STUDENT, TEXTS)
    found = divergence_of_logits(z, rows, kl, weights=torch.ones(len(z)), temperature=temperature).divergence
    torch.testing.assert_close(found, kl(z[None] / temperature, p.log()[None])[0], rtol=1e-4, atol=1e-5)
    assert isinstance(mixed, Teacher)


def test_a_teacher_mixed_with_itself_is_itself():
    rows = MixedTeachers({"a": live(2), "b": live(2)}).signal(STUDENT, *batch(TEXTS)).rows
    torch.testing.assert_close(rows(slice(None)).softmax(-1), expected(tiny_llama(2), TEXTS).softmax(-1))


def test_confidence_takes_the_surest_teacher_or_all_alike():
    def flat_and_sharp(sharpness):
        flat, sharp = live(2), live(3)
        with torch.no_grad():
            flat.model.lm_head.weight.mul_(0.01)
        return ConfidentTeachers({"flat": flat, "sharp": sharp}, sharpness=sharpness), flat, sharp

    teachers, _, sharp = flat_and_sharp(1e-3)
    rows = teachers.signal(STUDENT, *batch(TEXTS)).rows
    torch.testing.assert_close(rows(slice(None)).softmax(-1), expected(sharp.model, TEXTS).softmax(-1))
    teachers, flat, sharp = flat_and_sharp(1e6)
    rows = teachers.signal(STUDENT, *batch(TEXTS)).rows
    mean = 0.5 * (expected(flat.model, TEXTS).softmax(-1) + expected(sharp.model, TEXTS).softmax(-1))
    torch.testing.assert_close(rows(slice(None)).softmax(-1), mean, rtol=1e-4, atol=1e-6)


def routed(teachers, routes):
    inputs, mask = batch(TEXTS)
    return RoutedTeachers(teachers).signal(STUDENT, {**inputs, "teacher": torch.tensor(routes)}, mask).rows


def gradient(rows, loss="forward_kl", temperature=1.0):
    """Of the student's logits at the labeled tokens of `TEXTS`, and the values."""
    z = expected(STUDENT, TEXTS).clone().requires_grad_()
    found = divergence_of_logits(
        z, rows, DISTILLATION_LOSSES[loss], weights=torch.ones(len(z)), temperature=temperature
    )
    found.loss.backward()
    return z.grad, found.divergence


def cached(seed, folder, spec):
    return CachedTeacher(
        cache_teacher(
            tiny_llama(seed), [{"input_ids": text} for text in TEXTS], folder, tokenizer=byte_tokenizer(), spec=spec,
            accelerator=Accelerator(cpu=True),
        )
    )  # fmt: skip


class Listed:
    """A model that lists its likeliest tokens, without the rounding of a cache."""

    form = "sparse"

    def __init__(self, seed, top, temperature=1.0):
        self.live, self.top, self.temperature = live(seed), top, temperature

    def signal(self, student, inputs, mask):
        logits = self.live.signal(student, inputs, mask).rows(slice(None))
        return TeacherSignal(SparseRows.from_logits(logits, self.top, temperature=self.temperature))


def test_each_row_of_a_batch_has_its_own_teacher():
    teachers = {"a": live(2), "b": live(3)}
    want = torch.cat([expected(tiny_llama(seed), [text]) for seed, text in zip((3, 2, 3), TEXTS, strict=True)])
    for loss in DISTILLATION_LOSSES:
        rows = routed(teachers, [1, 0, 1])
        torch.testing.assert_close(gradient(rows, loss), gradient(LogitRows(want), loss), rtol=1e-3, atol=1e-5)
    assert RoutedTeachers(teachers).forms == ("dense",)


def test_a_batch_without_labels_asks_no_teacher():
    class Silent:
        form = "dense"

        def signal(self, student, inputs, mask):
            raise AssertionError("asked")

    inputs, mask = batch(TEXTS)
    routes = {**inputs, "teacher": torch.zeros(len(mask), dtype=torch.long)}
    assert len(RoutedTeachers({"a": Silent()}).signal(STUDENT, routes, torch.zeros_like(mask)).rows) == 0


def test_a_teacher_that_tells_likelihoods_alone_is_seen_among_others():
    class Likelihoods(torch.nn.Identity):
        form = "likelihood"

    teachers = RoutedTeachers({"model": live(2), "likelihoods": Likelihoods()})
    assert teachers.form == "likelihood" and teachers.forms[-1] == "likelihood"
    with pytest.raises(ValueError, match=r"forward_kl needs .* tells the likelihoods of the tokens of a text alone"):
        require_form(DISTILLATION_LOSSES["forward_kl"], teachers.form)


def test_models_and_caches_of_every_kind_are_routed_with_lists_of_any_length(tmp_path):
    """The loss is the sum of those of each teacher alone, in its own form."""
    teachers = {
        "model": live(2),
        "top": cached(3, tmp_path / "top", CacheSpec("top", 7)),
        "longer": cached(4, tmp_path / "longer", CacheSpec("top", 11)),
        "draws": cached(5, tmp_path / "draws", CacheSpec("top_and_samples", 7, 3)),
    }
    assert RoutedTeachers(teachers).forms == ("dense", "sparse", "sampled")
    for names in (["model", "top", "longer"], ["draws", "longer", "model"], ["top", "top", "draws"]):
        rows = routed(teachers, [list(teachers).index(name) for name in names])
        inputs, mask = batch(TEXTS)
        for loss in ("forward_kl", "reverse_kl", "generalized_jsd"):
            got, values = gradient(rows, loss)
            for i, name in enumerate(names):
                own = {key: value[i : i + 1] for key, value in inputs.items()}
                alone = teachers[name].signal(STUDENT, own, mask[i : i + 1]).rows
                z = expected(STUDENT, TEXTS)[mask.nonzero()[:, 0] == i].clone().requires_grad_()
                want = divergence_of_logits(z, alone, DISTILLATION_LOSSES[loss], weights=torch.ones(len(z)))
                want.loss.backward()
                torch.testing.assert_close(got[mask.nonzero()[:, 0] == i], z.grad, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(values[mask.nonzero()[:, 0] == i], want.divergence, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sparse ones"):
        gradient(routed(teachers, [0, 1, 0]), "adaptive_kl")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_model_and_a_list_of_all_tokens_are_the_mixture_of_two_models(temperature):
    models = {"a": live(2), "b": live(3)}
    lists = {"a": live(2), "b": Listed(3, 258, temperature)}
    shares = {"a": 3, "b": 1}
    one, two = (MixedTeachers(each, shares, temperature=temperature) for each in (models, lists))
    assert (one.forms, two.forms) == (("dense",), ("dense", "sparse", "mixture")) and two.form == "mixture"
    dense, listed = (each.signal(STUDENT, *batch(TEXTS)).rows for each in (one, two))
    assert isinstance(dense, MixtureRows) and isinstance(listed, CombinedRows)
    want, got = (gradient(rows, temperature=temperature) for rows in (dense, listed))
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-6)
    # The value is larger by what the teachers differ from their mixture.
    p = [(expected(tiny_llama(seed), TEXTS) / temperature).softmax(-1).double() for seed in (2, 3)]
    mean = 0.75 * p[0] + 0.25 * p[1]
    beyond = sum(w * (one * (one / mean).log()).sum(-1) for w, one in zip((0.75, 0.25), p, strict=True))
    torch.testing.assert_close(got[1].double(), want[1].double() + beyond, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="reverse_kl needs the probability of each token in the mixture"):
        gradient(listed, "reverse_kl", temperature)


def test_confidence_in_lists_of_all_tokens_is_that_of_the_models():
    models, lists = {"a": live(2), "b": live(3)}, {"a": Listed(2, 258), "b": live(3)}
    one, two = (ConfidentTeachers(each, sharpness=0.1).signal(STUDENT, *batch(TEXTS)).rows for each in (models, lists))
    torch.testing.assert_close(torch.stack(two.weights, 1), one.weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient(two)[0], gradient(one)[0], rtol=1e-3, atol=1e-5)


def test_a_teacher_is_as_sure_behind_a_short_list_as_in_front_of_it():
    """The same model as a model, a list of 4 and a list of 9: none is favored for what it does not tell."""
    teachers = {"model": live(2), "short": Listed(2, 4), "long": Listed(2, 9)}
    rows = ConfidentTeachers(teachers, sharpness=0.01).signal(STUDENT, *batch(TEXTS)).rows
    torch.testing.assert_close(torch.stack(rows.weights, 1), torch.full((len(rows), 3), 1 / 3), rtol=1e-3, atol=1e-3)


def test_views_through_lists_follow_their_definition():
    """Against float64 loops: k + 1 outcomes, and the label as one that every list has, or one that not every has."""
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(70, 9, generator=generator) for _ in range(3)]
    labels = torch.randint(0, 9, (70,), generator=generator)
    temperature = 1.6
    rows = [
        LogitRows(logits[0]),
        SparseRows.from_logits(logits[1], 3, temperature=temperature),
        SampledRows.from_logits(logits[2], 5, 2, temperature=temperature, generator=generator),
    ]
    got, outside = views_of(["a", "b", "c"], rows, labels, temperature), 0
    for t in range(70):
        p = [(one[t].double() / temperature).softmax(-1) for one in logits]
        common = set(p[1].topk(3).indices.tolist()) & set(p[2].topk(5).indices.tolist())
        for i in range(3):
            top = p[i].topk(3).values
            outcomes = [*top.tolist(), 1 - top.sum().item()]
            assert got[t, i, 0].item() == pytest.approx(-sum(x * math.log(x) for x in outcomes), rel=1e-4)
            assert got[t, i, 1].item() == pytest.approx(math.log(top[0].item()), rel=1e-4, abs=1e-6)
            is_common = labels[t].item() in common
            event = p[i][labels[t]].item() if is_common else 1 - sum(p[i][v].item() for v in common)
            assert got[t, i, 2].item() == pytest.approx(math.log(event), rel=1e-4, abs=1e-6)
            outside += not is_common
    assert 0 < outside < 3 * 70
    with pytest.raises(ValueError, match=r"'b' does not list its likeliest tokens .* `kind: top`"):
        views_of(["a", "b"], [rows[0], SampledRows.from_logits(logits[1], 0, 4)], labels, 1.0)


@pytest.mark.parametrize("kind", [MixedTeachers, ConfidentTeachers])
def test_a_mixture_is_cached_as_one_teacher(tmp_path, kind):
    """A second epoch without any of its members, and then a run without them."""
    mixture, whole = kind({"a": live(2), "b": live(3)}), {"kind": "top", "top": 258}

    def opened(teacher, **options):
        return open_combined_cache(str(tmp_path / "c"), teacher, byte_tokenizer(), temperature=1.0, options=options)

    cached = opened(mixture, **whole)
    for _ in range(2):
        rows = cached.signal(STUDENT, *batch(TEXTS)).rows
    want = mixture.signal(STUDENT, *batch(TEXTS)).rows(slice(None)).softmax(-1)
    dense = torch.full(want.shape, -torch.inf).scatter(1, rows.top.ids, rows.top.log_probs)
    torch.testing.assert_close(dense.exp(), want, rtol=3e-3, atol=1e-4)
    assert cached.forwards == 1
    sizes = frozen_bytes({"teacher": cached})  # of the models that fill it
    assert sizes == frozen_bytes(mixture.teachers) and set(sizes) == {"a", "b"} and all(sizes.values())
    cached.cache.flush()
    alone = open_cache(str(tmp_path / "c"), None, byte_tokenizer(), temperature=1.0)
    assert alone.signal(STUDENT, *batch(TEXTS)).rows.top.ids.equal(rows.top.ids)
    assert opened(kind({"x": live(2), "y": live(3)})).cache.spec.top == 258  # other names, the same weights
    for other in (kind({"a": live(3), "b": live(2)}), kind({"a": live(2), "b": live(4)})):
        with pytest.raises(ValueError, match="is not of this teacher and setting"):
            opened(other)


def test_what_is_not_one_distribution_is_not_cached_as_one(tmp_path):
    for teacher, got in (
        (RoutedTeachers({"a": live(2)}), "got RoutedTeachers"),
        (MixedTeachers({"a": live(2), "b": Listed(3, 4)}), "got a Listed among them"),
    ):
        with pytest.raises(ValueError, match=rf"{got}\. Leave `teacher_cache` out\. .* run `cache-teacher`"):
            open_combined_cache(str(tmp_path / "c"), teacher, byte_tokenizer(), temperature=1.0)
    with pytest.raises(ValueError, match="is on the Hub, where no rows are added"):
        open_combined_cache("hf://datasets/a/b", MixedTeachers({"a": live(2)}), byte_tokenizer(), temperature=1.0)


def test_adapters_of_one_base_and_the_base_teach_together_and_take_no_memory():
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, init_lora_weights=False))
    model.add_adapter("student", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("student")
    names = ("one", "two", "base")
    teachers = {name: AdapterTeacher(model, name, Accelerator(cpu=True)) for name in names}
    rows = MixedTeachers(teachers).signal(model, *batch(TEXTS)).rows
    alone = [teachers[name].signal(model, *batch(TEXTS)).rows for name in names]
    mean = sum(one(slice(None)).softmax(-1) for one in alone) / 3
    torch.testing.assert_close(rows(slice(None)).softmax(-1), mean, rtol=1e-4, atol=1e-6)
    other = live(2)
    sizes = frozen_bytes({**teachers, "live": other, "again": other})
    own = sum(p.untyped_storage().nbytes() for p in other.model.parameters())
    assert sizes == {"one": 0, "two": 0, "base": 0, "live": own, "again": 0}


def test_what_cannot_be_combined_is_refused():
    teachers = {"a": live(2), "b": live(3)}
    with pytest.raises(ValueError, match="got none"):
        MixedTeachers({})
    with pytest.raises(ValueError, match="Unknown teacher 'c'"):
        MixedTeachers(teachers, {"a": 1, "c": 1})
    with pytest.raises(ValueError, match="Each teacher needs a weight > 0"):
        MixedTeachers(teachers, {"a": 1})
    with pytest.raises(ValueError, match="`sharpness` and `temperature` have to be > 0"):
        ConfidentTeachers(teachers, sharpness=0.0)
    inputs, mask = batch(TEXTS)
    with pytest.raises(ValueError, match=r"needs the column 'teacher' of shape \(3,\) in the batch, got None"):
        RoutedTeachers(teachers).signal(STUDENT, inputs, mask)
    with pytest.raises(ValueError, match="names teacher 2, but there are 2: a, b, counted from 0"):
        routed(teachers, [0, 2, 1])
    with pytest.raises(ValueError, match="names teacher -1, but there are 2"):
        routed(teachers, [0, -1, 1])

    class Own:
        form = "dense"

        def signal(self, student, inputs, mask):
            return TeacherSignal(LogitRows(torch.zeros(0, 258)), torch.full(mask.shape, -100))

    with pytest.raises(ValueError, match="The teacher 'own' gives rows for tokens of its own"):
        MixedTeachers({"a": live(2), "own": Own()}).signal(STUDENT, inputs, mask)
