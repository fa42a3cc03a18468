"""PCM: one phase is LCD to the first level; the exact phase maps of a Gaussian leave no residual, and sample its ODE.

That the phases are those of every family's scheduler: tests/distill/diffusion/test_sampling.py.
"""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Oracle, Whitened, consistent, exact, level, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM
from distill.diffusion.student import Student
from distill.losses import hinge_discriminator
from distill.methods import LCD, PCM
from distill.networks.discriminator import accuracy, build_heads, head_logits, pixels
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig

B = 16
OFF = {"guidance": 1.0, "target_ema": 0.0, "huber_c": None}
NO_GAN = OFF | {"gan": 0.0}


def turn():
    return Draw(0, 0, "student", torch.arange(B))


def loss_of(method, nets):
    """The loss and its gradient to the student."""
    x = turn().normal("real", (B, 2)).double()
    loss, _ = method.student_loss(x, nets, {}, turn())
    return loss, *torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_phase_is_lcd(schedule):
    """To the first level, which is data but for a table: loss and gradient; two phases are another loss."""

    class Ends(LCD):
        def end_index(self, i, nets, draw):
            return torch.zeros_like(i)

    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed)
    one, two = (Nets(make(0), Student(make(1), times), (2,)) for times in ((1.0,), (1.0, 0.5)))
    want = loss_of(Ends(N=10, **OFF), one)
    for ours, theirs in zip(loss_of(PCM(N=10, **NO_GAN), one), want):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any(torch.equal(a, b) for a, b in zip(loss_of(PCM(N=10, **NO_GAN), two), want))


def test_phases():
    """To which edge every step of a grid leads, and where the grid is: the authors' on a table, even in each phase."""
    vp, flow = (Nets(None, None, (2,)) for _ in range(2))
    for nets, path in ((vp, SCHEDULES["vp"]), (flow, SCHEDULES["flow"])):
        nets.teacher = tiny(path, "v")
    i = torch.arange(51, dtype=F64)
    vp.student = Student(vp.teacher, (1.0, 749 / 999, 499 / 999, 249 / 999), renoise="tcd")
    n = (PCM(N=40).time(i[:41], vp) * 999).round().tolist()
    assert n == [0, *range(24, 1000, 25)]
    n = (PCM(N=50).time(i, vp) * 999).round().tolist()
    assert [n[j] for j in (0, 12, 25, 37, 50)] == [0, 249, 499, 749, 999] and n == sorted(n)
    flow.student = Student(flow.teacher, (1.0, 0.9, 0.5), renoise="ddim")
    method = PCM(N=10)
    ends = method.end_index(i[:10], flow, turn())
    assert ends.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 6]
    want = [0, 0.5 / 3, 1 / 3, 0.5, 0.5 + 0.4 / 3, 0.5 + 0.8 / 3, 0.9, 0.925, 0.95, 0.975, 1]
    assert method.time(i[:11], flow).tolist() == pytest.approx(want)
    flow.student = Student(flow.teacher, tuple(t / 10 for t in range(10, 0, -1)), renoise="ddim")
    assert torch.equal(method.end_index(i[:10], flow, turn()), i[:10])


def phased(law, path, kind, times):
    """The student whose one prediction at x_t leads to where the ODE is at the end of the phase of t, exactly."""
    starts = torch.tensor([0.0, *reversed(times[1:])], dtype=F64)

    def predict(x, alpha, sigma):
        t = path.time((sigma / alpha).flatten())
        e = starts[(torch.searchsorted(starts, t - 1e-6) - 1).clamp(min=0)]  # an edge is the end of the phase below
        a, s = (c[:, None] for c in path.coefficients(e))
        return (law.carry(x, (alpha, sigma), (a, s)) - s / sigma * x) / (a - s * alpha / sigma)

    return Denoiser(Oracle(predict, path, kind), path, kind)


def fits(schedule, kind):
    return kind != "eps" or schedule in ("vp", "edm")


PAIRS = [(s, k) for s in SCHEDULES for k in ("x0", "eps", "v", "flow", "edm") if fits(s, k)]


