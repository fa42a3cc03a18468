"""PSO: at the start log 2, gradients in closed form, a Gaussian student that moves to what is preferred."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from gaussian import F64, SCHEDULES
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.methods import PSO, OfflinePSO
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import run
from pipelines.teacher import load_teacher
from recipes.digits import TABLE

N, D, TIMES = 6, 2, (0.9, 0.6, 0.25)
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
LIKES = torch.tensor([1.0, -0.5], dtype=F64)
liked = lambda x, c: x @ LIKES.to(x)
both = pytest.mark.parametrize("schedule", SCHEDULES)


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


class Shift(nn.Module):
    """x0 = b[i] + x / 2 at call i of TIMES: the mean of the next x is alpha (b[i] + x / 2)."""

    def __init__(self, schedule, b):
        super().__init__()
        self.b = nn.Parameter(b.clone())
        self.told = schedule.native(torch.tensor(TIMES, dtype=F64))

    def forward(self, x, native):
        return self.b[(native[:, None] - self.told).abs().argmin(1)] + x / 2


def shift(schedule, b):
    return Denoiser(Shift(schedule, b), schedule, "x0")


def numbers(step=0, n=N):
    return Doubles(0, step, "student", torch.arange(n))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def nets_of(schedule, moved=0.0, reward=liked):
    """A teacher and a student of three calls, the student's x0 of call i `moved` [3, D] away."""
    b = random(len(TIMES), D)
    return Nets(shift(schedule, b), Student(shift(schedule, b + moved), TIMES), (D,), reward=reward)


def turn(method, nets, batch=None, draw=None, x=None):
    """(samples, loss, logs) of one turn of the student."""
    batch, draw = batch or {}, draw or numbers()
    x = method.sample(nets, batch, draw) if x is None else x
    return x, *method.updates()[0].loss(x, nets, batch, draw)


def levels(schedule):
    return [tuple(float(v) for v in schedule.coefficients(torch.tensor([t], dtype=F64))) for t in TIMES]


# ---- online ----


@pytest.mark.level(1, "PSO")
@both
def test_gradient(schedule):
    """At its teacher a step's loss is log 2, and its gradient to a mean m is -beta / 2 times (n - n') / sigma / D.

    n is the noise that the better walk met and n' the other. The last call, which has none, has no gradient.
    """
    nets = nets_of(SCHEDULES[schedule])
    x, loss, logs = turn(PSO(beta=50.0), nets)
    assert x.shape == (N, 2, len(TIMES) + 1, D) and not x.requires_grad
    assert loss.item() == math.log(2) and logs["margin"] == 0 and logs["clipped"] == 0
    (grad,) = torch.autograd.grad(loss, [nets.student.denoiser.net.b])
    a, b = x[:, 0], x[:, 1]
    sign = (liked(a[:, -1], None) - liked(b[:, -1], None)).sign()[:, None]
    near(grad[-1], torch.zeros(D, dtype=F64))
    for i, (alpha, sigma) in enumerate(levels(SCHEDULES[schedule])[1:]):
        n, other = ((walk[:, i + 1] - alpha * (nets.teacher.net.b[i] + walk[:, i] / 2)) / sigma for walk in (a, b))
        near(grad[i], -50 / 2 * alpha * (sign * (n - other)).mean(0) / sigma / D / (len(TIMES) - 1))
    assert grad[:-1].abs().min() > 1e-3


@pytest.mark.level(1, "PSO")
@both
def test_ratios(schedule):
    """h is the mean over elements of the difference of the two normal densities' logarithms; clipped where it is."""
    path, moved = SCHEDULES[schedule], 0.02 * random(len(TIMES), D, seed=1)
    nets = nets_of(path, moved)
    x, loss, logs = turn(PSO(beta=3.0, eps=0.01), nets)
    own, base = (net.b.detach() for net in (nets.student.denoiser.net, nets.teacher.net))
    r = []
    for walk in x.unbind(1):
        for i, (alpha, sigma) in enumerate(levels(path)[1:]):
            means = [alpha * (b[i] + walk[:, i] / 2) for b in (own, base)]
            density = [torch.distributions.Normal(mean, sigma).log_prob(walk[:, i + 1]) for mean in means]
            r.append((density[0] - density[1]).mean(1).exp())
    r, steps = torch.stack(r).reshape(2, -1, N), len(TIMES) - 1
    assert 0 < (r / 1.01 > 1).sum() + (r < 0.99).sum() < r.numel()
    near(logs["clipped"], ((r > 1.01) | (r < 0.99)).float().mean())
    log_r = r.clamp(0.99, 1.01).log()
    better = (liked(x[:, 0, -1], None) > liked(x[:, 1, -1], None))[None]
    margin = torch.where(better, log_r[0] - log_r[1], log_r[1] - log_r[0])
    near(loss, -F.logsigmoid(3 * margin).sum() / (N * steps))


