import json
import math
import os
import traceback

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat
from hf_transfer_ext.evals.engine import work as engine_work
from hf_transfer_ext.evals.engine.cache import ScoreCache
from hf_transfer_ext.evals.engine.evaluate import compute_metrics, evaluate, resolve_metric
from hf_transfer_ext.evals.engine.examples import needs_of_columns, prepare
from hf_transfer_ext.evals.engine.work import batches_of
from hf_transfer_ext.evals.metric import Metric
from hf_transfer_ext.evals.metrics import METRICS
from hf_transfer_ext.models import scoring
from hf_transfer_ext.models.generation import GenerationSettings

EXAMPLES = [
    {
        "question": f"Where was person {i} born?",
        "answer": "In " + "Atlantis " * (i + 1),
        "paraphrased_answer": "It was Atlantis" + "." * i,
        "perturbed_answer": ["In Rome", "In Oslo it was", "Paris"],
    }
    for i in range(5)
]
ALL = [
    name for name, metric in METRICS.items() if "generations" not in metric.needs and "gradients" not in metric.needs
]
PLAIN = QuestionAnswerFormat(template="plain")


def oracle(model, tokenizer, prompt, text, reference=None):
    """Per-token quantities from whole float64 logits of one sequence, one position at a time."""
    ids = tokenizer(prompt + " " + text)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
        other = reference(torch.tensor([ids])).logits[0].double() if reference is not None else None
    rows = []
    for t in range(start, len(ids)):
        p = torch.softmax(logits[t - 1], -1)
        log_p = p.log()
        mean = sum(float(p[v] * log_p[v]) for v in range(len(p)))
        row = {
            "log_prob": float(log_p[ids[t]]),
            "first": int(p.argmax()) == ids[t],
            "mean": mean,
            "std": math.sqrt(sum(float(p[v] * (log_p[v] - mean) ** 2) for v in range(len(p)))),
        }
        if other is not None:
            q = torch.softmax(other[t - 1], -1)
            row["kl"] = float((q * (q.log() - log_p)).sum())
            row["agrees"] = int(q.argmax()) == int(p.argmax())
        rows.append(row)
    return rows


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_whole_logits_taken_one_sequence_at_a_time(batch_size, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 258 * 7)  # chunks that do not divide the rows
    model, reference, tokenizer = tiny_llama(), tiny_llama(1), byte_tokenizer()
    result = evaluate(
        model, tokenizer, EXAMPLES, ALL, reference=reference, template=PLAIN, batch_size=batch_size, resamples=10
    )
    for example, scored in zip(EXAMPLES, result.scored, strict=True):
        prompt = f"Question: {example['question']}\nAnswer:"
        for column, texts in scored.texts.items():
            own = [example[column]] if isinstance(example[column], str) else example[column]
            for text, scores in zip(own, texts, strict=True):
                rows = oracle(model, tokenizer, prompt, text, reference)
                np.testing.assert_allclose(scores.log_probs, [r["log_prob"] for r in rows], atol=2e-5)
                assert scores.first_choice.tolist() == [r["first"] for r in rows]
                if column != "answer":  # no metric asks more of it
                    assert scores.vocabulary_mean is None and scores.reference_kl is None
                    continue
                np.testing.assert_allclose(scores.vocabulary_mean, [r["mean"] for r in rows], atol=2e-5)
                np.testing.assert_allclose(scores.vocabulary_std, [r["std"] for r in rows], atol=2e-5)
                np.testing.assert_allclose(scores.reference_kl, [r["kl"] for r in rows], atol=2e-5)
                assert scores.reference_agrees.tolist() == [r["agrees"] for r in rows]
    assert not result.problems
    assert [m.name.split("(")[0] for m in result.measurements] == ALL
    for m in result.measurements:
        assert m.examples == len(EXAMPLES) and m.interval[0] <= m.interval[1]


def tiny_gemma2(**config):
    torch.manual_seed(2)
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.5,
    }
    return Gemma2ForCausalLM(Gemma2Config(**{**settings, **config})).eval()


def tiny_gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2)).eval()


