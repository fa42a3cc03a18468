"""Sharding on the CPU: accelerate ignores its FSDP plugin there, so a test sets what a GPU run gets from a launcher."""

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig


def sharded(accelerator=None, replicas=1, **options):
    """An accelerator of this process that asks for FSDP, of version 2 where nothing else is given."""
    accelerator = accelerator or Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | options)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if replicas > 1:
        parts = accelerator.num_processes // replicas
        hybrid = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=parts)
        accelerator.state.parallelism_config = hybrid
    return accelerator
