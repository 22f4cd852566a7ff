"""One pass for all metrics beside a pass for each: forward tokens, time and memory of the TOFU and membership metrics.

    python -m benchmarks.evaluation --out benchmarks/results/evaluation

The model is a Llama of 6 layers and hidden size 256 with random weights, made on the spot; the data are people who do
not exist, in the schema of TOFU: twelve questions each, with a paraphrase and five wrong answers to every one. Both
sides run the same code on the same texts and give the same numbers (the last column); `own passes` is what it costs to
run the metrics one by one. Vocabularies of 8 and 64 thousand entries show what the chunks of logits cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, markdown_table, measure_in_child, median, memory_limit, rounds_of, write_json
from hf_transfer_ext.files import write_text

METRICS = (
    "answer_probability", "choice_probability", "perplexity", ("truth_ratio", {"definition": "arithmetic"}),
    ("truth_ratio", {"definition": "geometric"}), "exact_memorization", "extraction_strength", "margin",
    "loss_attack", "zlib_attack", "reference_attack", "min_k", "min_k_plus_plus",
)  # fmt: skip
VOCABULARIES = (8192, 65536)


def step_of(way: str, vocabulary: int, people: int) -> Any:
    """The step to measure: `way` is "one pass" or "own passes"."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hf_transfer_ext.data.fictitious_people import fictitious_people
    from hf_transfer_ext.evals.engine import evaluate

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
    groups = [METRICS] if way == "one pass" else [(name,) for name in METRICS]

    def step() -> dict[str, float]:
        tokens, checksum = 0, 0.0
        for group in groups:
            found = evaluate(model, fast, rows, list(group), reference=reference, resamples=0)
            tokens += found.cost["forward_tokens"]
            checksum += sum(m.value for m in found.measurements)
        return {"forward_tokens": tokens, "checksum": checksum}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--people", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluation"))
    options = parser.parse_args()
    cases = [(way, vocabulary) for vocabulary in VOCABULARIES for way in ("one pass", "own passes")]
    records = []
    for number, (way, vocabulary) in rounds_of(cases, options.rounds):
        arguments = {"way": way, "vocabulary": vocabulary, "people": options.people}
        record = measure_in_child(
            "benchmarks.evaluation:step_of", arguments, limit_bytes=memory_limit(), threads=options.threads
        )
        records.append({**arguments, "round": number, **record})
        print(way, vocabulary, record["status"], round(record.get("wall_s", 0.0), 1), "s")
    table = []
    for way, vocabulary in cases:
        own = [r for r in records if (r["way"], r["vocabulary"]) == (way, vocabulary)]
        values = [median(own, field) for field in ("forward_tokens", "wall_s", "growth_bytes", "checksum")]
        tokens, wall, growth, checksum = (float("nan") if v is None else v for v in values)
        table.append(
            [f"{way}, {vocabulary} entries", f"{tokens:.0f}", f"{wall:.1f}", f"{growth / 1e6:.0f}", f"{checksum:.6g}"]
        )
    columns = ["metrics by", "forward tokens", "seconds", "peak growth, MB", "sum of all values"]
    text = markdown_table(columns, table)
    print(text)
    write_json(options.out.with_suffix(".json"), {"machine": machine(["torch", "transformers"]), "records": records})
    command = f"python -m benchmarks.evaluation --rounds {options.rounds} --people {options.people}"
    write_text(options.out.with_suffix(".md"), f"Made by `{command}`.\n\n{text}")


if __name__ == "__main__":
    main()
