"""`hf-transfer-ext push FOLDER REPO`, and the options with which other commands publish their result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_transfer_ext.hub.access import require_write_access
from hf_transfer_ext.hub.publish import push
from hf_transfer_ext.hub.teacher_cache import refuse_part_of_cache
from hf_transfer_ext.settings import Setting, arguments_for
from hf_transfer_ext.weights.repository import place_of

#: Options of every command that writes a result.
PUSH_OPTIONS = (
    Setting("push_to_hub", str | None, None, "Publish the result on the Hub: REPO[@BRANCH][:SUBFOLDER]."),
    Setting("private", bool | None, None, "Of push_to_hub: make a new repository private."),
    Setting("create_pr", bool, False, "Of push_to_hub: open a pull request instead of changing the branch."),
)


@dataclass(frozen=True)
class Publication:
    """Where the result of a command is published, if anywhere."""

    repo: str | None = None
    private: bool | None = None
    create_pr: bool = False

    @classmethod
    def taken_from(cls, arguments: dict[str, Any], *, repo_type: str = "model") -> Publication:
        """The options of `PUSH_OPTIONS`, removed from the arguments of a command; checked before any work.

        Args:
            repo_type: "dataset" for a teacher cache.

        Raises:
            ValueError: An option without `push_to_hub`, a name that no repository has, or nothing to publish.
            PermissionError: No login, a token that is refused, or no right to write there.
        """
        found = cls(*(arguments.pop(option.name, option.default) for option in PUSH_OPTIONS))
        found.check(is_dry_run=bool(arguments.get("dry_run")), repo_type=repo_type)
        return found

    def check(self, *, is_dry_run: bool = False, repo_type: str = "model") -> None:
        """Refuse what cannot be published, before any work. Raises as `taken_from`."""
        if self.repo is None and (self.private is not None or self.create_pr):
            raise ValueError("`private` and `create_pr` say how to publish: set `push_to_hub` too.")
        if self.repo is not None:
            if is_dry_run:
                raise ValueError("A dry run writes nothing, so `push_to_hub` has nothing to publish.")
            place = place_of(self.repo)
            if place.path.count("/") > 1 or self.repo.startswith((".", "/", "~")):
                raise ValueError(f"`push_to_hub` takes REPO[@BRANCH][:SUBFOLDER], got {self.repo!r}.")
            private = self.private
            if repo_type == "dataset":
                refuse_part_of_cache(place, create_pr=self.create_pr)
                private = private is not False
            require_write_access(self.repo, private=private, create_pr=self.create_pr, repo_type=repo_type)

    def below(self, name: str) -> Publication:
        """Where a part of the result is published: a folder inside the place of the whole."""
        if self.repo is None:
            return self
        place = place_of(self.repo)
        return replace(self, repo=str(replace(place, subfolder=place.inside(name))))

    def publish(self, folder: str | Path) -> None:
        """Push the folder, where that was asked for, and print the address of the commit."""
        if self.repo is not None:
            print(f"Pushed to {push(folder, self.repo, private=self.private, create_pr=self.create_pr)}")


def refuse_single_file(out: str | Path) -> None:
    """Refuse to publish a GGUF file that is written alone, before it is made.

    Raises:
        ValueError: `out` is the name of a file.
    """
    if Path(out).suffix == ".gguf":
        raise ValueError(
            f"A single GGUF file has no card and no record to publish. Name a folder in the place of {str(out)!r}."
        )


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
