"""The settings with which recipes publish their result; trainers have those of transformers (`hub_model_id`, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_transfer_ext.hub.command import Publication
from hf_transfer_ext.recipe import setting


@dataclass(kw_only=True)
class PublishArguments:
    """Where a recipe publishes its result, if anywhere."""

    push_to_hub: str | None = setting(None, "", "Repository to publish it in: REPO[@BRANCH][:SUBFOLDER].")
    private: bool | None = setting(None, "", "Of push_to_hub: make a new repository private.")
    create_pr: bool = setting(False, "", "Of push_to_hub: open a pull request instead of changing the branch.")

    def publication(self, *, several: bool = False) -> Publication:
        """Where to publish the result, checked; call it before any work. Raises as `Publication.check`.

        Args:
            several: The recipe publishes several results, so that a pull request cannot hold them.
        """
        if several and self.create_pr:
            raise ValueError("This recipe publishes several results one after the other: leave `create_pr` out.")
        found = Publication(self.push_to_hub, self.private, self.create_pr)
        found.check()
        return found


def publish_stages(publication: Publication, root: Path, stages: tuple[str, ...]) -> None:
    """Publish the report of a chain of jobs, and the result of each job in a folder of its own beside it."""
    publication.publish(root)
    for name in stages:
        publication.below(name).publish(root / name)
