"""ESD: off the base to the bit; the numbers of SiD's and VSD's own guidance of the fake score; the sheet's variance."""

from dataclasses import replace

import pytest
import torch
from gaussian import F64, SCHEDULES, Gaussian, Line, Whitened, exact, nets_of
from test_forget import Doubles, after, same
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import drop
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.method import Requirement
from distill.methods import DMD, DMD2, VSD, DiffInstruct, Entropic, SiD, SiDA
from distill.roles import Nets

N, CLASSES = 8, 3
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
BASES = {
    "dmd2": DMD2(taps=("mid",), every=1),
    "dmd": DMD(regression=0.0),
    "diff-instruct": DiffInstruct(),
    "vsd": VSD(guidance=1.0),
    "sid": SiD(),
}


def labelled(draw):
    real = draw.normal("scan", (len(draw.samples), 2)).double()
    return {"c": {"label": draw.integers("label", 3)}, "real": real, "real_c": {"label": draw.integers("real", 3)}}


@pytest.mark.parametrize("name", BASES)
def test_off_is_the_base(name):
    base = BASES[name]
    want, _ = after(base, labelled)
    assert same(after(Entropic(base, entropy=0), labelled)[0], want)
    assert not same(after(Entropic(base), labelled)[0], want)
    assert Entropic(base).requirements == (*base.requirements, Requirement.NULL_CONDITION)
    assert Entropic(base, 0).requirements == base.requirements


@pytest.mark.level(1, "Entropic")
@pytest.mark.parametrize("entropy", (0.3, 1.0, 1.5))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_the_guidance_of_sid_and_vsd(schedule, entropy):
    """kappa2 = kappa3 = 1 - lambda of SiD, fake_guidance = 1 - lambda of VSD; and VSD's drops of conditions."""
    path, kind = SCHEDULES[schedule], "edm" if schedule == "edm" else "v"
    teacher, fake, student = (tiny(path, kind, seed, classes=CLASSES) for seed in range(3))
    nets, k = Nets(teacher, Student(student, (0.5,)), (2,), fake), 1 - entropy
    pairs = [(SiD(), SiD(kappa=(1.0, k, k, 1.0))), (VSD(guidance=1.0), VSD(guidance=1.0, fake_guidance=k))]
    for base, own in pairs:
        for player, net in nets.modules().items():
            if player == "fake" and isinstance(base, SiD):
                continue  # it drops before the sample is made
            found = []
            for method in (Entropic(base, entropy), own):
                batch, draw = labelled(Doubles(0, 0, "data", torch.arange(N))), Doubles(0, 0, player, torch.arange(N))
                x = method.sample(nets, batch, draw)
                update = next(u for u in method.updates() if u.player == player)
                found.append(torch.autograd.grad(update.loss(x, nets, batch, draw)[0], [*net.parameters()]))
            for ours, theirs in zip(*found, strict=True):
                near(ours, theirs)


@pytest.mark.level(1, "Entropic")
@pytest.mark.parametrize("entropy", (0.25, 0.5, 1.0, 1.25))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance(schedule, entropy):
    """A condition that names the sample itself has a fake score without spread; the entropy gives it a closed form.

    At a level (alpha, sigma) the generator rests at the variance v = lambda v_p - (1 - lambda) sigma^2 / alpha^2.
    """
    path, v_p = SCHEDULES[schedule], 9.0
    t = torch.tensor([0.3], dtype=F64)
    s = float(path.ratio(t))
    v = entropy * v_p - (1 - entropy) * s**2
    assert v > 0.1
    law = Gaussian(torch.tensor([0.7], dtype=F64), torch.tensor([[v_p]], dtype=F64))

    def pull(v):
        line = Line(torch.tensor([[v**0.5]], dtype=F64), law.mean)
        draw = Whitened(32, 1)
        samples = line(draw.normal("z", (32, 1)), None).detach()

        def call(net, x, native, c):  # under its condition the sample, under none the law of all
            named = c["named"].bool()[:, None]
            return torch.where(named, c["sample"], net(x, native))

        fake = replace(exact(line.law, path), call=call, null={"named": torch.zeros(1)})
        teacher = replace(exact(law, path), call=lambda net, x, native, c: net(x, native))
        nets = nets_of(line, teacher, fake=fake)
        nets.student.denoiser = Denoiser(line, path, "x0", call=lambda net, x, native, c: net(x, native))
        batch = {"c": {"named": torch.ones(32), "sample": samples}}
        method = Entropic(VSD(guidance=1.0, times=Fixed(0.3), reduction="sum"), entropy)
        loss, _ = method.updates()[0].loss(method.sample(nets, batch, draw), nets, batch, draw)
        return torch.autograd.grad(loss, (line.A, line.b))

    near(torch.stack([g.flatten()[0] for g in pull(v)]), torch.zeros(2, dtype=F64), 1e-8)
    assert pull(2 * v)[0] > 1e-4 and pull(v / 2)[0] < -1e-4


def test_drops_on_both_sides_of_a_gan():
    """A share of the conditions, the same ones of samples and of images; none without entropy, and no student's."""
    heard = {}

    class Ear(DMD2):
        def fake_loss(self, x, nets, batch, draw):
            heard["fake"] = batch
            return super().fake_loss(x, nets, batch, draw)

        def student_loss(self, x, nets, batch, draw):
            heard["student"] = batch
            return super().student_loss(x, nets, batch, draw)

    base = Ear(taps=("mid",), every=1)
    teacher, fake = (tiny(Flow(), "flow", seed, classes=CLASSES) for seed in range(2))
    nets = Nets(teacher, Student(teacher), (2,), fake, torch.nn.Linear(16, 1, dtype=F64))
    for entropy, p in ((0.5, 0.5), (0.0, 0.5)):
        draw = Doubles(0, 0, "fake", torch.arange(N))
        batch = labelled(draw)
        for update in Entropic(base, entropy, p).updates():
            update.loss(batch["real"], nets, batch, draw)
        mask = draw.uniform("drop", (N,)) < p * bool(entropy)
        assert bool(mask.any()) == bool(entropy) and not mask.all()
        for key in ("c", "real_c"):
            want = drop(batch[key], fake.null, mask)["label"]
            assert torch.equal(heard["fake"][key]["label"], want)
            assert torch.equal(heard["student"][key]["label"], batch[key]["label"])


@pytest.mark.parametrize("entropy", (0.5, 1.0))
def test_features_are_those_under_the_condition(entropy):
    """SiDA's logits of a guided fake score are read under c."""
    teacher, fake, student = (tiny(Flow(), "flow", seed, classes=CLASSES) for seed in range(3))
    nets = Nets(teacher, Student(student), (2,), fake)
    base = SiDA(taps=("mid",), gan=1.0)
    draw = Doubles(0, 0, "student", torch.arange(N))
    batch = labelled(draw)
    found = [m.updates()[1].loss(batch["real"], nets, batch, draw)[1]["gan"] for m in (base, Entropic(base, entropy))]
    near(*found)
