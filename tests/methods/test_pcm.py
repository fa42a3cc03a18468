"""PCM: off it is LCD to the bit; the exact phase maps of a Gaussian leave no residual, and sample its ODE."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Oracle, Whitened, consistent, exact, level, problem
from tiny import tiny

from distill.denoiser import Denoiser
from distill.disc import head, verdicts
from distill.draw import Draw
from distill.losses import hinge_discriminator
from distill.methods import LCD, PCM
from distill.roles import Nets
from distill.schedule import EDM
from distill.student import Student

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
    """Bit for bit, loss and gradient; with two it is another loss."""
    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed)
    nets = Nets(make(0), Student(make(1), (0.5,)), (2,))
    want = loss_of(LCD(N=10, **OFF), nets)
    assert all(torch.equal(a, b) for a, b in zip(loss_of(PCM(phases=1, N=10, **NO_GAN), nets), want))
    assert not any(torch.equal(a, b) for a, b in zip(loss_of(PCM(phases=2, N=10, **NO_GAN), nets), want))


def test_phases():
    """The edges of the authors' code, and to which of them every step of a grid leads."""
    assert PCM().edges == (0.0, 12 / 50, 25 / 50, 37 / 50)
    s = torch.arange(10, dtype=F64) / 10
    ends = PCM(phases=3, N=10).end(s, turn()) * 10
    assert ends.round().tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 6]  # edges 0, 3, 6
    assert torch.equal(PCM(phases=10, N=10).end(s, turn()), s)


def phased(law, path, kind, edges):
    """The student whose one prediction at x_t leads to where the ODE is at the start of the phase of t, exactly."""
    starts = torch.tensor(edges, dtype=F64)
    zero = path.coefficients(torch.zeros(1, dtype=F64))

    def predict(x, alpha, sigma):
        t = path.time((sigma / alpha).flatten())
        e = starts[(torch.searchsorted(starts, t - 1e-6) - 1).clamp(min=0)]  # an edge is the end of the phase below
        a, s = (c[:, None] for c in path.coefficients(e))
        x0 = (law.carry(x, (alpha, sigma), (a, s)) - s / sigma * x) / (a - s * alpha / sigma)
        return torch.where(e[:, None] > 0, x0, law.carry(x, (alpha, sigma), zero))

    return Denoiser(Oracle(predict, path, kind), path, kind)


def fits(schedule, kind):
    return kind != "eps" or schedule in ("vp", "edm")


PAIRS = [(s, k) for s in SCHEDULES for k in ("x0", "eps", "v", "flow", "edm") if fits(s, k)]


@pytest.mark.level(1, "PCM")
@pytest.mark.parametrize("schedule, kind", PAIRS)
class TestGaussian:
    METHOD = PCM(phases=3, N=12, solver="ddim", **NO_GAN)  # edges 0, 4, 8

    def residual(self, method, schedule, kind, student):
        law, path = problem(2)[0], SCHEDULES[schedule]
        draw = Whitened(8, 2, ("real", "eps"), 12)
        draw.uniform = lambda name, shape: (torch.arange(shape[0]) + 0.5).double() / shape[0]
        nets = Nets(exact(law, path, kind), Student(student, (1.0,)), (2,))
        logs = replace(method, solver=law.step).student_loss(draw.columns["real"], nets, {}, draw)[1]
        return float(logs["delta"]) ** 0.5

    def test_exact_maps_leave_no_residual(self, schedule, kind):
        law, path = problem(2)[0], SCHEDULES[schedule]
        right = phased(law, path, kind, self.METHOD.edges)
        assert self.residual(self.METHOD, schedule, kind, right) < 1e-10
        for wrong in (consistent(law, path, kind), phased(law, path, kind, PCM(phases=2, N=12).edges)):
            assert self.residual(self.METHOD, schedule, kind, wrong) > 1e-3

    def test_a_call_a_phase_follows_the_ode(self, schedule, kind):
        """From noise to data in three calls without new noise, without error; with fresh noise it is elsewhere."""
        law, path = problem(2)[0], SCHEDULES[schedule]
        right, times = phased(law, path, kind, self.METHOD.edges), (1.0, 8 / 12, 4 / 12)
        z = turn().normal("z", (B, 2)).double()
        ends = [tuple(c[:, None] for c in path.coefficients(torch.full((B,), t, dtype=F64))) for t in (1.0, 0.0)]
        want = law.carry(ends[0][1] * z, *ends)
        torch.testing.assert_close(Student(right, times, renoise="ddim").generate(z, None), want, rtol=1e-8, atol=1e-8)
        assert (Student(right, times).generate(z, None, turn()) - want).abs().max() > 0.1


