"""Configurations of the loop, of the student and of the fake score."""

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
        validate_ranges(self)

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


@dataclass(frozen=True)
class StudentConfig:
    """The student's calls. Levels of noise are ratios sigma / alpha, the same on every schedule."""

    steps: Calls = 1  # network calls
    sigma: Positive | None = None  # noise level of the first call (SiD: 2.5); None: the schedule's last
    # native time of a one-step student's call (DMD2, SDXL: 399); a student of several steps starts at the last time
    timestep: Positive | None = None
    scale: Positive | None = None  # scale of the unit noise at the first call; None: sigma of that level
    renoise: Renoise = "fresh"  # noise between calls: new (fresh) or predicted (ddim, tcd)
    times: tuple[UnitInterval, ...] | None = None  # times of all calls, in (0, 1]; they set `steps`
    lora: LoRA = field(default_factory=LoRA)  # adapters on the teacher's weights instead of a full copy
    network: str | None = None  # folder with the config.json of a (smaller) network of the teacher's class
    negative: Words = 0  # tokens of a prompt (CLIP: 77): add an adapter for negative prompts (SUN); 0: no adapter
    freeze: tuple[str, ...] = ()  # modules that keep the teacher's weights, for example time_embedding
    init: str | None = None  # weights to start from: a checkpoint-N (its average), a network's folder or a .safetensors
    phases: Calls = 1  # number of equal phases of the calls, each with its own expert (Phased DMD: 2)
    experts: tuple[str, ...] = ()  # weights of the earlier phases' experts, as for init; the next one is trained

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

    def first(self, schedule: Schedule) -> float:
        """The time of the first call on `schedule`; ValueError where the schedule has no such timestep."""
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
    """The fake score."""

    lora: LoRA = field(default_factory=LoRA)  # adapters on the teacher's weights instead of a full copy
    init: str | None = None  # weights to start from: a checkpoint-N of a run, a network's folder or a .safetensors
