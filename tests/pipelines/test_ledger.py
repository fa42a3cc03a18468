"""What a cycle costs, in forward passes of one sample; and that the ways to make it cheaper change nothing else."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64
from tiny import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unets import sdxl

from distill.data import Digits
from distill.diffusion.schedule import Flow
from distill.diffusion.times import Fixed
from distill.losses import jvp
from distill.methods import DMD2, SCM
from distill.random import Draw
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines.families import edm
from pipelines.planning import flop_counter
from pipelines.planning.models import MODELS, Meta
from pipelines.teacher import teacher_of

near = lambda got, want, tol=1e-9: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
weights = lambda net: {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.fixture(scope="module")
def cycle():
    """cycle(method, steps) -> forward passes of one cycle on SDXL at 1024 pixels, by the method's own code."""
    parts = Meta(MODELS["sdxl"])
    c = {name: torch.empty(1, *shape, device="meta") for name, shape in parts.condition().items()}

    def measure(method, steps):
        teacher = teacher_of(parts)
        with torch.device("meta"):
            nets = build(method, teacher.denoiser, teacher.shape, c, StudentConfig(steps=steps))
        cost = flop_counter.cost(method, nets, c, half=False, fused=False)
        return cost.flops * cost.cycle / flop_counter.forward(teacher.denoiser, teacher.shape, c)

    return measure


@pytest.mark.slow
def test_dmd2_on_sdxl(cycle):
    """Four steps, one of the student and five of the fake score; the authors' code takes 46.3."""
    assert cycle(DMD2(guidance=8.0, share=True, walk=True), 4) <= 34.7


@pytest.mark.slow
def test_published_dmd2_on_sdxl(cycle):
    """As the authors' code does it: each pass of its own."""
    assert cycle(DMD2(guidance=8.0), 4) == pytest.approx(46.3, abs=0.3)


@pytest.mark.slow
def test_scm_on_sdxl(cycle):
    """Teacher 1, value and tangent 2, backward 2, and attention's second product of a tangent, a tenth; FastGen 6."""
    assert cycle(SCM(), 1) <= 5.11


def test_tangents_of_layers_take_two_products():
    net, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as one:
        net(x)
    with FlopCounterMode(display=False) as both:
        jvp(net, (x,), (x,))
    assert both.get_total_flops() == 2 * one.get_total_flops()


class TestOnePass:
    """sCM's loss on the pass that found the tangent, against a pass of its own."""

    def test_jvp_on_a_unet(self):
        """Convolutions, norms and attention: value, slope and the gradient of the value."""
        net = sdxl().to(F64).requires_grad_(True)
        text, pooled, sizes = (
            torch.randn(1, 5, 16, dtype=F64),
            torch.randn(1, 8, dtype=F64),
            torch.ones(1, 6, dtype=F64),
        )
        added = {"text_embeds": pooled, "time_ids": sizes}
        f = lambda x, t: net(x, t, text, added_cond_kwargs=added, return_dict=False)[0]
        (x, u), t = torch.randn(2, 1, 4, 8, 8, dtype=F64), torch.tensor([300.0], dtype=F64)
        at = (x, t), (u, torch.ones(1, dtype=F64))
        value, slope = jvp(f, *at, True)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            near(slope, torch.func.jvp(f, *at)[1])
        got = torch.autograd.grad(value.square().sum(), net.parameters(), allow_unused=True)
        want = torch.autograd.grad(f(x, t).square().sum(), net.parameters(), allow_unused=True)
        assert not slope.requires_grad and any(g is not None for g in want)
        for a, b in zip(got, want):
            assert (a is None) == (b is None)
            if a is not None:
                near(a, b)

    def test_scm(self):
        teacher = tiny(Flow(), "flow", classes=3)
        draw, found = Draw(0, 5, "student", torch.arange(4)), []
        for one_pass in (True, False):
            method = SCM(warmup=0, one_pass=one_pass)
            nets = build(method, teacher, (2,))
            loss, _ = method.student_loss(
                torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).to(F64),
                nets,
                {"real_c": {"label": torch.arange(4) % 3}},
                draw,
            )
            found.append([loss, *torch.autograd.grad(loss, nets.student.denoiser.net.parameters())])
        for a, b in zip(*found):
            near(a, b)


