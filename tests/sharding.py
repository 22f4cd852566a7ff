"""FSDP2 on CPUs, which Accelerate offers on accelerators alone: its state is told that these gloo ranks are GPUs.

    accelerate launch --config_file FILE tests/sharding.py hf_transfer_ext.recipes.distill --teacher ...

runs a module as a program in a process that is patched in this way.
"""

import os
import runpy
import sys

#: What `accelerate launch` sets for `fsdp2.yaml`, for ranks that no launcher started.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip


def shard_on_cpu(offload=False):
    """Take the branch of FSDP2, as `fsdp2.yaml` (or `fsdp2_offload.yaml`) configures it, in this process."""
    os.environ.update(FSDP2, FSDP_OFFLOAD_PARAMS=str(offload).lower())
    take_cpus_for_gpus()


def take_cpus_for_gpus():
    """What stands between a configuration of FSDP2 and a machine without accelerators."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    original = PartialState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # AcceleratorState makes FSDP of it

    PartialState.__init__ = patched
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # shards are pinned in memory for an accelerator alone


if __name__ == "__main__":
    take_cpus_for_gpus()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