@pytest.mark.level(1, "PCM")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestGaussian:
    METHOD, TIMES = PCM(N=12, solver="ddim", **NO_GAN), (1.0, 2 / 3, 1 / 3)

    def residual(self, method, schedule, kind, student):
        law, path = problem(2)[0], SCHEDULES[schedule]
        draw = Whitened(8, 2, ("real", "eps"), 12)
        draw.uniform = lambda name, shape: (torch.arange(shape[0]) + 0.5).double() / shape[0]
        nets = Nets(exact(law, path, kind), Student(student, self.TIMES), (2,))
        logs = replace(method, solver=law.step).student_loss(draw.columns["real"], nets, {}, draw)[1]
        return float(logs["delta"]) ** 0.5

    def test_exact_maps_leave_no_residual(self, schedule, kind):
        law, path = problem(2)[0], SCHEDULES[schedule]
        right = phased(law, path, kind, self.TIMES)
        assert self.residual(self.METHOD, schedule, kind, right) < 1e-10
        for wrong in (consistent(law, path, kind), phased(law, path, kind, (1.0, 0.5))):
            assert self.residual(self.METHOD, schedule, kind, wrong) > 1e-3

    def test_a_call_a_phase_follows_the_ode(self, schedule, kind):
        """From noise to data in three calls without new noise, without error; with fresh noise it is elsewhere."""
        law, path = problem(2)[0], SCHEDULES[schedule]
        right, times = phased(law, path, kind, self.TIMES), self.TIMES
        z = turn().normal("z", (B, 2)).double()
        ends = [tuple(c[:, None] for c in path.coefficients(torch.full((B,), t, dtype=F64))) for t in (1.0, 0.0)]
        want = law.carry(ends[0][1] * z, *ends)
        torch.testing.assert_close(Student(right, times, renoise="tcd").generate(z, None), want, rtol=1e-8, atol=1e-8)
        assert (Student(right, times).generate(z, None, turn()) - want).abs().max() > 0.1


class TestGan:
    METHOD = PCM(N=12, taps=("mid",), **OFF)

    def nets(self, schedule):
        kind = "edm" if schedule == "edm" else "v"
        make = lambda seed: tiny(SCHEDULES[schedule], kind, seed, classes=3)
        torch.manual_seed(0)
        disc = pixels(torch.zeros(1, 16)).double()
        return Nets(make(0), Student(make(1), (1.0, 2 / 3, 1 / 3)), (2,), disc=disc)

    def batch(self):
        label = torch.arange(B) % 3
        return {"real": turn().normal("real", (B, 2)).double(), "real_c": {"label": label}}

    def noised(self, nets, x, e, draw, i):
        """x_e on to u, uniform over its phase, by the level that stands in between."""
        path, eps = nets.teacher.path, draw.normal(f"gan_eps{i}", (B, 2)).double()
        m = (e * 3).round()  # of the phase: 0, 1, 2
        u = (m + draw.uniform("gan_t", (B,)).double()) / 3
        if path == SCHEDULES["vp"]:  # whole timesteps from -1, 333, 666 to 333, 666, 999
            low = torch.where(m > 0, 333 * m, -1)
            u = (low + (333 * (m + 1) - low) * draw.uniform("gan_t", (B,)).double()).round().clamp(min=0) / 999
        (a, s), (a_e, s_e) = path.coefficients(u), path.coefficients(e)
        gain = a / a_e
        return gain[:, None] * x + (s**2 - (gain * s_e) ** 2).sqrt()[:, None] * eps, u

    def logits(self, nets, x, e, draw, i):
        x_u, u = self.noised(nets, x, e, draw, i)
        assert ((e <= u) & (u <= e + 1 / 3 + 1e-9)).all()
        return nets.disc(*nets.teacher.features(x_u, u, self.batch()["real_c"], ("mid",)))

    @pytest.mark.level(1, "PCM")
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_by_hand(self, schedule):
        """The student adds lambda times a hinge on its solution; the heads tell it from the target's."""
        nets, batch, draw = self.nets(schedule), self.batch(), turn()
        weights, x = [*nets.student.denoiser.net.parameters()], batch["real"]
        out, target, j = self.METHOD.solutions(x, nets, batch, draw)
        assert {*j.tolist()} == {0.0, 4.0, 8.0}
        e = j / 12
        base = replace(self.METHOD, gan=0.0)
        plain = torch.autograd.grad(base.student_loss(x, nets, batch, draw)[0], weights)
        hinge = torch.relu(1 - self.logits(nets, out, e, draw, 0)).mean()
        assert 0 < float(hinge.detach()) < 2
        for weight in (0.1, 3.0):
            loss, logs = replace(self.METHOD, gan=weight).student_loss(x, nets, batch, draw)
            torch.testing.assert_close(logs["gan"], hinge)
            found = torch.autograd.grad(loss, weights)
            for ours, one, two in zip(found, plain, torch.autograd.grad(hinge, weights, retain_graph=True)):
                torch.testing.assert_close(ours, one + weight * two)
        loss, _ = self.METHOD.fake_loss(x, nets, batch, draw)
        fake, real = (self.logits(nets, y.detach(), e, draw, i) for i, y in enumerate((out, target)))
        want = torch.relu(1 + fake).mean() + torch.relu(1 - real).mean()
        torch.testing.assert_close(loss, want)
        heads = [*nets.disc.parameters()]
        ours, hand = torch.autograd.grad(loss, weights + heads, allow_unused=True), torch.autograd.grad(want, heads)
        assert not any(g is not None for g in ours[: len(weights)])
        for one, two in zip(ours[len(weights) :], hand):
            torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_off(self, schedule):
        """Without weight it has no heads and no second player, and is LCD with other ends to the bit."""

        class Ends(LCD):
            end_index, time = PCM.end_index, PCM.time

        off = replace(self.METHOD, gan=0.0)
        assert off.roles == () and [u.player for u in off.updates()] == ["student"]
        assert self.METHOD.roles == ("disc",) and [u.player for u in self.METHOD.updates()] == ["student", "fake"]
        nets = self.nets(schedule)
        batch, weights = self.batch(), [*nets.student.denoiser.net.parameters()]
        both = [method.student_loss(batch["real"], nets, batch, turn())[0] for method in (off, Ends(N=12, **OFF))]
        ours, theirs = ((loss, *torch.autograd.grad(loss, weights)) for loss in both)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))

    def test_of_the_same_law_nobody_can_tell(self):
        """Heads trained while the student's solutions are the target's are right as often as not; of others, mostly."""
        right = {}
        for gap in (0.0, 2.0):
            nets, heads = self.nets("flow"), torch.nn.Linear(16, 1).double()
            nets.disc, optimizer = heads, torch.optim.Adam(heads.parameters(), 0.1)
            j = torch.full((256,), 4.0, dtype=F64)
            for step in range(25):
                draw = Draw(0, step, "fake", torch.arange(256))
                x = [draw.normal(name, (256, 2)).double() for name in ("a", "b")]
                c = {"label": torch.zeros(256, dtype=torch.long)}
                (logits,) = self.METHOD.logits([x[0] + gap, x[1]], j, c, nets, draw)
                fake, real = logits.chunk(2)
                optimizer.zero_grad()
                hinge_discriminator(fake, real).backward()
                optimizer.step()
            right[gap] = float(accuracy(fake, real))
        assert abs(right[0.0] - 0.5) < 0.1 and right[2.0] > 0.75, right


