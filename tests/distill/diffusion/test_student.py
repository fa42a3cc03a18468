"""The student's calls, and the solvers that sample from a teacher."""

import numpy as np
import pytest
import torch
from gaussian import F64, SCHEDULES, exact, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, KINDS, VP, Flow, Trig
from distill.diffusion.solver import STEPS, calls, ddim, run_calls, sample
from distill.diffusion.student import Student, grid_times
from distill.random import Draw

near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
N = 5


def times(t):
    return torch.full((N,), t, dtype=F64)


class Plain(Draw):
    def __init__(self):
        super().__init__(0, 0, "student", torch.arange(N))

    def normal(self, name, shape):
        return super().normal(name, shape).double()


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture
def z():
    return torch.randn(N, 2, dtype=F64)


class TestOneStep:
    def test_is_one_prediction(self, schedule, z):
        """sigma(t) z in, x0 out."""
        student = Student(tiny(schedule), (0.8,))
        sigma = schedule.coefficients(times(0.8))[1][:, None]
        near(student.generate(z, None), student.denoiser(sigma * z, times(0.8)).x0)

    @pytest.mark.parametrize("scale", (1.0, 2.5))
    def test_scale(self, schedule, z, scale):
        student = Student(tiny(schedule), scale=scale)
        near(student.generate(z, None), student.denoiser(scale * z, times(1.0)).x0)
        assert student.input_scale == scale

    def test_default_scale_is_the_noise_of_the_first_call(self):
        assert Student(tiny(EDM())).input_scale == pytest.approx(80.0)
        assert Student(tiny(VP.scaled_linear())).input_scale == pytest.approx(0.997667, abs=1e-6)
        assert Student(tiny(Flow()), (0.7,)).input_scale == pytest.approx(0.7)
        assert Student(tiny(Trig(0.5))).input_scale == pytest.approx(0.5)
        assert Student(tiny(EDM()).on_schedule(Flow()), (0.7,)).input_scale == pytest.approx(0.7)

    def test_condition(self, z):
        student = Student(tiny(EDM(), classes=3))
        a, b = (student.generate(z, {"label": torch.full((N,), k)}) for k in (0, 1))
        assert (a - b).abs().min() > 1e-6

    def test_wants_no_draw(self, z):
        assert Student(tiny(Flow())).generate(z, None, draw=None).shape == (N, 2)


