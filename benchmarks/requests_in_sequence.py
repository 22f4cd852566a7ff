"""Quality after 1, 2, 4 and 8 forget requests, one person each, by two ways to serve them.

    python -m benchmarks.requests_in_sequence --out benchmarks/results/requests_in_sequence

The models and people are those of `benchmarks.unlearned_people`, of which the eight people of these requests are the
four to forget and the first four of the retain set; the other four stay the retain set of all requests.

- *stacked*: each request is a LoRA that was trained from the original model alone; `hf-transfer-ext requests` adds
  the changes of all that stand, so that any one can be revoked.
- *in turn*: each request is trained from the result of the one before, merged; none can be revoked.

Settings are those that `unlearned_people` chose for the method, with twice as many passes over the twelve rows of a
request. Forgotten: 1 - the recovered share of the plain question, over the people of all requests so far; the floor is
the probability that the original gives to the answers about people it never met. Oldest: the same of the first
request alone. Utility: probability of the answers about the people of the test, who are in no request and no retain
set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from benchmarks import measure
from benchmarks.unlearned_people import BATCH, EPOCHS, LORA_RANK, PLAIN, World, probability, quiet, stored, world_of
from hf_transfer_ext.edits.requests import add_request, apply_requests
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.trainers.taught import lora_on
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

COUNTS = (1, 2, 4, 8)
WAYS = ("stacked", "in turn")
METHODS = ("npo", "simnpo", "jensun", "idk_dpo")


def requests_of(world: World) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """The rows of each request, and those that all requests retain."""
    people: dict[int, list[dict[str, Any]]] = {}
    for row in [*world.rows["forget"], *world.rows["given"]]:
        people.setdefault(row["person"], []).append(row)
    asked = list(people.values())
    return asked[: COUNTS[-1]], [row for rows in asked[COUNTS[-1] :] for row in rows]


def adapted(method: str, world: World, start: Any, rows: Any, retain: Any, settings: dict[str, Any]) -> Any:
    """The model with the adapter that one request has trained."""
    set_seed(world.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            folder, method=method, num_train_epochs=2 * EPOCHS, per_device_train_batch_size=BATCH,
            save_strategy="no", report_to="none", **settings, **quiet(world.seed),
        )  # fmt: skip
        trainer = UnlearningTrainer(
            lora_on(start, LORA_RANK), args, forget_dataset=rows, retain_dataset=retain,
            processing_class=world.tokenizer, template=PLAIN,
        )  # fmt: skip
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)


def looked_at(world: World, model: Any, requests: Sequence[list[dict[str, Any]]]) -> dict[str, float]:
    world.rows["requested"], world.rows["oldest"] = [row for rows in requests for row in rows], requests[0]
    found = {"utility": probability(world, model, "test")}
    floor = probability(world, world.original.model, "holdout")
    for name, part in (("forgotten", "requested"), ("oldest", "oldest")):
        known = probability(world, world.original.model, part) - floor
        share = (probability(world, model, part) - floor) / known
        found[name] = 1.0 - min(1.0, max(0.0, share))
    return found


def run_one(method: str, way: str, world: World, settings: dict[str, Any]) -> list[dict[str, Any]]:
    requests, retain = requests_of(world)
    rows, model = [], world.start()
    with tempfile.TemporaryDirectory() as folder:
        for count, request in enumerate(requests, 1):
            began = time.perf_counter()
            if way == "in turn":
                model = adapted(method, world, model, request, retain, settings).merge_and_unload()
            else:
                adapter, store = Path(folder, f"adapter-{count}"), Path(folder, "requests")
                adapted(method, world, world.start(), request, retain, settings).save_pretrained(adapter)
                base = str(world.folder / "original")
                add_request(store, f"person-{count}", base=base, adapter=adapter, method=method, forget=request)
            seconds = time.perf_counter() - began
            if count in COUNTS:
                if way == "stacked":
                    apply_requests(store, Path(folder, f"after-{count}"))
                    model = load_model(Path(folder, f"after-{count}"), dtype="float32")
                rows.append({"requests": count, "seconds": seconds, **looked_at(world, model, requests[:count])})
    return rows


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for seed in options.seeds:
        world: World | None = None
        for method in options.methods:
            for way in WAYS:
                path = options.work / "requests" / f"{method}-{way.replace(' ', '_')}-{seed}.json"
                if not path.exists():
                    measure.stop_in_time(options)
                    chosen = stored(options.work, method, 0)
                    if chosen is None or "settings" not in chosen:
                        raise ValueError(f"Run benchmarks.unlearned_people for {method!r} and seed 0 first.")
                    world = world or world_of(seed, options.work)
                    rows = run_one(method, way, world, chosen["settings"])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    measure.write_json(path, {"method": method, "way": way, "seed": seed, "rows": rows})
                    print(method, way, seed, [round(row["utility"], 2) for row in rows], flush=True)
                found.append(json.loads(path.read_text()))
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for method, way in dict.fromkeys((one["method"], one["way"]) for one in found):
        own = [one["rows"] for one in found if (one["method"], one["way"]) == (method, way)]
        cells: list[Any] = [method, way, len(own)]
        for place in range(len(COUNTS)):
            mean = {n: sum(rows[place][n] for rows in own) / len(own) for n in ("forgotten", "oldest", "utility")}
            cells.append(f"{mean['forgotten']:.0%} / {mean['oldest']:.0%} / {mean['utility']:.2f}")
        rows.append(cells)
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    columns = ["method", "way", "seeds", *(f"after {count}" for count in COUNTS)]
    return (
        "# Forget requests in sequence\n\nEach cell: forgotten / forgotten of the oldest request / utility. "
        f"{about}\n\n" + measure.markdown_table(columns, rows)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/unlearned_people"), help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the same command resumes")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    try:
        found = run(options)
    except measure.OutOfTime:
        print("The time is up; run the same command again to resume.")
        return
    machine = measure.machine(("torch", "transformers", "peft"))
    measure.write_json(options.out.with_suffix(".json"), {"machine": machine, "rows": found})
    options.out.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
