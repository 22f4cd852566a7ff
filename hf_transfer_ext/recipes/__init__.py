"""The jobs, one module each: `accelerate launch -m hf_transfer_ext.recipes.distill --config FILE.yaml`."""

#: Each job's module, in the order of the help, and what it does.
RECIPES = {
    "distill": "distill a language model: distill --config FILE.yaml",
    "unlearn": "make a language model forget: unlearn --config FILE.yaml",
    "robustify": "distill an unlearned model again, so that relearning brings back less: robustify --config FILE.yaml",
    "evaluate": "measure models: evaluate --config FILE.yaml",
    "audit": "try to get forgotten knowledge back: audit --config FILE.yaml",
    "transfer_lora": "move a LoRA to another base and measure it: transfer --config FILE.yaml",
    "merge": "merge models and measure them: merge --config FILE.yaml",
    "quickstart": "all jobs in a chain, on a small model: quickstart",
}
