"""SiDA: off it is SiD to the bit; on, its classifier is trained and read as the equations say. Networks in float64."""

import copy
import importlib
from dataclasses import asdict, fields, replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Gaussian, Oracle, Whitened, white
from tiny import tiny
from torch import nn
from torch.nn.functional import softplus

from distill.configuration import parse
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.method import Requirement
from distill.methods import SiD, SiDA
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

N, CLASSES = 8, 3
TAPS = ("mid",)  # [B, 16]: its mean over dimension 1 is the logit
ZERO, ANTI = (0.0, 0.0, 0.0, 1.0), (1.0, -1.0, -1.0, 1.0)
near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
kind_of = lambda schedule: "edm" if schedule == "edm" else "v"


def nets_of(schedule="edm", seeds=(0, 1, 2)):
    """Teacher, fake score and student that differ; the student takes one call."""
    make = lambda seed: tiny(SCHEDULES[schedule], kind_of(schedule), seed, classes=CLASSES)
    teacher, fake, student = map(make, seeds)
    return Nets(teacher, Student(student, (0.5,)), (2,), fake)


def turn(player="student", step=0):
    return Draw(0, step, player, torch.arange(N))


def batch_of():
    label = torch.arange(N) % CLASSES
    real = turn().normal("real", (N, 2)).double() + 1
    return {"c": {"label": label}, "real": real, "real_c": {"label": (label + 1) % CLASSES}}


def losses(method, nets, step=0):
    """{player: (loss, its gradient to the player's weights, logs)}; the fake's samples are those of its own turn."""
    found = {}
    for player, net in nets.modules().items():
        batch, draw = batch_of(), turn(player, step)
        with torch.set_grad_enabled(player == "student"):
            x = method.sample(nets, batch, draw)
        loss, logs = getattr(method, f"{player}_loss")(x, nets, batch, draw)
        found[player] = loss.detach(), torch.autograd.grad(loss, [*net.parameters()], allow_unused=True), logs
    return found


def same(a, b):
    """Of losses(): equal to the bit."""
    return all(
        torch.equal(a[p][0], b[p][0]) and all((g is h) or torch.equal(g, h) for g, h in zip(a[p][1], b[p][1]))
        for p in a
    )


class TestOff:
    @pytest.mark.parametrize("kappa", ((1.5,) * 4, ZERO), ids=("lsg", "zero"))
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_is_sid(self, schedule, kappa):
        """Without weights on its GAN, and for the student before `gan_start`; with them it is another."""
        base, nets = SiD(1.0, kappa), nets_of(schedule)
        off = SiDA(**asdict(base) | {"kappa": kappa, "times": base.times, "fake_times": base.fake_times}, taps=TAPS)
        want = losses(base, nets)
        assert same(losses(replace(off, gan=0, gan_fake=0), nets), want)
        on = losses(off, nets)
        assert not torch.equal(on["student"][0], want["student"][0])
        assert not torch.equal(on["fake"][0], want["fake"][0])
        late = replace(off, gan_start=3)
        assert torch.equal(losses(late, nets, 2)["student"][0], losses(base, nets, 2)["student"][0])
        assert not torch.equal(losses(late, nets, 3)["student"][0], losses(base, nets, 3)["student"][0])

    def test_fields_and_needs(self):
        """It is SiD with fields more; without its GAN it needs what SiD needs."""
        assert {f.name for f in fields(SiD)} < {f.name for f in fields(SiDA)}
        assert SiDA(gan=0, gan_fake=0).requirements == SiD().requirements == ()
        assert SiDA().requirements == (Requirement.REAL,)
        assert SiDA(kappa=ZERO).requirements == (Requirement.NULL_CONDITION, Requirement.REAL)
        assert SiDA(gan=0).roles == ("fake",)


class Judge(nn.Module):
    """The optimal denoiser of `law`, and beside it a linear "bottleneck" of x_t."""

    def __init__(self, law, schedule):
        super().__init__()
        self.score, self.bottleneck = Oracle(law.denoise, schedule, "x0"), nn.Linear(2, 4, dtype=F64)

    def forward(self, x, t):
        self.bottleneck(x)
        return self.score(x, t)


