"""Dataclasses that configure the training loop, the student and the fake score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from distill.diffusion.schedule import Schedule
from distill.diffusion.student import validate_times
from distill.diffusion.transition import Renoise, Transition, find_transition
from distill.networks.lora import LoRA
from distill.ranges import (
    Calls,
    Count,
    Decay,
    Natural,
    Positive,
    Seed,
    UnitInterval,
    Weight,
    Width,
    Words,
    validate_ranges,
)


@dataclass(frozen=True)
class TrainConfig:
    """Training options that all methods share. Names follow the training scripts of diffusers."""

    output_dir: str = "runs/distill"  # folder of checkpoints, log.jsonl, sample grids, replays and the export
    max_train_steps: Count = 1000  # iterations of the co-training loop
    train_batch_size: Count = 64  # images per update, over all processes and accumulation rounds
    # micro-batches per update, for every player; None: on a GPU as few as its memory allows, else one. If memory runs
    # out in the first iteration they are doubled
    gradient_accumulation_steps: Count | None = None
    # precision; None: that of `accelerate launch`, and where it was not given, bf16 on a GPU that supports it, else no
    # (float32)
    mixed_precision: Literal["no", "bf16"] | None = None
    learning_rate: Positive = 1e-4  # learning rate of the student
    fake_learning_rate: Positive | None = None  # learning rate of fake score and discriminator; None: learning_rate
    lr_scheduler: Literal["constant", "linear"] = "constant"  # linear: decay to 0 over the second half of the run
    lr_warmup_steps: Natural = 0  # iterations of linear warm-up
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    attention: str | None = None  # attention backend of diffusers: native, flash, ...; None: each network's default
    replicate_teacher: bool = False  # with FSDP: keep the full teacher on every process instead of sharding it
    # adamw8bit: bitsandbytes' AdamW, 2 bytes of moments per weight instead of 8
    # radam: Adam without warm-up (ECT, iCT, TCM)
    optimizer: Literal["adamw", "adamw8bit", "radam"] = "adamw"
    adam_beta1: Decay = 0.0  # decay rate of the first moment
    adam_beta2: Decay = 0.999  # decay rate of the second moment
    adam_epsilon: Positive = 1e-8  # constant added to the root of the second moment
    adam_weight_decay: Weight = 0.0  # decoupled weight decay
    max_grad_norm: Positive | None = None  # clip the gradient norm of each player to this value; None: never
    fake_max_grad_norm: Weight | None = None  # limit for fake score, discriminator; None: max_grad_norm; 0: never
    max_grad_value: Positive | None = None  # clip each entry of the student's gradient to this; None: never
    fake_max_grad_value: Positive | None = None  # clip each entry of the fake score's gradient to this; None: never
    ema_half_life: Weight = 10_000  # half-life of the student's average, in images; 0: no average
    ema_ramp: Positive | None = 0.05  # limit of the half-life, as a fraction of the images seen so far; None: no limit
    ema_width: Width | None = None  # sigma_rel of EDM2's power-function average (rCM: .1); replaces the half-life
    checkpointing_steps: Natural = 500  # write a checkpoint every N iterations; 0: only at the end
    checkpoints_total_limit: Count | None = 2  # number of newest checkpoints to keep; None: all
    resume_from_checkpoint: str | None = None  # "latest", or the path of a checkpoint folder
    # kinds of differences from the resumed run that are allowed; all others are refused. batch: train_batch_size;
    # times: times of the student's calls; teacher: weights of the teacher
    resume_allow: tuple[Literal["method", "teacher", "seed", "batch", "times"], ...] = ()
    validation_steps: Natural = 100  # write a sample grid every N iterations; 0: never
    logging_steps: Count = 10  # write the logs every N iterations
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"  # trackers beside log.jsonl
    tracker_project_name: str = "distill"  # project of the trackers; tensorboard: folder in output_dir
    tracker_run_name: str | None = None  # name of the run in W&B; None: the name of output_dir
    skip_nonfinite: Natural = 0  # consecutive non-finite updates to skip per player; 0: the first one ends the run
    hang_seconds: Weight = 1800  # report a step that takes longer than this, with the stacks of all threads; 0: never
    deterministic: bool = False  # same results on every run on a GPU: slower kernels, or an error where none exists
    seed: Seed = 0  # seed of all random numbers of the run

    def __post_init__(self) -> None:
        validate_ranges(self)

    def micro_batch(self, processes: int) -> int:
        """Number of images of one micro-batch on one process."""
        parts = processes * self.rounds
        size, rest = divmod(self.train_batch_size, parts)
        if rest or not size:
            nearest = max(round(self.train_batch_size / parts), 1) * parts
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is not divisible by {processes} process(es) x "
                f"{self.rounds} gradient_accumulation_steps; make it a multiple of {parts}: {nearest} is the nearest"
            )
        return size

    @property
    def rounds(self) -> int:
        """Number of micro-batches per update."""
        return self.gradient_accumulation_steps or 1

    def rates(self) -> dict[str, float]:
        """The learning rate of each player."""
        return {"student": self.learning_rate, "fake": self.fake_learning_rate or self.learning_rate}

    def norm(self, player: str) -> float | None:
        """The gradient norm to which `player` is clipped; None: no clipping."""
        if player == "student" or self.fake_max_grad_norm is None:
            return self.max_grad_norm
        return self.fake_max_grad_norm or None

    def rate(self, step: int) -> float:
        """The factor by which the learning rates are multiplied at iteration `step`."""
        warm = min(1.0, (step + 1) / (self.lr_warmup_steps + 1))
        if self.lr_scheduler == "constant":
            return warm
        return warm * min(1.0, 2 * (1 - step / self.max_train_steps))


@dataclass(frozen=True)
class StudentConfig:
    """The calls and the network of the student. A noise level is a ratio sigma / alpha, the same on every schedule."""

    steps: Calls = 1  # number of network calls per sample
    sigma: Positive | None = None  # noise level of the first call (SiD: 2.5); None: the last level of the schedule
    # timestep at which a one-step student is called (DMD2, SDXL: 399); with several steps it starts at the last time
    timestep: Positive | None = None
    scale: Positive | None = None  # standard deviation of the first call's input noise; None: sigma at that level
    renoise: Renoise = "fresh"  # noise between calls: new (fresh), the network's (ddim, tcd), or both (ancestral)
    times: tuple[UnitInterval, ...] | None = None  # times of all calls, in (0, 1]; their number replaces `steps`
    lora: LoRA = field(default_factory=LoRA)  # adapters on the teacher's weights; without a rank a full copy
    network: str | None = None  # folder with the config.json of a (smaller) network of the teacher's class
    negative: Words = 0  # tokens of a prompt (CLIP: 77): add an adapter for negative prompts (SUN); 0: no adapter
    freeze: tuple[str, ...] = ()  # modules that stay at the teacher's weights, for example time_embedding
    init: str | None = None  # initial weights: a checkpoint-N (its average), a network's folder or a .safetensors file
    phases: Calls = 1  # number of equal phases of the calls, one expert per phase (Phased DMD: 2)
    experts: tuple[str, ...] = ()  # weights of the experts of earlier phases, as for init; the next expert is trained

    def __post_init__(self) -> None:
        if self.times:
            validate_times(self.times)
            if self.steps not in (1, len(self.times)):
                raise ValueError(
                    f"student.steps is {self.steps} and student.times are {len(self.times)}, {self.times}: pass "
                    f"--student.steps {len(self.times)}, or as many times, or --student.times None"
                )
            object.__setattr__(self, "steps", len(self.times))
        if self.sigma is not None and self.timestep is not None:
            raise ValueError(
                f"sigma {self.sigma} and timestep {self.timestep} both name the first call; give one of them"
            )
        if [self.network is None, self.lora.rank is None, self.negative == 0].count(False) > 1:
            raise ValueError(
                "student.network is another network, lora.rank and negative are adapters of the teacher: give one"
            )

    @property
    def transition(self) -> Transition:
        return find_transition(self.renoise)

    def first_time(self, schedule: Schedule) -> float:
        """The time of the first call on `schedule`. ValueError if the schedule does not have the timestep."""
        if self.sigma is not None:
            return float(schedule.time(torch.tensor([self.sigma]).double()))
        if self.timestep is None or self.steps > 1:
            return 1.0
        last = float(schedule.native(torch.ones(1).double()))
        t = self.timestep / last  # exact on a table, where t = n / (N - 1)
        if not t <= 1:
            raise ValueError(f"timestep is {self.timestep}; on this schedule it must be above 0 and at most {last:g}")
        if abs(float(schedule.native(torch.tensor([t]).double())) - self.timestep) > 1e-6 * last:
            raise ValueError(f"timestep is {self.timestep}, but {type(schedule).__name__} counts no steps; give sigma")
        return t


@dataclass(frozen=True)
class FakeConfig:
    """The network of the fake score."""

    lora: LoRA = field(default_factory=LoRA)  # adapters on the teacher's weights; without a rank a full copy
    init: str | None = None  # initial weights: a checkpoint-N of a run, a network's folder or a .safetensors
