"""LADD: a hinge GAN in the frozen teacher's features at noise of their own; no fake score."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, RATIOS, SCHEDULES, Gaussian, Whitened, exact, gains, nets_of, problem, student_gradient, white
from safetensors.torch import load_file
from tiny import tiny
from torch import nn

from distill.diffusion.schedule import Flow
from distill.diffusion.times import Fixed
from distill.methods import DMD2, LADD
from distill.networks.discriminator import noised_features
from distill.random import Draw
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from distill.training.step import set_trainable

N = 64


def near(got, want, rtol=1e-10):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


class Known(Whitened):
    """Uniform draws of one half: every sample is the student's first call."""

    def uniform(self, name, shape):
        return torch.full(shape, 0.5, dtype=F64)


@pytest.mark.level(1, "LADD")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients(schedule):
    """The teacher's output as the feature, a linear head within its margins: all losses are linear.

    The feature of x is K (x + s eps) + k in units of the signal, so the student's offset b has gradient -K^T w, its
    map A none, and the head E[feature of x] - E[feature of y] = K (b - mean of y).
    """
    (law, line), path, data = (
        problem(3),
        SCHEDULES[schedule],
        Gaussian(torch.ones(3, dtype=F64), torch.eye(3, dtype=F64)),
    )
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        K = gains(law, line.A.detach(), float(path.ratio(t)))[2]
        nets = nets_of(line, exact(law, path, "x0"))
        nets.disc = nn.Linear(3, 1).double()
        nets.disc.weight.data *= 0.01
        method, batch = LADD(taps=("",), gan_times=Fixed(float(t))), {"real": white(N, 3, seed=2) + data.mean}
        draw = Known(N, 3, ("z", "gan_eps"))
        loss, dA, db = student_gradient(method, nets, draw, batch)
        w = nets.disc.weight.detach()[0]
        near(db, -K.T @ w)
        assert dA.norm() < 1e-12 * w.norm()
        draw = Known(N, 3, ("z", "gan_fake_eps", "gan_real_eps"), player="fake")
        x = method.sample(nets, batch, draw).detach()
        loss, logs = method.fake_loss(x, nets, batch, draw)
        (dw,) = torch.autograd.grad(loss, nets.disc.weight)
        near(dw[0], K @ (line.b.detach() - data.mean))
        near(2 - loss.detach(), logs["logit_gap"])


def test_softplus_losses():
    """... of the same logits; another loss is refused."""
    method = LADD(taps=("mid",), loss="softplus", gan_times=Fixed(0.5))
    nets, draw = nets_like(method), Draw(0, 0, "student", torch.arange(4))
    c = {"label": torch.zeros(4).long()}
    x, y = torch.randn(2, 4, 2)
    logits = lambda x, name: nets.disc(*noised_features(nets.teacher, ("mid",), Fixed(0.5), x, c, draw, name))
    student, _ = method.student_loss(x, nets, {"c": c}, draw)
    assert torch.equal(student, torch.log1p((-logits(x, "gan")).exp()).mean())
    heads, _ = method.fake_loss(x, nets, {"c": c, "real": y, "real_c": c}, draw)
    fake, real = logits(x, "gan_fake"), logits(y, "gan_real")
    torch.testing.assert_close(heads, torch.log1p(fake.exp()).mean() + torch.log1p((-real).exp()).mean())
    with pytest.raises(ValueError, match="loss is 'bce'; it must be 'hinge' or 'softplus'"):
        LADD(loss="bce")


def test_hinge_stops_beyond_the_margins():
    """Logits below -1 of samples and above 1 of real ones teach the heads nothing; each place is judged alone."""
    method, nets = LADD(taps=("mid",)), nets_like(LADD(taps=("mid",)))
    draw, c = Draw(0, 0, "fake", torch.arange(4)), {"label": torch.zeros(4).long()}
    batch = {"c": c, "real": torch.ones(4, 2), "real_c": c}

    class Sure(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(0.0))
            self.logits = logits

        def forward(self, features):
            half = len(features) // 2
            return self.bias + torch.cat([self.logits.expand(half, -1), -self.logits.expand(half, -1)])

    for logits, want in ((torch.tensor([-1.5, -3.0]), 0.0), (torch.tensor([-3.0, 1.0]), 2.0)):
        nets.disc = Sure(logits)  # of places that are told apart, and of one place that is not though their mean is
        loss, _ = method.fake_loss(torch.zeros(4, 2), nets, batch, draw)
        assert float(loss.detach()) == pytest.approx(want)


def data(draw):
    label = draw.integers("real", 3)
    real = torch.stack([label - 1.0, 0.3 * draw.normal("pixels", (len(label),))], dim=1)
    return {"c": {"label": draw.integers("label", 3)}, "real": real, "real_c": {"label": label}}


def nets_like(method, **student):
    torch.manual_seed(0)
    teacher = tiny(Flow(), "flow", dtype=torch.float32, classes=3)
    return build(method, teacher, (2,), {"label": torch.tensor([0])}, StudentConfig(**student))