def test_swapped():
    """What one reward calls better the other calls worse: the gradient turns round, and is 0 if it does not care."""
    grads = {}
    for name, sign in (("up", 1.0), ("down", -1.0), ("neither", 0.0)):
        nets = nets_of(Flow(), reward=lambda x, c, sign=sign: sign * liked(x, c))
        (grads[name],) = torch.autograd.grad(turn(PSO(), nets)[1], [nets.student.denoiser.net.b])
    near(grads["down"], -grads["up"])
    assert grads["neither"].abs().max() == 0 < grads["up"].abs().max()


def test_clipped():
    """Outside 1 +- eps there is no gradient, and its share is told."""
    nets = nets_of(Flow(), moved=30.0)
    _, loss, logs = turn(PSO(eps=0.1), nets)
    (grad,) = torch.autograd.grad(loss, [nets.student.denoiser.net.b])
    assert logs["clipped"] == 1 and grad.abs().max() == 0


def test_noise_is_each_ones_own():
    """No two samples of a batch, and no two walks of a pair, share a number."""
    nets = nets_of(Flow())
    x, *_ = turn(PSO(), nets)
    for i, (alpha, sigma) in enumerate(((0.0, 0.9), *levels(Flow())[1:])):
        mean = alpha * (nets.teacher.net.b[i - 1] + x[:, :, i - 1] / 2).detach()
        eps = (x[:, :, i] - mean) / sigma
        assert eps.flatten().sort()[0].diff().min() > 1e-9 and 0.3 < eps.std() < 2


def test_the_walk_is_the_students(schedule=Flow()):
    """The first walk ends at the sample that `generate` makes of the same numbers, and rewards are read there."""
    seen = []
    nets = Nets(tiny(schedule), Student(tiny(schedule), TIMES), (D,), reward=lambda x, c: seen.append(x) or x[:, 0])
    x, *_ = turn(PSO(), nets)
    near(x[:, 0, -1], nets.generate({}, numbers()))
    assert torch.equal(torch.cat(seen), torch.cat([x[:, 0, -1], x[:, 1, -1]]))


@pytest.mark.level(2, "PSO")
def test_moves_to_what_is_preferred():
    """A Gaussian student, x = b + n: b goes along the reward until ratios are clipped, whatever the reward's size."""
    path = Flow()

    class Kept(nn.Module):
        """x0 = b at the first call; at the second, x / alpha: x_2 = alpha b + sigma n."""

        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(D, dtype=F64))

        def forward(self, x, native):
            return torch.where(native[:, None] > 700, self.b.expand_as(x), x / 0.5)

    far = {}
    for size in (1.0, 100.0):
        make = lambda: Denoiser(Kept(), path, "x0")
        nets = Nets(make(), Student(make(), (1.0, 0.5)), (D,), reward=lambda x, c, size=size: size * liked(x, c))
        cfg = TrainConfig(max_train_steps=30, train_batch_size=64, learning_rate=1e-2, ema_half_life=0)
        *_, state = train(PSO(), nets, lambda draw: {}, cfg, Accelerator(cpu=True), draw=Doubles)
        far[size] = nets.student.denoiser.net.b.detach()
        assert state.logs["student/clipped"] > 0
    near(far[1.0], far[100.0])
    assert far[1.0] @ LIKES > 0.1 and torch.cosine_similarity(far[1.0], LIKES, 0) > 0.95, far


# ---- offline ----


def images(draw):
    return {"real": draw.normal("images", (len(draw.samples), D)) + 0.5}


def errors(net, x, t, eps, path):
    """l of every sample, written out."""
    alpha, sigma = (a[:, None] for a in path.coefficients(t))
    x0 = net(alpha * x + sigma * eps, path.native(t))
    return ((x0 - x) ** 2 / (sigma / alpha) ** 2).mean(1)


def test_offline_at_pure_noise_is_refused():
    """A flow's only call is there, a VP path's has signal left; several calls have lower ones."""
    path = Flow()
    with pytest.raises(ValueError, match="at pure noise, where offline PSO learns nothing: .* --student.sigma"):
        build(OfflinePSO(), tiny(path), (D,))
    for student in (StudentConfig(steps=2), StudentConfig(sigma=2.5)):
        build(OfflinePSO(), tiny(path), (D,), student=student)
    build(OfflinePSO(), tiny(SCHEDULES["vp"]), (D,))


