"""SFD: score forgetting distillation. Chen, Zhang & Zhou 2024, arXiv 2409.11219.

    T'(x_t, c) = T(x_t, rule(c))         rule: a class to forget -> the class in its place; every other one is itself
    L_student  = L_base( x(c), T' ) + b L_base( x(c_f), T' )       c_f: uniform over the classes to forget
    L_fake     = L_fake( x(c) )     + a L_fake( x(c_f) )           student and fake score are told c_f itself

L_base is any score distillation's that needs no images: SiD (paper), DMD2 without its GAN, VSD. A rule has one class
for each: where a class is sent to one of several at random, sample by sample, their scores are averaged and the student
learns the normalised geometric mean of these classes, which lies between them. Gradients flow as in the base.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Condition
from distill.draw import Draw
from distill.methods.wrapped import Wrapped
from distill.ranges import Natural, Weight
from distill.trainer import Batch, Logs, Loss, Nets


@dataclass(frozen=True)
class Forgetting(Wrapped):
    """Distillation of a teacher of classes without some of them: what is asked for by these is another class."""

    forget: tuple[Natural, ...] = ()  # c_f
    override: tuple[Natural, ...] = ()  # what each becomes
    weight: Weight = 0.01  # b, of the student's second batch (CIFAR-10's code: .01; SD 1: 1)
    fake_weight: Weight = 0.01  # a, of the fake's (the same)

    def __post_init__(self) -> None:
        if len(self.forget) != len(self.override) or set(self.forget) & set(self.override):
            raise ValueError(
                f"forget is {self.forget} and override {self.override}: give each class to forget one that is kept"
            )
        if self.forget and {"real", "pairs"} & set(self.base.needs):
            raise ValueError(
                f"{type(self.base).__name__} learns from {self.base.needs}, which show what is to be forgotten: "
                "set the weights of its GAN to 0, or take a method that needs none"
            )

    def student_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return self.both(self.weight, loss, x, nets, batch, draw)

    def fake_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        return self.both(self.fake_weight, loss, x, nets, batch, draw)

    def both(self, weight: float, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        if not self.forget:
            return loss(x, nets, batch, draw)
        call = nets.teacher.call

        def ruled(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
            return call(net, x, t, self.rule(c))

        nets = replace(nets, teacher=replace(nets.teacher, call=ruled))
        total, logs = loss(x, nets, batch, draw)
        if weight:
            draw, labels = draw.apart("forget"), torch.tensor(self.forget, device=draw.device)
            c_f = labels[draw.integers("class", len(labels))]
            second: Any = batch | {"c": {k: c_f if "label" in k else v for k, v in batch["c"].items()}}
            with torch.set_grad_enabled(draw.player == "student"):
                x_f = self.sample(nets, second, draw)
            forgetting, _ = loss(x_f, nets, second, draw)
            total, logs = total + weight * forgetting, logs | {"forgetting": forgetting}
        return total, logs

    def rule(self, c: Condition) -> Condition:
        """The condition that the teacher is told: of its keys those named after labels are classes."""
        if c is None:
            raise ValueError("an unconditional teacher has no class to forget")
        return {key: self.overridden(v) if "label" in key else v for key, v in c.items()}

    def overridden(self, label: Tensor) -> Tensor:
        out = label
        for old, new in zip(self.forget, self.override, strict=True):
            out = torch.where(label == old, new, out)
        return out