class TestGan:
    METHOD = PCM(phases=3, N=12, taps=("mid",), places=False, **OFF)  # edges 0, 4, 8

    def nets(self, schedule):
        kind = "edm" if schedule == "edm" else "v"
        make = lambda seed: tiny(SCHEDULES[schedule], kind, seed, classes=3)
        torch.manual_seed(0)
        disc = head(torch.zeros(1, 16)).double()
        return Nets(make(0), Student(make(1), (0.5,)), (2,), disc=disc)

    def batch(self):
        label = torch.arange(B) % 3
        return {"real": turn().normal("real", (B, 2)).double(), "real_c": {"label": label}}

    def noised(self, nets, x, e, draw, i):
        """x_e on to u, uniform over a phase's length, by the level that stands in between."""
        path, eps = nets.teacher.path, draw.normal(f"gan_eps{i}", (B, 2)).double()
        u = e + draw.uniform("gan_t", (B,)).double() / 3
        (a, s), (a_e, s_e) = path.coefficients(u), path.coefficients(e)
        s_e = torch.where(e > 0, s_e, 0.0)  # there it is x0, of a table that does not begin at 0 too
        a_e = torch.where(e > 0, a_e, 1.0)
        gain = a / a_e
        return gain[:, None] * x + (s**2 - (gain * s_e) ** 2).sqrt()[:, None] * eps, u

    def logits(self, nets, x, e, draw, i):
        x_u, u = self.noised(nets, x, e, draw, i)
        assert ((e <= u) & (u <= e + 1 / 3)).all()
        return nets.disc(*nets.teacher.features(x_u, u, self.batch()["real_c"], ("mid",)))

    @pytest.mark.level(1, "PCM")
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_by_hand(self, schedule):
        """The student adds lambda times a hinge on its solution; the heads tell it from the target's."""
        nets, batch, draw = self.nets(schedule), self.batch(), turn()
        weights, x = [*nets.student.denoiser.net.parameters()], batch["real"]
        out, target, e = self.METHOD.solutions(x, nets, batch, draw)
        assert {round(float(v) * 12) for v in e} == {0, 4, 8}
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
            end = PCM.end
            edges, phases = (0.0, 4 / 12, 8 / 12), 3

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
            e = torch.full((256,), 1 / 3, dtype=F64)
            for step in range(25):
                draw = Draw(0, step, "fake", torch.arange(256))
                x = [draw.normal(name, (256, 2)).double() for name in ("a", "b")]
                c = {"label": torch.zeros(256, dtype=torch.long)}
                fake, real = self.METHOD.logits([x[0] + gap, x[1]], e, c, nets, draw).chunk(2)
                optimizer.zero_grad()
                hinge_discriminator(fake, real).backward()
                optimizer.step()
            right[gap] = float(verdicts(fake, real))
        assert abs(right[0.0] - 0.5) < 0.1 and right[2.0] > 0.75, right


def test_mistakes():
    with pytest.raises(ValueError, match="phases is 11; it must be 1 to N = 10"):
        PCM(phases=11, N=10)


def test_levels_are_read_back():
    """The oracle's own reading of levels agrees with the schedule's on an edge."""
    path = EDM()
    t = torch.tensor([4 / 12], dtype=F64)
    assert float(path.time((lambda a, s: s / a)(*level(path, path.native(t)))[:, 0])) == pytest.approx(4 / 12)