def judged(schedule, law, W):
    """A fake score whose logit is the mean of W x_t."""
    net = Judge(law, schedule)
    net.bottleneck.weight.data, net.bottleneck.bias.data = W.clone(), torch.zeros(4, dtype=F64)
    return Denoiser(net, schedule, "x0")


@pytest.mark.level(1, "SiDA")
class TestClassifier:
    """Samples N(b, 1), real images N(mu, 1), a linear logit: closed forms, on every schedule."""

    b, mu = torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([-0.2, 1.1], dtype=F64)
    law = Gaussian(b, torch.eye(2, dtype=F64))

    def turn(self, schedule, fusion, W, n=64, reduction="sum"):
        path = SCHEDULES[schedule]
        t = path.time(torch.tensor(0.8, dtype=F64))
        at = Fixed(float(t))
        method = SiDA(taps=("bottleneck",), fusion=fusion, gan_fake=3.0, fake_times=at, times=at, reduction=reduction)
        fake = judged(path, self.law, W)
        draw = Whitened(n, 2, ("x", "eps"))
        x, y = self.b + draw.normal("x", (n, 2)), self.mu + white(n, 2, seed=1)
        return method, Nets(fake, Student(fake), (2,), fake), draw, x, y, path.coefficients(t)

    @pytest.mark.parametrize("reduction", ("sum", "mean"))
    @pytest.mark.parametrize("fusion, weight", (("batch", 4 + 1 / 0.8**2), ("sample", 2.0)))
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_moves_towards_the_real_images(self, schedule, fusion, weight, reduction):
        """At l = 0 the gradient to W is lambda v (E x_t - E y_t) / (4 * its four rows), and none to the bias.

        v is 1 / sigma_d^2 + alpha^2 / sigma^2 under batch fusion; per sample it is the n = 2 elements of x, and in a
        mean over elements 1.
        """
        method, nets, draw, x, y, (alpha, _) = self.turn(schedule, fusion, torch.zeros(4, 2, dtype=F64), 64, reduction)
        loss, logs = method.fake_loss(x, nets, {"real": y}, draw)
        loss.backward()
        weight = weight if reduction == "sum" or fusion == "batch" else 1.0
        want = (3.0 * weight * alpha * (self.b - self.mu) / 16).expand(4, 2)
        near(nets.fake.net.bottleneck.weight.grad, want, 1e-10)
        near(nets.fake.net.bottleneck.bias.grad, torch.zeros(4, dtype=F64))
        near(logs["gan"].detach(), torch.tensor(2.0, dtype=F64).log())

    @pytest.mark.parametrize("fusion", ("batch", "sample"))
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_pushes_the_samples_up_the_logit(self, schedule, fusion):
        """d/dx_i = -mix lambda_g n w_i' sigmoid(-l_i) alpha mean(W) / B; batch fusion has all samples' mean weight."""
        W = torch.tensor([[1.0, -2.0], [0.5, 0.5], [3.0, 1.0], [-1.0, 0.0]], dtype=F64)
        method, nets, draw, x, _, (alpha, sigma) = self.turn(schedule, fusion, W, 16)
        x.requires_grad_()
        method = replace(method, gan=0.7, mix=0.3)
        loss, _ = method.student_loss(x, nets, {}, draw)
        base = SiD(method.alpha, times=method.times).student_loss(x, nets, {}, draw)[0]
        (grad,) = torch.autograd.grad(loss - 0.3 * base, x)
        x_t = alpha * x.detach() + sigma * draw.normal("eps", (16, 2))
        x0 = nets.teacher(x_t, method.times(draw, "t", 16, nets.teacher.path)).x0.detach()
        w = 1 / (x.detach() - x0).abs().mean(1)
        w = w.mean().expand(16) if fusion == "batch" else w
        up = torch.sigmoid(-(x_t @ W.T).mean(1)) * w
        near(grad, -0.3 * 0.7 * 2 * alpha / 16 * up[:, None] * W.mean(0), 1e-10)

    @pytest.mark.parametrize("fusion, clamped", (("batch", False), ("sample", True)))
    def test_far_logits(self, fusion, clamped):
        """Beyond `clamp` the student has no gradient; the classifier itself is cut off per sample only."""
        method, nets, draw, x, y, _ = self.turn("edm", fusion, torch.full((4, 2), 1e3, dtype=F64))
        method.fake_loss(x, nets, {"real": y}, draw)[0].backward()
        grad = nets.fake.net.bottleneck.weight.grad
        assert bool((grad == 0).all()) == clamped
        x.requires_grad_()
        gan = lambda **change: torch.autograd.grad(
            replace(method, **change).student_loss(x, nets, {}, draw)[0] / method.mix, x
        )[0]
        far = (nets.fake.path.diffuse(x, draw.normal("eps", x.shape), method.times(draw, "t", 64, EDM())).sum(1)).abs()
        assert bool(far.min() > 0.01)  # 500 x_t summed, so all are beyond 5
        near(gan(), torch.autograd.grad(SiD(1.0, times=method.times).student_loss(x, nets, {}, draw)[0], x)[0], 1e-9)


