"""The forward passes and generations of one evaluation: batched, shared among processes, and never repeated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.evals.engine.cache import ScoreCache, digest
from hf_transfer_ext.models.generation import GenerationSettings, generate
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.models.scoring import ScoredExample, Scorer, TokenScores
from hf_transfer_ext.progress import steps


class Work:
    """Computes scores and generations for a set of examples, once for each distinct text and prompt.

    Args:
        scorer: Scores batches with the model (and its reference).
        cache: Results of earlier runs; new ones are added to it.
        batch_size: Sequences in one forward pass or generation.
        accelerator: Splits the batches among its processes; None for a single process.
        progress: Whether the main process shows progress bars.

    Attributes:
        cost: Tokens and passes that this process computed.
        lockstep: Whether the model is sharded: every process then runs the same number of passes, each with one
            sequence, since each pass needs the shards of all.
    """

    def __init__(
        self, scorer: Scorer, cache: ScoreCache, *, batch_size: int, accelerator: Any = None, progress: bool = False
    ) -> None:
        self.scorer, self.cache, self.batch_size, self.progress = scorer, cache, batch_size, progress
        self.processes = accelerator.num_processes if accelerator is not None else 1
        self.process = accelerator.process_index if accelerator is not None else 0
        self.lockstep = is_sharded(scorer.model)
        self.cost = {"forward_tokens": 0, "forwards": 0, "generated_tokens": 0, "cached": 0}

    def score(self, examples: Sequence[ScoredExample], wanted: Mapping[str, frozenset[str]]) -> None:
        """Fill `texts` of each example.

        Args:
            wanted: Column -> quantities to score its texts for.
        """
        sequences: dict[str, EncodedAnswer] = {}
        needs: dict[str, frozenset[str]] = {}
        keys: dict[int, str] = {}
        for example in examples:
            for column, encoded_list in example.sequences.items():
                for encoded in encoded_list if column in wanted else ():
                    key = digest([encoded.input_ids, encoded.answer_start])
                    sequences[key], keys[id(encoded)] = encoded, key
                    needs[key] = needs.get(key, frozenset()) | wanted[column]
        found: dict[str, TokenScores] = {}
        for key in sequences:
            value = self.cache.get(key)
            if value is not None and TokenScores.from_dict(value).has(needs[key]):
                found[key] = TokenScores.from_dict(value)
        self._count_cached(len(found))

        def score_batch(batch: list[str]) -> dict[str, TokenScores]:
            scores = self.scorer.score([sequences[key] for key in batch], needs[batch[0]])
            for key, value in zip(batch, scores, strict=True):
                self.cache.put(key, value.to_dict())
            return dict(zip(batch, scores, strict=True))

        def prompt_of(key: str) -> tuple[int, ...]:
            return tuple(sequences[key].input_ids[: sequences[key].answer_start])

        batches = []
        for alike in sorted(set(needs.values()), key=sorted, reverse=True):
            missing = [key for key in sequences if key not in found and needs[key] == alike]
            size = 1 if self.lockstep else self.batch_size
            own = batches_of(missing, lambda key: len(sequences[key].input_ids), size, prompt_of)
            if self.lockstep and own:  # a process with one pass fewer repeats the last one
                own += own[-1:] * (-len(own) % self.processes)
            batches += own
        found.update(self.share(batches, score_batch, title="scoring"))
        self.cost["forward_tokens"], self.cost["forwards"] = self.scorer.forward_tokens, self.scorer.forwards
        for example in examples:
            example.texts = {
                column: [found[keys[id(encoded)]] for encoded in encoded_list]
                for column, encoded_list in example.sequences.items()
                if column in wanted
            }

    def generate(
        self,
        examples: Sequence[ScoredExample],
        prompt_ids: Sequence[list[int]],
        tokenizer: Any,
        settings: GenerationSettings,
    ) -> None:
        """Fill `generation` of each example; call this with the evaluated adapter active.

        Raises:
            ValueError: The model is sharded: its processes would need as many passes each, whatever they write.
        """
        if self.lockstep:
            raise ValueError(
                f"The metrics need generations, but {type(self.scorer.model).__name__} is sharded (FSDP, ZeRO-3). "
                "Evaluate a model that is whole on each process, or choose metrics that only score answers."
            )
        prompts: dict[str, list[int]] = {}
        key_of: dict[int, str] = {}
        for example, ids in zip(examples, prompt_ids, strict=True):
            key = digest(["generation", ids, settings.max_new_tokens, settings.temperature, settings.seed])
            prompts[key], key_of[example.index] = ids, key
        found = {key: self.cache.get(key) for key in prompts if self.cache.get(key) is not None}
        self._count_cached(len(found))

        def generate_batch(batch: list[str]) -> dict[str, str]:
            texts, tokens = generate(self.scorer.model, tokenizer, [prompts[key] for key in batch], settings)
            self.cost["generated_tokens"] += tokens
            for key, text in zip(batch, texts, strict=True):
                self.cache.put(key, text)
            return dict(zip(batch, texts, strict=True))

        missing = [key for key in prompts if key not in found]
        batches = batches_of(missing, lambda key: len(prompts[key]), self.batch_size)
        found.update(self.share(batches, generate_batch, title="generating"))
        for example in examples:
            example.generation = found[key_of[example.index]]

    def share(
        self, batches: list[list[str]], compute: Callable[[list[str]], dict[str, Any]], *, title: str = ""
    ) -> dict[str, Any]:
        """Every process computes each `processes`-th batch; all processes get all results."""
        done: dict[str, Any] = {}
        own = batches[self.process :: self.processes]
        turns = range(-(-len(batches) // self.processes))
        for step in steps(turns, title, "batch", show=self.progress and self.process == 0):
            if step < len(own):
                done.update(compute(own[step]))
        if self.processes > 1:
            from accelerate.utils import gather_object

            done = {key: value for key, value in gather_object(list(done.items()))}
        return done

    def total_cost(self) -> dict[str, int]:
        """`cost` summed over all processes."""
        if self.processes == 1:
            return self.cost
        from accelerate.utils import gather_object

        gathered = gather_object([self.cost])
        return {name: sum(cost[name] for cost in gathered) for name in self.cost}

    def _count_cached(self, count: int) -> None:
        self.cost["cached"] += count if self.process == 0 else 0  # every process reads the same cache


def batches_of(
    keys: Sequence[str], length: Callable[[str], int], batch_size: int, group: Callable[[str], Any] = lambda key: key
) -> list[list[str]]:
    """Longest first, so that batches have similar lengths and one that does not fit in memory fails early.

    The keys of one group (the answers to one prompt) stay together, and in one batch where they fit into one: split,
    their prompt would be read twice, in a row that is mostly padding.
    """
    longest: dict[Any, int] = {}
    for key in keys:
        longest[group(key)] = max(length(key), longest.get(group(key), 0))
    ordered = sorted(keys, key=lambda key: (-longest[group(key)], group(key), -length(key), key))
    batches: list[list[str]] = []
    for _, together in itertools.groupby(ordered, group):
        own = list(together)
        if batches and len(batches[-1]) + len(own) <= batch_size:
            batches[-1] += own
        else:
            batches += [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    return batches