def test_a_gemma_head_with_a_soft_cap_and_a_gpt2_head_are_scored_as_their_own_forward_does():
    torch.manual_seed(0)
    gemma, gpt2 = tiny_gemma2(final_logit_softcapping=0.5), tiny_gpt2()
    for model in (gemma, gpt2):
        assert scoring.head_is_understood(model, plain=False)
        scored = evaluate(model, byte_tokenizer(), EXAMPLES[:1], ["perplexity"], template=PLAIN).scored[0]
        rows = oracle(model, byte_tokenizer(), f"Question: {EXAMPLES[0]['question']}\nAnswer:", EXAMPLES[0]["answer"])
        np.testing.assert_allclose(scored.answer.log_probs, [r["log_prob"] for r in rows], atol=2e-5)


def test_a_model_that_changes_its_logits_after_the_head_falls_back_to_its_own_logits():
    model = tiny_llama()
    plain = model.forward

    def forward(**inputs):
        output = plain(**inputs)
        output.logits = output.logits * 0.25
        return output

    expected = tiny_llama()
    expected.lm_head.weight.data *= 0.25
    model.forward = forward
    assert not scoring.head_is_understood(model, plain=False)
    got = evaluate(model, byte_tokenizer(), EXAMPLES, ["perplexity"], template=PLAIN)["perplexity"].value
    want = evaluate(expected, byte_tokenizer(), EXAMPLES, ["perplexity"], template=PLAIN)["perplexity"].value
    assert got == pytest.approx(want, rel=1e-5)


