"""Carry a LoRA adapter to another base model: by a closed form (methods/, one a file), or by training.

| bases | method | needs |
|---|---|---|
| equal weights | `copy` | |
| trained further from the source base, same depth | `copy`, `project` | |
| any other pair, other tokenizers included | `trans_lora` (by_training.py) | seed inputs, generation |
| the same, as the start of a training | `cross_lora`, `lorasuite`, `ridge` | shared tokens, or texts |
| a successor with the same tokenizer | muscle.py | both task adapters, the task's data |

`lineage` finds the row of two bases, and `trainer.TransferTrainer` follows it and measures the result next to the
target base alone, a copy, random factors of the same norm and training on the true data (`compare.py`). On one
task, between a model and a student of another depth (`benchmarks/results/transferred_task.md`), no closed form kept an
exact answer; the transfer by training kept most of them.
"""
