"""Where gradients flow in each method, and where they must not: networks of a few hundred weights, float64.

Every network's weights require gradients here, so that a leak is seen; set_trainable() of the trainer is used
where it matters.
"""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, exact, problem
from tiny import tiny

from distill.diffusion.denoiser import plain
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, Flow, Trig
from distill.diffusion.solver import STEPS
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.losses import gan_discriminator, gan_generator
from distill.method import Requirement
from distill.methods import DMD2, LCD, SCM, VSD, SiD, scm, sid
from distill.networks.discriminator import head
from distill.random import Draw
from distill.roles import Nets
from distill.training.step import set_trainable

N, CLASSES = 8, 3
NULL, REAL = Requirement.NULL_CONDITION, Requirement.REAL
near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)

PUSHED = {  # the scores say where to go and are not differentiated
    "dmd2": DMD2(guidance=1.5, gan=0, gan_fake=0),
    "vsd": VSD(guidance=2.0),
    "vsd-random": VSD(guidance=(0.5, 4.0), fake_guidance=1.0),
    "lcd": LCD(guidance=1.5),
    "lcd-heun": LCD(guidance=(2.0, 14.0), solver="heun", huber_c=None),
    "scm": SCM(guidance=1.5, warmup=0),
}
THROUGH = {  # gradients flow through both scores
    "sid": SiD(),
    "sid-unweighted": SiD(alpha=1.0, normalise=False),
    "sid-kappa": SiD(kappa=(1.0, 1.5, 2.0, 2.5)),
}
METHODS = PUSHED | THROUGH


class Plain(Draw):
    """Draws in float64 that remember their names."""

    def __init__(self, player="student", seed=0):
        super().__init__(seed, 0, player, torch.arange(N))
        self.names = []

    def normal(self, name, shape):
        self.names.append(name)
        return super().normal(name, shape).double()

    def uniform(self, name, shape):
        self.names.append(name)
        return super().uniform(name, shape)


def nets_of(method, schedule=EDM(), kind="edm", same=False):
    """Four different networks (or a fake that is the teacher's copy); the student takes one call."""
    make = lambda seed: tiny(schedule, kind, seed, classes=CLASSES)
    first = 1.0 if kind != "edm" else 0.5  # sigma 2.5
    nets = Nets(make(0), Student(make(2), (first,)), (2,))
    if "fake" in method.roles:
        nets.fake = make(0 if same else 1)
    if "target" in method.roles:
        nets.target = make(3)
    if "disc" in method.roles:
        torch.manual_seed(0)
        nets.disc = head(torch.zeros(1, 16)).double()
    return nets


def batch_of(draw):
    label = torch.arange(N) % CLASSES
    return {
        "c": {"label": label},
        "real": draw.normal("real", (N, 2)),
        "real_c": {"label": (label + 1) % CLASSES},
    }


def student_turn(method, nets, draw=None):
    """(loss, logs) with its graph."""
    draw = draw or Plain()
    batch = batch_of(draw)
    return method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)


def weights(nets, role="student"):
    return list((nets.teacher.net if role == "teacher" else nets.modules()[role]).parameters())


def gradients(loss, params):
    grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]


def size(tensors):
    return float(torch.cat([t.flatten() for t in tensors]).norm())


class Tape:
    """A network's outputs, recorded in one run and played back in the next as constants, whatever it is asked."""

    def __init__(self):
        self.outs, self.playing, self.graph = [], False, []  # graph: which outputs had one

    def __call__(self, net, x, t, c):
        if self.playing:
            return self.outs.pop(0)
        out = plain(net, x, t, c)
        self.outs.append(out.detach())
        self.graph.append(out.requires_grad)
        return out


def with_constant_scores(method, **change):
    """The student's gradient twice: as it is, and with all other networks replaced by what they said; and the tape."""
    nets, tape = nets_of(method, **change), Tape()
    others = [name for name in ("teacher", "fake", "target") if getattr(nets, name) is not None]
    for name in others:
        setattr(nets, name, replace(getattr(nets, name), call=tape))
    grads = []
    for tape.playing in (False, True):
        grads.append(gradients(student_turn(method, nets)[0], weights(nets)))
    assert not tape.outs
    return *grads, tape


