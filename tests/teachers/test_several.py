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
from hf_transfer_ext.losses.rows import LogitRows
from hf_transfer_ext.teachers.cache import CachedTeacher, CacheSpec, cache_teacher
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.several import (
    ConfidentTeachers,
    MixedTeachers,
    MixtureRows,
    RoutedTeachers,
    frozen_bytes,
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


def test_each_row_of_a_batch_has_its_own_teacher():
    teachers = {"a": live(2), "b": live(3)}
    rows = routed(teachers, [1, 0, 1])
    want = torch.cat([expected(tiny_llama(seed), [text]) for seed, text in zip((3, 2, 3), TEXTS, strict=True)])
    torch.testing.assert_close(rows(slice(None)), want, rtol=1e-4, atol=1e-4)
    for start in range(len(rows)):
        torch.testing.assert_close(rows(slice(start, start + 2)), want[start : start + 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [CacheSpec("top", 7), CacheSpec("top_and_samples", 7, 3)], ids=lambda s: s.kind)
def test_caches_are_routed_as_models_are(tmp_path, spec):
    caches = {}
    for seed in (2, 3):
        caches[str(seed)] = CachedTeacher(
            cache_teacher(
                tiny_llama(seed), [{"input_ids": text} for text in TEXTS], tmp_path / str(seed),
                tokenizer=byte_tokenizer(), spec=spec, accelerator=Accelerator(cpu=True),
            )
        )  # fmt: skip
    rows = routed(caches, [1, 0, 1])
    ids = (rows.top if spec.kind == "top" else rows.listed).ids[:, :7]
    want = torch.cat([expected(tiny_llama(seed), [text]) for seed, text in zip((3, 2, 3), TEXTS, strict=True)])
    assert ids.equal(want.topk(7).indices)
    with pytest.raises(ValueError, match="MixedTeachers needs the whole distribution of each teacher, got s"):
        MixedTeachers(caches)
    with pytest.raises(ValueError, match=r"rows of one form, got 2 s\w+, live dense"):
        RoutedTeachers({"2": caches["2"], "live": live(2)})


def test_a_mixture_is_cached_as_one_teacher(tmp_path):
    """A second epoch without any of its members."""
    from hf_transfer_ext.teachers.cache import FORMAT, TeacherCache

    fingerprint = {"format": FORMAT, "vocab_size": 258, **vars(CacheSpec("top", 258))}
    cached = CachedTeacher(TeacherCache(tmp_path / "c", fingerprint), MixedTeachers({"a": live(2), "b": live(3)}))
    for _ in range(2):
        rows = cached.signal(STUDENT, *batch(TEXTS)).rows
    mean = 0.5 * sum(expected(tiny_llama(seed), TEXTS).softmax(-1) for seed in (2, 3))
    dense = torch.full(mean.shape, -torch.inf).scatter(1, rows.top.ids, rows.top.log_probs)
    torch.testing.assert_close(dense.exp(), mean, rtol=3e-3, atol=1e-4)
    assert cached.forwards == 1


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

    class Own:
        form = "dense"

        def signal(self, student, inputs, mask):
            return TeacherSignal(LogitRows(torch.zeros(0, 258)), torch.full(mask.shape, -100))

    with pytest.raises(ValueError, match="The teacher 'own' speaks of tokens of its own"):
        MixedTeachers({"a": live(2), "own": Own()}).signal(STUDENT, inputs, mask)
