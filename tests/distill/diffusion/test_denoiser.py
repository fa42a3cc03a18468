"""A denoiser on its own schedule and on others, its copies and its features; guidance, which is a denoiser again."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Gaussian, exact, problem
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser, capture_features
from distill.diffusion.guidance import CFG, drop, embedding, merge, null_of, scale_of, with_guidance_key
from distill.diffusion.schedule import EDM, KINDS, VP, Flow, Trig
from distill.random import Draw

near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def batch(n=64, d=2):
    return torch.randn(n, d, dtype=F64), torch.linspace(0.05, 0.95, n, dtype=F64)


def across(schedule, other, t):
    """The time on `other` of the same level of noise, and where both schedules have that level."""
    there = other.time(schedule.ratio(t))
    return there, (there > 1e-6) & (there < 1 - 1e-6)


class TestOwnSchedule:
    def test_prediction(self, schedule, kind):
        denoiser, (x, t) = tiny(schedule, kind), batch()
        pred = denoiser(x, t)
        near(pred.out, denoiser.net(x, schedule.native(t)), 0)
        near(torch.cat((pred.alpha, pred.sigma), 1), torch.stack(schedule.coefficients(t), 1), 0)
        assert pred.kind == kind and denoiser.path == schedule

    def test_exact_denoiser_of_a_gaussian(self, schedule, kind):
        """alpha v x / (alpha^2 v + sigma^2) of N(0, v)."""
        law, (x, t) = Gaussian(torch.zeros(2, dtype=F64), 0.7 * torch.eye(2, dtype=F64)), batch()
        alpha, sigma = (a[:, None] for a in schedule.coefficients(t))
        near(exact(law, schedule, kind)(x, t).x0, alpha * 0.7 * x / (alpha**2 * 0.7 + sigma**2), 1e-11)

    def test_call_adapts_a_signature(self):
        """call(net, x, native t, c) -> out is all that is asked of a network."""
        seen = {}

        def call(net, x, t, c):
            seen.update(t=t, c=c)
            return (net(x), "more")[0]

        denoiser = Denoiser(nn.Linear(2, 2).double(), Flow(), "flow", call)
        x, t = batch()
        denoiser(x, t, {"c": x})
        near(seen["t"], 1000 * t, 0)
        assert seen["c"]["c"] is x

    def test_condition_by_name(self):
        denoiser, (x, t) = tiny(EDM(), classes=3), batch()
        label = torch.arange(64) % 3
        near(denoiser(x, t, {"label": label}).out, denoiser.net(x, EDM().native(t), label=label), 0)

    def test_low_precision_network(self):
        """The network gets x in its own precision; what comes back is in x's."""
        denoiser = Denoiser(nn.Linear(2, 2).bfloat16(), Flow(), "flow", lambda net, x, t, c: net(x))
        x, t = torch.randn(4, 2), torch.full((4,), 0.5, dtype=F64)
        pred = denoiser(x, t)
        assert pred.out.dtype == pred.x0.dtype == torch.float32
        near(pred.out, denoiser.net(x.bfloat16()).float(), 0)

    def test_wrong_kind(self):
        with pytest.raises(ValueError, match="kind is 'epsilon'; it must be one of"):
            Denoiser(nn.Identity(), EDM(), "epsilon")


