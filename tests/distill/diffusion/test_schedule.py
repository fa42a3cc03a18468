"""Identities of the schedules and of one output read as every prediction, in float64; diffusers' schedulers."""

import math

import pytest
import torch
from gaussian import F64
from gaussian import SCHEDULES as COMMON

from distill.diffusion.schedule import EDM, KINDS, VP, Flow, Prediction, Trig
from distill.diffusion.times import shift

SD = VP.scaled_linear()
SCHEDULES = COMMON | {"edm-3": EDM(0.01, 20.0, 3.0), "vp-few": VP((0.9, 0.5, 0.3, 0.1, 0.05)), "flow-1": Flow(1.0)}


def near(got, want, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def inside(n=257):
    """Times away from the ends, where no signal and no noise has vanished."""
    return torch.linspace(0.01, 0.99, n, dtype=F64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


class TestTime:
    def test_ratio_and_back(self, schedule):
        t = inside()
        near(schedule.time(schedule.ratio(t)), t)

    def test_between_any_two_schedules(self, schedule):
        """Where the ranges of noise overlap; beyond, the nearest end."""
        for other in SCHEDULES.values():
            t = inside()
            there = other.time(schedule.ratio(t))
            overlap = (there > 1e-6) & (there < 1 - 1e-6)
            assert overlap.sum() > 50
            near(other.ratio(there)[overlap], schedule.ratio(t)[overlap], 1e-6)  # VP rounds to whole indices
            near(schedule.time(other.ratio(there))[overlap], t[overlap], 1e-6)

    def test_beyond_the_range(self, schedule):
        near(schedule.time(tensor(0.0, math.inf)), tensor(0.0, 1.0))

    def test_keeps_its_derivative_at_the_ends(self, schedule):
        ratio = schedule.ratio(tensor(0.0, 1.0)).clamp(max=1e3).requires_grad_()
        (slope,) = torch.autograd.grad(schedule.time(ratio).sum(), ratio)
        assert (slope[0] if isinstance(schedule, Flow | Trig) else slope.min()) > 0

    def test_noise_rises(self, schedule):
        alpha, sigma = schedule.coefficients(torch.linspace(0, 1, 1000, dtype=F64))
        assert alpha.dtype == sigma.dtype == F64
        assert (sigma.diff() > 0).all() and (alpha.diff() <= 0).all() and (alpha > -1e-12).all()

    def test_vp_between_two_levels(self):
        """log(sigma / alpha) is linear there, so the middle is the geometric mean."""
        n = torch.arange(0, 999, dtype=F64)
        middle = SD.ratio((n + 0.5) / 999)
        near(middle, (SD.ratio(n / 999) * SD.ratio((n + 1) / 999)).sqrt())


class TestNative:
    def test_vp_is_told_whole_indices(self):
        n = torch.arange(1000)
        assert torch.equal(SD.native(n.double() / 999), n.double())
        assert torch.equal(SD.native(SD.time(SD.ratio(n.double() / 999))), n.double())
        assert torch.equal(SD.native((n / 999).float()), n.double())  # float32 times too

    def test_vp_has_a_derivative_on_whole_indices(self):
        t = tensor(0.0, 500 / 999, 0.3333, 1.0).requires_grad_()
        (slope,) = torch.autograd.grad(SD.native(t).sum(), t)
        near(slope, torch.full_like(slope, 999.0))
        _, slope = torch.func.jvp(SD.native, (t.detach(),), (torch.ones(4, dtype=F64),))
        near(slope, torch.full_like(slope, 999.0))

    def test_the_others(self):
        t = inside()
        near(EDM().native(t), EDM().ratio(t))
        near(Flow().native(t), 1000 * t)
        near(Flow(scale=1.0).native(t), t)
        near(Trig(0.5).native(t), t * math.pi / 2)


class TestNoise:
    def test_diffuse_is_linear(self, schedule):
        (x, eps), t = torch.randn(2, 257, 4, 2, dtype=F64), inside()
        alpha, sigma = (a[:, None, None] for a in schedule.coefficients(t))
        near(schedule.diffuse(x, eps, t), alpha * x + sigma * eps)

    def parts(self, schedule, s, t):
        """What a transition does to x and how much noise it adds."""
        zero, one = torch.zeros(len(t), 1, dtype=F64), torch.ones(len(t), 1, dtype=F64)
        return schedule.transition(one, s, t, zero)[:, 0], schedule.transition(zero, s, t, one)[:, 0]

    def test_diffuse_is_diffuse_and_transition(self, schedule):
        s, t = inside(), (inside() + 0.3).clamp(max=0.99)
        (alpha_s, sigma_s), (alpha, sigma) = schedule.coefficients(s), schedule.coefficients(t)
        gain, noise = self.parts(schedule, s, t)
        near(gain * alpha_s, alpha)
        near(((gain * sigma_s) ** 2 + noise**2).sqrt(), sigma)

    def test_transitions_compose(self, schedule):
        r, s, t = (torch.full((5,), a, dtype=F64) for a in (0.1, 0.4, 0.8))
        (g1, n1), (g2, n2), (g, n) = (self.parts(schedule, *pair) for pair in ((r, s), (s, t), (r, t)))
        near(g1 * g2, g)
        near(((g2 * n1) ** 2 + n2**2).sqrt(), n)

    def test_transition_to_itself(self, schedule):
        gain, noise = self.parts(schedule, inside(), inside())
        near(gain, torch.ones_like(gain))
        assert noise.max() < 1e-6  # a root of rounding

    def test_precision_follows_x(self, schedule):
        """Half precision is computed in float32, float32 and float64 in their own."""
        t = tensor(0.5)
        for dtype, want in ((torch.float16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
            x = torch.ones(1, 2, dtype=dtype)
            assert schedule.diffuse(x, x, t).dtype == want


def predicted(schedule, kind, t, out=None, sigma_d=0.5, shape=(3,)):
    """A prediction at x_t of known x0 and eps; the perfect one if `out` is None."""
    x0, eps = torch.randn(2, len(t), *shape, dtype=F64)
    alpha, sigma = (a.reshape(-1, *[1] * len(shape)) for a in schedule.coefficients(t))
    x = alpha * x0 + sigma * eps
    pred = Prediction(torch.zeros_like(x) if out is None else out, kind, x, alpha, sigma, sigma_d)
    return (x0, eps, Prediction(pred.target(x0, eps), kind, x, alpha, sigma, sigma_d)) if out is None else pred


@pytest.mark.parametrize("kind", KINDS)
class TestPrediction:
    def test_perfect_output_is_every_prediction(self, schedule, kind):
        x0, eps, pred = predicted(schedule, kind, inside(), shape=(3, 2))
        near(pred.x0, x0, 1e-11)
        near(pred.eps, eps, 1e-10)  # x0 and edm at little noise: x - alpha x0 over sigma
        near(pred.v, pred.alpha * eps - pred.sigma * x0, 1e-10)
        near(pred.flow, eps - x0, 1e-10)
        near(pred.score, -(pred.x - pred.alpha * x0) / pred.sigma**2, 1e-9)

    def test_any_output_there_and_back(self, schedule, kind):
        """out -> (x0, eps) -> target is out, and alpha x0 + sigma eps is x, whatever the network said."""
        pred = predicted(schedule, kind, inside(), out=torch.randn(257, 3, dtype=F64))
        near(pred.target(pred.x0, pred.eps), pred.out, 1e-10)
        near(pred.alpha * pred.x0 + pred.sigma * pred.eps, pred.x)
        names = {"x0": pred.x0, "eps": pred.eps, "v": pred.v, "flow": pred.flow}
        near(names.get(kind, pred.out), pred.out, 0)

    @pytest.mark.parametrize("end", (0.0, 1.0))
    def test_finite_at_the_ends(self, schedule, kind, end):
        """Nothing is divided by what vanishes; but eps at alpha = 0 says nothing of x0, nor x0 at sigma = 0 of eps."""
        pred = predicted(schedule, kind, tensor(end), out=torch.randn(1, 3, dtype=F64))
        gone = isinstance(schedule, Flow | Trig)
        if not (gone and end == 1 and kind == "eps"):
            assert pred.x0.isfinite().all() and pred.x0.abs().max() < 1e4
        if not (gone and end == 0 and kind == "x0"):
            assert pred.eps.isfinite().all() and pred.eps.abs().max() < 1e4
        assert pred.target(pred.x, pred.x).isfinite().all()

    @pytest.mark.parametrize("sigma_d", (0.3, 1.0))
    def test_edm_coefficients(self, schedule, kind, sigma_d):
        """c_skip, c_out of Karras et al. at the ratio sigma / alpha; sigma_d changes no other kind."""
        out, t = torch.randn(257, 3, dtype=F64), inside()
        pred = predicted(schedule, kind, t, out=out, sigma_d=sigma_d)
        other = Prediction(out, kind, pred.x, pred.alpha, pred.sigma, 0.5)
        r = schedule.ratio(t)[:, None]
        c_skip, c_out = sigma_d**2 / (r**2 + sigma_d**2), r * sigma_d / (r**2 + sigma_d**2).sqrt()
        near(pred.x0, c_skip * pred.x / pred.alpha + c_out * out if kind == "edm" else other.x0, 1e-11)


class TestGoldenNumbers:
    """Numbers of the method sheets, found there by other code."""

    def test_stable_diffusion(self):
        rows = (
            (999, 0.068265, 0.997667, 1.50248),
            (979, 0.076895, 0.997039, 1.49383),
            (759, 0.228501, 0.973544, 1.34026),
            (499, 0.526944, 0.849900, 1.01580),
            (259, 0.811773, 0.583973, 0.62361),
            (19, 0.991082, 0.133252, 0.13365),
            (0, 0.999575, 0.029155, 0.02916),
        )
        n, alpha, sigma, theta = torch.tensor(rows, dtype=F64).T
        t = n / 999
        near(torch.stack(SD.coefficients(t)), torch.stack((alpha, sigma)), 5.1e-7)
        near(Trig().native(Trig().time(SD.ratio(t))), theta, 5.1e-6)
        assert float(SD.coefficients(tensor(1.0))[0] ** 2) == pytest.approx(0.004660, abs=5e-7)  # SwiftBrush: .0047

    def test_flow_and_trig(self):
        rows = (
            (0.1, 0.091186, 0.913377),
            (0.5, 0.353296, 0.736915),
            (1.0, 0.608979, 0.723708),
            (1.3, 0.782708, 0.812310),
            (1.5, 0.933781, 0.936126),
        )
        theta, s, scale = torch.tensor(rows, dtype=F64).T
        t = Flow().time(Trig().ratio(theta * 2 / math.pi))
        near(t, s, 5.1e-7)
        near(torch.hypot(*Flow().coefficients(t)), scale, 5.1e-7)  # of x: hypot is 1 on Trig

    def test_karras_grid(self):
        """iCT's and CD's levels for N = 11."""
        sigma = tensor(0.002, 0.0167, 0.0851, 0.3183, 0.9654, 2.5152, 5.8389, 12.3816, 24.4083, 45.3137, 80.0)
        near(EDM().native(torch.linspace(0, 1, 11, dtype=F64)), sigma, 5.1e-5)
        near(EDM().time(sigma[[0, -1]]), tensor(0.0, 1.0))

    def test_trig_times(self):
        """sigma = 80 with sigma_d = .5 is sCM's largest angle; quantiles of sCM's law at (.2, 1.6)."""
        near(Trig(0.5).native(Trig(0.5).time(tensor(80.0))), tensor(math.atan(160.0)))
        ratio = (0.2 + 1.6 * tensor(-1.6449, 0.0, 1.6449)).exp()
        near(Trig(0.5).native(Trig(0.5).time(ratio)), tensor(0.176, 1.18, 1.54), 5e-3)


class TestDiffusers:
    """Against diffusers' own schedulers (float32 tables: 1e-5)."""

    SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)

    def test_ddpm_table_and_noise(self):
        from diffusers import DDPMScheduler

        theirs = DDPMScheduler(**self.SD)
        n = torch.arange(1000)
        near(SD.coefficients(n / 999)[0], theirs.alphas_cumprod.double().sqrt(), 1e-5)
        x, eps = torch.randn(2, 1000, 3, 2)
        near(SD.diffuse(x, eps, n / 999), theirs.add_noise(x, eps, n), 1e-5)
        table = VP(tuple(theirs.alphas_cumprod.tolist()))
        near(table.diffuse(x, eps, n / 999), theirs.add_noise(x, eps, n), 1e-6)

    @pytest.mark.parametrize("kind, theirs", (("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")))
    @pytest.mark.parametrize("n, m", ((999, 979), (500, 20), (19, 0)))
    def test_ddim_step(self, kind, theirs, n, m):
        """The clean sample and one DDIM step of each type of prediction."""
        from diffusers import DDIMScheduler

        from distill.diffusion.denoiser import Denoiser
        from distill.diffusion.solver import ddim

        scheduler = DDIMScheduler(**self.SD, prediction_type=theirs, clip_sample=False, set_alpha_to_one=False)
        scheduler.num_inference_steps = 1000 // (n - m)  # it steps by 1000 // this
        m = n - 1000 // scheduler.num_inference_steps
        x, out = torch.randn(2, 4, 3)
        want = scheduler.step(out, n, x, eta=0.0)
        denoiser = Denoiser(torch.nn.Identity(), SD, kind, call=lambda net, x, t, c: out)
        t, s = (torch.full((4,), float(k), dtype=F64) / 999 for k in (n, m))
        near(denoiser(x, t).x0, want.pred_original_sample, 1e-4)
        if m >= 0:
            near(ddim(denoiser, x, t, s), want.prev_sample, 1e-4)

    def test_euler_discrete(self):
        from diffusers import EulerDiscreteScheduler

        scheduler = EulerDiscreteScheduler(**self.SD, timestep_spacing="trailing")
        scheduler.set_timesteps(10)
        t = scheduler.timesteps.double() / 999
        near(SD.ratio(t), scheduler.sigmas[:-1].double(), 1e-4)

    @pytest.mark.parametrize("s", (1.0, 3.0))
    def test_flow_match(self, s):
        """The shift is ours in times.shift; native time, noising and the Euler step."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from distill.diffusion.denoiser import Denoiser
        from distill.diffusion.solver import ddim

        scheduler = FlowMatchEulerDiscreteScheduler(shift=s)
        t = shift(torch.linspace(1, 0.001, 1000, dtype=F64), s)
        near(t, scheduler.sigmas.double(), 1e-6)
        near(Flow().native(t), scheduler.timesteps.double(), 1e-3)
        x, eps, out = torch.randn(3, 4, 3)
        pick = [1, 250, 500, 998]
        noised = scheduler.scale_noise(x, scheduler.timesteps[pick], eps)
        near(Flow().diffuse(x, eps, t[pick]), noised, 1e-5)
        scheduler.set_timesteps(4)
        now, then = (scheduler.sigmas[i].double().expand(4) for i in (1, 2))
        want = scheduler.step(out, scheduler.timesteps[1], x).prev_sample
        denoiser = Denoiser(torch.nn.Identity(), Flow(), "flow", call=lambda net, x, t, c: out)
        near(ddim(denoiser, x, now, then), want, 1e-5)

    def test_edm(self):
        from diffusers import EDMEulerScheduler

        scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
        scheduler.set_timesteps(18)
        near(EDM().native(torch.linspace(1, 0, 18, dtype=F64)), scheduler.sigmas[:-1].double(), 1e-5)
        x, out = torch.randn(2, 18, 3)
        one = torch.ones(18, 1)
        sigma = scheduler.sigmas[:-1, None]
        ours = Prediction(out, "edm", x, one, sigma, sigma_d=0.5).x0
        near(ours, scheduler.precondition_outputs(x, out, sigma), 1e-5)


class TestErrors:
    @pytest.mark.parametrize("table", ((0.9,), (0.5, 0.9), (1.0, 0.5), (0.9, 0.0), (0.9, 0.9), ((0.9, 0.8),)))
    def test_vp_table(self, table):
        with pytest.raises(ValueError, match="decreasing table of at least two numbers inside"):
            VP(table)

    @pytest.mark.parametrize("read", (lambda p: p.x0, lambda p: p.eps, lambda p: p.target(p.x, p.x)))
    def test_kind(self, read):
        one = torch.ones(1, 1)
        with pytest.raises(ValueError, match="kind is 'epsilon'; it must be one of .*'eps'"):
            read(Prediction(one, "epsilon", one, one, one))


def test_schedules_are_values():
    """Two of the same numbers are equal and hash alike: Denoiser.on_schedule compares them."""
    assert VP.scaled_linear() == SD and hash(VP.scaled_linear()) == hash(SD)
    assert EDM() != EDM(rho=3.0) and Trig(0.5) != Trig() and Flow() != Flow(1.0)
