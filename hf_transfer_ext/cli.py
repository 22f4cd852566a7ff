"""`hf-transfer-ext COMMAND ...`: each command is one line here and one `main(argv)` in the module that runs it."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from hf_transfer_ext import __version__
from hf_transfer_ext.recipes import RECIPES
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import run_program

#: Command -> the recipe of the same job that runs it where it is given `--config`, with measurements.
_WITH_CONFIG = {"merge": "merge", "transfer": "transfer_lora"}

#: command -> (module whose `main(argv)` runs it, what it does). Modules are imported only when their command runs.
COMMANDS = {
    **{
        name: (f"hf_transfer_ext.recipes.{name}", about)
        for name, about in RECIPES.items()
        if name not in _WITH_CONFIG.values()
    },
    "merge": ("hf_transfer_ext.merging.command", "merge checkpoints: merge CONFIG.yml OUT_DIR"),
    "moe": ("hf_transfer_ext.merging.moe.command", "make a mixture of experts: moe CONFIG.yml OUT_DIR"),
    "extract": ("hf_transfer_ext.adapters.extract", "extract a LoRA: extract BASE FINETUNED OUT --rank R"),
    "transfer": (
        "hf_transfer_ext.adapters.transfer.command",
        "move a LoRA to a new base: transfer ADAPTER BASE OUT",
    ),
    "resize": ("hf_transfer_ext.adapters.resize", "change the rank of a LoRA: resize ADAPTER OUT --rank R"),
    "convert": ("hf_transfer_ext.adapters.convert", "write any adapter as a plain LoRA or GGUF: convert ADAPTER OUT"),
    "edit": ("hf_transfer_ext.edits.apply", "unlearn without training: edit MODEL OUT --method NAME"),
    "requests": ("hf_transfer_ext.edits.requests", "forget requests: requests add|list|revoke|apply STORE"),
    "cache-teacher": ("hf_transfer_ext.recipes.cache_teacher", "store a teacher's outputs on a dataset"),
    "push": ("hf_transfer_ext.hub.command", "publish a result: push FOLDER REPO"),
    "pull": ("hf_transfer_ext.hub.pull_command", "download a result: pull REPO FOLDER"),
    "adapters": ("hf_transfer_ext.hub.adapters_of", "list the adapters of a base model on the Hub: adapters BASE"),
    "lineage": ("hf_transfer_ext.hub.lineage_tree", "show what a result was made from: lineage PATH_OR_REPO"),
    "reproduce": ("hf_transfer_ext.reproduce", "make a result again and compare: reproduce PATH_OR_REPO"),
    "export": ("hf_transfer_ext.export", "write a model or LoRA as GGUF: export FOLDER OUT"),
    "methods": ("hf_transfer_ext.catalogue", "list the methods, or explain one: methods [NAME]"),
    "doctor": ("hf_transfer_ext.doctor", "show versions, devices, and what is missing for which job"),
}


def usage() -> str:
    lines = [f"hf-transfer-ext {__version__}", "", "usage: hf-transfer-ext COMMAND ...", "", "commands:"]
    lines += [f"  {name:<14} {about}" for name, (_, about) in COMMANDS.items()]
    lines += [
        "",
        "`hf-transfer-ext COMMAND --help` shows the options of a command; --debug the traceback of an error.",
    ]
    several = "accelerate launch -m hf_transfer_ext.recipes.distill --config FILE.yaml"
    return "\n".join([*lines, f"On several devices: {several}"])


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 after bad input, which is answered in one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"hf-transfer-ext: {unknown_name('command', command, COMMANDS)}", file=sys.stderr)
        return 2
    module = COMMANDS[command][0]
    if command in _WITH_CONFIG and any(word.startswith(("--config", "--merge_config")) for word in rest):
        module = f"hf_transfer_ext.recipes.{_WITH_CONFIG[command]}"
    return run_program(f"hf-transfer-ext {command}", lambda words: _imported(module).main(words), rest)


def run() -> NoReturn:
    """`main` as a program, which leaves at once: taking torch down piece by piece costs half a second."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _imported(name: str) -> ModuleType:
    """A module, imported without the garbage collector, which finds nothing in a hundred thousand new objects."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if collecting:
            gc.enable()


if __name__ == "__main__":
    run()