class TestOn:
    def test_speaks_another_schedule(self, schedule, kind):
        """The same clean sample and noise from the same point: x rescaled, the same sigma / alpha."""
        denoiser, (x, t) = tiny(schedule, kind), batch()
        for other in SCHEDULES.values():
            there, overlap = across(schedule, other, t)
            (a, s), (a1, s1) = schedule.coefficients(t), other.coefficients(there)
            scale = (torch.hypot(a1, s1) / torch.hypot(a, s))[:, None]
            ours, theirs = denoiser(x, t), denoiser.on_schedule(other)(x * scale, there)
            near(theirs.x0[overlap], ours.x0[overlap], 1e-8)
            near(theirs.eps[overlap], ours.eps[overlap], 1e-8)
            assert denoiser.on_schedule(other).path == other

    def test_velocity_and_score_are_of_the_frame(self, schedule, kind):
        law, _ = problem(2)
        x, t = batch()
        for other in SCHEDULES.values():
            here, frame = exact(law, other, "x0"), exact(law, schedule, kind).on_schedule(other)
            overlap = across(other, schedule, t)[1]
            want, got = here(x, t), frame(x, t)
            for name in ("x0", "eps", "v", "flow", "score"):
                near(getattr(got, name)[overlap], getattr(want, name)[overlap], 1e-8)

    def test_back_again(self, schedule, kind):
        denoiser, (x, t) = tiny(schedule, kind), batch()
        for other in SCHEDULES.values():
            back = denoiser.on_schedule(other).on_schedule(schedule)
            assert back.frame is None and back.net is denoiser.net
            near(back(x, t).out, denoiser(x, t).out, 0)

    def test_only_the_last_frame_counts(self):
        denoiser, (x, t) = tiny(VP.scaled_linear()), batch()
        near(denoiser.on_schedule(Trig()).on_schedule(Flow())(x, t).x0, denoiser.on_schedule(Flow())(x, t).x0, 0)

    def test_target_is_in_the_networks_own_space(self, kind):
        """Whatever schedule the caller speaks, target(x0, eps) is what the network should have said."""
        path, (x0, t), eps = Trig(0.5), batch(), torch.randn(64, 2, dtype=F64)
        law = Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
        pred = exact(law, Flow(), kind).on_schedule(path)(path.diffuse(x0, eps, t), t)
        near(pred.target(pred.x0, pred.eps), pred.out, 1e-10)
        near(pred.alpha * x0 + pred.sigma * eps, pred.x, 1e-10)

    def test_flow_as_trig(self):
        """The sheet's transform of a flow model: F = ((1 - 2 s) x + (1 - 2 s + 2 s^2) v) / sqrt(s^2 + (1 - s)^2)."""
        denoiser, (x, t) = tiny(Flow(), "flow"), batch()
        theta = (t * math.pi / 2)[:, None]
        s = theta.sin() / (theta.sin() + theta.cos())
        x_flow = x / (theta.sin() + theta.cos())
        v = denoiser.net(x_flow, 1000 * s[:, 0])
        want = ((1 - 2 * s) * x_flow + (1 - 2 * s + 2 * s**2) * v) / (s**2 + (1 - s) ** 2).sqrt()
        near(denoiser.on_schedule(Trig())(x, t).v, want, 1e-11)

    def test_pure_noise(self):
        """t = 1 of a flow or Trig frame is beyond every table: the noisiest level that the network knows."""
        x, one = torch.randn(3, 2, dtype=F64), torch.ones(3, dtype=F64)
        for frame in (Flow(), Trig(0.5)):
            for schedule in SCHEDULES.values():
                pred = tiny(schedule, "v").on_schedule(frame)(x, one)
                assert pred.x0.isfinite().all() and pred.eps.isfinite().all() and pred.v.isfinite().all()


class TestCopies:
    def test_a_copy_is_another_network(self):
        denoiser, (x, t) = tiny(EDM()), batch()
        clone = denoiser.copy()
        assert clone.schedule is denoiser.schedule and clone.null is denoiser.null
        with torch.no_grad():
            clone.net.last.bias += 1
        near(clone(x, t).out, denoiser(x, t).out + 1)

    @pytest.mark.parametrize("how", (lambda d: d.copy(), copy.deepcopy), ids=("copy", "deepcopy"))
    def test_a_copy_gives_its_own_features(self, how):
        """A hook that closed over the original would give the original's. Also after the original was tapped."""
        denoiser, (x, t) = tiny(EDM()), batch()
        before = denoiser.features(x, t, None, ("mid",))[0]
        clone = how(denoiser)
        with torch.no_grad():
            clone.net.mid.weight.mul_(3)
        after = clone.features(x, t, None, ("mid",))[0]
        bias = denoiser.net.mid.bias
        near(after - bias, 3 * (before - bias))
        near(denoiser.features(x, t, None, ("mid",))[0], before, 0)
        after.sum().backward()
        assert clone.net.mid.weight.grad is not None and denoiser.net.mid.weight.grad is None