def slope(f, params, direction, h=1e-5):
    """Central difference of f() along `direction`."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction):
                p += sign * h * d
            values.append(float(f()))
            for p, d in zip(params, direction):
                p -= sign * h * d
    return (values[0] - values[1]) / (2 * h)


def random_direction(params):
    return [torch.randn_like(p) for p in params]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PUSHED)
class TestPushed:
    def at(self, schedule):
        return dict(schedule=SCHEDULES[schedule], kind="edm" if schedule == "edm" else "v")

    def test_no_gradient_to_the_weights_of_others(self, name, schedule):
        method, nets = PUSHED[name], nets_of(PUSHED[name], **self.at(schedule))
        student_turn(method, nets)[0].backward()
        for role in {"teacher", *nets.modules()} - {"student"}:
            assert all(p.grad is None for p in weights(nets, role)), role
        assert size([p.grad for p in weights(nets)]) > 0

    def test_no_gradient_through_the_scores(self, name, schedule):
        """Not by the path of their inputs either: the same gradient if the scores are constants; no graph is kept."""
        as_is, constant, tape = with_constant_scores(PUSHED[name], **self.at(schedule))
        assert size(as_is) > 0 and all(torch.equal(a, b) for a, b in zip(as_is, constant))
        assert tape.graph and not any(tape.graph)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", THROUGH)
class TestThrough:
    def at(self, schedule):
        return dict(schedule=SCHEDULES[schedule], kind="edm" if schedule == "edm" else "v")

    def test_differs_with_constant_scores(self, name, schedule):
        as_is, constant, tape = with_constant_scores(THROUGH[name], **self.at(schedule))
        assert all(tape.graph) and size([a - b for a, b in zip(as_is, constant)]) > 0.05 * size(as_is)

    @pytest.mark.parametrize("role", ("teacher", "fake"))
    def test_reaches_both_scores(self, name, schedule, role):
        nets = nets_of(THROUGH[name], **self.at(schedule))
        assert size(gradients(student_turn(THROUGH[name], nets)[0], weights(nets, role))) > 0

    def test_is_the_derivative_of_the_loss(self, name, schedule, monkeypatch):
        """Finite differences of the whole loss, with the weight 1 / mean|x - real| held."""
        method, nets, held = THROUGH[name], nets_of(THROUGH[name], **self.at(schedule)), []
        params = weights(nets)
        right = sid.normaliser
        monkeypatch.setattr(sid, "normaliser", lambda x, real: held.append(right(x, real)) or held[0])
        got = gradients(student_turn(method, nets)[0], params)
        direction = random_direction(params)
        want = slope(lambda: student_turn(method, nets)[0], params, direction)
        assert float(sum((g * d).sum() for g, d in zip(got, direction))) == pytest.approx(want, rel=1e-6)


class TestTargets:
    """Consistency targets have no gradient either where the target is the student itself."""

    def test_lcd(self):
        """target_ema = 0 is a frozen copy of the student."""
        itself, copied = LCD(target_ema=0), LCD(target_ema=0.9)
        nets = nets_of(itself)
        frozen = replace(nets, target=nets.student.denoiser.copy())
        got, want = gradients(student_turn(itself, nets)[0], weights(nets)), student_turn(copied, frozen)[0]
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(want, weights(nets))))

    @pytest.mark.parametrize("normalise", (True, False))
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_scm(self, schedule, normalise, monkeypatch):
        """The derivative of |F - constant|^2, by finite differences with what jvp said held."""
        method = SCM(guidance=1.5, warmup=0, normalise=normalise, one_pass=False)
        nets = nets_of(method, SCHEDULES[schedule], "v")
        params, held, right = weights(nets), [], scm.jvp
        monkeypatch.setattr(scm, "jvp", lambda *a: held.append(right(*a)) or held[0])
        got = gradients(student_turn(method, nets)[0], params)
        direction = random_direction(params)
        want = slope(lambda: student_turn(method, nets)[0], params, direction)
        assert float(sum((g * d).sum() for g, d in zip(got, direction))) == pytest.approx(want, rel=1e-6)

    @pytest.mark.parametrize("norm, factor", (("rms", 1.0), ("vector", 2**0.5)))
    def test_scm_tangent_normalisation(self, norm, factor):
        """g / (|g| + c): the loss at the current weights is the mean square of what remains."""
        plain, normal = SCM(warmup=0, normalise=False, norm=norm), SCM(warmup=0, norm=norm, c=0.1)
        nets = nets_of(plain)
        one = Plain()
        one.samples = one.samples[:1]  # of one sample
        pick = lambda method: method.student_loss(torch.ones(1, 2, dtype=F64), nets, {"real_c": label}, one)
        label = {"label": torch.tensor([0])}
        (raw, logs), (loss, _) = pick(plain), pick(normal)
        assert float(logs["tangent"]) == pytest.approx(factor * float(raw.detach()) ** 0.5, rel=1e-12)
        want = float(raw.detach()) / (factor * float(raw.detach()) ** 0.5 + 0.1) ** 2
        assert float(loss.detach()) == pytest.approx(want, rel=1e-12)

    def test_scm_warm_up(self):
        """g = g0 + r g1 with r from 0 to 1 in `warmup` steps; g0 vanishes where the student is the teacher."""

        class Same(Draw):
            """The same numbers at every step."""

            def normal(self, name, shape):
                return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(len(name)))

        method = SCM(warmup=8, normalise=False)
        nets = nets_of(method)
        batch = batch_of(Plain())
        loss = lambda step: float(
            method.student_loss(batch["real"], nets, batch, Same(0, step, "student", torch.arange(N)))[0].detach()
        )
        start, half, end = loss(0), loss(4), loss(8)
        assert loss(9) == loss(10**6) == end != start
        quadratic = 2 * (start + end - 2 * half)
        assert loss(2) == pytest.approx(start + (end - start - quadratic) / 4 + quadratic / 16, rel=1e-10)
        nets.student = Student(nets.teacher.copy())
        assert loss(0) < 1e-20 < 1e-3 < loss(8)


class TestZero:
    """A score method has nothing to teach where fake = teacher, under equal guidance and without a GAN."""

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize(
        "method",
        (
            DMD2(gan=0, gan_fake=0),
            VSD(guidance=4.5),
            VSD(guidance=(0.5, 4.0)),
            SiD(),
            SiD(alpha=1.0, kappa=(1.5,) * 4),
        ),
        ids=("dmd2", "vsd", "vsd-random", "sid", "sid-lsg"),
    )
    def test_fake_is_teacher(self, method, schedule):
        nets = nets_of(method, SCHEDULES[schedule], "v", same=True)
        loss, logs = student_turn(method, nets)
        assert size(gradients(loss, weights(nets))) < 1e-9
        assert float(logs["score_gap"]) < 1e-20

    @pytest.mark.parametrize(
        "method",
        (DMD2(guidance=2.0, gan=0, gan_fake=0), VSD(guidance=4.5, fake_guidance=1.0), SiD(kappa=(1.0, 1.0, 1.0, 2.0))),
        ids=("dmd2", "vsd", "sid"),
    )
    def test_unequal_guidance(self, method):
        nets = nets_of(method, same=True)
        assert size(gradients(student_turn(method, nets)[0], weights(nets))) > 1e-3


class TestByHand:
    """The loss of one turn from its equations."""

    def test_dmd2(self):
        """g = (fake - real) / mean|x - real| per sample, over the number of elements."""
        method = PUSHED["dmd2"]
        nets, draw = nets_of(method), Plain()
        batch = batch_of(draw)
        x = method.sample(nets, batch, draw)
        t, eps = method.times(draw, "t", N, EDM()), draw.normal("eps", (N, 2))
        x_t = x.detach() + EDM().native(t)[:, None] * eps
        real, fake = CFG(nets.teacher, 1.5)(x_t, t, batch["c"]).x0, nets.fake(x_t, t, batch["c"]).x0
        g = (fake - real) / (x - real).abs().mean(1, keepdim=True)
        want = torch.autograd.grad(x, weights(nets), g.detach() / x.numel(), retain_graph=True)
        for a, b in zip(gradients(student_turn(method, nets)[0], weights(nets)), want):
            near(a, b)

    @pytest.mark.parametrize("guidance", (2.0, (0.5, 4.0)), ids=("fixed", "random"))
    @pytest.mark.parametrize("reduction", ("mean", "sum"))
    def test_vsd(self, reduction, guidance):
        """sigma^2 (eps_real - eps_fake) under one guidance of every sample, times what the reduction says."""
        method = VSD(guidance=guidance, reduction=reduction)
        path = SCHEDULES["vp"]
        nets, draw = nets_of(method, path, "v"), Plain()
        batch = batch_of(draw)
        x = method.sample(nets, batch, draw)
        t, eps = method.times(draw, "t", N, path), draw.normal("eps", (N, 2))
        x_t = path.diffuse(x.detach(), eps, t)
        k = 2.0 if guidance == 2.0 else 0.5 + 3.5 * draw.uniform("guidance", (N,))
        gap = CFG(nets.teacher, k)(x_t, t, batch["c"]).eps - CFG(nets.fake, k)(x_t, t, batch["c"]).eps
        g = path.coefficients(t)[1][:, None] ** 2 * gap / (x.numel() if reduction == "mean" else N)
        want = torch.autograd.grad(x, weights(nets), g.detach(), retain_graph=True)
        for a, b in zip(gradients(student_turn(method, nets)[0], weights(nets)), want):
            near(a, b)

    @pytest.mark.parametrize("normalise", (True, False))
    def test_sid(self, normalise):
        """gain w delta . ((fake^k3 - x) + (1 - alpha) delta), delta = real^k4 - fake^k2; sum of elements / batch."""
        method = SiD(alpha=1.2, kappa=(1.0, 1.5, 2.0, 2.5), gain=10.0, normalise=normalise)
        nets, draw = nets_of(method), Plain()
        batch = batch_of(draw)
        x = method.sample(nets, batch, draw)
        t, eps = method.times(draw, "t", N, EDM()), draw.normal("eps", (N, 2))
        say = lambda who, k: CFG(who, k)(EDM().diffuse(x, eps, t), t, batch["c"]).x0
        fake2, fake3, real = say(nets.fake, 1.5), say(nets.fake, 2.0), say(nets.teacher, 2.5)
        w = 1 / (x - real).abs().mean(1, keepdim=True) if normalise else 1.0
        delta = real - fake2
        near(student_turn(method, nets)[0], 10 * (w * delta * ((fake3 - x) - 0.2 * delta)).sum() / N)

    def test_sid_weighted_by_alpha(self):
        """SiD-DiT's weight is 1 - sigma on a flow: at one time for all, a factor of the unweighted loss."""
        plain = SiD(times=Fixed(0.3), normalise=False)
        nets = nets_of(plain, Flow(), "flow")
        loss = student_turn(plain, nets)[0]
        near(student_turn(replace(plain, normalise=True, weight="alpha"), nets)[0], 0.7 * loss)

    @pytest.mark.parametrize("solver", ("ddim", "heun"))
    def test_lcd(self, solver):
        """d( f(x_t, t), f_target(x_s, s) ), x_s one step of the guided teacher on; the target is another network."""
        method = LCD(N=4, guidance=1.5, solver=solver)
        nets, draw = nets_of(method), Plain()
        batch = batch_of(draw)
        x, c, eps = batch["real"], batch["real_c"], draw.normal("eps", (N, 2))
        t = ((draw.uniform("t", (N,)).double() * 4).floor() + 1) / 4
        assert len(t.unique()) > 2
        x_t, s = EDM().diffuse(x, eps, t), t - 0.25
        x_s = STEPS[solver](CFG(nets.teacher, 1.5), x_t, t, s, c)
        target = torch.where((s > 0)[:, None], nets.target(x_s, s, c).x0, x_s)
        delta = nets.student.denoiser(x_t, t, c).x0 - target
        near(student_turn(method, nets)[0], ((delta**2 + 1e-6).sqrt() - 1e-3).mean(), 1e-10)

    def test_lcd_boundary_and_guidance_told(self):
        """Student and target are told the teacher's guidance; at s = 0 the target is x_0 itself."""
        method = LCD(N=1, guidance=(2.0, 14.0), target_ema=0.9, huber_c=None)
        nets, draw, heard = nets_of(method), Plain(), {}
        for role, denoiser in (("student", nets.student.denoiser), ("target", nets.target), ("teacher", nets.teacher)):
            denoiser.net.register_forward_hook(
                lambda m, args, kwargs, out, role=role: heard.update({role: kwargs}), with_kwargs=True
            )
        loss, _ = student_turn(method, nets, draw)
        w = 2 + 12 * draw.uniform("guidance", (N,))
        near(heard["student"]["guidance"], w, 0)
        assert "guidance" not in heard["teacher"]
        one, zero, batch = torch.ones(N, dtype=F64), torch.zeros(N, dtype=F64), batch_of(Plain())
        x_t = EDM().diffuse(batch["real"], draw.normal("eps", (N, 2)), one)
        pred = CFG(nets.teacher, w)(x_t, one, batch["real_c"])
        x_0 = EDM().diffuse(pred.x0, pred.eps, zero)  # N = 1: one DDIM step from t = 1 to 0
        f = nets.student.denoiser(x_t, one, batch["real_c"] | {"guidance": w}).x0
        near(loss, ((f - x_0) ** 2).mean(), 1e-9)

    @pytest.mark.parametrize("normalise", (True, False))
    def test_scm(self, normalise):
        """F is moved by g = cos(t) df/dt, f differentiated numerically along the exact trajectories of a Gaussian."""
        path, method = Trig(0.5), SCM(warmup=0, normalise=normalise)
        law, student = problem(2)[0], tiny(path, "v", seed=2)
        nets, draw = Nets(exact(law, path), Student(student), (2,)), Plain()
        x = draw.normal("real", (N, 2))
        t, eps = method.times(draw, "t", N, path), draw.normal("eps", (N, 2))
        x_t, theta = path.diffuse(x, eps, t), path.native(t)[:, None]
        level = lambda angle: (angle.cos(), 0.5 * angle.sin())

        def f(angle):
            there = law.carry(x_t, level(theta), level(angle))
            return student(there, angle[:, 0] * 2 / math.pi).x0

        g = theta.cos() * (f(theta + 1e-5) - f(theta - 1e-5)).detach() / 2e-5
        g = g / ((g**2).mean(1, keepdim=True).sqrt() + 0.1) if normalise else g
        pred = student(x_t, t)
        F = theta.cos() * pred.eps - theta.sin() / 0.5 * pred.x0
        want = torch.autograd.grad(F, weights(nets), -2 * g / g.numel())
        got = gradients(method.student_loss(x, nets, {}, Plain())[0], weights(nets))
        for a, b in zip(got, want):
            near(a, b, 1e-7)

    @pytest.mark.parametrize("w", (1.5, (2.0, 14.0)))
    def test_scm_guidance(self, w):
        """A guided teacher is a teacher; random guidance is told to the student in every call, never to the teacher."""
        method, heard = SCM(guidance=w, warmup=0), {"teacher": [], "student": []}
        nets, draw = nets_of(method), Plain()
        scale = w if isinstance(w, float) else 2 + 12 * draw.uniform("guidance", (N,))
        for role, denoiser in (("teacher", nets.teacher), ("student", nets.student.denoiser)):
            denoiser.net.register_forward_hook(
                lambda m, args, kwargs, out, role=role: heard[role].append(kwargs.get("guidance")), with_kwargs=True
            )
        guided = lambda net, x, t, c: CFG(nets.teacher, scale)(x, EDM().time(t), c).out
        told = (lambda c: c) if isinstance(w, float) else (lambda c: c | {"guidance": scale})
        batch = batch_of(draw)
        got = method.student_loss(batch["real"], nets, batch, draw)[0]
        assert heard["teacher"] == [None] and len(heard["student"]) == 1
        assert all(k is None if isinstance(w, float) else torch.equal(k, scale) for k in heard["student"])
        plainly = replace(nets, teacher=replace(nets.teacher, call=guided))
        plainly.student = Student(replace(nets.student.denoiser, call=lambda net, x, t, c: net(x, t, **told(c))))
        near(got, SCM(warmup=0).student_loss(batch["real"], plainly, batch, draw)[0], 1e-9)

    @pytest.mark.parametrize("once, recomputed, passes", ((True, False, 1), (False, False, 2), (True, True, 2)))
    def test_scm_passes(self, once, recomputed, passes):
        """One pass of the student for value and derivative; two if asked for, or if its blocks are recomputed."""
        method, calls = SCM(warmup=0, one_pass=once), []
        nets = nets_of(method)
        net = nets.student.denoiser.net
        net.is_gradient_checkpointing = recomputed
        net.register_forward_hook(lambda *a: calls.append(1))
        student_turn(method, nets)
        assert len(calls) == passes

    def test_sid_fake(self):
        """The fake is trained as it is asked, guided by k1."""
        method, draw = SiD(kappa=(2.0, 1.0, 1.0, 1.0)), Plain("fake")
        nets, x = nets_of(method), draw.normal("x", (N, 2))
        c, t, eps = batch_of(draw)["c"], method.fake_times(draw, "t", N, EDM()), draw.normal("eps", (N, 2))
        pred = CFG(nets.fake, 2.0)(EDM().diffuse(x, eps, t), t, c)
        want = ((pred.out - pred.target(x, eps)) ** 2).sum() / N
        near(method.fake_loss(x, nets, {"c": c}, draw)[0], want)

    def test_lcd_target_follows(self):
        method = LCD(target_ema=0.9)
        nets = nets_of(method)
        before = [p.detach().clone() for p in weights(nets, "target")]
        method.after_student_step(nets)
        for old, student, new in zip(before, weights(nets), weights(nets, "target")):
            near(new, 0.9 * old + 0.1 * student)


