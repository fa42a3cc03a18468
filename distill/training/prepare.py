"""Prepare the networks of a run: device, sharding, optimizers, moving average, checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from distill import sharding
from distill.networks.ema import EMA
from distill.random import Draw
from distill.roles import SMALL, Batch, Nets
from distill.training import checkpoint, precision
from distill.training.config import TrainConfig
from distill.training.state import State

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_state(
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
    resume: Path | None = None,
    draw: Callable[..., Draw] = Draw,
) -> State:
    """The networks on the device with optimizers and moving average, or from a checkpoint if one is given.

    The arguments are those of `train`.
    """
    validate_launch(cfg, accelerator)
    cfg.micro_batch(accelerator.num_processes)
    start(nets, accelerator)
    if cfg.gradient_checkpointing:
        precision.recompute(nets)
    if cfg.attention is not None:
        first = draw(cfg.seed, 0, "student", torch.zeros(1, dtype=torch.long, device=accelerator.device))
        with precision.autocast(accelerator):
            precision.attend(nets, cfg.attention, data(first).get("c"))
    ema = EMA(nets.student.denoiser.net, cfg.ema_half_life, cfg.ema_ramp, cfg.ema_width)
    if sharding.is_fsdp_launch(accelerator):
        shard_roles(nets, ema, accelerator, cfg.replicate_teacher)
    state = State(nets, ema, {name: adam(params, cfg.rates()[name], cfg) for name, params in owners(nets).items()})
    if resume is not None:
        checkpoint.load(state, resume)
    return state


def validate_launch(cfg: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse options that cannot train several players. It needs no networks: call it before they are loaded."""
    from accelerate.utils import DistributedType

    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}; it must be 'no' or 'bf16': "
            "several players under one loss scaler unscale each other's gradients"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed wraps one model with one loss; students and fake scores share theirs: use DDP")
    sharded = sharding.is_fsdp_launch(accelerator)
    if cfg.replicate_teacher and not sharded:
        raise ValueError("replicate_teacher is for sharded runs (FSDP); elsewhere every process has the teacher whole")
    if cfg.optimizer == "adamw8bit":
        if sharded:
            raise ValueError("optimizer adamw8bit cannot be sharded: use adamw with FSDP, or adamw8bit with DDP")
        precision.adam8bit()


def start(nets: Nets, accelerator: Accelerator) -> None:
    """Make the networks equal on all processes and move them to the device. Those that will be sharded stay where they
    are."""
    from accelerate.utils import broadcast

    for denoiser in (nets.teacher, nets.student.denoiser, nets.fake, nets.target):
        if denoiser is not None and denoiser.null is not None:
            denoiser.null = {name: value.to(accelerator.device) for name, value in denoiser.null.items()}
    for net in nets.frozen().values():
        net.requires_grad_(False).eval()
    for role, net in {**nets.frozen(), **nets.modules()}.items():
        if not sharding.is_fsdp_launch(accelerator):
            net.to(accelerator.device)
        low = [name for name, p in net.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if low:
            raise ValueError(f"{role} has trainable weights in half precision ({low[0]}, ...); load them as float32")
        for tensor in (p for p in net.parameters() if p.requires_grad):
            tensor.data = broadcast(tensor.data.to(accelerator.device)).to(tensor.device)


def shard_roles(nets: Nets, ema: EMA, accelerator: Accelerator, replicate_teacher: bool) -> None:
    """Shard every role and the moving average. A replicated teacher moves to the device instead."""
    mesh = sharding.mesh(accelerator)
    half = accelerator.mixed_precision == "bf16"
    blocks = nets.teacher.blocks
    modules = {id(net): net for net in (*nets.frozen().values(), ema.net, *nets.modules().values())}
    if replicate_teacher:
        for role in nets.frozen().keys() & {"teacher", "worse"}:
            modules.pop(id(nets.frozen()[role])).to(accelerator.device)
    for net in modules.values():
        sharding.shard(net, blocks, mesh, half and net not in [getattr(nets, role) for role in SMALL])


def owners(nets: Nets) -> dict[str, list[nn.Parameter]]:
    """The parameters of each player: those that require gradients now."""
    players: dict[str, list[nn.Parameter]] = {}
    for role, net in nets.modules().items():
        if role != "target":
            params = [p for p in net.parameters() if p.requires_grad]
            players.setdefault(SMALL.get(role, role), []).extend(params)
    return players


def adam(params: list[nn.Parameter], lr: float, cfg: TrainConfig) -> torch.optim.Optimizer:
    betas = (float(cfg.adam_beta1), float(cfg.adam_beta2))
    if cfg.optimizer == "adamw8bit":
        return precision.adam8bit()(params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay)
    if cfg.optimizer == "radam":
        return torch.optim.RAdam(
            params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay, decoupled_weight_decay=True
        )
    fused = params[0].device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay, fused=fused)
