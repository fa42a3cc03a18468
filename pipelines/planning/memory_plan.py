"""The memory of one GPU in a run, from configurations.

Roles are built by the training code from public configs on the meta device, and the method's losses run there. Weights,
gradients and optimizer state are exact, FLOPs are counted, activations are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from distill.configuration import Config
from distill.diffusion.student import grid_times
from distill.method import Method, Requirement
from distill.training.step import BUCKET

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.roles import Nets
    from pipelines.planning.flop_counter import Cost
    from pipelines.planning.models import Meta
    from pipelines.teacher import Teacher

RunConfig = Config[Method, object]  # with any method and data
GiB = 2**30


@dataclass(frozen=True)
class Bytes:
    """Memory of one GPU. Without sharding everything but the activations is exact."""

    weights: int
    average: int  # of the student's moving average
    gradients: int  # of one player: they are cleared before the next player's update
    optimizer: int
    buckets: int  # of the all-reduce, or of gathered units
    activations: int  # estimated

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Run:
    """One configuration on a number of GPUs, with everything that is counted about it."""

    config: RunConfig
    parts: Meta
    gpus: int = 1
    half: bool = True
    shards: int = 1  # number of shards of weights, gradients and optimizer state (FSDP), each on gpus / shards GPUs

    @cached_property
    def networks(self) -> tuple[Teacher, dict[str, Tensor], Nets]:
        """Teacher, condition of one sample, and roles, on the meta device."""
        import torch

        from distill.training.build import build
        from pipelines.inference import controlnet, pag
        from pipelines.teacher import teacher_of

        guidance_embedded = Requirement.GUIDANCE_EMBEDDING in self.config.method.requirements
        teacher = teacher_of(self.parts, self.config.resolution, self.config.frames, guidance_embedded)
        kinds = {"class_labels": torch.long}
        shapes = self.parts.condition().items()
        c = {key: torch.empty(1, *shape, dtype=kinds.get(key), device="meta") for key, shape in shapes}
        if teacher.denoiser.null is None and Requirement.NULL_CONDITION in self.config.method.requirements:
            teacher.denoiser.null = c
        student = self.config.student
        times = student.times or grid_times(student.steps, student.first_time(teacher.denoiser.schedule))
        student = replace(student, times=times, sigma=None, timestep=None)
        with torch.device("meta"):
            if Requirement.CONTROL_PICTURE in self.config.method.requirements:
                controlnet.install_adapter(teacher)
            nets = build(self.config.method, teacher.denoiser, teacher.shape, c, student, self.config.fake)
        if told := controlnet.example_picture(teacher.denoiser, teacher):
            nets.control = lambda x: told["control"].to("meta").expand(len(x), -1, -1, -1)
            nets.teacher = teacher.denoiser = controlnet.without_controlnet(teacher.denoiser)
        pag.attach_pag(nets, self.config.pag_scale, self.config.pag_layers)
        if self.half:
            for p in teacher.denoiser.net.parameters():  # adapters share these
                p.data = p.data.to(torch.bfloat16)
        return teacher, c, nets

    @property
    def micro(self) -> int:
        return self.config.train.micro_batch(self.gpus)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """{role: (number of parameters, number of trained parameters)}."""
        _, _, nets = self.networks
        roles = nets.frozen() | nets.modules()
        moved = nets.modules().keys() - {"target"}
        trained = lambda role, p: p.requires_grad and role in moved
        count = lambda role, net: sum(p.numel() for p in net.parameters() if trained(role, p))
        return {role: (sum(p.numel() for p in net.parameters()), count(role, net)) for role, net in roles.items()}

    @cached_property
    def cost(self) -> Cost:
        from pipelines.planning.flop_counter import cost

        _, c, nets = self.networks
        recompute = self.config.train.gradient_checkpointing
        return cost(self.config.method, nets, c, self.micro, self.half, recompute)

    @cached_property
    def unsharded_memory(self) -> Bytes:
        """Memory without sharding, except the activations."""
        from distill.networks.ema import EMA
        from pipelines.planning.flop_counter import distinct, players

        _, _, nets = self.networks
        owners = players(nets)
        roles = [*nets.frozen().values(), *nets.modules().values()]
        weights = list(distinct(*roles))
        cfg = self.config.train
        average = EMA(nets.student.denoiser.net, cfg.ema_half_life, width=cfg.ema_width).net
        ema = list(distinct(*roles, average))[len(weights) :]
        gradients = max(sum(p.nbytes for p in params) for params in owners.values())
        kind = self.config.train.optimizer
        optimizer = sum(moments(p.numel(), kind) for params in owners.values() for p in params)
        parts = [sum(t.nbytes for t in weights), sum(t.nbytes for t in ema), gradients, optimizer]
        return Bytes(*parts, 0, 0)  # type: ignore[call-arg]

    @property
    def state(self) -> Bytes:
        """Memory except the activations."""
        whole = self.unsharded_memory
        if self.shards == 1:
            return replace(whole, buckets=min(4 * BUCKET, whole.gradients) if self.gpus > 1 else 0)
        teacher, _, nets = self.networks
        largest, rest = gathered_sizes(teacher.denoiser.net)
        bytes_of = lambda net: sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        whole_nets = (*nets.frozen().values(), *nets.modules().values())
        weights = sum(map(bytes_of, whole_nets))  # backbones of adapters, each once
        average = bytes_of(nets.student.denoiser.net) if whole.average else 0
        parts = [size // self.shards for size in (weights, average, whole.gradients, whole.optimizer)]
        buckets = (2 if self.half else 4) * (2 * largest + rest) + 4 * largest
        return Bytes(*parts, buckets, 0)  # type: ignore[call-arg]

    @property
    def memory(self) -> Bytes:
        return replace(self.state, activations=self.cost.activations)

    def on_gpus(self, gpus: int, shards: int) -> Run:
        """The same micro-batch on other GPUs. Counts are kept."""
        run = replace(self, gpus=gpus, shards=shards)
        run.__dict__.update({name: getattr(self, name) for name in ("networks", "unsharded_memory", "cost")})
        return run

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: trained weights, their average, optimizer state."""
        trained = 4 * sum(n for _, n in self.parameters.values())
        return trained + self.unsharded_memory.average + self.unsharded_memory.optimizer

    @property
    def flops(self) -> float:
        """FLOPs of the whole run on all GPUs together."""
        train = self.config.train
        return self.cost.flops / self.cost.micro * train.train_batch_size * train.max_train_steps


def moments(numel: int, kind: str) -> int:
    """Bytes of the optimizer's state for one parameter."""
    if kind == "adamw8bit" and numel >= 4096:  # bitsandbytes: two bytes, and two float32 scales per block of 256
        return 2 * numel + 2 * 4 * -(-numel // 256)
    return 8 * numel + (0 if kind == "adamw8bit" else 4)  # torch stores the step count in a float32 per parameter


def gathered_sizes(net: nn.Module) -> tuple[int, int]:
    """(parameters of the largest FSDP unit, parameters outside units). Two units and the rest are gathered."""
    from pipelines.planning.flop_counter import units

    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units(net)]
    return max(sizes, default=0), sum(p.numel() for p in net.parameters()) - sum(sizes)