def test_it_sees_what_dmd2s_classifier_sees():
    """With a fake score that is the teacher: the same logits bit for bit, and -1 of the student's slope in them."""
    base = DMD2(taps=("mid",), gan_times=Fixed(0.4))
    nets, draw, x = nets_like(base), Draw(0, 0, "student", torch.arange(6)), torch.randn(6, 2)
    c = {"label": torch.arange(6) % 3}
    features = noised_features(nets.teacher, ("mid",), Fixed(0.4), x, c, draw, "gan")
    assert torch.equal(nets.disc(*features), base.logits(x, c, nets, draw, "gan"))
    loss, _ = LADD(taps=("mid",), gan_times=Fixed(0.4)).student_loss(x, nets, {"c": c}, draw)
    assert torch.equal(loss, -base.logits(x, c, nets, draw, "gan").mean())
    for p in nets.disc.parameters():
        p.data.zero_()
    x.requires_grad_()
    loss, _ = LADD(taps=("mid",)).student_loss(x, nets, {"c": c}, draw)
    assert float(loss) == 0 and not torch.autograd.grad(loss, x)[0].any()  # switched off nothing pulls


class TestSamples:
    """One call of the student: at its first time from noise, at later ones from noised real samples."""

    def test_one_step_is_the_generator(self):
        method = LADD(taps=("mid",))
        nets, draw = nets_like(method, sigma=2.5), Draw(0, 0, "student", torch.arange(6))
        batch = data(draw)
        x = method.sample(nets, batch, draw)
        assert torch.equal(x, nets.generate({"c": batch["real_c"]}, draw))
        assert batch["c"] is batch["real_c"]

    def test_shares(self):
        method = LADD(taps=("mid",), shares=(0.7, 0.1, 0.1, 0.1))
        nets, draw = nets_like(method, steps=4), Draw(0, 0, "student", torch.arange(2000))
        batch, heard = data(draw), []
        nets.student.denoiser.net.register_forward_pre_hook(
            lambda net, args, kwargs: heard.append((args[0], args[1])), with_kwargs=True
        )
        method.sample(nets, batch, draw)
        ((x, native),) = heard
        z = draw.normal("z", (2000, 2))
        for i, (t, share) in enumerate(zip((1.0, 0.75, 0.5, 0.25), method.shares)):
            at = (native / 1000 - t).abs() < 1e-6
            assert float(at.float().mean()) == pytest.approx(share, abs=0.04)
            want = z if i == 0 else (1 - t) * batch["real"] + t * z
            torch.testing.assert_close(x[at], want[at])
        with pytest.raises(ValueError, match="shares are .* of 2 calls: give one for each, or none"):
            method.sample(nets_like(method, steps=2), data(draw), draw)


def run(method, nets, steps, resume=None):
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=8, learning_rate=1e-3)
    yield from train(method, nets, data, cfg, Accelerator(cpu=True), resume)


def test_who_moves(tmp_path):
    """Student and heads, never the teacher; resumed, it ends bit for bit where it ended."""
    method = LADD(taps=("first", "mid"), every=2)
    nets = nets_like(method, steps=2)
    assert nets.modules().keys() == {"student", "disc"}
    before = {role: [p.clone() for p in net.parameters()] for role, net in nets.modules().items()}
    frozen = [p.clone() for p in nets.teacher.net.parameters()]
    for state in run(method, nets, 4):
        if state.step == 1:
            folder = checkpoint.save(state, tmp_path)
        assert state.logs.keys() >= {"fake/loss", "fake/logit_gap"}
        assert ("student/loss" in state.logs) == (state.step % 2 == 1)
    for role, net in nets.modules().items():
        moved = [not torch.equal(a, b) for a, b in zip(before[role], net.parameters())]
        assert sum(moved) > len(moved) / 2, role  # within the margins a head's last bias has no gradient
    assert all(torch.equal(a, b) for a, b in zip(frozen, nets.teacher.net.parameters()))
    assert not [name for name in load_file(folder / "disc.safetensors") if not name.startswith(("0.", "1."))]
    *_, again = run(method, nets_like(method, steps=2), 4, folder)
    for role, net in nets.modules().items():
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.nets.modules()[role].parameters())), role


def test_where_gradients_flow():
    """The student's through the teacher, whose weights get none, as the heads; the heads' to the heads alone."""
    method = replace(LADD(), taps=("first", "mid"))
    nets = nets_like(method)
    players = {"student": [*nets.student.denoiser.net.parameters()], "fake": [*nets.disc.parameters()]}
    nets.teacher.net.requires_grad_(False)
    for player in players:
        set_trainable(players, player)
        draw = Draw(0, 0, player, torch.arange(8))
        batch = data(draw)
        x = method.sample(nets, batch, draw)
        getattr(method, f"{player}_loss")(x, nets, batch, draw)[0].backward()
        for name, params in players.items():
            moved = [p for p in params if p.grad is not None and p.grad.any()]
            assert bool(moved) == (name == player), (player, name)
            for p in params:
                p.grad = None


@pytest.mark.level(2, "LADD")
def test_the_student_comes_to_the_data():
    """From a teacher of another law: the gap of the means falls to a fifth in 300 steps."""
    method = LADD(taps=("first", "mid"), gan_times=Fixed(0.3))
    nets = nets_like(method, scale=1.0)
    z, c = torch.randn(512, 2), {"label": torch.arange(512) % 3}
    want = torch.stack([c["label"] - 1.0, torch.zeros(512)], 1)

    @torch.no_grad()
    def gap():
        x = nets.student.generate(z, c)
        return float(sum((x[c["label"] == i].mean(0) - want[c["label"] == i].mean(0)).norm() for i in range(3)))

    before = gap()
    cfg = TrainConfig(max_train_steps=300, train_batch_size=64, learning_rate=2e-3, fake_learning_rate=4e-3)
    for _ in train(method, nets, data, cfg, Accelerator(cpu=True)):
        pass
    assert gap() < before / 5, (before, gap())