class TestSteps:
    TIMES = (0.9, 0.6, 0.25)

    def rollout(self, student, z, steps, noise):
        """Written out: predict, then bring to the next time with the given noise, with the predicted one, or DDPM's."""
        x = student.input_scale * z
        for i in range(steps):
            pred = student.denoiser(x, times(self.TIMES[i]))
            if i + 1 < steps:
                (a, s), (alpha, sigma) = (
                    [c[:, None] for c in student.denoiser.path.coefficients(times(t))] for t in self.TIMES[i : i + 2]
                )
                eps = pred.eps if noise is None else noise.normal(f"renoise{i}", (N, 2))
                if student.renoise == "ancestral":  # q(x_next | x, x0), DDPM's equations 6 and 7
                    rest = s**2 - (a / alpha * sigma) ** 2
                    x = (a / alpha * sigma**2 * x + alpha * rest * pred.x0) / s**2 + rest.sqrt() * sigma / s * eps
                else:
                    x = alpha * pred.x0 + sigma * eps
        return pred.x0

    @pytest.mark.parametrize("renoise", ("fresh", "ddim", "ancestral"))
    @pytest.mark.parametrize("steps", (1, 2, 3, None))
    def test_rollout(self, schedule, z, renoise, steps):
        student, draw = Student(tiny(schedule), self.TIMES, renoise=renoise), Plain()
        want = self.rollout(student, z, steps or 3, draw if renoise != "ddim" else None)
        near(student.generate(z, None, draw, steps), want)
        if steps is None:
            near(student.trajectory(z, None, draw)[-1], want)
            near(run_calls(student.calls(draw), z), want)
            draw.before = z  # an x0 of the call before replaces earlier calls only where x0 is all that is kept
            assert torch.allclose(student.generate(z, None, draw), want) == (renoise != "fresh")

    def test_fresh_and_ddim_differ(self, z):
        fresh, same = (
            Student(tiny(EDM()), self.TIMES, renoise=r).generate(z, None, Plain()) for r in ("fresh", "ddim")
        )
        assert (fresh - same).abs().min() > 1e-3

    def test_fresh_noise_differs_between_calls(self):
        draw = Plain()
        assert not torch.equal(draw.normal("renoise0", (N, 2)), draw.normal("renoise1", (N, 2)))

    def test_ddim_student_is_the_ddim_solver(self, schedule, z):
        """A teacher called as a student with renoise="ddim" integrates its own ODE."""
        teacher = exact(problem(2)[0], schedule, "x0")
        x = schedule.coefficients(times(0.9))[1][:, None] * z
        for t, s in zip(self.TIMES, self.TIMES[1:]):
            x = ddim(teacher, x, times(t), times(s))
        near(Student(teacher, self.TIMES, renoise="ddim").generate(z, None), teacher(x, times(self.TIMES[-1])).x0)

    @pytest.mark.parametrize("renoise", ("fresh", "ddim"))
    @pytest.mark.parametrize("steps", (1, 2, 3))
    def test_gradient_of_the_last_call_only(self, z, renoise, steps):
        """The gradient is that of one call on the detached x that it was given."""
        student, draw = Student(tiny(EDM()), self.TIMES, renoise=renoise), Plain()
        inputs, params = [], list(student.denoiser.net.parameters())
        student.denoiser.net.register_forward_hook(lambda m, args, out: inputs.append((args[0], out.requires_grad)))
        got = torch.autograd.grad(student.generate(z, None, draw, steps).square().sum(), params)
        assert [grad for _, grad in inputs] == [False] * (steps - 1) + [True]
        x = inputs[-1][0].detach()
        want = torch.autograd.grad(student.denoiser(x, times(self.TIMES[steps - 1])).x0.square().sum(), params)
        for a, b in zip(got, want):
            near(a, b)
        assert max(g.abs().max() for g in want) > 0

    def test_gradient_to_the_noise_of_one_step(self, z):
        z.requires_grad_()
        student = Student(tiny(EDM()), self.TIMES)
        assert torch.autograd.grad(student.generate(z, None, None, 1).sum(), z)[0].abs().min() > 0
        assert not student.generate(z, None, Plain(), 2).grad_fn.next_functions == ()


class TestErrors:
    @pytest.mark.parametrize("times", ((), (0.0,), (1.1,), (0.5, 0.5), (0.3, 0.6), (0.5, 0.0), (0.5, -0.1)))
    def test_times(self, times):
        with pytest.raises(ValueError, match=r"student times are .*; they must fall strictly within \(0, 1\]"):
            Student(tiny(EDM()), times)

    def test_renoise(self):
        with pytest.raises(
            ValueError, match="renoise is 'DDIM'; it must be one of .'fresh', 'ddim', 'tcd', 'ancestral'."
        ):
            Student(tiny(EDM()), renoise="DDIM")

    @pytest.mark.parametrize("steps", (0, -1, 3))
    def test_steps(self, z, steps):
        student = Student(tiny(EDM()), (1.0, 0.5))
        with pytest.raises(ValueError, match=rf"steps is {steps}; this student has 2 time\(s\), so 1 to 2"):
            student.generate(z, None, Plain(), steps)

    def test_no_draw(self, z):
        with pytest.raises(ValueError, match="fresh noise between its steps needs `draw`"):
            Student(tiny(EDM()), (1.0, 0.5)).generate(z, None)

    def test_grid(self):
        assert grid_times(1) == (1.0,) and grid_times(4) == (1.0, 0.75, 0.5, 0.25)
        near(torch.tensor(grid_times(2, 0.6)), torch.tensor((0.6, 0.3)), 1e-7)
        with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
            grid_times(0)


