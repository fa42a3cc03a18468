"""RG-LCD's latent proxy: off the base exactly; its loss by hand; a perfect proxy gives RewardGuided."""

from itertools import combinations

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Whitened, exact, nets_of, problem
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.methods import DMD2, LADD, LCD, RGLCD, VSD, RewardGuided, SiD
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train

N, CLASSES = 8, 3
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
DECODER, GOAL = (
    torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.1]], dtype=F64),
    torch.tensor([2.0, -1.0, 0.5], dtype=F64),
)
BASES = {
    "sid": SiD(),
    "dmd2": DMD2(taps=("mid",), every=2),
    "ladd": LADD(taps=("mid",)),
    "lcd": LCD(N=4),
}


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def quality(x):
    """R of the decoded x: a quadratic form."""
    return -(x @ DECODER.T.to(x) - GOAL.to(x)).square().sum(1)


def closeness(x, c):
    """R, whose gradient nobody may ask for."""
    assert not torch.is_grad_enabled() and not x.requires_grad
    return quality(x)


def labelled(draw):
    label = draw.integers("real", CLASSES)
    c = {"c": {"label": draw.integers("label", CLASSES)}, "real_c": {"label": label}}
    return c | {"real": draw.normal("scan", (len(label), 2)).double() + 0.5}


def built(method):
    torch.manual_seed(0)
    nets = build(method, tiny(Flow(), "flow", 0, classes=CLASSES), (2,), {"label": torch.tensor([0])})
    for heads in filter(None, (nets.disc, nets.proxy)):
        heads.double()
    return nets


def after(method, steps=3, judge=closeness):
    """(networks, logs) after some steps of training tiny networks in float64."""
    nets = built(method)
    nets.reward = judge
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=N, learning_rate=1e-2, ema_half_life=0)
    *_, state = train(method, nets, labelled, cfg, Accelerator(cpu=True), draw=Doubles)
    return nets, state.logs


def same(a, b):
    return [
        role
        for role in a.modules()
        if all(torch.equal(p, q) for p, q in zip(*(n.modules()[role].parameters() for n in (a, b)), strict=True))
    ]


@pytest.mark.parametrize("name", BASES)
def test_off_is_the_base(name):
    """Three steps of training: with weight 0 all networks are the base's to the bit; with one the student is not."""
    base = BASES[name]
    want, _ = after(base)
    off = RGLCD(base, weight=0, proxy_taps=("mid",))
    assert same(want, after(off)[0]) == [*want.modules()]
    assert (off.requirements, off.roles) == (
        base.requirements,
        base.roles,
    )
    on = RGLCD(base, weight=1, tau=1.0, proxy_taps=("mid",))
    found, logs = after(on)
    assert "student" not in same(want, found) and {"fake/proxy", "fake/proxy_right"} <= logs.keys()
    assert "proxy" not in same(built(on), found)


class Seen(nn.Module):
    """x0 = x, and x itself is there to be tapped."""

    def __init__(self):
        super().__init__()
        self.tap, self.gain = nn.Identity(), nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, x, t, **c):
        return self.gain * self.tap(x)


class Quadratic(nn.Module):
    """x . Q x + b . x, as a head's logit."""

    def __init__(self, Q, b):
        super().__init__()
        self.Q, self.b = nn.Parameter(Q.clone()), nn.Parameter(b.clone())

    def forward(self, x):
        return ((x @ self.Q * x).sum(1) + x @ self.b)[:, None]


def perfect():
    """R but for a constant, which no preference tells."""
    return Quadratic(-DECODER.T @ DECODER, 2 * DECODER.T @ GOAL)


def proxied(**change):
    return RGLCD(**{"base": LCD(N=4), "proxy_taps": ("tap",), "proxy_times": Fixed(0.0), "tau": 1.0} | change)


def compared(proxy, batch, n=64, path=Flow()):
    """The proxy's turn on samples of a student that makes its noise, and what it was compared on."""
    nets = Nets(Denoiser(Seen(), path, "x0"), Student(Denoiser(Seen(), path, "x0"), scale=1.0), (2,))
    nets.proxy, nets.reward, draw = proxy, closeness, Doubles(0, 0, "fake", torch.arange(n))
    x = Doubles(1, 0, "x", torch.arange(n)).normal("x", (n, 2))
    loss, logs = proxied().proxy_loss(x, nets, batch, draw)
    return loss, logs, x, draw