class TestFeatures:
    def full(self, denoiser, x, t, taps):
        with capture_features(denoiser.net, taps) as found:
            denoiser(x, t)
        return [found[name] for name in taps]

    @pytest.mark.parametrize("taps", (("mid",), ("first",), ("mid", "first"), ("last",), ("",)))
    def test_stopping_early_changes_neither_values_nor_gradients(self, taps):
        denoiser, (x, t) = tiny(EDM()).on_schedule(Flow()), batch()
        x.requires_grad_()
        gradients = []
        for read in (denoiser.features, lambda x, t, c, taps: self.full(denoiser, x, t, taps)):
            found = read(x, t, None, taps)
            params = [x, *denoiser.net.first.parameters()]
            gradients.append([*found, *torch.autograd.grad(sum(f.square().sum() for f in found), params)])
        for early, whole in zip(*gradients):
            near(early, whole, 0)

    def test_it_does_stop(self):
        denoiser, (x, t) = tiny(EDM()), batch()
        calls = []
        denoiser.net.last.register_forward_hook(lambda *a: calls.append(1))
        denoiser.features(x, t, None, ("mid",))
        assert not calls
        denoiser(x, t)
        assert calls

    def test_no_hook_stays(self):
        denoiser, (x, t) = tiny(EDM()), batch()
        denoiser.features(x, t, None, ("mid",))
        with pytest.raises(RuntimeError, match="an error of the network"), capture_features(denoiser.net, ("mid",)):
            raise RuntimeError("an error of the network")
        assert not any(m._forward_hooks for m in denoiser.net.modules())

    def test_tuple_outputs(self):
        """A module that returns a tuple is tapped for its first."""

        class Two(nn.Module):
            def forward(self, x):
                return x, None

        net = nn.Sequential(Two())
        denoiser = Denoiser(net, EDM(), "x0", lambda net, x, t, c: net(x)[0])
        x, t = batch()
        near(denoiser.features(x, t, None, ("0",))[0], x, 0)

    def test_the_call_knows_the_feature(self):
        """Joint blocks return (text, image): whoever calls the network knows which is which; one tensor is itself."""

        class Joint(nn.Module):
            def forward(self, x):
                return torch.zeros(1), x

        call = lambda net, x, t, c: net(x)[1]
        call.feature = lambda output: output[1]
        denoiser, (x, t) = Denoiser(nn.Sequential(nn.Identity(), Joint()), EDM(), "x0", call), batch()
        for found in denoiser.features(x, t, None, ("0", "1")):
            near(found, x, 0)

    def test_a_denoiser_has_features_of_its_own(self):
        """They are those of a method that names none; naming no module is not the same."""
        denoiser, (x, t) = replace(tiny(EDM(), "edm"), taps=("mid",)), batch()
        (own,) = denoiser.features(x, t, None, None)
        near(own, denoiser.features(x, t, None, ("mid",))[0], 0)
        for w in (0.0, 1.0, 2.0):
            c, guided = {}, CFG(replace(denoiser, null={}), w)
            near(guided.predict_with_features(x, t, c, None)[1][0], own, 0)
            assert guided.predict_with_features(x, t, c, ())[1] == []

    def test_unknown_module(self):
        denoiser, (x, t) = tiny(EDM()), batch()
        with pytest.raises(ValueError, match=r"no submodule \['mid_block'\] to tap.*\['first', 'mid', 'last'\]"):
            denoiser.features(x, t, None, ("mid_block",))