class TestSolvers:
    def error(self, schedule, solver, steps):
        """Of sample() at the end, against the exact trajectory of a Gaussian; the teacher predicts x0."""
        law, _ = problem(2)
        z = torch.randn(64, 2, dtype=F64)
        start, end = (
            tuple(a[:, None] for a in schedule.coefficients(torch.full((64,), t, dtype=F64))) for t in (1.0, 0.0)
        )
        want = law.denoise(law.carry(start[1] * z, start, end), *end)
        return float((sample(exact(law, schedule, "x0"), z, None, steps, solver) - want).square().mean().sqrt())

    def order(self, name, solver):
        N = (100, 200, 400)
        return -np.polyfit(np.log(N), np.log([self.error(SCHEDULES[name], solver, n) for n in N]), 1)[0]

    @pytest.mark.parametrize("name", ("edm", "flow", "trig", "trig-half"))
    def test_ddim_is_of_first_order(self, name):
        assert self.order(name, "ddim") == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("name, low", (("edm", 1.9), ("flow", 1.5), ("trig", 1.5), ("trig-half", 1.5)))
    def test_heun_is_of_second_order(self, name, low):
        """On EDM. From alpha = 0 its first steps cross an infinite range of sigma / alpha: 1.9, 1.7, 1.6 measured."""
        assert low < self.order(name, "heun") < 2.1

    def test_vp(self):
        """Its table is not smooth near t = 0: less than first and second order, but convergent, and Heun far better."""
        ddim, heun = ([self.error(SCHEDULES["vp"], solver, n) for n in (50, 200, 999)] for solver in ("ddim", "heun"))
        assert ddim[0] > 2 * ddim[1] > 4 * ddim[2] and heun[0] > 4 * heun[1] > 16 * heun[2]
        assert heun[2] < 0.02 * ddim[2]

    @pytest.mark.parametrize("kind", ("x0", "v", "flow", "edm"))
    @pytest.mark.parametrize("solver", ("ddim", "heun"))
    def test_finite_on_the_whole_of_every_schedule(self, schedule, solver, kind):
        """From alpha = 0 to sigma = 0, where there is no noise to predict: kind x0 divides 0 by 0 there."""
        z = torch.randn(N, 2)
        assert sample(tiny(schedule, kind, dtype=torch.float32), z, None, 4, solver).isfinite().all()

    @pytest.mark.parametrize("solver", ("ddim", "heun"))
    @pytest.mark.parametrize("steps", (1, 2, 5))
    def test_calls(self, z, solver, steps):
        denoiser, seen = tiny(EDM()), []
        denoiser.net.register_forward_hook(lambda *a: seen.append(1))
        sample(denoiser, z, None, steps, solver)
        assert len(seen) == calls(solver, steps) == {"ddim": steps, "heun": 2 * steps - 1}[solver]

    def test_one_step_is_a_prediction(self, schedule, z):
        denoiser = tiny(schedule)
        sigma = schedule.coefficients(times(1.0))[1][:, None]
        near(sample(denoiser, z, None, 1), denoiser(sigma * z, times(1.0)).x0)

    @pytest.mark.parametrize("solver", ("ddim", "heun"))
    def test_a_frame_changes_nothing(self, solver, z):
        """A step on another schedule is the same step: both are Euler's or Heun's in sigma / alpha."""
        law, _ = problem(2)
        edm, trig = exact(law, EDM()), exact(law, EDM()).on_schedule(Trig(0.5))
        t, s = times(0.7), times(0.5)
        t1, s1 = (Trig(0.5).time(EDM().ratio(u)) for u in (t, s))
        a, a1 = (Trig(0.5).coefficients(u)[0][:, None] for u in (t1, s1))
        near(STEPS[solver](trig, a * z, t1, s1) / a1, STEPS[solver](edm, z, t, s), 1e-11)

    @pytest.mark.parametrize("kind", KINDS)
    def test_heun_by_hand(self, z, kind):
        """Karras et al., algorithm 1, on sigma."""
        denoiser = tiny(EDM(), kind)
        t, s = times(0.6), times(0.4)
        a, b = EDM().native(t)[:, None], EDM().native(s)[:, None]
        d = (z - denoiser(z, t).x0) / a
        euler = z + (b - a) * d
        d1 = (euler - denoiser(euler, s).x0) / b
        near(STEPS["heun"](denoiser, z, t, s), z + (b - a) * (d + d1) / 2, 1e-11)
        near(ddim(denoiser, z, t, s), euler, 1e-11)

    def test_errors(self, z):
        with pytest.raises(ValueError, match=r"solver is 'euler'; it must be one of \['cfg\+\+', 'ddim', 'heun'\]"):
            sample(tiny(EDM()), z, solver="euler")
        with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
            sample(tiny(EDM()), z, steps=0)


def test_a_denoiser_may_be_any_callable():
    """A student around a network of images."""
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    student = Student(Denoiser(net, Flow(), "flow", lambda net, x, t, c: net(x)), (1.0, 0.5), renoise="ddim")
    assert student.generate(torch.randn(2, 1, 8, 8), None).shape == (2, 1, 8, 8)
