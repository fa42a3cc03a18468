"""Sharding on the CPU: accelerate ignores its FSDP plugin there, so a test sets what a GPU run gets from a launcher."""

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def sharded(accelerator=None, **options):
    """An accelerator of this process that asks for FSDP, of version 2 where nothing else is given."""
    accelerator = accelerator or Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | options)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def unsharded(accelerator):
    accelerator.state.distributed_type = DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    return accelerator
