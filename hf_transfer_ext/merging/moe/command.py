"""`hf-transfer-ext moe CONFIG.yml OUT_DIR`."""

from __future__ import annotations

from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.merging.foreign import MOE_FLAGS
from hf_transfer_ext.merging.moe.assemble import assemble
from hf_transfer_ext.settings import arguments_for


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_for(
        assemble,
        argv,
        program="hf-transfer-ext moe",
        about="Make a mixture of experts of dense models, as a YAML configuration says (the grammar of mergekit-moe): "
        "Mixtral of Llama or Mistral models, Qwen2-MoE and Qwen3-MoE of Qwen models.",
        extra=PUSH_OPTIONS,
        foreign=MOE_FLAGS,
    )
    publication = Publication.taken_from(arguments)
    report = assemble(**arguments)
    print(f"{report.architecture} -> {report.folder}")
    print(
        f"{report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, {report.written_bytes / 1e9:.2f} GB"
        + ("" if arguments.get("dry_run") else f" in {report.seconds:.1f} s")
    )
    if report.alike_layers:
        layers = ", ".join(map(str, report.alike_layers))
        print(f"the gates of layers {layers} hardly tell the experts apart: choose prompts that differ more")
    publication.publish(report.folder)
    return 0
