"""Networks that take turns on one sample, and CFG++: identities in float64, and the ring of eight modes."""

import pytest
import torch
from gaussian import F64, SCHEDULES, consistent, exact
from test_student import near, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, VP, Flow, Trig
from distill.diffusion.solver import Call, cfgpp, ddim, join_calls, renoising_step, run_calls, sample
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.methods import BOOT, LCD
from distill.random import Draw

N = 32


def noise(n=N, d=2):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0))


def along(denoiser, times, step=ddim):
    return [Call(denoiser, t, step) for t in times]


class TestCalls:
    @pytest.mark.parametrize("renoise", ("fresh", "ddim"))
    def test_a_students_calls_are_what_it_generates(self, renoise):
        """Experts of phases too; the scale of its input is its own."""
        own, expert = tiny(EDM(), seed=1), tiny(EDM(), seed=2)
        student = Student(own, (0.9, 0.7, 0.4, 0.2), 2.0, renoise, phases=2, experts=(expert,))
        draw = Draw(0, 0, "student", torch.arange(N))
        assert [call.denoiser for call in student.calls(draw)] == [expert, expert, own, own]
        assert run_calls(student.calls(draw), noise()).equal(student.generate(noise(), None, draw))

    def test_fresh_noise_needs_a_draw(self):
        with pytest.raises(ValueError, match="needs `draw`"):
            run_calls(Student(tiny(EDM()), (1.0, 0.5)).calls(), noise())
        assert run_calls(Student(tiny(EDM())).calls(), noise()).equal(Student(tiny(EDM())).generate(noise(), None))

    @pytest.mark.parametrize("here", SCHEDULES)
    @pytest.mark.parametrize("there", SCHEDULES)
    def test_the_levels_and_x_of_two_schedules_meet(self, here, there):
        """With solvers that make no error all stay on one trajectory, whoever is asked, on whatever schedule."""
        (law, _), a, b = problem(2), SCHEDULES[here], SCHEDULES[there]
        base = along(exact(law, a), (1.0, 0.8, 0.55, 0.3, 0.1), law.step)
        student = along(consistent(law, b), (1.0, 0.5), renoising_step(lambda x: 1 / 0))
        calls = join_calls(base, student, 1)
        assert 1 < len(calls) < 6 and all(
            x.noise_ratio > y.noise_ratio for x, y in zip(calls[:-1], calls[1:], strict=True)
        )
        assert student[1].on_schedule(a).noise_ratio == pytest.approx(student[1].noise_ratio, rel=1e-9)
        start, end = (
            tuple(v[:, None] for v in s.coefficients(torch.full((N,), t, dtype=F64))) for s, t in ((a, 1.0), (b, 0.0))
        )
        near(run_calls(calls, noise()), law.carry(start[1] * noise(), start, end), 1e-9)

    def test_who_is_called(self):
        small, middle, large = (along(tiny(Flow(), seed=i), [1 - k / 10 for k in range(10)]) for i in range(3))
        who = lambda calls: "".join(
            "sml"[[c[0].denoiser for c in (small, middle, large)].index(x.denoiser)] for x in calls
        )
        assert who(join_calls(small, large, 4)) == "ssssllllll"
        assert who(join_calls(join_calls(small, middle, 4), large, 7)) == "ssssmmmlll"
        assert who(join_calls(small, large, 0)) == "l" * 10 and who(join_calls(small, large, 10)) == "s" * 10
        assert who(join_calls(small[::3], large, 4)) == "ssllllll"  # a coarser way there

    def test_a_network_relieves_itself_unseen(self):
        denoiser, times = CFG(tiny(VP.scaled_linear(), classes=2), 3.0), [1 - k / 12 for k in range(12)]
        c = {"label": torch.arange(N) % 2}
        whole = run_calls(along(denoiser, times), noise(), c)
        for skip in (0, 1, 7, 12):
            assert run_calls(join_calls(along(denoiser, times), along(denoiser, times), skip), noise(), c).equal(whole)

    def test_mistakes(self):
        calls = along(tiny(Flow()), (1.0, 0.5))
        with pytest.raises(ValueError, match="skip is 3, and there are 2 calls"):
            join_calls(calls, calls, 3)
        with pytest.raises(ValueError, match="no call above the level that remains, sigma / alpha = 1"):
            join_calls(calls[1:], calls, 1)