@pytest.mark.level(1, "OfflinePSO")
@pytest.mark.parametrize("loss, n", (("sigmoid", 1.0), ("sigmoid", 0.1), ("hinge", 1.0), ("hinge", 0.3)))
@both
def test_offline(schedule, loss, n):
    """Both losses and their gradients by hand; samples of the teacher, times of the student's own."""
    path, draw, batch = SCHEDULES[schedule], numbers(), images(numbers())
    nets = nets_of(path, 0.3 * random(len(TIMES), D, seed=2))
    method = OfflinePSO(beta=0.7, gamma=0.25, loss=loss, neg_defactor=n)
    x, got, logs = turn(method, nets, batch, draw)
    reference = replace(nets, student=Student(nets.teacher, TIMES)).generate({}, draw)
    assert torch.equal(x, torch.stack([batch["real"], reference], 1)) and not x.requires_grad
    t, eps = torch.tensor(TIMES, dtype=F64)[draw.integers("t", len(TIMES))], draw.normal("eps", (N, D))
    assert len(t.unique()) > 1
    own, base = nets.student.denoiser.net, nets.teacher.net
    (w, l), (rw, rl) = ([errors(net, y, t, eps, path) for y in x.unbind(1)] for net in (own, base))
    if loss == "hinge":
        want = ((1 + 0.7 * (w - n * l)).clamp(min=0) + 0.25 * l).mean()
    else:
        want = -torch.sigmoid(0.7 * ((rw - n * rl) - (w - n * l))).log().mean()
    near(got, want)
    near(*(torch.autograd.grad(a, [own.b])[0] for a in (got, want)))
    near(logs["gap"], (w - n * l).mean())


@both
def test_offline_begins_at_log_2(schedule):
    """A student that is its teacher; what has the data first has the reference first with the opposite gradient."""
    nets, draw = nets_of(SCHEDULES[schedule]), numbers()
    x, loss, _ = turn(OfflinePSO(loss="sigmoid"), nets, images(draw), draw)
    assert loss.item() == math.log(2)
    swapped = turn(OfflinePSO(loss="sigmoid"), nets, images(draw), draw, x.flip(1))[1]
    a, b = (torch.autograd.grad(value, [nets.student.denoiser.net.b])[0] for value in (loss, swapped))
    near(a, -b)
    assert a.abs().max() > 1e-6


@pytest.mark.level(2, "OfflinePSO")
@pytest.mark.parametrize("loss, left", (("sigmoid", 0.9), ("hinge", 0.45)))
def test_offline_moves_to_the_data(loss, left):
    """Samples of the tuned student are nearer to the images than its teacher's; a margin is soon reached."""
    nets = nets_of(Flow())
    nets.student = Student(nets.teacher.copy(), TIMES)
    cfg = TrainConfig(max_train_steps=60, train_batch_size=32, learning_rate=5e-2, ema_half_life=0)
    data = lambda draw: {"real": 1.5 + 0.1 * draw.normal("images", (len(draw.samples), D))}
    far = lambda: (nets.generate({}, numbers(1, 256)).mean(0) - 1.5).norm().item()
    before = far()
    for _ in train(OfflinePSO(loss=loss), nets, data, cfg, Accelerator(cpu=True), draw=Doubles):
        pass
    assert far() < left * before, (far(), before)


# ---- a finished student ----


@pytest.mark.parametrize("name", ("pso", "pso_offline"))
def test_a_finished_student_is_tuned(name, tmp_path):
    """From an exported student to an exported student of the same calls, and so on; only an exported one will do."""
    flags = "--max_train_steps 1 --train_batch_size 8 --validation_steps 0 --learning_rate 1e-2 --lr_warmup_steps 0"
    first = ["--smoke", "--student.steps", "2", "--method.fake_steps", "1"]
    make = lambda name, to, *more: run.main(
        TABLE[name].config, [*flags.split(), *more, "--output_dir", f"{tmp_path / to}"]
    )
    make("sid", "a", *first)
    for before, after in (("a", "b"), ("b", "c")):
        make(name, after, "--teacher", f"{tmp_path / before / 'pipeline'}")
    facts, scheduler = (
        [json.loads((tmp_path / to / "pipeline" / file).read_text()) for to in "abc"]
        for file in ("distill.json", "scheduler/scheduler_config.json")
    )
    assert all(one["times"] == pytest.approx(facts[0]["times"]) for one in facts) and facts[0]["steps"] == 2
    assert all(one["sigma_max"] == pytest.approx(2.5) for one in scheduler)
    nets = [load_teacher(f"{tmp_path / to / 'pipeline'}").denoiser.net for to in "abc"]
    assert all(any(not torch.equal(*p) for p in zip(a.parameters(), b.parameters())) for a, b in zip(nets, nets[1:]))


@pytest.mark.parametrize(
    "student", (StudentConfig(), StudentConfig(steps=2, renoise="ddim")), ids=("one call", "no noise")
)
def test_students_without_random_calls_are_refused(student):
    with pytest.raises(ValueError, match="two calls or more, with fresh noise"):
        build(PSO(), tiny(Flow()), (D,), student=student)
    build(OfflinePSO(), tiny(SCHEDULES["vp"]), (D,), student=student)
