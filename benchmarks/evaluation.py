"""One pass for all metrics versus one pass per metric: tokens, time and memory of the TOFU and membership metrics.

    python -m benchmarks.evaluation --out benchmarks/results/evaluation

The model is a Llama of 6 layers and hidden size 256 with random weights, made on the spot; the data are people who do
not exist, in the schema of TOFU: twelve questions each, with a paraphrase and five wrong answers to every one. Three
ways to the same numbers (the last column is their sum):

- *one pass*: this package's engine, all metrics in one call;
- *own passes*: the same engine, called once for each metric;
- *plain loop*: the loop that evaluation scripts are made of, written here for comparison: each metric makes batches of
  the texts in their order, takes the whole logits of each batch and reads its number off them.

Generations are left out, because every way must make them once. The passes of the gradient norm are
counted, though every way has as many: of the 5.0 CPU seconds of the one pass, 1.7 went into them, 0.8 into the scan of
the logits, 0.4 into the pass of the reference, and 0.03 into tokenization and the metrics themselves.

The second table compares vocabularies on three of the metrics (perplexity, the reference attack and min-k++; no
gradients, which are as large as the weights): what is counted is the peak of the resident memory over what was there
before the step, so the weights of the two models are not part of it.
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    machine,
    markdown_table,
    measure_in_child,
    median,
    memory_limit,
    paired_ratio,
    rounds_of,
    write_json,
)
from hf_transfer_ext.files import write_text

LIKELIHOOD = (
    "answer_probability", "choice_probability", "perplexity", ("truth_ratio", {"definition": "arithmetic"}),
    ("truth_ratio", {"definition": "geometric"}), "exact_memorization", "extraction_strength", "margin",
    "loss_attack", "zlib_attack", "reference_attack", "min_k", "min_k_plus_plus",
)  # fmt: skip
METRICS = (*LIKELIHOOD, "gradient_norm")
FEW = ("perplexity", "reference_attack", "min_k_plus_plus")
WAYS = ("one pass", "own passes", "plain loop")
VOCABULARIES = (8192, 32768, 131072)
BATCH = 16


def step_of(way: str, vocabulary: int, people: int, few: bool) -> Any:
    """The step to measure: `way` is one of `WAYS`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hf_transfer_ext.data.fictitious_people import fictitious_people
    from hf_transfer_ext.evals.engine.evaluate import evaluate

    rows = fictitious_people(people, forget=people - 1, holdout=0)["forget"]
    alphabet = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model, reference = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    metrics = FEW if few else METRICS
    if way == "plain loop":
        return lambda: plain_loop(model, reference, fast, rows, metrics)
    groups = [metrics] if way == "one pass" else [(name,) for name in metrics]

    def step() -> dict[str, float]:
        tokens, checksum = 0, 0.0
        for group in groups:
            found = evaluate(model, fast, rows, list(group), reference=reference, resamples=0, batch_size=BATCH)
            tokens += found.cost["forward_tokens"]
            checksum += sum(m.value for m in found.measurements)
        return {"forward_tokens": tokens, "checksum": checksum}

    return step


