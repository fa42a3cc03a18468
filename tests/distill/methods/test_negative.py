"""Negative prompts in the cross-attention: off to the bit, on by closed forms. And PG-SB's random guidance."""

import pytest
import torch
from gaussian import SCHEDULES
from tiny import tiny as small

from distill.diffusion.guidance import CFG
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.methods import VSD
from distill.networks.negative_attention import NASA
from distill.random import Draw
from distill.roles import Nets
from pipelines import load
from pipelines.families import tiny
from pipelines.inference.negative_prompt import NAG, apply_negative_prompt

FAMILIES = ("sd", "pixart", "sana", "wan")
near = lambda got, want, tol=1e-5: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "teacher"
    tiny.save(request.param, folder)
    return load(folder)


def output(teacher, text="a red fox"):
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return teacher.denoiser(x, torch.full((2,), 0.9, dtype=torch.float64), teacher.encode([text, text])).out


class Shown:
    """A rule that keeps what it is shown, and takes the prompt's."""

    def __init__(self, part=0):
        self.part, self.seen = part, []

    def __call__(self, *z):
        self.seen.append(z)
        return z[self.part]


def test_off_and_on(teacher):
    """alpha = 0 and blend = 0 are the network to the bit, also after a block that was left; others are not."""
    plain = output(teacher)
    for rule in (NASA(0.0), NAG(blend=0.0)):
        with apply_negative_prompt(teacher, "blurry", rule):
            assert torch.equal(output(teacher), plain)
    for rule in (NASA(0.3), NAG()):
        with apply_negative_prompt(teacher, "blurry", rule):
            moved = output(teacher)
        with apply_negative_prompt(teacher, "a tree", rule):
            other = output(teacher)
        assert (moved - plain).abs().max() > 1e-5 and (moved - other).abs().max() > 1e-6
        assert torch.equal(output(teacher), plain)


def test_is_the_negative_prompts_attention(teacher):
    """In the first layer Z- is the Z+ that the negative text has as a prompt; with Z = Z- it is that prompt."""
    plain = output(teacher, "blurry")
    with apply_negative_prompt(teacher, "blurry", a := Shown()):
        output(teacher)
    with apply_negative_prompt(teacher, "a red fox", b := Shown()):
        output(teacher, "blurry")
    near(a.seen[0][1], b.seen[0][0])
    near(b.seen[0][1], a.seen[0][0])
    with apply_negative_prompt(teacher, "a red fox", c := Shown()):
        output(teacher)
    near(c.seen[0][1], c.seen[0][0])  # NASA: (1 - alpha) Z
    with apply_negative_prompt(teacher, "blurry", Shown(1)):  # the words reach the network through these layers alone
        near(output(teacher), plain)


def test_rules():
    """NASA by hand; NAG's far point keeps its direction, and at most tau of the prompt's norm."""
    z, n = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double().chunk(2)
    near(NASA(0.2)(z, n), z - 0.2 * n, 1e-12)
    near(NAG(scale=1.0)(z, n), z, 1e-12)
    near(NAG(3.0, 1e9, 1.0)(z, n), z + 2 * (z - n), 1e-12)
    for norm in (1, 2):
        far = NAG(30.0, 2.5, 1.0, norm)(z, n)
        near(far.abs().pow(norm).sum(-1), 2.5**norm * z.abs().pow(norm).sum(-1), 1e-12)
        near(NAG(30.0, 2.5, 1.0, norm)(0 * z, 0 * n), 0 * z, 1e-12)  # of a token that hears nothing
    far = NAG(30.0, 2.5, 1.0)(z, n)
    near(far.abs().sum(-1), 2.5 * z.abs().sum(-1), 1e-12)
    with pytest.raises(ValueError, match="norm is 3; it must be 1"):
        NAG(norm=3)
    near(torch.nn.functional.cosine_similarity(far, 30 * z - 29 * n, -1), torch.ones(1, 5).double(), 1e-12)
    near(NAG(30.0, 2.5, 0.25)(z, n), 0.25 * far + 0.75 * z, 1e-12)


def test_no_cross_attention(tmp_path):
    tiny.save("flux", tmp_path / "flux")
    with (
        pytest.raises(ValueError, match="has no cross-attention"),
        apply_negative_prompt(load(tmp_path / "flux"), "x", NASA()),
    ):
        pass


@pytest.mark.level(1, "VSD")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("low, high", ((0.5, 4.0), (2.0, 2.0)))
def test_random_guidance_is_one_for_both_scores(low, high, schedule):
    """PG-SB: x . (real^k - fake^k), one k a sample in [low, high] and the same in both; of low = high, SwiftBrush's."""
    N, classes = 64, 3
    path, kind = SCHEDULES[schedule], "edm" if schedule == "edm" else "v"
    teacher, fake, student = (small(path, kind, seed, classes=classes) for seed in range(3))
    nets, draw = Nets(teacher, Student(student, (0.5,)), (2,), fake), Draw(0, 0, "student", torch.arange(N))
    c, t = {"label": torch.arange(N) % classes}, torch.full((N,), 0.4, dtype=torch.float64)
    x = draw.normal("x", (N, 2)).double().requires_grad_()
    at = lambda k: VSD(guidance=k, times=Fixed(0.4), reduction="sum", weight=False)
    (got,) = torch.autograd.grad(at((low, high)).student_loss(x, nets, {"c": c}, draw)[0], x)
    k = low + (high - low) * draw.uniform("guidance", (N,)).double()
    x_t = teacher.path.diffuse(x.detach(), draw.normal("eps", (N, 2)).double(), t)
    real, other = (CFG(net, k)(x_t, t, c).eps for net in (teacher, fake))
    near(got, (real - other).detach() / N, 1e-6)
    assert k.min() >= low and k.max() <= high and (k.std() > 0.8) == (high > low)
    if low == high:
        near(got, torch.autograd.grad(at(low).student_loss(x, nets, {"c": c}, draw)[0], x)[0], 1e-9)
