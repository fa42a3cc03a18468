"""The pieces that losses are made of, and discriminator heads."""

import math

import pytest
import torch
from gaussian import F64, SCHEDULES, Gaussian, exact
from tiny import tiny
from torch import nn

from distill import losses
from distill.diffusion.schedule import EDM, KINDS, Flow
from distill.losses import (
    denoising,
    gan_discriminator,
    gan_generator,
    gradient_surrogate,
    huber,
    jvp,
    normaliser,
    per_sample,
    reduce,
)
from distill.networks.discriminator import build_heads, head

near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


class TestReduce:
    def test_mean_and_sum(self):
        x = torch.randn(5, 3, 2, dtype=F64)
        near(reduce(x, "mean"), x.sum() / 30)
        near(reduce(x, "sum"), x.sum() / 5)

    def test_wrong(self):
        with pytest.raises(ValueError, match="reduction is 'none'; it must be 'mean' or 'sum'"):
            reduce(torch.ones(2), "none")

    def test_per_sample(self):
        x = torch.randn(5, 3, 2, dtype=F64)
        assert per_sample(x).shape == (5, 1, 1)
        near(per_sample(x)[:, 0, 0], torch.stack([one.mean() for one in x]))


class TestPush:
    @pytest.mark.parametrize("dtype", (torch.float32, F64))
    def test_gradient_is_g_exactly(self, dtype):
        """Bit for bit, however far apart x and g are; the surrogate |x - sg(x - g)|^2 / 2 rounds."""
        x = (1000 * torch.randn(7, 3, dtype=dtype)).requires_grad_()
        g = (1e-3 * torch.randn(7, 3, dtype=dtype)).requires_grad_()
        elements = gradient_surrogate(x, g)
        assert torch.equal(torch.autograd.grad(elements.sum(), x)[0], g)
        near(elements.detach(), g.detach() ** 2 / 2, 0)

    def test_no_gradient_to_g(self):
        x = torch.randn(4, 2, dtype=F64, requires_grad=True)
        g = x**2
        assert torch.equal(torch.autograd.grad(gradient_surrogate(x, g).sum(), x)[0], g)

    def test_through_a_network(self):
        """To the weights: the vector-Jacobian product with g."""
        net, z, g = nn.Linear(2, 2).double(), torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64)
        got = torch.autograd.grad(gradient_surrogate(net(z), g).sum(), net.weight)[0]
        near(got, g.T @ z)


class TestNormaliser:
    def test_value(self):
        x, real = torch.randn(2, 5, 3, 4, dtype=F64)
        w = normaliser(x, real)
        assert w.shape == (5, 1, 1)
        near(w[:, 0, 0], torch.stack([(a - b).abs().mean() for a, b in zip(x, real)]))

    def test_floor_and_gradient(self):
        x = torch.ones(2, 3, dtype=F64, requires_grad=True)
        near(normaliser(x, x)[:, 0], tensor(1e-5, 1e-5))
        assert not normaliser(x, 2 * x).requires_grad


class TestDenoising:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_is_zero_for_the_target(self, schedule, kind):
        """Data at one point only: the exact denoiser gives that point, and the loss is 0 in every space."""
        path, point = SCHEDULES[schedule], tensor(0.3, -0.7)
        law, t = Gaussian(point, torch.zeros(2, 2, dtype=F64)), torch.linspace(0.05, 0.95, 64, dtype=F64)
        x0, eps = point.expand(64, 2), torch.randn(64, 2, dtype=F64)
        pred = exact(law, path, kind)(path.diffuse(x0, eps, t), t)
        assert denoising(pred, x0, eps, "sum") < 1e-18
        assert denoising(pred, x0 + 0.01, eps + 0.02, "sum") > 1e-7

    @pytest.mark.parametrize("reduction", ("mean", "sum"))
    def test_edm_weight(self, reduction):
        """(sigma^2 + sigma_d^2) / (sigma sigma_d)^2 on |D - x|^2 (Karras et al. 2022, eq. 108)."""
        x0, eps = torch.randn(2, 64, 2, dtype=F64)
        t = torch.linspace(0.05, 0.95, 64, dtype=F64)
        pred, sigma = tiny(EDM(), "edm")(EDM().diffuse(x0, eps, t), t), EDM().native(t)[:, None]
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        near(denoising(pred, x0, eps, reduction), reduce(weight * (pred.x0 - x0) ** 2, reduction), 1e-9)

    @pytest.mark.parametrize(
        "kind, weight",
        (
            ("x0", lambda a, s: 1 + 0 * a),
            ("eps", lambda a, s: (a / s) ** 2),
            ("v", lambda a, s: (a**2 + s**2) ** 2 / s**2),
            ("flow", lambda a, s: ((a + s) / s) ** 2),
        ),
    )
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_weight_on_the_clean_sample(self, schedule, kind, weight):
        """The space of the network is a weight on |D - x|^2."""
        path, (x0, eps) = SCHEDULES[schedule], torch.randn(2, 64, 2, dtype=F64)
        t = torch.linspace(0.1, 0.9, 64, dtype=F64)
        pred = tiny(path, kind)(path.diffuse(x0, eps, t), t)
        want = (weight(pred.alpha, pred.sigma) * (pred.x0 - x0) ** 2).mean()
        near(denoising(pred, x0, eps, "mean"), want, 1e-9)


