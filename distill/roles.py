"""The roles of a distillation: teacher, student, fake score, discriminator, target; and how they start as copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.average import timed
from distill.denoiser import Condition, Denoiser
from distill.disc import heads
from distill.draw import Draw
from distill.guidance import Away
from distill.lora import LoRA, trained_alone, twin, weightless
from distill.negative import TEXT, adapted, layers
from distill.ranges import Calls, Positive, Share, Words, check
from distill.schedule import Schedule
from distill.student import Renoise, Student, falling, grid_times
from distill.weight import LogVariance

if TYPE_CHECKING:
    from distill.trainer import Method

Batch = dict[str, Any]
HEADS = {"disc": "", "proxy": "proxy_"}  # roles that are heads, and how a method's fields for them begin
SMALL = {"disc": "fake", "proxy": "fake", "weight": "student"}  # roles that are no denoisers, and the players of each


@dataclass(eq=False)
class Recorded:
    """A denoiser as it was at each of several checkpoints of the role "fake": one network, with the last asked for.

    backbone: the network whose tensors it may share, which are never written.
    """

    denoiser: Denoiser
    folders: tuple[Path, ...]
    backbone: nn.Module
    at: int | None = None

    def __call__(self, i: int) -> Denoiser:
        if i != self.at:
            checkpoint.fill(self.denoiser.net, self.folders[i], "fake", self.backbone)
            self.at = i
        return self.denoiser


@dataclass(eq=False)
class Nets:
    """The roles. A role that a method does not use is None. shape: of one sample, (C, H, W) say.

    disc, proxy: heads over features of the fake score or the teacher, a discriminator and a reward; "fake" moves them.
    weight: the learned weight of the student's loss (weight.py); "student" moves it.
    past: the teacher on its recorded way to the student (DisBack).
    perceptual: how far decoded samples [B, *shape] look from others, [B], with gradient; for methods that need it.
    reward: how good samples [B, *shape] are under a condition, [B], with gradient to the samples; likewise.
    control: the picture [B, C, H, W] of samples [B, *shape] that a student is told as c["control"]; likewise.
    """

    teacher: Denoiser
    student: Student
    shape: tuple[int, ...]
    fake: Denoiser | None = None
    disc: nn.Module | None = None
    proxy: nn.Module | None = None
    weight: nn.Module | None = None
    target: Denoiser | None = None
    past: Recorded | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    reward: Callable[[Tensor, Condition], Tensor] | None = None
    control: Callable[[Tensor], Tensor] | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Every trained or averaged network by role; the teacher is frozen and not among them."""
        roles = {
            "student": self.student.denoiser.net,
            "fake": self.fake.net if self.fake is not None else None,
            **{role: getattr(self, role) for role in SMALL},
            "target": self.target.net if self.target is not None else None,
        }
        return {name: net for name, net in roles.items() if net is not None}

    def frozen(self) -> dict[str, nn.Module]:
        """The teacher, the worse network that it is guided away from, its past, and the experts of a student's earlier
        phases: networks that no player moves."""
        experts = {f"expert {i}": expert.net for i, expert in enumerate(self.student.experts)}
        past = {} if self.past is None else {"past": self.past.denoiser.net}
        worse = {"worse": self.teacher.worse} if isinstance(self.teacher, Away) else {}
        return {"teacher": self.teacher.net, **worse, **past, **experts}

    @property
    def finished(self) -> Student:
        """The teacher, called as the student is: what a finished student was before it is tuned."""
        return replace(self.student, denoiser=self.teacher)

    def generate(self, batch: Batch, draw: Draw, steps: int | None = None, to: float | None = None) -> Tensor:
        """A sample of the student for every index of `draw`, from its noise "z" and the batch's condition."""
        z = draw.normal("z", (len(draw.samples), *self.shape))
        return self.student.generate(z, batch.get("c"), draw, steps, to)

    def walk(self, batch: Batch, draw: Draw) -> list[Tensor]:
        """Every x on the way to that sample, and the sample (Student.walk)."""
        return self.student.walk(draw.normal("z", (len(draw.samples), *self.shape)), batch.get("c"), draw)


@dataclass(frozen=True)
class StudentConfig:
    """The student's calls. Levels of noise are ratios sigma / alpha, the same on every schedule."""

    steps: Calls = 1  # network calls
    sigma: Positive | None = None  # noise level of the first call (SiD: 2.5); None: the schedule's last
    # native time of a one-step student's call (DMD2, SDXL: 399); a student of several steps starts at the last time
    timestep: Positive | None = None
    scale: Positive | None = None  # scale of the unit noise at the first call; None: sigma of that level
    renoise: Renoise = "fresh"  # noise between calls: new (fresh) or predicted (ddim, tcd)
    times: tuple[Share, ...] | None = None  # times of all calls, in (0, 1]; they set `steps`
    lora: LoRA = field(default_factory=LoRA)  # adapters on the teacher's weights instead of a full copy
    network: str | None = None  # folder with the config.json of a (smaller) network of the teacher's class
    negative: Words = 0  # tokens of a prompt (CLIP: 77): add an adapter for negative prompts (SUN); 0: no adapter
    freeze: tuple[str, ...] = ()  # modules that keep the teacher's weights, for example time_embedding
    init: str | None = None  # weights to start from: a checkpoint-N (its average), a network's folder or a .safetensors
    phases: Calls = 1  # number of equal phases of the calls, each with its own expert (Phased DMD: 2)
    experts: tuple[str, ...] = ()  # weights of the earlier phases' experts, as for init; the next one is trained

    def __post_init__(self) -> None:
        if self.times:
            falling(self.times)
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

    def net(self, backbone: nn.Module) -> nn.Module:
        """What is trained: a copy of the backbone, an adapter on it, or another network of its class, at random.

        Of a backbone with a child `control`, an adapter to pictures (pipelines/control.py), that child.
        """
        if hasattr(backbone, "control"):
            return trained_alone(backbone, "control")
        if self.network is None:
            return adapted(backbone, self.negative) if self.negative else self.lora(backbone)
        file = Path(self.network) / "config.json"
        if not file.is_file():
            raise ValueError(f"student.network is {self.network!r}; it must be a folder that holds a config.json")
        made = type(backbone).from_config(json.loads(file.read_text()))  # type: ignore[attr-defined]
        return made.float().requires_grad_(True).eval()

    def earlier(self, teacher: Denoiser) -> tuple[Denoiser, ...]:
        """The experts of the earlier phases, frozen: copies of the teacher, or adapters on it, from their weights."""
        nets = [self.net(teacher.net) for _ in self.experts]
        for net, path in zip(nets, self.experts, strict=True):
            checkpoint.fill(net, path, "student", teacher.net)
        return tuple(replace(teacher, net=net.requires_grad_(False).eval()) for net in nets)

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


