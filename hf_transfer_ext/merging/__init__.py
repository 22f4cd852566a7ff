"""How checkpoints combine: methods (one a file), the YAML that plans a merge, and the stream that carries it out."""

from __future__ import annotations

from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.merging.run import MergeReport, merge

__all__ = ["MERGE_METHODS", "MergeReport", "merge"]