class TestGan:
    """DMD2's classifier reads features of the fake score at its own noise."""

    def setup_method(self):
        self.method = DMD2(gan=0.3, gan_fake=0.7, taps=("mid",))
        self.nets = nets_of(self.method)
        self.players = {
            "student": weights(self.nets),
            "fake": [*weights(self.nets, "fake"), *weights(self.nets, "disc")],
        }
        for p in weights(self.nets, "teacher"):
            p.requires_grad_(False)

    def without(self):
        """The same turn without the GAN."""
        return replace(self.method, gan=0.0, gan_fake=0.0)

    def fake_turn(self, method):
        draw = Plain("fake")
        batch = batch_of(draw)
        with torch.no_grad():
            x = method.sample(self.nets, batch, draw)
        return method.fake_loss(x, self.nets, batch, draw)

    def test_students_turn(self):
        """It reaches the student through the encoder and the head, whose own weights get nothing."""
        set_trainable(self.players, "student")
        student_turn(self.method, self.nets)[0].backward()
        assert all(p.grad is None for p in (*self.players["fake"], *weights(self.nets, "teacher")))
        whole = [p.grad for p in self.players["student"]]
        rest = gradients(student_turn(self.without(), self.nets)[0], self.players["student"])
        gan = [a - b for a, b in zip(whole, rest)]
        assert size(gan) > 0
        direction = random_direction(gan)
        want = 0.3 * slope(lambda: student_turn(self.method, self.nets)[1]["gan"], self.players["student"], direction)
        assert float(sum((g * d).sum() for g, d in zip(gan, direction))) == pytest.approx(want, rel=1e-6)

    def test_fakes_turn(self):
        """It trains the head and the encoder up to the tapped layer, and nobody else."""
        set_trainable(self.players, "fake")
        loss, logs = self.fake_turn(self.method)
        loss.backward()
        assert all(p.grad is None for p in (*self.players["student"], *weights(self.nets, "teacher")))
        whole = dict(self.nets.fake.net.named_parameters())
        whole = {name: p.grad.clone() for name, p in whole.items()}
        rest = gradients(self.fake_turn(self.without())[0], weights(self.nets, "fake"))
        gan = {name: size([whole[name] - g]) for (name, _), g in zip(self.nets.fake.net.named_parameters(), rest)}
        assert all(gan[name] > 1e-6 for name in ("first.weight", "first.bias", "label.weight", "mid.weight"))
        assert gan["last.weight"] < 1e-12 and gan["last.bias"] < 1e-12
        assert size([p.grad for p in weights(self.nets, "disc")]) > 0
        plain = self.fake_turn(self.without())[0]
        near(loss.detach(), (plain + 0.7 * logs["gan"]).detach())

    def test_values(self):
        """Generator: softplus(-l(x)); classifier: both terms, with the real images' own condition and noise."""
        draw = Plain()
        batch, nets = batch_of(draw), self.nets
        x = self.method.sample(nets, batch, draw)

        def logits(x, c, draw, name):
            u, eps = self.method.gan_times(draw, f"{name}_t", N, EDM()), draw.normal(f"{name}_eps", (N, 2))
            return nets.disc(nets.fake.features(EDM().diffuse(x, eps, u), u, c, ("mid",))[0])

        _, logs = self.method.student_loss(x, nets, batch, draw)
        near(logs["gan"], gan_generator(logits(x, batch["c"], draw, "gan")))
        draw = Plain("fake")
        _, logs = self.method.fake_loss(x.detach(), nets, batch, draw)
        fake = logits(x.detach(), batch["c"], draw, "gan_fake")
        real = logits(batch["real"], batch["real_c"], draw, "gan_real")
        near(logs["gan"], gan_discriminator(fake, real))

    def test_own_random_numbers(self):
        draw = Plain()
        student_turn(self.method, self.nets, draw)
        assert sorted(draw.names) == ["eps", "gan_eps", "gan_t", "real", "t", "z"]