class TestHuber:
    def test_values(self):
        """Square near 0, absolute value far away."""
        near(huber(tensor(0.0, 3.0, -4.0), 4.0), tensor(0.0, 1.0, math.sqrt(32) - 4))
        near(huber(tensor(1e-5)), tensor(1e-10 / 2e-3), 2e-12)
        near(huber(tensor(2.0, -5.0), 0.0), tensor(2.0, 5.0))

    @pytest.mark.parametrize("c", (0.0, 1e-3, 1.0))
    def test_gradient(self, c):
        delta = tensor(-1.0, 0.0, 1e-4, 2.0).requires_grad_()
        (slope,) = torch.autograd.grad(huber(delta, c).sum(), delta)
        want = delta.detach() / (delta.detach() ** 2 + c**2).sqrt() if c else tensor(-1.0, 0.0, 1.0, 1.0)
        near(slope, want)


class TestGan:
    def test_generator(self):
        logits = tensor(0.0, 2.0, -3.0)
        near(gan_generator(logits), -torch.sigmoid(logits).log().mean())

    def test_discriminator(self):
        fake, real = tensor(0.0, 2.0), tensor(-1.0, 3.0)
        near(gan_discriminator(fake, real), -(torch.sigmoid(-fake).log() + torch.sigmoid(real).log()).mean())
        near(gan_discriminator(tensor(0.0), tensor(0.0)), torch.tensor(2 * math.log(2), dtype=F64))

    def test_signs(self):
        """The generator raises the logits of its samples, the discriminator lowers them and raises the real ones'."""
        fake, real = tensor(0.3).requires_grad_(), tensor(-0.2).requires_grad_()
        assert torch.autograd.grad(gan_generator(fake), fake)[0] < 0
        down, up = torch.autograd.grad(gan_discriminator(fake, real), (fake, real))
        assert down > 0 > up


class TestJvp:
    def test_against_reverse_mode(self):
        net = tiny(Flow()).net
        (x, v), t, dt = torch.randn(2, 4, 2, dtype=F64), torch.rand(4, dtype=F64), torch.randn(4, dtype=F64)
        value, slope = jvp(net, (x, t), (v, dt))
        want = torch.autograd.functional.jvp(net, (x, t), (v, dt))
        near(value, want[0])
        near(slope, want[1])

    def test_no_graph(self):
        net = tiny(Flow()).net
        x, t = torch.randn(4, 2, dtype=F64), torch.rand(4, dtype=F64)
        with torch.enable_grad():
            value, slope = jvp(net, (x, t), (x, t))
        assert not value.requires_grad and not slope.requires_grad

    @pytest.mark.parametrize("mask", (None, "words", "weights"))
    def test_attention(self, mask):
        """Flash and efficient attention have no forward-mode rule: the math kernel has. Other threads keep theirs."""
        attend, flash = torch.nn.functional.scaled_dot_product_attention, torch.backends.cuda.flash_sdp_enabled
        q, k, v, u = torch.randn(4, 2, 8, 16, 32, dtype=F64)
        told = {"words": torch.rand(2, 1, 1, 16) < 0.7, "weights": torch.randn(16, 16, dtype=F64)}.get(mask)
        seen = []

        def f(q):
            seen.append(flash())
            return attend(q, k, v, told, scale=0.3)

        value, slope = jvp(f, (q,), (u,))
        near(value, f(q))
        near(slope, (f(q + 1e-6 * u) - f(q - 1e-6 * u)) / 2e-6, 1e-7)
        assert seen[0] == flash()

    def test_method_calls_it_by_this_name(self):
        from distill.methods import scm

        assert scm.jvp is losses.jvp


