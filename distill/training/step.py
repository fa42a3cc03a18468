"""Parts of an update: trainable parameters, gradients averaged over processes, the gradient norm, counts of updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill import sharding
from distill.method import Method, Update
from distill.roles import Nets

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET = 1 << 25  # elements per all-reduce: 128 MiB of float32


def set_trainable(players: dict[str, list[nn.Parameter]], *active: str) -> None:
    """Only the parameters of the `active` players require gradients. Gradients still flow *through* the others."""
    for name, params in players.items():
        for p in params:
            p.requires_grad_(name in active)


def average(params: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Average the gradients over processes, in buckets. Those of sharded networks are averaged already."""
    grads = [p.grad for p in params if p.grad is not None and not sharding.is_sharded_tensor(p)]
    if accelerator.num_processes == 1:
        return
    while grads:
        bucket: list[Tensor] = []
        size = 0
        while grads and (not bucket or size + grads[-1].numel() <= BUCKET):
            bucket.append(grads.pop())
            size += bucket[-1].numel()
        flat = accelerator.reduce(torch.cat([g.flatten() for g in bucket]), "mean")
        for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(mean.view_as(g))


def reserve_bucket(params: list[nn.Parameter]) -> None:
    """Allocate what `average` needs, and free it: memory then runs out here, where no process waits for another."""
    sizes = [p.grad.numel() for p in params if p.grad is not None and not sharding.is_sharded_tensor(p)]
    if sizes:
        torch.empty(2 * max(max(sizes), min(BUCKET, sum(sizes))), device=params[0].device)


def clip(params: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """The total gradient norm. With `max_norm`, the gradients are scaled down to it."""
    if max_norm is None:
        return sharding.gather_full_tensor(
            torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        )
    return sharding.gather_full_tensor(torch.nn.utils.clip_grad_norm_(params, max_norm))


def is_due(update: Update, step: int) -> bool:
    """Whether an update is due at iteration `step`."""
    return step >= update.start and (step % update.every == 0 or step < update.alone)


def steps_into_generation(method: Method, nets: Nets, step: int) -> int:
    """Number of steps since the generation began that this step continues (Update.walk)."""
    cycle = max(update.every for update in method.updates())
    return (step % cycle - 1) % len(nets.student.times) if step % cycle else 0


def count_updates(method: Method, player: str, step: int) -> int:
    """Number of updates of `player` before iteration `step`, including those skipped for a NaN."""
    total = 0
    for update in method.updates():
        if update.player == player:
            alone = min(step, update.alone) - update.start
            first = max(update.start, update.alone)
            later = -(-step // update.every) + first // -update.every  # multiples of `every` from `first` to step - 1
            total += max(0, alone) + max(0, later)
    return total