class TestGuidance:
    """Zero-CFG, Anti-CFG, and what the classifier is told."""

    def heard(self, nets):
        said = {"teacher": [], "fake": [], "student": []}
        for role, net in {"teacher": nets.teacher.net, **nets.modules()}.items():
            net.first.register_forward_hook(lambda m, a, o, role=role: said[role].append(len(o)))
            net.label.register_forward_hook(lambda m, a, o, role=role: said[role].append(a[0].tolist()))
        return said

    def test_zero_cfg(self):
        """The teacher is asked once, for the prompt; the fake score once, for none: B samples each, as without CFG."""
        nets = nets_of()
        said, batch = self.heard(nets), batch_of()
        method = SiD(1.0, ZERO, p_drop=0.0)
        label = batch["c"]["label"].tolist()
        for player in ("student", "fake"):
            for calls in said.values():
                calls.clear()
            draw = turn(player)
            getattr(method, f"{player}_loss")(method.sample(nets, batch, draw), nets, batch, draw)
            assert said["student"] == [N, label] and said["fake"] == [N, [CLASSES] * N]
            assert said["teacher"] == ([N, label] if player == "student" else [])

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_anti_cfg(self, schedule):
        """fake = 2 D(null) - D(c) in the student's loss; the fake score learns as it is under k1."""
        nets, batch, draw = nets_of(schedule), batch_of(), turn()
        method = SiD(1.0, ANTI, p_drop=0.0, normalise=False, gain=1.0, times=Fixed(0.4))
        x, c, path = batch["real"], batch["c"], nets.teacher.path
        t = torch.full((N,), 0.4, dtype=F64)
        x_t = path.diffuse(x, draw.normal("eps", (N, 2)).double(), t)
        null = {"label": torch.full((N,), CLASSES)}
        fake = 2 * nets.fake(x_t, t, null).x0 - nets.fake(x_t, t, c).x0
        real = nets.teacher(x_t, t, c).x0
        near(method.student_loss(x, nets, batch, draw)[0], ((real - fake) * (fake - x)).sum() / N, 1e-9)

    @pytest.mark.parametrize("kappa", (ZERO, (-1.0, -1.0, -1.0, 1.0), (4.5,) * 4), ids=("zero", "anti", "lsg"))
    def test_flags(self, kappa):
        """Each strategy is a flag of the recipes for text."""
        for name in ("sid_sd15", "sid_sdxl", "sida_sdxl"):
            config = importlib.import_module(f"recipes.{name}").CONFIG
            assert parse(config, ["--method.kappa", *map(str, kappa)]).method.kappa == kappa

    @pytest.mark.parametrize("w", (0.0, 1.0, -1.0, 4.5, torch.linspace(0, 3, N).double()))
    def test_features_are_of_the_condition_itself(self, w):
        nets, batch, t = nets_of(), batch_of(), torch.full((N,), 0.4, dtype=F64)
        x, c = batch["real"], batch["c"]
        pred, (found,) = CFG(nets.fake, w).predict_with_features(x, t, c, TAPS)
        near(found, nets.fake.features(x, t, c, TAPS)[0])
        near(pred.out, CFG(nets.fake, w)(x, t, c).out, 0)
        assert CFG(nets.fake, w).predict_with_features(x, t, c, ())[1] == []

    @pytest.mark.parametrize("kappa, calls", (((1.0,) * 4, 1), ((2.0,) * 4, 1), (ZERO, 2)))
    def test_one_pass_for_both(self, kappa, calls):
        """The student's GAN costs no pass of its own; where no pass is under c (Zero-CFG) one that ends at the tap."""
        nets = nets_of()
        said, batch, draw = self.heard(nets), batch_of(), turn()
        ends = []
        nets.fake.net.last.register_forward_hook(lambda *a: ends.append(1))
        SiDA(kappa=kappa, taps=TAPS).student_loss(batch["real"], nets, batch, draw)
        assert len(said["fake"]) == 2 * calls and len(ends) == 1

    @pytest.mark.parametrize("pairs", (True, False))
    def test_real_pairs(self, pairs):
        """Samples of the fake's turn have the scans' own labels; without `pairs` each side keeps its own."""
        nets, batch, draw = nets_of(), batch_of(), turn("fake")
        said, label, real = self.heard(nets), batch["c"]["label"].tolist(), batch["real_c"]["label"].tolist()
        method = SiDA(taps=TAPS, pairs=pairs)
        with torch.no_grad():
            x = method.sample(nets, batch, draw)
        method.fake_loss(x, nets, batch, draw)
        asked = real if pairs else label
        assert said["student"] == [N, asked] and said["fake"] == [N, asked, N, real]
        said["student"].clear()
        batch, draw = batch_of(), turn()
        method.sample(nets, batch, draw)
        assert said["student"] == [N, label]  # the student's turn has its own

    def test_dropped_pairs(self):
        """Under guidance a dropped label is dropped of the scan, too."""
        nets, batch, draw = nets_of(), batch_of(), turn("fake")
        method = SiDA(kappa=(1.5,) * 4, p_drop=0.5, taps=TAPS)
        real = batch["real_c"]["label"].clone()
        method.sample(nets, batch, draw)
        dropped = draw.uniform("drop", (N,)) < 0.5
        assert 0 < dropped.sum() < N
        want = torch.where(dropped, CLASSES, real)
        assert torch.equal(batch["c"]["label"], want) and torch.equal(batch["real_c"]["label"], want)