def build(
    method: Method,
    teacher: Denoiser,
    shape: tuple[int, ...],
    c: Condition = None,
    student: StudentConfig | None = None,
    fake: FakeConfig | None = None,
) -> Nets:
    """All roles of `method`, each starting as a copy of the teacher, as an adapter on it, or from weights on disk.

    shape: of one sample; c: an example condition of batch 1, to find the size of the discriminator's features.
    """
    student, fake = student or StudentConfig(), fake or FakeConfig()
    for name, part in (("method", method), ("student", student), ("fake", fake)):
        check(part, f"{name}.")
    if "null" in method.needs and teacher.null is None:
        raise ValueError(
            f"{type(method).__name__} with these guidance values needs a null condition, but the teacher is "
            "unconditional or was trained without label dropout; set its guidance (or every kappa) to 1"
        )
    if "text" in method.needs:
        layers(teacher.net)  # or a ValueError
    if "negative" in method.needs:
        words = c[TEXT[0]].shape[1] if c is not None and TEXT[0] in c else 0
        if student.negative != words or not words:
            raise ValueError(
                f"{type(method).__name__} trains an adapter that hears a negative prompt after the {words} words of "
                f"the prompt, and student.negative is {student.negative}: "
                + (f"pass --student.negative {words}" if words else "it needs a teacher with text conditions")
            )
    nets = Nets(
        teacher,
        Student(
            replace(teacher, net=student.net(teacher.net)),
            student.times or grid_times(student.steps, student.first(teacher.schedule)),
            student.scale,
            student.renoise,
            student.phases,
            student.earlier(teacher),
        ),
        shape,
    )
    if "steps" in method.needs and (len(nets.student.times) < 2 or nets.student.renoise != "fresh"):
        raise ValueError(
            f"{type(method).__name__} tunes the random calls of a student, all but the last; one of "
            f"{len(nets.student.times)} call(s) with {nets.student.renoise!r} noise between them has none: it needs "
            "two calls or more, with fresh noise"
        )
    noises = getattr(method, "noises", None)
    if noises is not None and len(nets.student.times) > 1 and nets.student.renoise not in noises:
        raise ValueError(
            f"{type(method).__name__} does not train a student of {len(nets.student.times)} calls with "
            f"{nets.student.renoise!r} noise between them: pass --student.renoise "
            + (" or ".join(noises) if noises else "fresh --student.steps 1")
        )
    for name in student.freeze:
        try:
            nets.student.denoiser.net.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            top = [child for child, _ in teacher.net.named_children()]
            raise ValueError(f"no module {name!r} to freeze ({error}); at the top there are {top}") from None
    if "end" in method.needs:
        nets.student.denoiser = timed(nets.student.denoiser)
        nets.student.jumps = getattr(method, "jumps", False)
    if student.init is not None:
        checkpoint.fill(nets.student.denoiser.net, student.init, "student", teacher.net)
    if "past" in method.roles:
        folders: tuple[Path, ...] = method.recorded()  # type: ignore[attr-defined]
        nets.past = Recorded(replace(teacher, net=fake.lora(teacher.net)), folders, teacher.net)
        nets.past(len(folders) - 1).net.requires_grad_(False)
        fake = replace(fake, init=fake.init or f"{folders[-1]}")
    if "fake" in method.roles:
        nets.fake = replace(teacher, net=fake.lora(teacher.net))
        if fake.init is not None:
            checkpoint.fill(nets.fake.net, fake.init, "fake", teacher.net)
    if "target" in method.roles:
        nets.target = replace(nets.student.denoiser, net=twin(nets.student.denoiser.net).requires_grad_(False))
    if "weight" in method.roles:
        nets.weight = LogVariance()
    for role in (role for role in HEADS if role in method.roles):  # a set has no order, and heads start at random
        taps: tuple[str, ...] = getattr(method, f"{HEADS[role]}taps")
        with torch.device("meta"), torch.no_grad():  # shapes are enough, and the network may not fit the device yet
            x, t = torch.zeros(1, *shape), torch.full((1,), 0.5, dtype=torch.float64)
            told = None if c is None else {key: torch.empty_like(value, device="meta") for key, value in c.items()}
            features = replace(teacher, net=weightless(teacher.net)).features(x, t, told, taps)
        kind = (getattr(method, f"{HEADS[role]}{name}", False) for name in ("places", "pixels"))
        setattr(nets, role, heads(features, *kind))
    if hasattr(method, "before"):
        method.before(nets)
    return nets