def test_heads():
    """Two residual 1x1 convolutions and a logit a place; each head counts alike, whatever its number of places."""
    maps, tokens = torch.randn(2, 64, 4, 4), torch.randn(2, 9, 32)
    disc = build_heads((maps[:1], tokens[:1]), of_pixels=True)
    assert head_logits(disc, (maps, tokens))[0].shape == (2, 16) and head_logits(disc, (maps, tokens))[1].shape == (
        2,
        9,
    )
    one = disc[0]
    a = one.conv1(maps)
    torch.testing.assert_close(one(maps), one.conv_out(one.conv2(a) + a).flatten(1))
    torch.testing.assert_close(disc[1](tokens), disc[1](tokens.transpose(1, 2)[..., None]))
    (conv, norm, relu) = one.conv1
    assert conv.kernel_size == (1, 1) and norm.num_groups == 32 and relu.negative_slope == 0.01
    nets = Nets(tiny(SCHEDULES["flow"], "v"), Student(tiny(SCHEDULES["flow"], "v")), (2,), disc=disc)
    nets.teacher.features = lambda *args: [maps, tokens]
    draw, x = Draw(0, 0, "student", torch.arange(2)), torch.randn(2, 2, dtype=F64)
    _, logs = PCM(N=4, **OFF).student_loss(x, nets, {}, draw)
    means = [torch.relu(1 - logits).mean() for logits in head_logits(disc, (maps, tokens))]
    torch.testing.assert_close(logs["gan"], sum(means) / 2)


@pytest.mark.parametrize(
    "schedule, student, words",
    (
        ("flow", {"steps": 4}, "pass --student.renoise ddim or tcd$"),
        ("vp", {"steps": 1, "scale": 1.0}, "pass --student.renoise tcd --student.scale 1"),
        ("vp", {"steps": 2, "renoise": "ddim"}, "without new noise, and ends at the level of t = 0"),
        ("flow", {"steps": 11, "renoise": "tcd"}, "N is 10; it must be at least the student's 11 calls"),
    ),
)
def test_mistakes(schedule, student, words):
    """A student that would be called outside its phases is refused before training."""
    with pytest.raises(ValueError, match=words):
        build(PCM(N=10, **NO_GAN), tiny(SCHEDULES[schedule], "v"), (2,), student=StudentConfig(**student))


def test_levels_are_read_back():
    """The oracle's own reading of levels agrees with the schedule's on an edge."""
    path = EDM()
    t = torch.tensor([4 / 12], dtype=F64)
    assert float(path.time((lambda a, s: s / a)(*level(path, path.native(t)))[:, 0])) == pytest.approx(4 / 12)