class Doubles(Draw):
    """Draws in float64."""

    def normal(self, name, shape):
        return super().normal(name, shape).double()


def labelled(draw):
    label = draw.integers("real", CLASSES)
    return {
        "c": {"label": draw.integers("label", CLASSES)},
        "real": draw.normal("scan", (len(label), 2)).double() + 0.5,
        "real_c": {"label": label},
    }


@pytest.mark.parametrize("schedule", ("edm", "flow"))
def test_whole_iterations(schedule):
    """Five iterations of two rounds through train(), beside the same from the equations with plain Adam.

    The student waits one step, its GAN two; the fake's gradient is clipped by its entries; a batch is one round's.
    """
    path, kind = SCHEDULES[schedule], kind_of(schedule)
    teacher = tiny(path, kind, 0, classes=CLASSES)
    method = SiDA(gan=0.5, gan_fake=2.0, taps=TAPS, start=1, gan_start=2)
    cfg = TrainConfig(max_train_steps=5, train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-2)
    cfg = replace(cfg, fake_max_grad_value=0.05, ema_half_life=20, ema_ramp=None, adam_epsilon=1e-8)
    nets = build(method, teacher, (2,), {"label": torch.tensor([0])}, StudentConfig(sigma=2.5))
    fake, student = (copy.deepcopy(teacher.net).requires_grad_(True) for _ in "fs")
    ema, clipped = copy.deepcopy(student), 0
    adams = {net: torch.optim.Adam(net.parameters(), 1e-2, (0.0, 0.999), 1e-8) for net in (fake, student)}

    def D(net, x, t, c):  # (x0, logit)
        pred, (h,) = Denoiser(net, path, kind).predict_with_features(x, t, c, TAPS)
        return pred, h.mean(1)

    def made(net, draw, c):
        first = path.time(torch.full((len(draw.samples),), 2.5).double())
        return D(net, path.coefficients(first)[1][:, None] * draw.normal("z", (4, 2)), first, c)[0].x0

    for step in range(5):
        for i in range(2):
            draw = Doubles(0, step, "fake", torch.arange(4 * i, 4 * i + 4))
            batch = labelled(draw)
            c, y = batch["real_c"], batch["real"]
            x = made(student, draw, c).detach()
            s, eps = (1.2 * draw.normal("t", (4,)).double() - 1.2).exp(), draw.normal("eps", (4, 2))
            t = path.time(s)
            pred, low = D(fake, path.diffuse(x, eps, t), t, c)
            high = D(fake, path.diffuse(y, eps, t), t, c)[1]
            bce = (softplus(low).mean() + softplus(-high).mean()) / 2
            loss = ((pred.out - pred.target(x, eps)) ** 2).sum() + 2.0 * ((1 / s**2 + 4) * bce).sum()
            (loss / 8).backward()
        clipped += sum(int((p.grad.abs() > 0.05).sum()) for p in fake.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_value_(fake.parameters(), 0.05)
        adams[fake].step(), adams[fake].zero_grad()
        for i in range(2 if step >= 1 else 0):
            draw = Doubles(0, step, "student", torch.arange(4 * i, 4 * i + 4))
            c = labelled(draw)["c"]
            x, t, eps = made(student, draw, c), method.times(draw, "t", 4, path), draw.normal("eps", (4, 2))
            x_t = path.diffuse(x, eps, t)
            real, (pred, logit) = teacher(x_t, t, c).x0, D(fake, x_t, t, c)
            w = 1 / (x - real).abs().mean(1, keepdim=True).clamp(min=1e-5).detach()
            sid = 100 * (w * (real - pred.x0) * (pred.x0 - x)).sum()
            gan = 0.5 * 2 * w.sum() * softplus(-logit.clamp(-10, 10)).mean()
            ((sid if step < 2 else 0.5 * (sid + gan)) / 8).backward()
        if step >= 1:
            fake.zero_grad()
            adams[student].step(), adams[student].zero_grad()
            for mean, p in zip(ema.parameters(), student.parameters()):
                mean.data.lerp_(p.data, 1 - 0.5 ** (8 / 20))
    *_, state = train(method, nets, labelled, cfg, Accelerator(cpu=True), draw=Doubles)
    assert clipped > 20
    for net, want in ((nets.fake.net, fake), (nets.student.denoiser.net, student), (state.ema.net, ema)):
        start = dict(teacher.net.named_parameters())
        for (name, p), q in zip(net.named_parameters(), want.parameters()):
            near(p - start[name], q - start[name], 1e-6)
        assert any(not torch.equal(p, start[name]) for name, p in net.named_parameters())


@pytest.mark.level(2, "SiDA")
def test_it_finds_what_the_teacher_lacks():
    """Real points 1.5 to the right of where teacher and student are: SiD stays, the GAN moves the student there."""
    torch.manual_seed(0)
    path = Flow()

    class Teacher(nn.Module):
        """E[x | x_t] of N(0, 1/4) with a learnable correction, so that a copy can follow the student."""

        def __init__(self):
            super().__init__()
            self.shift, self.mid = nn.Parameter(torch.zeros(2, dtype=F64)), nn.Linear(2, 8, dtype=F64)

        def forward(self, x, t):
            sigma = (t / 1000)[:, None]
            self.mid(x)
            gain = 0.25 * (1 - sigma) / ((1 - sigma) ** 2 * 0.25 + sigma**2)
            return self.shift + gain * (x - (1 - sigma) * self.shift)

    def mean(method):
        nets = build(method, Denoiser(Teacher(), path, "x0"), (2,))
        real = lambda draw: {"c": None, "real": 0.5 * draw.normal("r", (64, 2)) + torch.tensor([1.5, 0.0])}
        cfg = TrainConfig(max_train_steps=80, train_batch_size=64, learning_rate=0.02, fake_learning_rate=0.05)
        *_, state = train(method, nets, real, cfg, Accelerator(cpu=True))
        return state.nets.student.denoiser.net.shift.detach()

    torch.manual_seed(0)
    off = mean(SiD(1.0))
    torch.manual_seed(0)
    on = mean(SiDA(gan=30.0, taps=TAPS))
    assert abs(float(off[0])) < 0.3 < 0.8 < float(on[0])