def adapted(seed=0):
    """A base with two adapters that both do something; the first is active."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    torch.manual_seed(seed + 7)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


def test_adapters_of_one_base_are_measured_without_a_copy_and_left_as_they_were():
    model, tokenizer = adapted(), byte_tokenizer()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {
        name: evaluate(model, tokenizer, EXAMPLES, ["nats_per_token"], adapter=name, template=PLAIN).values[
            "nats_per_token"
        ]
        for name in ("default", "other", "base")
    }
    assert model.active_adapter == "default"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    base = evaluate(tiny_llama(), tokenizer, EXAMPLES, ["nats_per_token"], template=PLAIN).values["nats_per_token"]
    np.testing.assert_allclose(values["base"], base, rtol=1e-6)
    assert np.abs(values["default"] - values["base"]).min() > 1e-4
    assert np.abs(values["other"] - values["default"]).min() > 1e-4
    with pytest.raises(ValueError, match="Unknown adapter 'third'"):
        evaluate(model, tokenizer, EXAMPLES, ["perplexity"], adapter="third")


def test_the_base_of_an_adapter_is_a_reference():
    model, tokenizer = adapted(), byte_tokenizer()
    switched = evaluate(model, tokenizer, EXAMPLES, ["kl_to_reference"], reference="base", template=PLAIN)
    copied = evaluate(model, tokenizer, EXAMPLES, ["kl_to_reference"], reference=tiny_llama(), template=PLAIN)
    assert switched["kl_to_reference"].value == pytest.approx(copied["kl_to_reference"].value, rel=1e-5)
    same = evaluate(model, tokenizer, EXAMPLES, ["kl_to_reference", "token_agreement"], reference="default")
    assert same["kl_to_reference"].value == pytest.approx(0.0, abs=1e-6) and same["token_agreement"].value == 1.0


def test_all_metrics_share_one_forward_pass():
    result = evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ALL, reference=tiny_llama(1), template=PLAIN)
    answers = sum(len(e.sequences["answer"][0].input_ids) for e in result.scored)
    others = 0
    for example in result.scored:
        texts = example.sequences["paraphrased_answer"] + example.sequences["perturbed_answer"]
        others += texts[0].answer_start - 1 + sum(text.answer_length for text in texts)
    # The model reads each text once, other answers to one question in one row with it, and the reference the answers.
    assert result.cost["forward_tokens"] == 2 * answers + others
    assert result.cost["forwards"] == 1 + 1 + math.ceil((5 + 5 * 3) / 16)


def scored_apart(model, sequences, needs, **options):
    scorer = scoring.Scorer(model, **options)
    scorer._shares = {id(model): False, id(options.get("reference")): False}
    return scorer.score(sequences, needs)


def assert_same_scores(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        one, other = one.to_dict(), other.to_dict()
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("family", [tiny_llama, tiny_gemma2, tiny_gpt2, lambda: adapted()])
def test_answers_to_one_prompt_are_read_in_one_row_with_the_same_scores(family):
    model, reference = family().eval(), tiny_llama(5)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 250, size=n).tolist() for n in (5, 9, 5, 2)]
    sequences = [
        EncodedAnswer([*prompts[i % 4], *draw.integers(0, 250, size=1 + i % 3).tolist()], len(prompts[i % 4]))
        for i in range(11)
    ]
    needs = frozenset({"token_log_probs", "vocabulary_moments", "reference", "hidden_states"})
    scorer = scoring.Scorer(model, reference=reference)
    found = scorer.score(sequences, needs)
    assert scorer.shares_prompts(model) and scorer.shares_prompts(reference)
    # Three of the prompts are long enough to be shared: what is left of each is read once.
    alone = sum(len(s.input_ids) for s in sequences if s.answer_start == 2)
    together = sum(len(p) - 1 for p in prompts[:3]) + sum(s.answer_length for s in sequences if s.answer_start > 2)
    assert alone - 2 <= scorer.forward_tokens / 2 - together <= alone
    assert_same_scores(found, scored_apart(model, sequences, needs, reference=reference))


def test_a_shared_row_is_not_longer_than_its_bound(monkeypatch):
    sequences = [EncodedAnswer([1, 2, 3, 4, 5, 6, 7, 8, 9], 6) for _ in range(5)]
    assert scoring.groups_of(sequences) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(scoring, "LONGEST_SHARED_ROW", 5 + 2 * 3)
    assert scoring.groups_of(sequences) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(scoring, "LONGEST_SHARED_ROW", 1)
    assert scoring.groups_of(sequences) == [[0], [1], [2], [3], [4]]


def test_reference_and_gradients_take_one_batch_each():
    model, reference = tiny_llama(), tiny_llama(5)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, 250, size=n).tolist() for n in (6, 3, 6)]
    sequences = [EncodedAnswer([*prompts[i % 3], *draw.integers(0, 250, size=2 + i).tolist()], 6 if i % 3 != 1 else 3)
                 for i in range(5)]  # fmt: skip
    needs = frozenset({"token_log_probs", "gradients", "reference"})
    scorer = scoring.Scorer(model, reference=reference)
    found = scorer.score(sequences, needs)
    assert scorer.forwards == 3  # model, reference, and the shortest sequence again, to verify its gradient
    one_by_one = [scored_apart(model, [s], needs, reference=reference)[0] for s in sequences]
    assert_same_scores(found, one_by_one)


def test_prompts_are_not_shared_where_the_model_or_its_window_does_not_allow_it(monkeypatch):
    sequences = [EncodedAnswer([1, 2, 3, 4, 5, 6, answer], 6) for answer in (7, 8)]
    needs = frozenset({"token_log_probs"})
    model = tiny_llama()
    forward = type(model).forward

    def blind(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", blind)
    assert not scoring.prompts_can_be_shared(model)
    monkeypatch.undo()
    assert scoring.prompts_can_be_shared(model)
    short = tiny_gemma2(sliding_window=6)
    for one, tokens in ((model, 7), (short, 14)):
        scorer = scoring.Scorer(one)
        scorer.score(sequences, needs)
        assert scorer.forward_tokens == tokens


def test_greedy_generations_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    settings = GenerationSettings(max_new_tokens=12)
    one, many = (
        evaluate(model, tokenizer, EXAMPLES, ["rouge_l_recall"], generation=settings, batch_size=b, template=PLAIN)
        for b in (1, 5)
    )
    assert [s.generation for s in one.scored] == [s.generation for s in many.scored]
    prompt = tokenizer("Question: Where was person 0 born?\nAnswer:", return_tensors="pt")
    own = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert one.scored[0].generation == tokenizer.decode(own, skip_special_tokens=True)


def test_samples_follow_from_their_seed_and_leave_the_callers_random_numbers():
    model, tokenizer = tiny_llama(), byte_tokenizer()

    def written(seed):
        settings = GenerationSettings(8, temperature=1.0, seed=seed)
        found = evaluate(model, tokenizer, EXAMPLES, ["rouge_l_recall"], generation=settings, template=PLAIN)
        return [s.generation for s in found.scored]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = written(0)
    assert torch.equal(torch.rand(3), expected)
    assert written(0) == first != written(1)


def test_logits_exist_for_a_few_tokens_at_a_time(monkeypatch):
    made = []
    real = scoring.output_head

    def watched(model):
        project = real(model)

        def counted(rows):
            logits = project(rows)
            made.append(logits.numel())
            return logits

        return counted

    monkeypatch.setattr(scoring, "output_head", watched)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 258 * 11)
    evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ["perplexity"], template=PLAIN)
    assert len(made) > 5 and max(made) <= 258 * 11


def test_a_cached_run_computes_nothing_and_a_changed_weight_everything(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    metrics = ["perplexity", "rouge_l_recall"]
    settings = GenerationSettings(max_new_tokens=4)

    def run():
        return evaluate(
            model, tokenizer, EXAMPLES, metrics, cache=tmp_path, generation=settings, template=PLAIN, seed=3
        )

    first, second = run(), run()
    assert second.cost["forwards"] == 0 and second.cost["generated_tokens"] == 0 and second.cost["cached"] == 10
    assert first.measurements == second.measurements
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    assert run().cost["cached"] == 0


def test_a_stopped_run_goes_on_after_its_last_whole_line(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    whole = evaluate(model, tokenizer, EXAMPLES, ["perplexity"], cache=tmp_path, template=PLAIN)
    (path,) = tmp_path.glob("*/process-0.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    resumed = evaluate(model, tokenizer, EXAMPLES, ["perplexity"], cache=tmp_path, template=PLAIN)
    assert resumed.cost["cached"] == 2
    assert resumed["perplexity"].value == pytest.approx(whole["perplexity"].value, rel=1e-6)
    assert evaluate(model, tokenizer, EXAMPLES, ["perplexity"], cache=tmp_path, template=PLAIN).cost["cached"] == 5


def test_a_cached_score_without_a_needed_quantity_is_made_again(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    evaluate(model, tokenizer, EXAMPLES, ["perplexity"], cache=tmp_path, template=PLAIN)
    again = evaluate(model, tokenizer, EXAMPLES, ["kl_to_reference"], reference=model, cache=tmp_path, template=PLAIN)
    assert again.cost["forwards"] == 2 and again["kl_to_reference"].value == pytest.approx(0.0, abs=1e-6)


def test_a_chat_template_is_used_where_the_tokenizer_has_one():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    scored = evaluate(tiny_llama(), tokenizer, EXAMPLES[:1], ["perplexity"]).scored[0]
    (encoded,) = scored.sequences["answer"]
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == "In Atlantis </s>"
    assert tokenizer.decode(encoded.input_ids[: encoded.answer_start]).endswith("born?</s><|assistant|>")


def test_plain_texts_are_scored_whole():
    result = evaluate(tiny_llama(), byte_tokenizer(), [{"text": "abc"}, {"text": "defgh"}], ["perplexity"])
    assert [len(s.answer) for s in result.scored] == [2, 4]


def test_one_bad_example_never_voids_a_run(monkeypatch):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    real = scoring.Scorer.score

    def with_one_nan(self, sequences, needs):
        scores = real(self, sequences, needs)
        scores[0].log_probs[0] = float("nan")
        return scores

    monkeypatch.setattr(scoring.Scorer, "score", with_one_nan)
    result = evaluate(model, tokenizer, EXAMPLES, ["perplexity"], template=PLAIN)
    assert result["perplexity"].examples == 4 and math.isfinite(result["perplexity"].value)
    assert result.problems == [
        "perplexity leaves example 4 out: the model's log-probabilities are NaN at 1 of 50 tokens."
    ]
    assert result.per_example()[4]["metrics"] == {"perplexity": None}


def test_a_result_is_written_and_can_be_measured_again_without_a_forward(tmp_path):
    result = evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ["truth_ratio"], template=PLAIN, dataset="births")
    result.save(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "per_example.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5)) and rows[2]["answer"] == EXAMPLES[2]["answer"]
    saved = json.loads((tmp_path / "measurements.json").read_text())["measurements"]
    assert saved[0]["name"] == "truth_ratio(definition=arithmetic, role=forget)" and saved[0]["dataset"] == "births"
    geometric = compute_metrics(result.scored, [{"truth_ratio": {"definition": "geometric"}}])
    assert geometric.measurements[0].name == "truth_ratio(definition=geometric, role=forget)"
    assert result["truth_ratio"].value != geometric.measurements[0].value


@pytest.mark.parametrize(
    "examples, metrics, options, message",
    [
        ([], ["perplexity"], {}, "data is empty"),
        (EXAMPLES, [], {}, "`metrics` is empty"),
        (EXAMPLES, ["perplexty"], {}, "Did you mean 'perplexity'"),
        ([*EXAMPLES, {"question": "Who?"}], ["perplexity"], {}, "Example 5 .*'answer' is missing"),
        ([{"question": "Who?", "answer": " "}], ["perplexity"], {}, "Example 0 .*is empty"),
        ([{"question": "Who?", "answer": "I"}], ["truth_ratio"], {}, "Example 0 .*'perturbed_answer' is missing"),
        ([{"q": "Who?", "answer": "I"}], ["perplexity"], {"columns": {"question": "frage"}}, "'frage' and 'answer'"),
        (EXAMPLES, ["perplexity"], {"columns": {"quesion": "q"}}, "not 'quesion'"),
        (EXAMPLES, ["kl_to_reference"], {}, "kl_to_reference compare with a reference"),
        (EXAMPLES, ["perplexity"], {"adapter": "x"}, "not a PeftModel"),
        (EXAMPLES, ["perplexity"], {"batch_size": 0}, "at least 1"),
        ([{"text": "a b c"}], ["rouge_l_recall"], {}, "Example 0 has no question"),
    ],
)
def test_bad_input_is_refused_by_name(examples, metrics, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_llama(), byte_tokenizer(), examples, metrics, **options)


def test_columns_may_be_renamed():
    renamed = [{"frage": e["question"], "antwort": e["answer"], "satz": 1} for e in EXAMPLES]
    names = {"question": "frage", "answer": "antwort"}
    model, tokenizer = tiny_llama(), byte_tokenizer()
    result = evaluate(model, tokenizer, renamed, ["perplexity"], columns=names, template=PLAIN)
    same = evaluate(model, tokenizer, EXAMPLES, ["perplexity"], template=PLAIN)
    assert result["perplexity"].value == same["perplexity"].value
    assert result.scored[0].example == {
        "satz": 1,
        "question": EXAMPLES[0]["question"],
        "answer": EXAMPLES[0]["answer"],
    }


def test_the_training_flag_is_as_before():
    model = tiny_llama().train()
    evaluate(model, byte_tokenizer(), EXAMPLES[:1], ["perplexity"], accelerator=Accelerator(cpu=True))
    assert model.training


def test_sharded_models_get_every_process_into_as_many_passes_of_each_kind(monkeypatch):
    # Two processes played one after the other, each with all results: [process][pass] -> (texts, needs).
    metrics = [resolve_metric(name)[0] for name in ("truth_ratio", "min_k_plus_plus")]
    prepared = prepare(tiny_llama(), byte_tokenizer(), EXAMPLES[:3], metrics, template=PLAIN)
    passes = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda items: items)
    for rank in (0, 1):
        model, own = tiny_llama(), []
        scorer = scoring.Scorer(model)
        score = scorer.score
        monkeypatch.setattr(scorer, "splits", lambda model: False)  # as of shards
        monkeypatch.setattr(scorer, "score", lambda texts, needs, own=own, score=score: (
            own.append((len(texts), needs)), score(texts, needs))[1])  # fmt: skip
        work = engine_work.Work(scorer, ScoreCache(None, ""), batch_size=2)
        work.process, work.processes, work.lockstep = rank, 2, True
        with pytest.raises(KeyError):  # the texts of the other process
            work.score(prepared.examples, needs_of_columns(metrics))
        passes.append((own, scorer.forwards))
        with pytest.raises(ValueError, match=r"need generations, but LlamaForCausalLM is sharded"):
            work.generate(prepared.examples, [[1]] * 3, byte_tokenizer(), GenerationSettings(5))
    assert passes[0] == passes[1]
    assert {size for size, _ in passes[0][0]} == {1} and len({needs for _, needs in passes[0][0]}) == 2


def _rank(rank, tmp_path):
    """One of two processes; ends the process."""
    status = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(27600 + os.getppid() % 2000), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent set up for one process
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        found = evaluate(
            tiny_llama(),
            byte_tokenizer(),
            EXAMPLES,
            ["truth_ratio", "rouge_l_recall"],
            template=PLAIN,
            batch_size=4,
            generation=GenerationSettings(5),
            accelerator=accelerator,
            cache=tmp_path / "cache",
        )
        found.save(tmp_path / f"rank-{rank}")
        torch.distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def test_two_processes_give_the_result_of_one_and_make_each_pass_once(tmp_path):
    torch.set_num_threads(1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            _rank(rank, tmp_path)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    both = [(tmp_path / f"rank-{rank}" / "per_example.jsonl").read_text() for rank in (0, 1)]
    assert both[0] == both[1]
    one = evaluate(
        tiny_llama(),
        byte_tokenizer(),
        EXAMPLES,
        ["truth_ratio", "rouge_l_recall"],
        template=PLAIN,
        batch_size=4,
        generation=GenerationSettings(5),
    )
    for line, row in zip(both[0].splitlines(), one.per_example(), strict=True):
        assert json.loads(line)["generation"] == row["generation"]
        assert json.loads(line)["metrics"] == pytest.approx(row["metrics"], rel=1e-5)
    two = json.loads((tmp_path / "rank-0" / "measurements.json").read_text())
    assert two["cost"]["forward_tokens"] == one.cost["forward_tokens"]


def test_examples_are_saved_as_parquet_too(tmp_path):
    from pyarrow import parquet

    rows = [{**row, "mixed": i if i else "text", "map": {"a": i}} for i, row in enumerate(EXAMPLES)]
    result = evaluate(tiny_llama(), byte_tokenizer(), rows, ["perplexity", "truth_ratio"], template=PLAIN)
    read = parquet.read_table(result.save(tmp_path, per_example="parquet") / "per_example.parquet").to_pylist()
    expected = result.per_example()
    for row, want in zip(read, expected, strict=True):
        assert row["metrics"] == want["metrics"] and row["perturbed_answer"] == want["perturbed_answer"]
        assert json.loads(row["mixed"]) == want["mixed"] and json.loads(row["map"]) == want["map"]
    assert not (tmp_path / "per_example.jsonl").exists()
    with pytest.raises(ValueError, match="must be jsonl or parquet, got 'csv'"):
        result.save(tmp_path, per_example="csv")


def test_whatever_one_example_raises_the_others_stay_measured():
    def picky(example):
        return 1 / (example.index - 2)

    result = evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ["perplexity"], template=PLAIN)
    found = compute_metrics(result.scored, [(Metric(picky, unit="share", higher_is_better=True), {})])
    assert found["picky"].examples == len(EXAMPLES) - 1
    assert found.problems == ["picky leaves example 2 out: ZeroDivisionError: division by zero"]


def test_empty_generations_are_told_with_the_first_index(monkeypatch):
    def often_silent(model, tokenizer, prompts, settings):
        return ["" if "person 1" in tokenizer.decode(prompt) else "Atlantis" for prompt in prompts], 1

    monkeypatch.setattr(engine_work, "generate", often_silent)
    result = evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ["rouge_l_recall"], template=PLAIN)
    assert "generated nothing for 1 of 5 examples (first: example 1)" in result.problems[-1]
    assert result["rouge_l_recall"].examples == 5


def test_a_metric_of_free_text_needs_no_answer_and_a_comparison_does():
    rows = [{"question": "Tell a story."}]
    settings = GenerationSettings(20)
    told = evaluate(tiny_llama(), byte_tokenizer(), rows, ["fluency_entropy"], template=PLAIN, generation=settings)
    assert told["fluency_entropy"].examples == 1
    with pytest.raises(ValueError, match="Example 0 cannot be measured: column 'answer' is missing"):
        evaluate(tiny_llama(), byte_tokenizer(), rows, ["rouge_l_recall"], template=PLAIN)


def test_an_answer_that_the_tokenizer_has_no_token_for_is_named():
    deaf = Tokenizer(models.BPE(vocab={"Q": 0, "y": 1, "</s>": 2}, merges=[]))  # drops what it does not know
    deaf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=deaf, eos_token="</s>", pad_token="</s>")
    rows = [{"question": "Q", "answer": "y"}, {"question": "Q", "answer": "z"}]
    with pytest.raises(ValueError, match="Example 1 cannot be measured: The answer 'z' does not add any token"):
        evaluate(tiny_llama(), tokenizer, rows, ["perplexity"], template=PLAIN)


def test_a_model_whose_logits_are_nan_gets_no_numbers():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    names = [name for name in ALL if "reference" not in METRICS[name].needs]
    result = evaluate(model, byte_tokenizer(), EXAMPLES, names, template=PLAIN)
    assert result.measurements == [] and all(np.isnan(values).all() for values in result.values.values())
    assert "the model's log-probabilities are NaN at" in result.problems[0]
    with pytest.raises(ValueError, match="logits are NaN"):
        evaluate(model, byte_tokenizer(), EXAMPLES, ["rouge_l_recall"], template=PLAIN)
    broken_reference = evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, ["token_agreement"], reference=model)
    assert broken_reference.measurements == [] and "the reference's log-prob" in broken_reference.problems[0]


def test_rows_beyond_the_positions_are_refused_before_any_pass():
    model, calls = tiny_gpt2(), []
    model.config.n_positions = model.config.max_position_embeddings = 64
    model.transformer.wpe = torch.nn.Embedding(64, 32)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    long = {"question": "Who?", "answer": "A diver for lost anchors. " * 4}
    with pytest.raises(ValueError, match="Example 1 has 128 tokens, but the model has 64 positions"):
        evaluate(model, byte_tokenizer(), [{"question": "Who?", "answer": "Me"}, long], ["perplexity"], template=PLAIN)
    # A table of positions must hold what is generated as well.
    with pytest.raises(ValueError, match="prompt of 22 tokens and up to 200 new ones"):
        evaluate(model, byte_tokenizer(), [{"question": "Who?", "answer": "Me"}], ["rouge_l_recall"], template=PLAIN)
    assert not calls
    cut = QuestionAnswerFormat(template="plain", max_length=64)
    assert evaluate(model, byte_tokenizer(), [long], ["perplexity"], template=cut)["perplexity"].examples == 1


def test_an_option_that_a_metric_does_not_have_is_refused_before_any_pass():
    with pytest.raises(ValueError, match=r"Unknown option of the metric min_k 'shar'\. Did you mean 'share'"):
        evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, [{"min_k": {"shar": 0.2}}])
    with pytest.raises(ValueError, match=r"Unknown option of the metric perplexity 'a'\. Available: \(it has none\)"):
        evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, [("perplexity", {"a": 1})])
    with pytest.raises(ValueError, match="A metric must be a name"):
        evaluate(tiny_llama(), byte_tokenizer(), EXAMPLES, [{"a": {}, "b": {}}])


def test_answers_to_one_prompt_are_in_one_batch_where_they_fit():
    keys = [f"{prompt}{answer}" for prompt in "abc" for answer in range(3)]
    assert batches_of(keys, len, 4, lambda key: key[0]) == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
    assert batches_of(keys, len, 6, lambda key: key[0]) == [keys[:6], keys[6:]]
    assert batches_of(keys[:3], len, 2, lambda key: key[0]) == [["a0", "a1"], ["a2"]]  # it does not fit
    assert batches_of(["x", "yyy", "zz"], len, 2) == [["yyy", "zz"], ["x"]]