def plain_loop(model: Any, reference: Any, tokenizer: Any, rows: Sequence[Any], metrics: Sequence[Any]) -> dict:
    """Every metric in a separate loop over batches of full logits."""
    import numpy as np
    import torch

    from hf_transfer_ext.data.question_answer import QuestionAnswerFormat

    template, counted = QuestionAnswerFormat(), [0]

    def logits_of(texts: Sequence[tuple[str, str]], net: Any) -> Any:
        """(logits that predict the answer, its tokens) of each text, a batch at a time."""
        encoded = [template.encode(tokenizer, *text) for text in texts]
        for at in range(0, len(encoded), BATCH):
            batch = encoded[at : at + BATCH]
            ids = torch.full((len(batch), max(len(e.input_ids) for e in batch)), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for i, e in enumerate(batch):
                ids[i, : len(e.input_ids)] = torch.tensor(e.input_ids)
                mask[i, : len(e.input_ids)] = 1
            counted[0] += int(mask.sum())
            with torch.no_grad():
                logits = net(input_ids=ids, attention_mask=mask).logits
            for i, e in enumerate(batch):
                end = len(e.input_ids)
                yield logits[i, e.answer_start - 1 : end - 1], ids[i, e.answer_start : end]

    def log_probs(column: str, net: Any = model) -> list[np.ndarray]:
        wrong = column == "perturbed_answer"
        texts = [(row["question"], text) for row in rows for text in (row[column] if wrong else [row[column]])]
        return [z.log_softmax(-1).gather(-1, y[:, None])[:, 0].double().numpy() for z, y in logits_of(texts, net)]

    def grouped(values: list[Any]) -> list[list[Any]]:
        each = len(values) // len(rows)
        return [values[i : i + each] for i in range(0, len(values), each)]

    def losses(column: str, net: Any = model) -> np.ndarray:
        return np.array([-float(p.mean()) for p in log_probs(column, net)])

    def lowest(values: np.ndarray, share: float) -> float:
        return float(np.sort(values)[: max(1, int(len(values) * share))].mean())

    def truth_ratio(definition: str) -> float:
        right, wrong = losses("paraphrased_answer"), np.array(grouped(list(losses("perturbed_answer"))))
        change = right[:, None] - wrong
        ratios = np.exp(change).mean(1) if definition == "arithmetic" else np.exp(change.mean(1))
        return float(np.minimum(ratios, 1 / ratios).mean())

    def firsts() -> list[np.ndarray]:
        answers = [(row["question"], row["answer"]) for row in rows]
        return [(z.argmax(-1) == y).numpy() for z, y in logits_of(answers, model)]

    def strength(first: np.ndarray) -> float:
        wrong = np.flatnonzero(~first)
        start = int(wrong[-1]) + 1 if len(wrong) else 0
        return 1.0 - start / len(first) if start < len(first) else 0.0

    def margins() -> list[float]:
        found = []
        for z, y in logits_of([(row["question"], row["answer"]) for row in rows], model):
            log_p = z.log_softmax(-1).gather(-1, y[:, None])[:, 0].double()
            found.append(float((log_p - torch.log1p(-log_p.exp())).mean()))
        return found

    def plus_plus() -> list[float]:
        found = []
        for z, y in logits_of([(row["question"], row["answer"]) for row in rows], model):
            log_p = z.log_softmax(-1)
            p = log_p.exp()
            mean = (p * log_p).sum(-1)
            deviation = ((p * log_p.square()).sum(-1) - mean.square()).sqrt()
            own = log_p.gather(-1, y[:, None])[:, 0]
            found.append(-lowest(((own - mean) / deviation).double().numpy(), 0.4))
        return found

    def gradient_norms() -> list[float]:
        found = []
        for row in rows:
            e = template.encode(tokenizer, row["question"], row["answer"])
            ids = torch.tensor([e.input_ids])
            counted[0] += ids.numel()
            model.zero_grad()
            logits = model(input_ids=ids).logits[0, e.answer_start - 1 : -1]
            torch.nn.functional.cross_entropy(logits, ids[0, e.answer_start :]).backward()
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            found.append(float(torch.stack(norms).norm()))
        model.zero_grad()
        return found

    def choice() -> float:
        right, wrong = np.exp(-losses("answer")), np.exp(-np.array(grouped(list(losses("perturbed_answer")))))
        return float((right / (right + wrong.sum(1))).mean())

    def zipped() -> float:
        sizes = np.array([len(zlib.compress(row["answer"].encode())) for row in rows])
        return float((losses("answer") / sizes).mean())

    by_name = {
        "answer_probability": lambda: np.exp(-losses("answer")).mean(),
        "choice_probability": choice,
        "perplexity": lambda: np.exp(-np.concatenate(log_probs("answer")).mean()),
        "exact_memorization": lambda: np.mean([first.mean() for first in firsts()]),
        "extraction_strength": lambda: np.mean([strength(first) for first in firsts()]),
        "margin": lambda: np.mean(margins()),
        "loss_attack": lambda: losses("answer").mean(),
        "zlib_attack": zipped,
        "reference_attack": lambda: (losses("answer") - losses("answer", reference)).mean(),
        "min_k": lambda: np.mean([-lowest(p, 0.4) for p in log_probs("answer")]),
        "min_k_plus_plus": lambda: np.mean(plus_plus()),
        "gradient_norm": lambda: np.mean(gradient_norms()),
    }
    checksum = 0.0
    for spec in metrics:
        checksum += float(by_name[spec]()) if isinstance(spec, str) else truth_ratio(spec[1]["definition"])
    return {"forward_tokens": counted[0], "checksum": checksum}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluation"))
    options = parser.parse_args()
    cases = [(way, VOCABULARIES[0], False) for way in WAYS]
    cases += [(way, size, True) for size in VOCABULARIES for way in ("one pass", "plain loop")]
    records: list[dict[str, Any]] = []
    loads: list[float] = []
    for number, (way, vocabulary, few) in rounds_of(cases, options.rounds):
        arguments = {"way": way, "vocabulary": vocabulary, "people": options.people, "few": few}
        loads.append(os.getloadavg()[0])
        record = measure_in_child(
            "benchmarks.evaluation:step_of", arguments, limit_bytes=memory_limit(), threads=options.threads
        )
        records.append({**arguments, "round": number, **record})
        print(way, vocabulary, few, record["status"], round(record.get("wall_s", 0.0), 1), "s", flush=True)

    def of(way: str, vocabulary: int, few: bool) -> list[dict[str, Any]]:
        return [r for r in records if (r["way"], r["vocabulary"], r["few"]) == (way, vocabulary, few)]

    first = of(WAYS[0], VOCABULARIES[0], False)
    costs, memory = [], []
    for way in WAYS:
        own = of(way, VOCABULARIES[0], False)
        shown: list[tuple[float | None, str]] = []
        for field, form in (("forward_tokens", "{:.0f}"), ("cpu_s", "{:.1f}"), ("wall_s", "{:.1f}")):
            shown += [(median(own, field), form), (paired_ratio(own, first, field), "{:.1f}")]
        shown.append((median(own, "checksum"), "{:.6g}"))
        costs.append([way, *(None if value is None else form.format(value) for value, form in shown)])
    for way in ("one pass", "plain loop"):
        growth = [median(of(way, size, True), "growth_bytes") for size in VOCABULARIES]
        memory.append([way, *(None if value is None else f"{value / 1e6:.0f}" for value in growth)])
    text = markdown_table(
        [
            "all metrics by", "forward tokens", "times one pass", "CPU seconds", "times one pass", "wall seconds",
            "times one pass", "sum of all values",
        ],
        costs,
    )  # fmt: skip
    text += "\n" + markdown_table(["peak growth in MB by", *(f"{size} entries" for size in VOCABULARIES)], memory)
    print(text)
    found = machine(["torch", "transformers"]) | {"threads": options.threads, "load_averages": loads}
    write_json(options.out.with_suffix(".json"), {"machine": found, "records": records})
    command = "python -m benchmarks.evaluation " + " ".join(
        f"--{name} {getattr(options, name)}" for name in ("rounds", "people", "threads")
    )
    stated = (
        f"{options.threads} threads of {found['cores']} cores; load average {min(loads):.1f} to {max(loads):.1f} "
        "before the measurements, this benchmark included. CPU seconds count all threads and suffer less than wall "
        "seconds from other work on the machine."
    )
    write_text(options.out.with_suffix(".md"), f"Made by `{command}`: {stated}\n\n{text}")


if __name__ == "__main__":
    main()