class TestWhen:
    """Each loss looks at its own law of times; the student's calls follow one choice of the step."""

    @pytest.mark.parametrize(
        "method",
        (DMD2(taps=("mid",), gan_times=Fixed(0.7)), VSD(guidance=1.0), SiD()),
        ids=("dmd2", "vsd", "sid"),
    )
    def test_times(self, method):
        method = replace(method, times=Fixed(0.3), fake_times=Fixed(0.6))
        nets, told = nets_of(method), {"teacher": [], "fake": []}
        for role, denoiser in (("teacher", nets.teacher), ("fake", nets.fake)):
            denoiser.net.first.register_forward_hook(lambda m, args, out, role=role: told[role].append(args[0][:, 2]))
        heard = lambda role: [float(t.unique()) for t in told[role]]  # inside, the network has log(1 + sigma) / 4
        says = lambda *times: pytest.approx((EDM().native(torch.tensor(times, dtype=F64)).log1p() / 4).tolist())
        gan = (0.7,) if isinstance(method, DMD2) else ()
        student_turn(method, nets)
        assert heard("teacher") == says(0.3) and heard("fake") == says(0.3, *gan)
        told["fake"].clear()
        draw = Plain("fake")
        batch = batch_of(draw)
        method.fake_loss(method.sample(nets, batch, draw).detach(), nets, batch, draw)
        assert heard("teacher") == says(0.3) and heard("fake") == says(0.6, *gan)

    @pytest.mark.parametrize("name", ("dmd2", "vsd", "sid"))
    def test_calls(self, name):
        """One to all of the calls, equally often, as the step alone decides: for both players."""
        method, counts = METHODS[name], {"student": [], "fake": []}
        nets = nets_of(method)
        nets.student = Student(nets.student.denoiser, (0.9, 0.6, 0.3))
        calls = []
        nets.student.denoiser.net.register_forward_hook(lambda *a: calls.append(1))
        for player, seen in counts.items():
            for step in range(60):
                draw = Draw(0, step, player, torch.arange(2))
                calls.clear()
                method.sample(nets, {"c": {"label": torch.tensor([0, 1])}}, draw)
                seen.append(len(calls))
        assert counts["student"] == counts["fake"]
        assert min(counts["fake"].count(k) for k in (1, 2, 3)) > 10