@pytest.mark.level(1, "RGLCD")
@pytest.mark.parametrize("data", (False, True))
def test_loss_by_hand(data):
    """The sum over pairs of KL between two preferences, of sample, another, and the real image of that condition."""
    proxy = Quadratic(torch.eye(2, dtype=F64) / 4, torch.tensor([0.5, 0.1], dtype=F64))
    label, real = torch.zeros(64), torch.full((64, 2), 0.7, dtype=F64)
    own = {"c": {"label": label}, "real": real, "real_c": {"label": label if data else label + 1}}
    loss, logs, x, draw = compared(proxy, own)
    xs = [x, draw.independent_stream("proxy").normal("z", (64, 2)), *[real] * data]
    want, right = 0, []
    for a, b in combinations(xs, 2):
        p, q = (torch.stack([f(a), f(b)]).softmax(0) for f in (quality, lambda y: proxy(y)[:, 0]))
        want = want + (p * (p / q).log()).sum(0).mean()
        right.append(((p[0] > p[1]) == (q[0] > q[1])).double().mean())
    near(loss, want)
    near(logs["proxy_right"].double(), torch.stack(right).mean(), 1e-6)
    for part in (proxy.Q, proxy.b):
        near(*(torch.autograd.grad(one, part, retain_graph=True)[0] for one in (loss, want)))


@pytest.mark.level(1, "RGLCD")
@pytest.mark.parametrize("schedule", ("flow", "trig", "trig-half"))
def test_the_proxy_finds_the_preference(schedule):
    """A linear decoder and a quadratic reward: at R no loss and no gradient; from nothing it agrees in most pairs."""
    loss, logs, *_ = compared(perfect(), {}, path=SCHEDULES[schedule])
    near(loss.detach(), torch.zeros((), dtype=F64))
    assert logs["proxy_right"] == 1
    assert compared(Quadratic(*(-p for p in perfect().parameters())), {})[1]["proxy_right"] == 0
    proxy = Quadratic(torch.zeros(2, 2, dtype=F64), torch.zeros(2, dtype=F64))
    optimizer = torch.optim.LBFGS(proxy.parameters(), max_iter=40)

    def closure():
        optimizer.zero_grad()
        loss = compared(proxy, {}, path=SCHEDULES[schedule])[0]
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert float(closure().detach()) < 1e-3 * first
    near((proxy.Q + proxy.Q.T).detach() / 2, perfect().Q.detach(), 0.1)


@pytest.mark.level(1, "RGLCD")
@pytest.mark.parametrize("clamp", (None, 0.5))
@pytest.mark.parametrize("schedule", ("flow", "trig"))
def test_with_a_perfect_proxy_it_is_rewarded(schedule, clamp):
    """The student's gradient is that of the reward itself, though nobody differentiates the reward."""
    law, line = problem(2)
    path, draw, R = SCHEDULES[schedule], Whitened(16, 2, ("z", "eps", "proxy_eps")), perfect()
    base, grads = VSD(guidance=1.0, times=Fixed(0.4), reduction="sum"), []
    teacher = exact(law, path)
    teacher.net.tap = nn.Identity()
    teacher.net.register_forward_pre_hook(lambda net, args: (net.tap(args[0]), *args[1:]))
    ours = proxied(base=base, weight=0.3, clamp=clamp)
    for method, reward in ((RewardGuided(base, 0.3, clamp), lambda x, c: R(x)[:, 0]), (ours, closeness)):
        nets = nets_of(line, teacher, fake=exact(line.law, path), reward=reward)
        nets.proxy, batch = R, {}
        loss, logs = method.updates()[0].loss(method.sample(nets, batch, draw), nets, batch, draw)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (line.A, line.b)), logs["reward"].detach()))
    for ours, theirs in zip(*grads):
        near(ours, theirs)
    assert not batch["rewarded"]["x"].requires_grad


@pytest.mark.level(2, "RGLCD")
def test_a_proxy_and_its_student():
    """Through the trainer: of a reward without gradient the student's samples have more; the proxy is mostly right."""
    rounded = lambda x, c: (4 * closeness(x, c)).round() / 4
    mean, right = {}, 0
    for weight in (0.0, 3.0):
        nets, logs = after(RGLCD(BASES["lcd"], weight=weight, tau=1.0, proxy_taps=("mid",)), 50, rounded)
        draw = Doubles(1, 0, "student", torch.arange(256))
        with torch.no_grad():
            mean[weight] = closeness(nets.generate(labelled(draw), draw), None).mean()
        right = logs.get("fake/proxy_right", right)
    assert mean[3.0] > mean[0.0] + 0.5 and right > 0.7, (mean, right)


def test_taps_of_both():
    """Two roles of heads, each where its method's fields say; the discriminator starts as it does alone."""
    base = DMD2(taps=("first",))
    nets = built(RGLCD(base, proxy_taps=("mid", "first")))
    assert len(nets.proxy) == 2 and not isinstance(nets.disc, type(nets.proxy))
    assert all(torch.equal(*pair) for pair in zip(nets.disc.parameters(), built(base).disc.parameters(), strict=True))


def test_the_target_follows_the_student_alone():
    """Once a step, by mu: the proxy's turn does not move it."""
    method = RGLCD(LCD(N=4, target_ema=0.9), proxy_taps=("mid",))
    first, (nets, _) = built(method), after(method, 1)
    weights = [one.net.parameters() for one in (first.target, nets.student.denoiser, nets.target)]
    for old, new, average in zip(*weights, strict=True):
        assert not torch.equal(old, new)
        near(average, 0.9 * old + 0.1 * new)