class TestHead:
    @pytest.mark.parametrize("channels, side, strided", ((32, 4, 0), (64, 8, 1), (48, 16, 2)))
    def test_images(self, channels, side, strided):
        """DMD2's: convolutions of stride 2 to 4x4, one to 1x1, one logit; group normalisation and SiLU between."""
        feature = torch.randn(3, channels, side, side)
        disc = head(feature)
        assert disc(feature).shape == (3, 1, 1, 1)
        kinds = [type(layer) for layer in disc]
        assert kinds == [nn.Conv2d, nn.GroupNorm, nn.SiLU] * (strided + 1) + [nn.Conv2d]
        assert [layer.stride[0] for layer in disc if isinstance(layer, nn.Conv2d)] == [2] * strided + [1, 1]

    def test_vectors(self):
        assert head(torch.randn(3, 16))(torch.randn(5, 16)).shape == (5, 1)

    @pytest.mark.parametrize(
        "shape", ((8, 6, 6), (8, 2, 3), (8, 16, 4), (12, 45, 80), (4, 1, 1), (8, 5, 8, 12)), ids=str
    )
    def test_every_place_of_a_map_counts(self, shape):
        """Other sides than 4, 8, ... and frames of a video: one logit, to which every pixel contributes."""
        feature = torch.randn(3, *shape, requires_grad=True)
        disc = head(feature[:1])
        assert disc(feature).shape == (3, 1, 1, 1)
        near(disc(feature)[1:], disc(feature[1:]), 1e-6)
        assert (torch.autograd.grad(disc(feature).sum(), feature)[0] != 0).all()

    def test_frames_are_judged_alone(self):
        video = torch.randn(2, 8, 5, 8, 8)
        disc = head(video)
        near(disc(video), torch.stack([disc(video[:, :, i]) for i in range(5)]).mean(0), 1e-6)

    def test_tokens(self):
        """[B, N, C]: the mean over tokens, in whatever order and however many."""
        tokens = torch.randn(3, 10, 16)
        disc = head(tokens)
        assert disc(tokens).shape == (3, 1)
        near(disc(tokens), disc(tokens[:, torch.randperm(10)]), 1e-6)
        near(disc(tokens), (disc(tokens[:, :5]) + disc(tokens[:, 5:])) / 2, 1e-6)

    def test_every_place_may_have_a_logit(self):
        """[B, places], whose mean is the one logit; of tokens, maps of 4x4 patches and the frames of a video."""
        for feature, places in (
            (torch.randn(3, 10, 16), 10),
            (torch.randn(3, 8, 6, 5), 6),
            (torch.randn(3, 8, 2, 4, 4), 2),
        ):
            disc = head(feature[:1])
            each = head(feature[:1], places=True)
            each.load_state_dict(disc.state_dict())
            assert each(feature).shape == (3, places)
            near(each(feature).mean(1), disc(feature).flatten(), 1e-6)

    def test_one_tap_is_a_head_alone(self):
        """With the names of its weights as they were; several are read side by side, whatever their kinds."""
        maps, tokens = torch.randn(3, 8, 4, 4), torch.randn(3, 10, 16)
        assert build_heads([maps[:1]]).state_dict().keys() == head(maps[:1]).state_dict().keys()
        both = build_heads([maps[:1], tokens[:1]])
        logits = both(maps, tokens)
        assert logits.shape == (3, 2) and len(both.state_dict()) == sum(len(one.state_dict()) for one in both)
        near(logits[:, :1], both[0](maps).flatten(1), 1e-6)
        near(logits[:, 1:], both[1](tokens), 1e-6)
        assert build_heads([maps[:1], tokens[:1]], places=True)(maps, tokens).shape == (3, 11)
        with pytest.raises(ValueError, match="zip"):
            both(maps)

    def test_precision(self):
        """Half-precision features enter a float32 head."""
        for feature in (torch.randn(1, 8, 4, 4), torch.randn(1, 8)):
            assert head(feature)(feature.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize("shape", ((8,), (1, 8, 4, 4, 4, 4)))
    def test_other_shapes(self, shape):
        with pytest.raises(ValueError, match=r"tapped feature has shape .*8.*needs \[B, C\], tokens \[B, N, C\]"):
            head(torch.zeros(shape))
