"""Multi-Student Distillation: what teacher score matching learns, and what several students of parts can."""

import json

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Line, Oracle, Whitened, exact, nets_of, problem
from tiny import Tiny, filled, tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, KINDS
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.losses import denoising
from distill.method import Requirement
from distill.methods import DMD2, TSM
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train


@pytest.mark.level(1, "TSM")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_gradient_is_that_of_denoising(schedule, kind):
    """Whatever the student: the losses differ by the variance of the target given x_t, their gradients not at all."""
    path, (law, line) = SCHEDULES[schedule], problem(2)
    draw, t = Whitened(64, 2), 0.4
    x = law.mean + draw.columns["z"] @ (law.axes @ law.var.sqrt().diag()).T
    K, k = (p.detach().clone().requires_grad_() for p in (line.A, line.b))
    net = Oracle(lambda x, *at: x @ K.T + k, path, kind)
    teacher, student = exact(law, path, kind), Denoiser(net, path, kind)
    nets, method = Nets(teacher, Student(student), (2,)), TSM(times=Fixed(t), reduction="sum")
    batch = {"real": x}
    loss, _ = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    levels = torch.full((64,), t, dtype=F64)
    x_t = path.diffuse(x, draw.columns["eps"], levels)
    plain, floor = (denoising(d(x_t, levels), x, draw.columns["eps"], "sum") for d in (student, teacher))
    torch.testing.assert_close(loss, plain - floor, rtol=1e-9, atol=1e-9)
    got, want = (torch.autograd.grad(one, (K, k)) for one in (loss, plain))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert float(floor.detach()) > 1e-3 and max(g.norm() for g in got) > 1e-3


@pytest.mark.parametrize("K, divergence", ((1, 10.0), (2, 2.0), (4, 0.0)))
def test_a_part_is_easier(K, divergence):
    """Four classes at -3, -1, 1, 3 of variance 1/4, students that cannot see the class: the mean KL of each to it.

    At the optimum it is the variance of a part's means over 2 / 4 in all: with more students there is less of it.
    """
    path, means, var = EDM(), torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=F64), 0.25
    method, total = DMD2(gan=0, gan_fake=0, normalise=False, reduction="sum", times=Fixed(0.4)), 0.0
    n = 4 // K
    for part in means.split(n):
        line = Line(torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=F64))
        of_class = Oracle(None, path, "x0")
        teacher = Denoiser(of_class, path, "x0", call=lambda net, x, t, c: net(x, t))
        of_class.predict = lambda x, alpha, sigma, part=part: (
            (var * x + sigma**2 * part.repeat_interleave(8)[:, None]) / (var + sigma**2)
        )
        draw = Whitened(8, 1, blocks=n)
        for _ in range(400):
            nets = nets_of(line, teacher, fake=exact(line.law, path))
            loss, _ = method.student_loss(method.sample(nets, {}, draw), nets, {}, draw)
            for p, g in zip((line.A, line.b), torch.autograd.grad(loss, (line.A, line.b))):
                p.data -= 0.3 * g
        law = line.law
        for mean in part:
            gap, ratio = float(law.mean - mean) ** 2 / var, float(law.cov) / var
            total += (ratio + gap - 1 - torch.tensor(ratio).log().item()) / 2 / 4
    assert total == pytest.approx(divergence, abs=1e-3)


class Small(Tiny):
    """A network that is made of a config.json, as those of diffusers."""

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class TestSmaller:
    """A student with another network, from a config; what it learns another run starts from."""

    def run(self, method, steps, **config):
        teacher = tiny(EDM(), "edm", dtype=torch.float32)
        teacher.net = filled(Small(), 0)
        torch.manual_seed(0)
        nets = build(method, teacher, (2,), None, StudentConfig(**config))
        data = lambda draw: {"real": draw.normal("real", (32, 2))}
        cfg = TrainConfig(max_train_steps=steps, train_batch_size=32, learning_rate=1e-2, ema_half_life=0)
        states = [dict(state.logs) for state in train(method, nets, data, cfg, Accelerator(cpu=True))]
        return nets, states

    def test_it_learns_the_teacher(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"width": 8}))
        nets, logs = self.run(TSM(), 150, network=f"{tmp_path}")
        count = lambda net: sum(p.numel() for p in net.parameters())
        assert count(nets.student.denoiser.net) < count(nets.teacher.net) / 2
        first, last = (sum(float(log["student/loss"]) for log in part) for part in (logs[:10], logs[-10:]))
        assert last < 0.2 * first
        assert all(p.grad is None for p in nets.teacher.net.parameters())

    def test_guidance(self):
        """The teacher's, not the student's: at w the loss of the teacher itself is not zero, at 1 it is."""
        teacher = tiny(EDM(), "edm", classes=3)
        c = {"label": torch.arange(16) % 3}
        draw, batch = Draw(0, 0, "student", torch.arange(16)), {"real": torch.randn(16, 2).double(), "real_c": c}
        nets = Nets(teacher, Student(teacher.copy()), (2,))
        loss = lambda w: float(TSM(w).student_loss(batch["real"], nets, batch, draw)[0].detach())
        assert loss(1.0) == 0 and loss(2.0) > 1e-4
        assert TSM().requirements == (Requirement.REAL,)
        assert TSM(2.0).requirements == (
            Requirement.REAL,
            Requirement.NULL_CONDITION,
        )

    def test_mistakes(self, tmp_path):
        with pytest.raises(ValueError, match="holds a config.json"):
            self.run(TSM(), 1, network=f"{tmp_path}")
        with pytest.raises(ValueError, match="give one"):
            StudentConfig(network=f"{tmp_path}", lora=LoRA(rank=2))
