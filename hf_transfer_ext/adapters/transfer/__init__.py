"""Carry a LoRA adapter to another base model: by a closed form (methods/, one a file), or by training.

| bases | method | needs |
|---|---|---|
| equal weights | `copy` | |
| trained further from the source base, same depth | `copy`, `project` | |
| any other pair, any tokenizers | `trans_lora` (`by_training.py`) | seeds of the task's inputs; generation |
| the same, as the start of a training | `cross_lora`, `lorasuite`, `ridge` | shared tokens, or texts |
| a successor with the same tokenizer, and the task's data | `muscle.py` | both task adapters |

`lineage` says which row two bases belong to, `command.transfer` follows it, and `compare.compare_transfer` measures
the result next to the target base alone, a copy, random factors of the same norm and training on the true data. On one
task between a model and a student of another depth (`benchmarks/results/transferred_task.md`), no closed form kept an
exact answer; the transfer by training kept most of them.
"""
