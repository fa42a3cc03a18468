"""Sharded networks: every process holds a part of each tensor, and gathers a block's tensors while it runs (FSDP2).

Each role is wrapped on its own: the blocks that its family names, then what is left. Gradients come back as parts too,
averaged over processes; optimizers, averages and checkpoints work on parts. Zhao et al. 2023, arXiv 2304.11277.
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
    """Whether the launcher's configuration asks for sharding; ValueError if it is of a kind that cannot be had."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin, parallel = accelerator.state.fsdp_plugin, accelerator.parallelism_config
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


def mesh(accelerator: Accelerator) -> DeviceMesh:
    """All processes in a row; in a hybrid, (replicas, parts)."""
    from torch.distributed.device_mesh import init_device_mesh

    parallel, n = accelerator.parallelism_config, accelerator.num_processes
    replicas = parallel.dp_replicate_size if parallel is not None else 1
    if replicas == 1:
        return init_device_mesh(accelerator.device.type, (n,))
    return init_device_mesh(
        accelerator.device.type, (replicas, n // replicas), mesh_dim_names=("dp_replicate", "dp_shard")
    )


def shard(net: nn.Module, blocks: Iterable[str], mesh: DeviceMesh, half: bool) -> None:
    """Split the parameters of `net` over `mesh`, a unit for every submodule whose class is named, one for the rest.

    half: blocks are gathered in bfloat16, the parts and the sum of gradients stay as they are. Buffers are whole.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if half else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of views: no output is changed in place
    units = [module for module in net.modules() if type(module).__name__ in {*blocks} and module is not net]
    for module in (*reversed(units), net):  # from the inside out
        fully_shard(module, **options)


def close_fsdp_forward(net: nn.Module, features: list[Tensor]) -> None:
    """A forward pass of `net` was left early, with `features` as its outputs: close the blocks that it was in."""
    for module in reversed([*net.modules()] if sharded(net) else []):
        state = module._get_fsdp_state() if sharded(module) else None  # type: ignore[operator]
        if state is not None and state._training_state.name == "FORWARD":
            state._post_forward(module, (), tuple(features))


def sharded(net: nn.Module) -> bool:
    """Whether `net` is a unit of a sharded network."""
    return hasattr(net, "set_requires_gradient_sync")


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether this process holds but a part of the tensor."""
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: memory of the tensor itself."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """The tensor on every process, which all must ask for; of one that is not split, itself."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor the part of this process lies."""
    if not is_sharded_tensor(tensor):
        return tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