@pytest.mark.parametrize("name", SCHEDULES)
class TestCFGpp:
    def ends(self, name):
        t = torch.linspace(0.35, 0.95, N, dtype=F64)
        return SCHEDULES[name], t, t - 0.2

    @pytest.mark.parametrize("kind", ("x0", "eps", "v", "flow", "edm"))
    def test_is_guidance_that_depends_on_the_step(self, name, kind):
        """lambda / (1 - e^-h), h the step in log alpha / sigma; each row its own."""
        schedule, t, s = self.ends(name)
        denoiser, c = tiny(schedule, kind, classes=3), {"label": torch.arange(N) % 3}
        h = (schedule.ratio(t) / schedule.ratio(s)).log()
        for scale in (0.6, 1.0):
            w = scale / (1 - (-h).exp())
            near(cfgpp(CFG(denoiser, scale), noise(), t, s, c), ddim(CFG(denoiser, w), noise(), t, s, c), 1e-10)
        assert cfgpp(denoiser, noise(), t, s, c).equal(cfgpp(CFG(denoiser, 1.0), noise(), t, s, c))

    def test_zero_is_unconditional(self, name):
        schedule, t, s = self.ends(name)
        denoiser, c = tiny(schedule, classes=3), {"label": torch.arange(N) % 3}
        none = {"label": torch.full((N,), 3)}
        near(cfgpp(CFG(denoiser, 0.0), noise(), t, s, c), ddim(denoiser, noise(), t, s, none), 1e-12)
        near(sample(CFG(denoiser, 0.0), noise(), c, 5, "cfg++"), sample(denoiser, noise(), none, 5, "ddim"), 1e-11)

    def test_the_last_call_is_guided_by_lambda(self, name):
        schedule, t, s = self.ends(name)
        denoiser, c = tiny(schedule, classes=3), {"label": torch.arange(N) % 3}
        x0 = run_calls(along(CFG(denoiser, 0.4), (0.7, 0.3), cfgpp), noise(), c)
        first = torch.full((N,), 0.7, dtype=F64)
        x = cfgpp(CFG(denoiser, 0.4), schedule.coefficients(first)[1][:, None] * noise(), first, first - 0.4, c)
        near(x0, CFG(denoiser, 0.4)(x, first - 0.4, c).x0, 1e-12)


def test_methods_know_that_it_needs_a_null_condition():
    for method in (LCD, BOOT):
        assert Requirement.NULL_CONDITION not in method().requirements
        assert Requirement.NULL_CONDITION in method(solver="cfg++").requirements
    with pytest.raises(ValueError, match=r"needs a null condition, and so does CFG\+\+"):
        sample(tiny(EDM()), noise(), None, 3, "cfg++")


STD, ANGLES = 0.1, torch.arange(8, dtype=F64) * (torch.pi / 4)
RING = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # eight equally likely modes


class Plain(torch.nn.Module):
    """A network of no weights that predicts x0 from x0 + sigma eps."""

    def __init__(self, predict):
        super().__init__()
        self.forward = predict


def posterior(x, sigma):
    """E[x0 | x0 + sigma eps = x] of the ring."""
    var = sigma[:, None] ** 2
    which = ((x @ RING.T) / (STD**2 + var)).softmax(1)
    return (STD**2 * x + var * (which @ RING)) / (STD**2 + var)


def ring(predict=posterior, schedule=Trig()):
    """The exact denoiser of the ring, or another, spoken to on a schedule that is not its own."""
    return Denoiser(Plain(predict), EDM(), "x0").on_schedule(schedule)


def inside(x):
    """Share of the samples within 4 standard deviations of a mode."""
    return float((torch.cdist(x, RING).min(1).values < 4 * STD).double().mean())


def spread(x):
    """Total variation between the histogram of modes and the uniform one."""
    count = torch.bincount(torch.cdist(x, RING).argmin(1), minlength=8) / len(x)
    return float((count - 1 / 8).abs().sum() / 2)


def test_a_small_network_will_do_at_high_noise():
    """T-Stitch on the ring: the small network knows the data's mean and covariance alone."""
    var = 2 + STD**2
    large, small = ring(), ring(lambda x, sigma: x * (var / (var + sigma**2))[:, None])
    times = [1 - k / 50 for k in range(50)]
    few, many = along(small, times), along(large, times)
    share = lambda calls: inside(run_calls(calls, noise(2000)))
    whole = share(many)
    assert whole > 0.995
    for r in (0.3, 0.5):
        assert abs(share(join_calls(few, many, int(50 * r))) - whole) < 0.003
    assert share(join_calls(few, many, 40)) < 0.95 and share(few) < 0.2
    assert share(join_calls(many, few, 25)) < 0.3  # the other order


def test_a_base_model_brings_back_what_the_first_call_lost():
    """The hybrid on the ring: a student that makes two modes of eight of pure noise, and is exact afterwards."""
    teacher = ring(schedule=EDM())

    def student(x, sigma):
        if sigma[0] > 10:
            return RING[[0, 4]][(x[:, 0] < 0).long()]
        t = float(EDM().time(sigma[:1]))
        return run_calls([Call(teacher, t * (1 - k / 20), ddim, 1.0) for k in range(20)], x)

    draw = Draw(0, 0, "student", torch.arange(2000))
    calls = Student(ring(student), (1.0, 0.3)).calls(draw)
    alone = run_calls(calls, noise(2000))
    assert inside(alone) > 0.99 and spread(alone) > 0.5  # .62
    for steps in (1, 4):
        base = along(ring(), [1 - 0.7 * k / steps for k in range(steps)])
        x = run_calls(join_calls(base, calls, 1), noise(2000))
        assert spread(x) < 0.06  # .029; of 2000 samples that are right it is .02
        assert inside(x) > (0.9 if steps == 1 else 0.98)