class TestShare:
    def test_one_pass_is_two_at_the_same_noise(self):
        """With the classifier's time and noise those of the denoising loss, sharing changes no number."""

        class Same(Draw):
            def normal(self, name, shape):
                return super().normal({"gan_fake_eps": "eps"}.get(name, name), shape)

        teacher, x = tiny(Flow(), "flow", classes=3), torch.randn(4, 2, dtype=F64)
        c = {"label": torch.arange(4) % 3}
        batch, found = {"c": c, "real": x + 1, "real_c": c}, []
        laws = {"fake_times": Fixed(0.4), "gan_times": Fixed(0.4), "gan_fake": 0.7, "taps": ("mid",)}
        for share in (True, False):
            method = DMD2(share=share, **laws)
            torch.manual_seed(0)
            nets = build(method, teacher, (2,), {"label": c["label"][:1]})
            nets.disc.double()
            loss, logs = method.fake_loss(x, nets, batch, Same(0, 1, "fake", torch.arange(4)))
            params = [*nets.fake.net.parameters(), *nets.disc.parameters()]
            found.append([loss, logs["gan"], *torch.autograd.grad(loss, params)])
        for a, b in zip(*found):
            near(a, b)


class TestWalk:
    METHOD = DMD2(every=6, walk=True, gan=0.1, gan_fake=0.1)

    def start(self, steps=3):
        torch.manual_seed(0)
        teacher = edm.teacher(edm.unet((8, 16)), 0.5, null_class=10)
        return build(self.METHOD, teacher.denoiser, teacher.shape, teacher.encode([0]), StudentConfig(steps=steps))

    def run(self, nets, steps, **resume):
        settings = TrainConfig(max_train_steps=steps, train_batch_size=4, gradient_accumulation_steps=2)
        yield from train(self.METHOD, nets, Digits(), settings, Accelerator(cpu=True), **resume)

    def test_a_step_is_one_call(self):
        """Where the student has no turn."""
        nets, calls, seen = self.start(), 0, []

        def count(*_):
            nonlocal calls
            calls += 1

        nets.student.denoiser.net.conv_in.register_forward_hook(count)
        for _ in self.run(nets, 6):
            seen.append(calls)
        assert [b - a for a, b in zip(seen, seen[1:])] == [2] * 5  # two micro-batches

    def test_samples_are_those_of_the_generation(self, monkeypatch):
        """At the steps 1 2 3 | 4 5 after the student's, the samples after 1 2 3 | 1 2 calls, of the first's numbers."""
        seen, right = [], DMD2.fake_loss
        monkeypatch.setattr(
            DMD2,
            "fake_loss",
            lambda self, x, nets, batch, draw: seen.append((x, batch, draw)) or right(self, x, nets, batch, draw),
        )
        nets = self.start()
        states = self.run(nets, 6)
        next(states), seen.clear()
        for _ in states:
            pass
        for i, (x, batch, draw) in enumerate(seen):
            late = (i // 2) % 3
            source = Draw(draw.seed, draw.step - late, "fake", draw.samples)
            c = Digits()(source)["c"]
            assert torch.equal(batch["c"]["class_labels"], c["class_labels"])
            with torch.no_grad():
                assert torch.equal(x, nets.generate({"c": c}, source, late + 1))
            assert torch.equal(batch["real"], Digits()(draw)["real"])  # new ones at every step

    def test_resumed_within_a_walk(self, tmp_path):
        """Bit for bit: what was not kept is made again."""
        nets = self.start()
        for state in self.run(nets, 5):
            if state.step == 3:  # the next step is the third call
                folder = checkpoint.save(state, tmp_path)
        want = {role: weights(net) for role, net in nets.modules().items()}
        nets = self.start()
        for _ in self.run(nets, 5, resume=folder):
            pass
        for role, net in nets.modules().items():
            assert all(torch.equal(p, want[role][name]) for name, p in weights(net).items())

    def test_off_it_changes_nothing(self):
        assert dataclasses.replace(self.METHOD, walk=False) == DMD2(every=6, gan=0.1, gan_fake=0.1)
