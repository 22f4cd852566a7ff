"""`hf-transfer-ext COMMAND ...`: each command is one line here and one `main(argv)` in the module that runs it."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from hf_transfer_ext import __version__
from hf_transfer_ext.registry import unknown_name

#: command -> (module whose `main(argv)` runs it, what it does). Modules are imported only when their command runs.
COMMANDS = {
    "merge": ("hf_transfer_ext.merging.command", "merge checkpoints: merge CONFIG.yml OUT_DIR"),
    "moe": ("hf_transfer_ext.merging.moe.command", "make a mixture of experts: moe CONFIG.yml OUT_DIR"),
    "extract": ("hf_transfer_ext.adapters.extract", "extract a LoRA: extract BASE FINETUNED OUT --rank R"),
}


def usage() -> str:
    lines = [f"hf-transfer-ext {__version__}", "", "usage: hf-transfer-ext COMMAND ...", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`hf-transfer-ext COMMAND --help` tells the options of a command."])


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 after bad input, which is told in one line on stderr."""
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
    try:
        return _imported(COMMANDS[command][0]).main(rest) or 0
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-transfer-ext {command}: {error}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """`main` as a program, which leaves at once: to take torch down piece by piece costs half a second."""
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
