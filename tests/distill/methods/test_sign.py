"""SIGN (experimental): without its terms DMD to the bit, each term by hand, and what a projection makes of them."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Line, exact, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.solver import ddim
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.methods import DMD, SIGN
from distill.random import Draw
from distill.roles import Nets

N, TERMS = 16, ("idem", "rec", "flow", "denoise")
OFF = dict.fromkeys(TERMS, 0.0)


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def draw_of():
    return Doubles(0, 0, "student", torch.arange(N))


def nets_of(schedule):
    make = lambda seed: tiny(SCHEDULES[schedule], "edm" if schedule == "edm" else "v", seed)
    return Nets(make(0), Student(make(1), (0.9,)), (2,), fake=make(2), target=make(3))


def turn(method, nets):
    batch, draw = {"real": draw_of().normal("real", (N, 2))}, draw_of()
    loss, logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    return loss.detach(), torch.autograd.grad(loss, [*nets.student.denoiser.net.parameters()]), logs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_off_is_dmd(schedule):
    nets, off = nets_of(schedule), SIGN(**OFF)
    want, got = turn(DMD(regression=0.0), nets), turn(off, nets)
    assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    assert off.roles == ("fake",) and off.requirements == () and SIGN().roles == ("fake", "target")
    assert SIGN().requirements == (Requirement.REAL,) and SIGN(regression=0.25).requirements[0] == Requirement.PAIRS
    for term in TERMS:
        on = turn(replace(off, **{term: 2.0}), nets)
        torch.testing.assert_close(on[0], want[0] + 2 * on[2][term].detach())
        assert on[2][term] > 1e-6


@pytest.mark.level(1, "SIGN")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_by_hand(schedule):
    """Each term and its gradient, f(u) = A u + b and the frozen f'(u) = A' u + b'."""
    law, line = problem(2)
    path, teacher = SCHEDULES[schedule], exact(problem(2)[0], SCHEDULES[schedule])
    frozen = Line(torch.tensor([[0.5, 0.1], [0.0, 0.7]], dtype=F64), torch.tensor([0.2, -0.1], dtype=F64))
    frozen.requires_grad_(False)
    student, target = Student(Denoiser(line, path, "x0"), scale=1.0), Denoiser(frozen, path, "x0")
    nets, draw = Nets(teacher, student, (2,), fake=teacher, target=target), draw_of()
    y, method = draw.normal("real", (N, 2)), SIGN(N=8, t_max=0.3)
    col, f = lambda a: a[:, None], lambda u: line(u, None)
    x = f(draw.normal("z", (N, 2)))
    t = (1 + (8 * draw.uniform("t_flow", (N,)).double()).floor()) / 8
    unit = lambda x, t: x / col(torch.hypot(*path.coefficients(t)))
    x_t = path.diffuse(y, draw.normal("eps_flow", (N, 2)), t)
    low = 0.3 * draw.uniform("t_denoise", (N,)).double()
    x_low = path.diffuse(y, draw.normal("eps_denoise", (N, 2)), low)
    want = {
        "idem": frozen(x, None) - x,
        "rec": f(y) - y,
        "flow": f(unit(x_t, t)) - f(unit(ddim(teacher, x_t, t, t - 1 / 8), t - 1 / 8)).detach(),
        "denoise": f(unit(x_low, low)) - y,
    }
    batch = {"real": y}
    logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)[1]
    for name, gap in want.items():
        torch.testing.assert_close(logs[name], gap.square().mean())
        grads = (torch.autograd.grad(a, (line.A, line.b), retain_graph=True) for a in (logs[name], gap.square().mean()))
        for got, right in zip(*grads, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)


def test_projection():
    """A map onto a line through the data: idempotent, and right on data that lie there."""
    P = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    line = Line(P, torch.zeros(2, dtype=F64))
    student = Student(Denoiser(line, Flow(), "x0"), scale=1.0)
    teacher = exact(problem(2)[0], Flow())
    nets, draw = Nets(teacher, student, (2,), fake=teacher, target=student.denoiser), draw_of()
    batch, method = {"real": draw.normal("real", (N, 2)) @ P}, SIGN()
    logs = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)[1]
    assert logs["idem"] == logs["rec"] == 0 < logs["denoise"]


def test_the_copy_is_of_now():
    nets = nets_of("flow")
    SIGN().after_student_step(nets)
    pairs = zip(nets.target.net.parameters(), nets.student.denoiser.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
