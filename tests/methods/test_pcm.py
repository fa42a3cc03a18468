"""PCM: off it is LCD to the bit; the exact phase maps of a Gaussian leave no residual, and sample its ODE."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Oracle, Whitened, consistent, exact, level, problem
from tiny import tiny

from distill.denoiser import Denoiser
from distill.draw import Draw
from distill.methods import LCD, PCM
from distill.roles import Nets
from distill.schedule import EDM
from distill.student import Student

B = 16
OFF = {"guidance": 1.0, "target_ema": 0.0, "huber_c": None}


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
    assert all(torch.equal(a, b) for a, b in zip(loss_of(PCM(phases=1, N=10, **OFF), nets), want))
    assert not any(torch.equal(a, b) for a, b in zip(loss_of(PCM(phases=2, N=10, **OFF), nets), want))


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
    METHOD = PCM(phases=3, N=12, solver="ddim", **OFF)  # edges 0, 4, 8

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


def test_mistakes():
    with pytest.raises(ValueError, match="phases is 11; it must be 1 to N = 10"):
        PCM(phases=11, N=10)


def test_levels_are_read_back():
    """The oracle's own reading of levels agrees with the schedule's on an edge."""
    path = EDM()
    t = torch.tensor([4 / 12], dtype=F64)
    assert float(path.time((lambda a, s: s / a)(*level(path, path.native(t)))[:, 0])) == pytest.approx(4 / 12)