class TestFakeTurn:
    @pytest.mark.parametrize("reduction", ("mean", "sum"))
    @pytest.mark.parametrize(
        "method, k",
        ((DMD2(2.0, gan=0, gan_fake=0), 1), (VSD(2.0, p_drop=0), 1), (SiD(kappa=(1.5, 2, 2.5, 3), p_drop=0), 1.5)),
        ids=("dmd2", "vsd", "sid"),
    )
    def test_by_hand(self, method, k, reduction):
        """| D^k(x_t) - x |^2 / c_out^2 in EDM's space; DMD2's and VSD's fake scores learn without guidance."""
        method, draw = replace(method, reduction=reduction), Plain("fake")
        nets, batch = nets_of(method), batch_of(draw)
        x = method.sample(nets, batch, draw).detach()
        t, eps = method.fake_times(draw, "t", N, EDM()), draw.normal("eps", (N, 2))
        sigma = EDM().native(t)[:, None]
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        elements = weight * (CFG(nets.fake, k)(x + sigma * eps, t, batch["c"]).x0 - x) ** 2
        want = elements.mean() if reduction == "mean" else elements.sum() / N
        near(method.fake_loss(x, nets, batch, draw)[0], want, 1e-9)

    @pytest.mark.parametrize("name", ("dmd2", "vsd", "sid-kappa"))
    def test_only_the_fake_is_reached(self, name):
        method, draw = METHODS[name], Plain("fake")
        nets = nets_of(method)
        batch = batch_of(draw)
        with torch.no_grad():
            x = method.sample(nets, batch, draw)
        method.fake_loss(x, nets, batch, draw)[0].backward()
        assert all(p.grad is None for p in (*weights(nets), *weights(nets, "teacher")))
        assert size([p.grad for p in weights(nets, "fake")]) > 0

    @pytest.mark.parametrize("method", (VSD(p_drop=0.5), SiD(kappa=(1.5,) * 4, p_drop=0.5)), ids=("vsd", "sid"))
    def test_conditions_are_dropped_where_the_fake_is_guided(self, method):
        """SiD-LSG's samples are also made without them."""
        nets, draw, heard = nets_of(method), Plain("fake"), {}
        for role, denoiser in (("student", nets.student.denoiser), ("fake", nets.fake)):
            denoiser.net.register_forward_hook(
                lambda m, args, kwargs, out, role=role: heard.update({role: kwargs["label"][:N].tolist()}),
                with_kwargs=True,
            )
        batch = batch_of(draw)
        given = batch["c"]["label"]
        method.fake_loss(method.sample(nets, batch, draw).detach(), nets, batch, draw)
        dropped = draw.uniform("drop", (N,)) < 0.5
        assert 0 < dropped.sum() < N
        assert heard["fake"] == torch.where(dropped, CLASSES, given).tolist()
        assert heard["student"] == (heard["fake"] if isinstance(method, SiD) else given.tolist())

    def test_not_in_the_students_turn(self):
        for method in (SiD(kappa=(1.5,) * 4, p_drop=1.0), VSD(p_drop=1.0)):
            draw = Plain()
            student_turn(method, nets_of(method), draw)
            assert "drop" not in draw.names

    def test_and_only_there(self):
        guided = SiD(kappa=(1.0, 1.0, 1.0, 4.5), p_drop=1.0)  # its teacher, not its fake score
        for method in (SiD(p_drop=1.0), guided, VSD(guidance=1.0, p_drop=1.0), DMD2(3.0, gan=0, gan_fake=0)):
            draw = Plain("fake")
            batch = batch_of(draw)
            nets = nets_of(method)
            method.fake_loss(method.sample(nets, batch, draw).detach(), nets, batch, draw)
            assert "drop" not in draw.names


