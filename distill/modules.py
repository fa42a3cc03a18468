"""Copies of networks that share some of their tensors and train others."""

from __future__ import annotations

import copy

from torch import nn


def shallow_module_copy(net: nn.Module) -> nn.Module:
    """A copy of the module tree of `net` that shares every parameter and buffer tensor with it."""
    memo = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    return copy.deepcopy(net, memo)


def copy_trainable(net: nn.Module) -> nn.Module:
    """A copy of `net` with its own trainable parameters. Frozen ones (an adapter's backbone) stay shared."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters() if not p.requires_grad})


def freeze_all_but(net: nn.Module, child: str) -> nn.Module:
    """A copy of `net` in which only the child module `child` is copied and trains. The rest is frozen and shared."""
    found = shallow_module_copy(net).requires_grad_(False)
    setattr(found, child, promote_trainable_to_float32(copy.deepcopy(getattr(net, child)).requires_grad_(True)))
    return found


def meta_copy(net: nn.Module) -> nn.Module:
    """A copy on the meta device, which has shapes but no values."""
    tensors = {id(t): t.detach().to("meta") for t in net.buffers()}
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, tensors | parameters)


def promote_trainable_to_float32(net: nn.Module) -> nn.Module:
    """Cast trainable parameters of `net` to at least float32: half precision rounds small steps away."""
    for p in net.parameters():
        if p.requires_grad and p.dtype.itemsize < 4:
            p.data = p.data.float()
    return net
