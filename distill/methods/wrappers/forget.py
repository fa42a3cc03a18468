"""SFD: score forgetting distillation. Chen, Zhang & Zhou 2024, arXiv 2409.11219.

    T'(x_t, c) = T(x_t, rule(c))         rule: a condition to forget -> the one in its place; every other one is itself
    L_student  = L_base( x(c), T' ) + b L_base( x(c_f), T' )       c_f: uniform over the conditions to forget
    L_fake     = L_fake( x(c) )     + a L_fake( x(c_f) )           student and fake score get c_f itself

Classes and their rule are fields. Prompts c_f are those with certain words of the data's (Text.forget); rule(c) is
stored beside them in c. L_base is any score distillation that needs no images: SiD (paper), DMD2 without GAN, VSD. A
rule has one override per condition: with several at random the student would learn the geometric mean, which lies
between them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import OVERRIDE, relabel
from distill.method import Batch, Logs, Loss, Nets, Requirement
from distill.methods.wrappers.wrapper import MethodWrapper
from distill.random import Draw
from distill.ranges import Natural, Weight


@dataclass(frozen=True)
class SFD(MethodWrapper):
    """Distillation that forgets classes or words of the teacher: the student maps each of them to another one."""

    forget: tuple[Natural, ...] = ()  # classes c_f to forget; (): the prompts of the data
    override: tuple[Natural, ...] = ()  # the class that replaces each of them
    keep: tuple[Natural, ...] = ()  # classes that replace c_f in the main batch (CIFAR-10's code: all others)
    weight: Weight = 0.01  # b, weight of the student's second batch (CIFAR-10's code: .01; SD 1: 1)
    fake_weight: Weight = 0.01  # a, weight of the fake score's second batch (the same)

    def __post_init__(self) -> None:
        wrong = set(self.forget) & {*self.override, *self.keep} or self.keep and not self.forget
        if wrong or len(self.forget) != len(self.override):
            raise ValueError(
                f"forget is {self.forget}, override {self.override} and keep {self.keep}: give each class to forget "
                "one that is kept"
            )
        if {Requirement.REAL, Requirement.PAIRS, "past"} & {*self.base.requirements, *self.base.roles}:
            raise ValueError(
                f"{type(self.base).__name__} learns from images, pairs or a recorded teacher, which show what is to be "
                "forgotten: set the weights of its GAN to 0, or take a method that needs none of these"
            )

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.base.requirements + Requirement.select(FORGOTTEN_PROMPTS=not self.forget)

    def sample(self, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        if self.keep:
            batch["c"] = relabel(batch["c"], self.keep, draw, self.forget)
        return self.base.sample(nets, batch, draw)

    def add_forgetting(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not (self.forget or "forget_c" in batch):
            return loss(x, nets, batch, draw)
        call = nets.teacher.call

        def call_with_override(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
            return call(net, x, t, self.replace_condition(c))

        call_with_override.__dict__.update(vars(call))  # feature
        nets = replace(nets, teacher=replace(nets.teacher, call=call_with_override))
        total, logs = loss(x, nets, batch, draw)
        if weight := self.weight if draw.player == "student" else self.fake_weight:
            draw = draw.independent_stream("forget")
            second: Batch = batch | {"c": batch.get("forget_c") or relabel(batch["c"], self.forget, draw)}
            with torch.set_grad_enabled(draw.player == "student"):
                x_f = self.base.sample(nets, second, draw)
            forgetting, _ = loss(x_f, nets, second, draw)
            return total + weight * forgetting, logs | {"forgetting": forgetting}
        return total, logs

    student_term = fake_term = add_forgetting

    def replace_condition(self, c: Condition) -> Condition:
        """The condition for the teacher. Keys that are named after labels hold classes."""
        if c is None or not any("label" in key or OVERRIDE in key for key in c):
            raise ValueError(f"a teacher with the conditions {sorted(c or ()) or 'none'} has no class to forget")
        c = {key: self.replace_label(value) if "label" in key else value for key, value in c.items()}
        return c | {key.removeprefix(OVERRIDE): value for key, value in c.items() if OVERRIDE in key}

    def replace_label(self, label: Tensor) -> Tensor:
        for old, new in zip(self.forget, self.override, strict=True):  # an override is not forgotten itself
            label = torch.where(label == old, new, label)
        return label
