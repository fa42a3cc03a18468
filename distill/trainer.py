"""The co-training loop: whose parameters move, under which loss, how often. It yields after every step.

Gradients are averaged over processes by one bucketed all-reduce when a player's micro-batches are done. A player may
call its networks any number of times, tap features, stop early or differentiate forward: nothing depends on hooks of
a wrapper, and accumulation needs no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from distill import health, memory, shard
from distill.draw import Draw
from distill.ema import EMA
from distill.ranges import Count, Decay, Natural, Positive, Seed, Weight, Width, check
from distill.roles import SMALL, Batch, Nets

if TYPE_CHECKING:
    from accelerate import Accelerator

Logs = dict[str, Tensor]
Loss = Callable[[Tensor, Nets, Batch, Draw], tuple[Tensor, Logs]]
BUCKET = 1 << 25  # elements of one all-reduce: 128 MiB of float32


@dataclass(frozen=True)
class Update:
    """`player` ("student", with a learned weight; "fake": fake score, discriminator, proxy, or several of them) moves
    under `loss` every `every` steps from `start` on.

    reuse: on the detached samples of an earlier update of the same step, where there was one, instead of fresh ones.
    walk: fresh samples of successive steps are those after 1, 2, ... calls of one generation, until the student moves
    or has no more calls: Draw.late is how many steps ago it began, and a step costs one call.
    alone: before this step it moves at each one, the others having not begun.
    """

    player: Literal["student", "fake"]
    loss: Loss
    every: int = 1
    reuse: bool = False
    walk: bool = False
    start: int = 0
    alone: int = 0


class Method(Protocol):
    """An algorithm: a frozen dataclass of its hyper-parameters.

    May define `after(nets)`, called when the student has moved, and `before(nets)` for a state that is to be kept, as
    buffers of a network.

    One with the role "disc" also has `taps`, the modules of the fake score or the teacher that the discriminator reads
    with a head each, and may have `places`: whether each place of a head has a logit, or all have their mean, and
    `pixels`: whether heads are PCM's. It may define `calls(steps, first, schedule)`: the times of a student of so many
    calls from the time `first` on, where none are given; None: those of the scheduler. `noises` are the values of
    student.renoise with which several calls of its student are right, where not all are. One that needs "end" has a
    student that is told a second time (average.py), which `jumps` if it is the time to which x goes, "steps" one of
    several calls with fresh noise, and "finished" one that is called as its teacher, an exported student
    (pipelines/scheduler.py).
    """

    roles: tuple[str, ...]  # of Nets, beside teacher and student
    # of data "real": and "real_c", "pairs": "z", "y", "forget": "forget_c"; guidance "null", "told"; of Nets "reward"
    needs: tuple[str, ...]

    def updates(self) -> list[Update]: ...

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor: ...


class ToData:
    """A method whose student leads from every level to data: several calls need fresh noise between them."""

    noises: ClassVar[tuple[str, ...]] = ("fresh",)


@dataclass(frozen=True)
class TrainConfig:
    """How to train, independent of the method. Names follow the training scripts of diffusers."""

    output_dir: str = "runs/distill"  # checkpoints, log.jsonl, sample grids, replays and the exported pipeline go here
    max_train_steps: Count = 1000  # iterations of the co-training loop
    train_batch_size: Count = 64  # images per update, over all processes and accumulation rounds
    gradient_accumulation_steps: Count = 1  # micro-batches per update, for every player
    learning_rate: Positive = 1e-4  # learning rate of the student
    fake_learning_rate: Positive | None = None  # of fake score and discriminator; None: learning_rate
    lr_scheduler: Literal["constant", "linear"] = "constant"  # linear: constant, then to 0 over the last half
    lr_warmup_steps: Natural = 0  # iterations of linear warm-up
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    attention: str | None = None  # diffusers backend: native, flash, xformers, ...; None: the networks' default
    replicate_teacher: bool = False  # with FSDP: keep the full teacher on every process instead of sharding it
    # adamw8bit: bitsandbytes, 2 bytes of moments per weight, not 8; radam: Adam without warm-up (ECT, iCT, TCM)
    optimizer: Literal["adamw", "adamw8bit", "radam"] = "adamw"
    adam_beta1: Decay = 0.0  # decay of the first moment
    adam_beta2: Decay = 0.999  # decay of the second moment
    adam_epsilon: Positive = 1e-8  # added to the root of the second moment
    adam_weight_decay: Weight = 0.0  # decoupled weight decay
    max_grad_norm: Positive | None = None  # clip the gradient of each player to this norm; None: never
    fake_max_grad_norm: Weight | None = None  # of fake score and discriminator; None: max_grad_norm; 0: never
    max_grad_value: Positive | None = None  # clip every entry of the student's gradient to this; None: never
    fake_max_grad_value: Positive | None = None  # clip every entry of the fake score's gradient to this; None: never
    ema_half_life: Weight = 10_000  # of the student's average, in images; 0: no averaging
    ema_ramp: Positive | None = 0.05  # half-life at most this share of the images seen; None: no ramp
    ema_width: Width | None = None  # sigma_rel of EDM2's power average (rCM: .1); replaces the half-life
    checkpointing_steps: Natural = 500  # write a checkpoint every N iterations; 0: only at the end
    checkpoints_total_limit: Count | None = 2  # number of newest checkpoints to keep; None: all
    resume_from_checkpoint: str | None = None  # "latest" or a checkpoint folder
    # differences from the resumed run to allow; without it they are refused. batch: train_batch_size; times: of the
    # student's calls; teacher: its weights
    resume_allow: tuple[Literal["method", "teacher", "seed", "batch", "times"], ...] = ()
    validation_steps: Natural = 100  # write a sample grid every N iterations; 0: never
    logging_steps: Count = 10  # write the logs every N iterations
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"  # trackers beside log.jsonl
    skip_nonfinite: Natural = 0  # consecutive updates per player that a NaN may skip; 0: the first NaN ends the run
    hang_seconds: Weight = 1800  # report a longer step, with the stacks of all threads; 0: never
    deterministic: bool = False  # bit-identical repeats on a GPU: slower kernels, or an error if there is none
    seed: Seed = 0  # of all random numbers of the run

    def __post_init__(self) -> None:
        check(self)

    def micro_batch(self, processes: int) -> int:
        """Images of one micro-batch on one process."""
        size, rest = divmod(self.train_batch_size, processes * self.gradient_accumulation_steps)
        if rest or not size:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is not divisible by {processes} process(es) x "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps; make it a multiple of "
                f"{processes * self.gradient_accumulation_steps}"
            )
        return size

    def rates(self) -> dict[str, float]:
        """The learning rate of each player."""
        return {"student": self.learning_rate, "fake": self.fake_learning_rate or self.learning_rate}

    def norm(self, player: str) -> float | None:
        """The norm that the gradient of `player` is clipped to; None: it is not clipped."""
        if player == "student" or self.fake_max_grad_norm is None:
            return self.max_grad_norm
        return self.fake_max_grad_norm or None

    def rate(self, step: int) -> float:
        """The factor on the learning rates at iteration `step`."""
        warm = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
        if self.lr_scheduler == "constant":
            return warm
        return warm * min(1.0, 2 * (1 - step / self.max_train_steps))


@dataclass(eq=False)
class State:
    """What a run is: everything that a checkpoint holds, and the logs of the last step (on the device)."""

    nets: Nets
    ema: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0  # iterations done
    skipped: dict[str, int] = field(default_factory=dict)  # by player: updates left out since the last one that was not
    logs: Logs = field(default_factory=dict)


def train(
    method: Method,
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
    resume: Path | None = None,
    draw: Callable[..., Draw] = Draw,
) -> Iterator[State]:
    """Co-train the players of `method`, yielding the state after every step until `cfg.max_train_steps`.

    A finished run, resumed, yields its state once.
    data(draw) -> batch with "c" and what the method needs. resume: a checkpoint folder to continue, bit for bit.
    draw: the source of random numbers, called (seed, step, player, samples [B]); replaced in tests.
    """
    state = begin(nets, data, cfg, accelerator, resume, draw)
    players = {player: optimizer.param_groups[0]["params"] for player, optimizer in state.optimizers.items()}
    rates = cfg.rates()
    micro = cfg.micro_batch(accelerator.num_processes)
    first = accelerator.process_index * micro * cfg.gradient_accumulation_steps
    samples = torch.arange(first, first + micro * cfg.gradient_accumulation_steps, device=accelerator.device)
    walked: list[health.Turn] = []  # the last step's samples, where the next one's go on from them
    if state.step >= cfg.max_train_steps:
        yield state
    while state.step < cfg.max_train_steps:
        step, state.logs = state.step, {}
        kept: list[health.Turn] = []
        for update in method.updates():
            if step % update.every and step >= update.alone or step < update.start:
                continue
            player, optimizer = update.player, state.optimizers[update.player]
            own(players, player)
            done = []
            for i, indices in enumerate(samples.split(micro)):
                numbers = draw(cfg.seed, step, player, indices)
                with memory.autocast(accelerator):
                    if update.reuse and kept:
                        (x, batch, *_), source = kept[i], None
                    else:
                        batch, source = data(numbers), numbers
                        if update.walk:
                            late = began(method, nets, step)
                            source = draw(cfg.seed, step - late, player, indices)
                            if late and walked:
                                source.before, begun, *_ = walked[i]
                            elif late:  # a resumed run
                                begun = data(source)
                            source.late, batch = late, batch | {"c": begun.get("c")} if late else batch
                        with torch.set_grad_enabled(player == "student"):
                            x = method.sample(nets, batch, source)
                    loss, logs = update.loss(x, nets, batch, numbers)
                one = 1 + 0 * loss.detach()  # a loss that is not finite makes all gradients so, on every process
                (loss / cfg.gradient_accumulation_steps).backward(one)
                done.append(health.Turn(x.detach(), batch, numbers, source))
                logs = {"loss": loss} | logs | (health.samples(x) if x.requires_grad else {})
                for name, value in {f"{player}/{k}": v for k, v in logs.items()}.items():
                    value = value.detach() / cfg.gradient_accumulation_steps
                    state.logs[name] = state.logs.get(name, 0.0) + value
            kept, walked = done, done if update.walk else walked
            average(players[player], accelerator)
            state.logs[f"{player}/grad_norm"] = norm = clip(players[player], cfg.norm(player))
            if not torch.isfinite(norm):
                health.refuse(state, method, update, done, cfg, accelerator)  # raises, unless it may be left out
                continue
            limit = cfg.max_grad_value if player == "student" else cfg.fake_max_grad_value
            if limit is not None:
                torch.nn.utils.clip_grad_value_(players[player], limit)
            for group in optimizer.param_groups:
                group["lr"] = rates[player] * cfg.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.skipped.pop(player, None)
            if cfg.skip_nonfinite:
                state.logs[f"{player}/skipped"] = torch.zeros_like(norm)
            if player == "student":
                seen, updates = step * cfg.train_batch_size, count_updates(method, "student", step)
                state.ema.update(nets.student.denoiser.net, cfg.train_batch_size, seen, updates)
                if hasattr(method, "after"):
                    method.after(nets)
        own(players, *players)
        state.step += 1
        yield state


def begin(
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
    resume: Path | None = None,
    draw: Callable[..., Draw] = Draw,
) -> State:
    """The networks on the device, ready to train, with optimizers and average; all from a checkpoint, if there is one.

    The arguments are those of `train`.
    """
    supported(cfg, accelerator)
    cfg.micro_batch(accelerator.num_processes)
    start(nets, accelerator)
    if cfg.gradient_checkpointing:
        memory.recompute(nets)
    if cfg.attention is not None:
        first = draw(cfg.seed, 0, "student", torch.zeros(1, dtype=torch.long, device=accelerator.device))
        with memory.autocast(accelerator):
            memory.attend(nets, cfg.attention, data(first).get("c"))
    ema = EMA(nets.student.denoiser.net, cfg.ema_half_life, cfg.ema_ramp, cfg.ema_width)
    if shard.asked(accelerator):
        split(nets, ema, accelerator, cfg.replicate_teacher)
    state = State(nets, ema, {name: adam(params, cfg.rates()[name], cfg) for name, params in owners(nets).items()})
    if resume is not None:
        from distill import checkpoint

        checkpoint.load(state, resume)
    return state


def began(method: Method, nets: Nets, step: int) -> int:
    """How many steps ago the generation began that this step's samples continue (Update.walk)."""
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