class TestGuided:
    """out = null + w (cond - null), through whatever the network predicts."""

    N, K = 6, 3

    def setup_method(self):
        self.base = tiny(EDM(), "edm", classes=self.K)
        self.x, self.t = torch.randn(self.N, 2, dtype=F64), torch.linspace(0.1, 0.9, self.N, dtype=F64)
        self.c = {"label": torch.arange(self.N) % self.K}
        self.null = {"label": torch.full((self.N,), self.K)}

    def outs(self):
        return self.base(self.x, self.t, self.c).out, self.base(self.x, self.t, self.null).out

    @pytest.mark.parametrize("w", (-1.0, 0.0, 0.5, 1.0, 1.5, 7.5, 0, 1))
    def test_combination(self, w):
        cond, empty = self.outs()
        near(CFG(self.base, w)(self.x, self.t, self.c).out, empty + w * (cond - empty))

    def test_one_scale_per_sample(self):
        cond, empty = self.outs()
        w = torch.linspace(-1, 2, self.N)
        near(CFG(self.base, w)(self.x, self.t, self.c).out, empty + w.double()[:, None] * (cond - empty))

    def test_as_x0_and_as_eps(self):
        """At a fixed point guidance is linear, so it may be read in any space; everything else is the point's own."""
        pred = CFG(self.base, 3.0)(self.x, self.t, self.c)
        cond, empty = self.base(self.x, self.t, self.c), self.base(self.x, self.t, self.null)
        for name in ("x0", "eps", "v", "flow"):
            near(getattr(pred, name), getattr(empty, name) + 3 * (getattr(cond, name) - getattr(empty, name)), 1e-9)
        near(pred.x, self.x, 0)
        assert pred.alpha.shape == pred.sigma.shape == (self.N, 1)

    def test_on_another_schedule(self):
        frame, w = CFG(self.base, torch.full((self.N,), 2.0)).on_schedule(Trig(0.5)), 2.0
        cond, empty = (self.base.on_schedule(Trig(0.5))(self.x, self.t, c) for c in (self.c, self.null))
        near(frame(self.x, self.t, self.c).v, empty.v + w * (cond.v - empty.v))
        near(frame(self.x, self.t, self.c).score, empty.score + w * (cond.score - empty.score))
        assert frame.path == Trig(0.5)

    @pytest.mark.parametrize("w, samples", ((1.0, [6]), (0.0, [6]), (2.0, [12]), (torch.ones(6), [12])))
    def test_cost(self, w, samples):
        sizes = []
        self.base.net.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
        CFG(self.base, w)(self.x, self.t, self.c)
        assert sizes == samples

    def test_gradient_through_both_branches(self):
        grads = []
        for w in (0.0, 1.0, 3.0):
            x = self.x.clone().requires_grad_()
            grads.append(torch.autograd.grad(CFG(self.base, w)(x, self.t, self.c).x0.sum(), x)[0])
        near(grads[2], grads[0] + 3 * (grads[1] - grads[0]), 1e-10)

    @pytest.mark.parametrize("w", (0.0, 2.0, torch.ones(6)))
    def test_no_null_condition(self, w):
        with pytest.raises(ValueError, match="guidance other than 1 needs a null condition.*set the guidance to 1"):
            CFG(tiny(EDM()), w)(self.x, self.t)
        self.base.null = None
        with pytest.raises(ValueError, match="needs a null condition"):
            CFG(self.base, w)(self.x, self.t, self.c)
        CFG(self.base, 1.0)(self.x, self.t, self.c)  # none needed

    def test_null_keeps_what_it_does_not_name(self):
        """A guidance embedding, say, is the same in both branches."""
        w = torch.full((self.N,), 4.0)
        empty = null_of({"label": torch.tensor([self.K])}, with_guidance_key(self.c, w))
        assert torch.equal(empty["label"], self.null["label"]) and empty["guidance"] is w

    def test_null_is_cast_and_expanded(self):
        c = {"text": torch.ones(4, 7, 5, dtype=torch.float64)}
        empty = null_of({"text": torch.zeros(1, 7, 5)}, c)
        assert empty["text"].shape == (4, 7, 5) and empty["text"].dtype == torch.float64

    def test_drop(self):
        mask = torch.tensor([True, False] * 3)
        got = drop({**self.c, "text": torch.ones(6, 2, 2)}, {**self.base.null, "text": torch.zeros(1, 2, 2)}, mask)
        assert got["label"].tolist() == [3, 1, 3, 0, 3, 2]
        assert got["text"].mean((1, 2)).tolist() == [0, 1] * 3
        with pytest.raises(ValueError, match="null condition"):
            drop(None, None, mask)

    def test_merge(self):
        both = merge({"a": torch.zeros(2)}, {"a": torch.ones(3, dtype=F64)})
        assert both["a"].tolist() == [0, 0, 1, 1, 1] and both["a"].dtype == torch.float32
        assert merge(None, None) is None

    def test_scale_of_and_told(self):
        draw = Draw(0, 0, "student", torch.arange(4000))
        assert scale_of(4.5, draw, 4000) == 4.5 and with_guidance_key(self.c, 4.5) is self.c
        w = scale_of((2.0, 14.0), draw, 4000)
        assert 2 <= w.min() < 2.05 and 13.95 < w.max() < 14 and abs(w.mean() - 8) < 0.2
        assert with_guidance_key(None, w)["guidance"] is w and with_guidance_key({"a": w}, w).keys() == {
            "a",
            "guidance",
        }

    def test_embedding(self):
        """LCM's, against the sheet's numbers; the argument is 1000 w."""
        want = torch.tensor([-0.85124, 0.56268, -0.43523, 0.68164, -0.52478, -0.82668, -0.90032, 0.73169])
        near(embedding(torch.tensor([7.5]), 8)[0], want, 1e-5)
        assert embedding(torch.rand(3)).shape == (3, 256)
        with pytest.raises(ValueError, match="no embedding of guidance .* guidance_embedded=True"):
            embedding(torch.rand(3), None)


class TestBatchesOfImages:
    def test_more_dimensions(self):
        """alpha and sigma are [B, 1, 1, 1] beside images."""
        net = nn.Conv2d(3, 3, 3, padding=1).double()
        denoiser = Denoiser(net, Flow(), "flow", lambda net, x, t, c: net(x))
        x, t = torch.randn(5, 3, 8, 8, dtype=F64), torch.rand(5, dtype=F64)
        pred = denoiser(x, t)
        near(pred.x0, x - t.reshape(5, 1, 1, 1) * net(x))
        assert denoiser.on_schedule(Trig())(x, t).v.shape == x.shape


def test_a_network_without_parameters():
    denoiser = Denoiser(nn.Identity(), EDM(), "x0", lambda net, x, t, c: net(x))
    x, t = batch()
    near(denoiser(x, t).x0, x, 0)
