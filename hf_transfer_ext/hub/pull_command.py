"""`hf-transfer-ext pull REPO FOLDER`."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_transfer_ext.files import refuse_existing_output, written_aside
from hf_transfer_ext.hub.publish import pull
from hf_transfer_ext.hub.record import RECORD_FILE, read_record
from hf_transfer_ext.settings import arguments_for


def pull_into(repo_id: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False) -> Path:
    """Copy a published result into a folder, atomically; safetensors and text files only.

    Args:
        repo_id: Repository on the Hub.
        folder: Where to put it.
        revision: Branch, tag or commit.
        overwrite: Replace a model that is there.
    """
    refuse_existing_output(folder, overwrite=overwrite)
    source = pull(repo_id, revision=revision)
    with written_aside(folder, overwrite=overwrite) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)  # follows the links of the cache
    return Path(folder)


def main(argv: list[str] | None = None) -> int:
    about = "Download a result from the Hub into a folder."
    arguments = arguments_for(pull_into, argv, program="hf-transfer-ext pull", about=about)
    folder = pull_into(**arguments)
    print(f"Saved to {folder}")
    if (folder / RECORD_FILE).is_file():
        jobs = [record.job for record in read_record(folder).history()]
        print(f"Its record: {' -> '.join(jobs)}")
    return 0