def supported(cfg: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what cannot train several players here. It takes no networks: call it before any is loaded."""
    from accelerate.utils import DistributedType

    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}; it must be 'no' or 'bf16': "
            "several players under one loss scaler unscale each other's gradients"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed wraps one model with one loss; students and fake scores share theirs: use DDP")
    sharded = shard.asked(accelerator)
    if cfg.replicate_teacher and not sharded:
        raise ValueError("replicate_teacher is for sharded runs (FSDP); elsewhere every process has the teacher whole")
    if cfg.optimizer == "adamw8bit":
        if sharded:
            raise ValueError("optimizer adamw8bit cannot be sharded: use adamw with FSDP, or adamw8bit with DDP")
        memory.adam8bit()


def start(nets: Nets, accelerator: Accelerator) -> None:
    """Networks that are equal on all processes, on the device; those to be sharded stay where they are."""
    from accelerate.utils import broadcast

    for denoiser in (nets.teacher, nets.student.denoiser, nets.fake, nets.target):
        if denoiser is not None and denoiser.null is not None:
            denoiser.null = {name: value.to(accelerator.device) for name, value in denoiser.null.items()}
    for net in nets.frozen().values():
        net.requires_grad_(False).eval()
    for role, net in {**nets.frozen(), **nets.modules()}.items():
        if not shard.asked(accelerator):
            net.to(accelerator.device)
        low = [name for name, p in net.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if low:
            raise ValueError(f"{role} has trainable weights in half precision ({low[0]}, ...); load them as float32")
        for tensor in (p for p in net.parameters() if p.requires_grad):
            tensor.data = broadcast(tensor.data.to(accelerator.device)).to(tensor.device)


def split(nets: Nets, ema: EMA, accelerator: Accelerator, replicate_teacher: bool) -> None:
    """Shard every role, the average too; a teacher that is to be whole goes to the device."""
    mesh, half, blocks = shard.mesh(accelerator), accelerator.mixed_precision == "bf16", nets.teacher.blocks
    modules = {id(net): net for net in (*nets.frozen().values(), ema.net, *nets.modules().values())}
    if replicate_teacher:
        for role in nets.frozen().keys() & {"teacher", "worse"}:
            modules.pop(id(nets.frozen()[role])).to(accelerator.device)
    for net in modules.values():
        shard.shard(net, blocks, mesh, half and net not in [getattr(nets, role) for role in SMALL])


def owners(nets: Nets) -> dict[str, list[nn.Parameter]]:
    """The parameters that each player moves: those that require gradients now."""
    players: dict[str, list[nn.Parameter]] = {}
    for role, net in nets.modules().items():
        if role != "target":
            params = [p for p in net.parameters() if p.requires_grad]
            players.setdefault(SMALL.get(role, role), []).extend(params)
    return players


def adam(params: list[nn.Parameter], lr: float, cfg: TrainConfig) -> torch.optim.Optimizer:
    betas = (float(cfg.adam_beta1), float(cfg.adam_beta2))
    if cfg.optimizer == "adamw8bit":
        return memory.adam8bit()(params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay)
    if cfg.optimizer == "radam":
        return torch.optim.RAdam(
            params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay, decoupled_weight_decay=True
        )
    fused = params[0].device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(params, lr, betas, cfg.adam_epsilon, cfg.adam_weight_decay, fused=fused)


def own(players: dict[str, list[nn.Parameter]], *player: str) -> None:
    """Exactly the parameters of `player` require gradients; gradients still flow *through* the others."""
    for name, params in players.items():
        for p in params:
            p.requires_grad_(name in player)


def average(params: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean of the gradients over processes, in buckets; those of sharded networks are means already."""
    grads = [p.grad for p in params if p.grad is not None and not shard.split(p)]
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


def clip(params: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """The total gradient norm; with `max_norm`, gradients are scaled down to it."""
    if max_norm is None:
        return shard.whole(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    return shard.whole(torch.nn.utils.clip_grad_norm_(params, max_norm))
