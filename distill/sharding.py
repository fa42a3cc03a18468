"""Sharded networks (FSDP2): every process holds a part of each tensor and gathers a block's tensors while it runs.

Each role is sharded on its own: first the blocks that its family names, then the rest. Gradients are sharded too, and
averaged over processes. Optimizers, averages and checkpoints work on the local parts.
Zhao et al. 2023, arXiv 2304.11277.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh


def is_fsdp_launch(accelerator: Accelerator) -> bool:
    """Whether the launcher's configuration asks for FSDP. ValueError for a kind of FSDP that is not supported."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    parallel = accelerator.parallelism_config
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version is {plugin.fsdp_version}; it must be 2: version 1 flattens frozen and trained weights into "
            "one tensor. Set fsdp_version: 2 in the configuration of accelerate, or pass --fsdp_version 2"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params is on; it must be false: parameters stay on their device")
    if parallel is not None and parallel.total_size != parallel.dp_replicate_size * parallel.dp_shard_size:
        raise ValueError(f"{parallel} splits tensors or sequences; only dp_replicate_size and dp_shard_size may be > 1")
    return True


def count_shards(accelerator: Accelerator) -> int:
    """Number of processes that share one copy of the state under FSDP."""
    parallel = accelerator.parallelism_config
    return accelerator.num_processes // (parallel.dp_replicate_size if parallel is not None else 1)


def mesh(accelerator: Accelerator) -> DeviceMesh:
    """The device mesh: all processes in one dimension; for hybrid sharding two, (replicas, shards)."""
    from torch.distributed.device_mesh import init_device_mesh

    n = accelerator.num_processes
    replicas = n // count_shards(accelerator)
    if replicas == 1:
        return init_device_mesh(accelerator.device.type, (n,))
    return init_device_mesh(
        accelerator.device.type, (replicas, n // replicas), mesh_dim_names=("dp_replicate", "dp_shard")
    )


def shard(net: nn.Module, blocks: Iterable[str], mesh: DeviceMesh, half: bool) -> None:
    """Shard the parameters of `net` over `mesh`: one unit for every submodule of a class in `blocks`, one for the rest.

    half: gather blocks in bfloat16. The local parts and the sum of gradients keep their precision.
    Buffers are not sharded.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if half else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # views: no output is changed in place
    units = [module for module in net.modules() if type(module).__name__ in {*blocks} and module is not net]
    for module in (*reversed(units), net):  # inner modules first
        fully_shard(module, **options)


def close_fsdp_forward(net: nn.Module, features: list[Tensor]) -> None:
    """Close the FSDP blocks of a forward pass of `net` that was left early with the outputs `features`."""
    for module in reversed([*net.modules()] if sharded(net) else []):
        state = module._get_fsdp_state() if sharded(module) else None  # type: ignore[operator]
        if state is not None and state._training_state.name == "FORWARD":
            state._post_forward(module, (), tuple(features))


def sharded(net: nn.Module) -> bool:
    """Whether `net` is an FSDP unit."""
    return hasattr(net, "set_requires_gradient_sync")


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """The local part of a tensor; it shares memory with the tensor."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor. Collective: all processes must call it. Returns an unsharded tensor unchanged."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """The position of this process's part in the full tensor."""
    if not is_sharded_tensor(tensor):
        return tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
