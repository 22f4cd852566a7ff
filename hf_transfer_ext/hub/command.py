"""`hf-transfer-ext push FOLDER REPO`."""

from __future__ import annotations

from hf_transfer_ext.hub.publish import push
from hf_transfer_ext.settings import arguments_for


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_for(
        push,
        argv,
        program="hf-transfer-ext push",
        about="Publish a result with its card and record on the Hub. Log in with `hf auth login`, or set HF_TOKEN.",
        hidden=["token"],  # a command line is kept by shells and shown to others
    )
    print(push(**arguments))
    return 0