class TestDeclarations:
    """What a method says of itself: networks beside the student, requirements, turns, times, and its logs."""

    REQUIREMENTS = (
        (SiD(), ("fake",), ()),
        (SiD(kappa=(1.0, 1.0, 1.0, 4.5)), ("fake",), (NULL,)),
        (VSD(guidance=1.0), ("fake",), ()),
        (VSD(guidance=1.0, fake_guidance=1.0), ("fake",), ()),
        (VSD(guidance=1.0, fake_guidance=0.5), ("fake",), (NULL,)),
        (VSD(guidance=2.0, fake_guidance=1.0), ("fake",), (NULL,)),
        (DMD2(), ("fake", "disc"), (REAL,)),
        (DMD2(gan=0.0), ("fake", "disc"), (REAL,)),
        (DMD2(gan_fake=0.0), ("fake", "disc"), (REAL,)),
        (DMD2(2.0, gan=0.0, gan_fake=0.0), ("fake",), (NULL,)),
        (DMD2(2.0), ("fake", "disc"), (NULL, REAL)),
        (LCD(), ("target",), (REAL,)),
        (LCD(target_ema=0, guidance=2.0), (), (REAL, NULL)),
        (SCM(), (), (REAL,)),
        (SCM(adaptive=True, guidance=2.0), ("weight",), (REAL, NULL)),
    )

    @pytest.mark.parametrize("method, roles, requirements", REQUIREMENTS)
    def test_roles_and_requirements(self, method, roles, requirements):
        assert (method.roles, method.requirements) == (roles, requirements)

    def test_turns(self):
        """Who moves, every how many steps, whether on the samples of the one before, whether along one generation."""
        turns = lambda method: [(u.player, u.every, u.reuse, u.walk) for u in method.updates()]
        assert turns(SiD(fake_steps=3)) == [("fake", 1, False, False), ("student", 3, False, False)]
        assert turns(VSD(fake_steps=3)) == [("student", 3, False, False), ("fake", 1, True, False)]
        assert turns(DMD2(every=7)) == [("student", 7, False, False), ("fake", 1, True, False)]
        assert turns(DMD2(every=7, walk=True))[1] == ("fake", 1, True, True)
        assert turns(LCD()) == turns(SCM()) == [("student", 1, False, False)]

    def test_times_of_lcd(self):
        """On a table its calls are on the grid, as many as it has at most; elsewhere they are the scheduler's."""
        table, method = SCHEDULES["vp"], LCD(N=5)
        assert method.call_times(5, 1.0, table) == pytest.approx([(200 * i - 1) / 999 for i in (5, 4, 3, 2, 1)])
        assert (
            method.call_times(6, 1.0, table)
            is method.call_times(2, 0.9, table)
            is method.call_times(2, 1.0, Flow())
            is None
        )

    @pytest.mark.parametrize("name", METHODS)
    def test_logs_have_no_graph(self, name):
        """What no loss uses must not keep activations."""
        _, logs = student_turn(METHODS[name], nets_of(METHODS[name]))
        assert logs and not [key for key, value in logs.items() if value.requires_grad]

    def test_weights_have_names(self):
        with pytest.raises(ValueError, match="fake_weight is 'sigma'; it must be 'one', or 'alpha'"):
            VSD(fake_weight="sigma")

    @pytest.mark.parametrize(
        "method, real_k, fake_k, lag",
        (
            (DMD2(1.5, gan=0, gan_fake=0), 1.5, 1.0, True),
            (SiD(kappa=(2.0, 2.0, 3.0, 1.5)), 1.5, 2.0, True),
            (SiD(kappa=(1.0, 2.0, 1.0, 1.5)), 1.5, 2.0, False),  # the fake is not asked as it is trained
            (VSD(guidance=2.0), 2.0, 2.0, False),
            (VSD(guidance=2.0, fake_guidance=1.0), 2.0, 1.0, True),
            (VSD(guidance=(0.5, 4.0)), None, None, False),
        ),
    )
    def test_signs_of_health(self, method, real_k, fake_k, lag):
        """score_gap = mean (real - fake)^2, lag = mean (sample - fake) (real - fake); of eps in VSD."""
        nets, draw = nets_of(method), Plain()
        batch = batch_of(draw)
        x = method.sample(nets, batch, draw)
        _, logs = method.student_loss(x, nets, batch, draw)
        assert ("lag" in logs) == lag
        if real_k is None:
            real_k = fake_k = 0.5 + 3.5 * draw.uniform("guidance", (N,))
        t, eps = method.times(draw, "t", N, EDM()), draw.normal("eps", (N, 2))
        x_t, c = EDM().diffuse(x, eps, t), batch["c"]
        real, fake = CFG(nets.teacher, real_k)(x_t, t, c), CFG(nets.fake, fake_k)(x_t, t, c)
        sample, real, fake = (eps, real.eps, fake.eps) if isinstance(method, VSD) else (x, real.x0, fake.x0)
        near(logs["score_gap"], (real - fake).square().mean())
        if lag:
            near(logs["lag"], ((sample - fake) * (real - fake)).mean())
