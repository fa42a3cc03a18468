"""ECT, TCM, sCM, MeanFlow, rCM, SANA-Sprint and TwinFlow: the numbers of the authors' code. See CONTRIBUTING.md, Tests.

Every case that is stored runs. All are float64; an error is relative to the largest entry, of gradients the largest of
all of a case.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from replay import Replay, cases, filled, gradients, load, module, under

from distill.diffusion.curriculum import ECTCurriculum
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import LogitNormal, LogNormal, StudentT, Uniform
from distill.methods import CT, RCM, SCM, TCM, MeanFlow, Sprint, TwinFlow
from distill.ranges import MOST
from distill.roles import Nets

DOUBLE = 1e-8


@pytest.fixture
def case(golden):
    """case("scm/rf_sigma1") -> the stored tensors and numbers, and the class of the small networks."""

    def read(name):
        stored = load(golden(f"consistency/{name}.safetensors"))
        facts = json.loads(golden(f"consistency/{name}.json").read_text())
        return stored, facts, module(golden("consistency/tiny_nets.py")).Mini

    return read


def whole(tensors):
    """One tensor of all gradients: an error is relative to the largest of them."""
    return {"": torch.cat([tensors[name].flatten() for name in sorted(tensors)])}


def inner(stored, prefix):
    """Weights or gradients of a network without the name of the wrapper that the authors put around it."""
    return {name.removeprefix("net."): a for name, a in under(stored, prefix).items()}


def edm(Mini, weights, null=None):
    """A network of EDM, told ln(sigma) / 4."""
    call = lambda net, x, sigma, c: net(x / (0.25 + sigma**2).sqrt()[:, None, None, None], sigma.log() / 4, **(c or {}))
    return Denoiser(filled(Mini(ch=3), weights), EDM(), "edm", call, null)


def flow(net, scale=1.0, null=None):
    """A velocity network of rectified flow, told scale * t."""
    return Denoiser(net, Flow(scale), "flow", null=null)


def squeezed(stored):
    """Videos of one frame as images."""
    return {name: a.squeeze(2) if a.ndim == 5 else a for name, a in stored.items()}


def checked(close, loss, net, want, grad):
    """The loss and its gradient to the network."""
    loss.backward()
    close("loss", loss, want, DOUBLE)
    close("gradient to the student", whole(gradients(net)), whole(grad), DOUBLE)


# ---- consistency training ----


@pytest.mark.level(4, "CT")
@pytest.mark.parametrize("name", cases("ect", "stage0"))
def test_ect(case, close, name):
    stored, facts, Mini = case(f"ect/{name}")
    student = edm(Mini, inner(stored, "net"))
    method = CT(ECTCurriculum(q=facts.get("q", 2)))
    draw = Replay({"t": stored["draw/rnd_normal"], "eps": stored["draw/eps"]}, step=facts["stage"] * 25_000)
    x = stored["in/images"]
    loss, _ = method.student_loss(x, Nets(student, Student(student), x.shape[1:]), {}, draw)
    assert draw.used_up
    checked(close, loss, student.net, stored["out/loss"], inner(stored, "grad"))


@pytest.mark.level(4, "TCM")
@pytest.mark.parametrize("name", cases("tcm", "cifar"))
def test_tcm(case, close, name):
    """A sample's number in the batch says whether it is at the boundary: the stored ones get numbers that do."""
    stored, facts, Mini = case(f"tcm/{name}")
    student, first = (edm(Mini, inner(stored, name)) for name in ("net", "frozen"))
    start, bound = facts["transition_t"], stored["draw/boundary"].bool()
    method = TCM(
        ECTCurriculum(StudentT(df=facts["df"], low=start), q=1 / (1 - facts["ratio"]), every=MOST),
        c=facts["huber_const"],
        c_out=facts.get("weighting") == "c_out_sq",
        start=start + 1e-8,
        boundary=facts["boundary_prob"],
        weight=facts["w_boundary"],
    )
    ours, numbers = method.bound(Replay(samples=torch.arange(8))), torch.zeros(8, dtype=torch.long)
    numbers[bound], numbers[~bound] = (torch.arange(8)[some] for some in (ours, ~ours))
    draw = Replay({"eps": stored["draw/eps"]}, {"t": stored["draw/u"]}, samples=numbers)
    x, c = stored["in/images"], {"c": stored["in/text"]}
    nets = Nets(student, Student(student), x.shape[1:], target=first)
    loss, _ = method.student_loss(x, nets, {"real_c": c}, draw)
    assert draw.used_up
    checked(close, loss, student.net, stored["out/loss"], inner(stored, "grad"))


# ---- continuous time ----


@pytest.mark.level(4, "SCM")
@pytest.mark.parametrize("name", cases("scm", "rf_sigma1"))
def test_scm(case, close, name):
    stored, facts, Mini = case(f"scm/{name}")
    null = {"c": stored["in/null"]}
    if facts["net"] == "EdmNet":
        student, teacher = (edm(Mini, inner(stored, p), null) for p in ("student", "teacher"))
    else:
        student, teacher = (flow(filled(Mini(ch=3), inner(stored, p)), 1.0, null) for p in ("student", "teacher"))
    method = SCM(
        guidance=facts["guidance"] or 1.0,
        sigma_d=facts["sigma_data"],
        times=LogNormal(*facts["law"]),
        warmup=facts["warmup"],
        c=facts["c"],
        norm="rms" if facts["rms_norm"] else "vector",
        prior=facts["prior_weighting"],
    )
    draw = Replay({"t": stored["draw/n"], "eps": stored["draw/eps"]}, step=facts["iteration"])
    x = stored["in/real"]
    loss, _ = method.student_loss(
        x, Nets(teacher, Student(student), x.shape[1:]), {"real_c": {"c": stored["in/text"]}}, draw
    )
    assert draw.used_up
    checked(close, loss, student.net, stored["out/loss_elem"].mean(), inner(stored, "grad"))


# ---- average velocities ----


def averaging(net, null):
    """A velocity network of two times."""
    call = lambda net, x, t, c: net(x, t, c["c"], r=c.get("end"))
    return Denoiser(net, Flow(1.0), "flow", call, null)


@pytest.mark.level(4, "MeanFlow")
@pytest.mark.parametrize("name", [name for name in cases("meanflow", "paper") if not name.startswith("fg_")])
def test_meanflow(case, close, name):
    stored, facts, Mini = case(f"meanflow/{name}")
    table, x = stored["in/table"], stored["in/x"]
    student = averaging(filled(Mini(second=True), under(stored, "net")), {"c": table[facts["null_row"]][None]})
    B, number = len(x), torch.arange(len(x))
    law = LogitNormal(facts["P_mean"], facts["P_std"])
    guided = {"omega": facts["omega"], "kappa": facts["kappa"]}
    method = MeanFlow(**guided, times=law, p=facts["norm_p"], floor=facts["norm_eps"])
    equal = (number >= int(B * facts["data_proportion"])).double()
    dropped = (number >= facts["dropped_first"]).double()
    normal = {"t": stored["draw/n_a"], "r": stored["draw/n_b"], "eps": stored["draw/eps"]}
    draw = Replay(normal, {"equal": equal, "drop": dropped})
    batch = {"real_c": {"c": table[stored["in/label"]]}}
    loss, _ = method.student_loss(x, Nets(student, Student(student), x.shape[1:]), batch, draw)
    assert draw.used_up
    checked(close, loss, student.net, stored["out/loss"], under(stored, "grad"))


@pytest.mark.parametrize("name", cases("meanflow", "fg_l2_poly1", "fg_"))
def test_meanflow_of_a_teacher(case, close, name):
    stored, facts, Mini = case(f"meanflow/{name}")
    null, x = {"c": stored["in/null"]}, stored["in/x"]
    student = averaging(filled(Mini(second=True), under(stored, "student")), null)
    teacher = flow(filled(Mini(), under(stored, "teacher")), 1.0, null)
    times = {"t": stored["draw/t"], "r": stored["draw/r"], "equal": torch.ones(len(x)), "drop": torch.ones(len(x))}
    draw = Replay({"eps": stored["draw/eps"]}, times, step=facts["iteration"])
    method = MeanFlow(
        velocity="teacher",
        guidance=facts["guidance"],
        times=Uniform(0.0, 1.0),
        equal=0.0,
        p=float(facts["norm_method"].removeprefix("poly_")),
        floor=facts["norm_const"],
        norm="square" if facts["loss_type"] == "l2" else "rms" if facts["spatial_invariance"] else "vector",
        warmup=facts["warmup"],
    )
    nets, batch = Nets(teacher, Student(student), x.shape[1:]), {"real_c": {"c": stored["in/text"]}}
    loss, _ = method.student_loss(x, nets, batch, draw)
    assert draw.used_up
    checked(close, loss, student.net, stored["out/loss_elem"].mean(), under(stored, "grad"))


@pytest.mark.level(4, "TwinFlow")
@pytest.mark.parametrize("name", cases("twinflow", "kappa0_N2"))
def test_twinflow(case, close, name):
    """Theirs is a mean over three parts of the base and one of the twin, plus .5 of the third loss: 3/4 of our sum.

    Each loss here has its own samples, so the terms are asked for one at a time. Their Barron is ours times 1.00499.
    """
    stored, facts, Mini = case(f"twinflow/{name}")
    x, text = stored["in/real"], stored["in/text"]

    def told(net, x, t, c):  # a negative end makes both times negative
        r = c.get("end", torch.zeros_like(t))
        return net(x, torch.where(r < 0, -t, t), c["c"], r=r)

    null = {"c": stored["in/null"]}
    of = lambda p: Denoiser(filled(Mini(ch=3, second=True), under(stored, p)), Flow(1.0), "flow", told, null)
    student, target = of("student"), of("target")
    nets = Nets(student, Student(student), x.shape[1:], target=target)
    barron = facts["loss"].startswith("barron")
    C = 1e-6 + 1e-8
    whole_base = TwinFlow(
        kappa=facts["kappa"], N=facts["estimate_order"], c=C**0.5 if barron else None, twin=0.0, rectify=0.0
    )
    share = torch.cat([torch.zeros(2), stored["draw/u_mul"][2:4].flatten(), 1 - stored["draw/u_any"][4:6].flatten()])
    samples, z = torch.tensor([0, 3, 1, 4, 2, 5]), stored["draw/z"]

    def base(method, **more):
        uniform = {"t": stored["draw/t"].flatten()[:6], "r": share} | more.pop("uniform", {})
        return Replay({"eps": z[:6]} | more, uniform, samples=samples)

    def turn(method, x_of, draw, z0, c):
        """The loss of `method` where its own samples are made from z0."""
        batch = {"real": x[:6], "real_c": {"c": text[:6]}, "c": {"c": c}}
        sample = method.sample(nets, batch, Replay({"z": z0}, samples=torch.arange(2))) if x_of else x[:6]
        loss, logs = method.student_loss(sample, nets, batch, draw)
        assert draw.used_up
        return loss, logs, sample

    alone, _, _ = turn(whole_base, False, base(whole_base), None, text[:6])
    method = replace(whole_base, twin=TwinFlow().twin, rectify=4 / 3 * facts["dist_match_cof"])
    assert TwinFlow().rectify == pytest.approx(4 / 3 * 0.5)  # SD3.5 and Qwen-Image
    with_twin = replace(method, rectify=0.0)
    t = stored["draw/t"].flatten()
    draw = base(with_twin, eps_twin=z[6:], uniform={"t_twin": t[6:]})
    twin, _, x_fake = turn(with_twin, True, draw, stored["draw/z_fake"], text[6:])
    close("samples of the twin", x_fake, stored["out/x_fake"], DOUBLE)
    rectified = replace(method, twin=0.0)
    draw = base(rectified, eps_rectify=stored["draw/z_rect"], uniform={"t_rectify": stored["draw/t_rect"].flatten()})
    rect, _, _ = turn(rectified, True, draw, z[:2], text[:2])
    loss = 0.75 * (C**0.5 / 1e-3 if barron else 1.0) * (twin + rect - alone)
    checked(close, loss, student.net, stored["out/loss"], under(stored, "grad"))


# ---- rCM ----


@pytest.fixture
def rcm(case):
    """rcm(name) -> stored tensors and numbers, the networks of a student with the stored times, and the batch."""

    def read(name):
        stored, facts, Mini = case(f"rcm/{name}")
        stored, null = squeezed(stored), {"c": stored["in/null"]}
        of = lambda p: flow(filled(Mini(ch=3, scale=1000.0), under(stored, p)), 1000.0, null)
        angles = torch.tensor(facts.get("angles", [torch.pi / 2]), dtype=torch.float64)
        times = (angles.sin() / (angles.sin() + angles.cos())).tolist()
        fake = of("fake") if any(key.startswith("fake/") for key in stored) else None
        nets = Nets(of("teacher"), Student(of("student"), (1.0, *times[1:])), (3, 8, 8), fake)
        return stored, facts, nets, {"c": {"c": stored["in/text"]}, "real_c": {"c": stored["in/text"]}}

    return read


@pytest.mark.level(4, "RCM")
@pytest.mark.parametrize("name", cases("rcm", "scm_after_warmup", "scm_"))
def test_rcm_consistency(rcm, close, name):
    stored, facts, nets, batch = rcm(name)
    draw = Replay({"t": stored["draw/n"], "eps": stored["draw/eps"]}, step=facts["iteration"])
    method = RCM(facts["teacher_guidance"], times=LogNormal(*facts["p_G"]), warmup=facts["tangent_warmup"], dmd=0.0)
    x = stored["in/real"]
    loss, _ = method.student_loss(x, nets, batch | {"real": x}, draw)
    assert draw.used_up
    want = stored["out/loss_elem"].mean()
    checked(close, facts["loss_scale"] * loss, nets.student.denoiser.net, want, under(stored, "grad"))


@pytest.mark.parametrize("name", cases("rcm", "dmd_one_call", "dmd_"))
def test_rcm_distribution_matching(rcm, close, name):
    """The authors' |x - sg(x - g)|^2 has no half: it is twice DMD2's loss."""
    stored, facts, nets, batch = rcm(name)
    calls = facts["calls"]
    method = RCM(facts["teacher_guidance"], warmup=0)
    normal = {f"renoise{i - 1}": stored[f"draw/noise{i}"] for i in range(1, calls)}
    normal |= {"z": stored["draw/noise0"], "eps": stored[f"draw/noise{calls}"]}
    draw = Replay(normal, {"t": stored["draw/u"]}, {"steps": calls - 1}, samples=torch.arange(6))
    x = method.sample(nets, batch, draw)
    close("the student's sample", x, stored["out/G_x0"], DOUBLE)
    loss, _ = method.matching.student_loss(x, nets, batch, draw)
    assert draw.used_up
    want = stored["out/loss_elem"].mean()
    checked(close, 2 * facts["loss_scale_dmd"] * loss, nets.student.denoiser.net, want, under(stored, "grad"))


@pytest.mark.parametrize("name", cases("rcm", "dmd_one_call", "dmd_"))
def test_rcm_fake_score(rcm, close, name):
    stored, facts, nets, batch = rcm(name)
    critic, method = under(stored, "critic"), RCM(facts["teacher_guidance"], warmup=0)
    normal = {"z": critic["draw/noise0"], "eps": critic["draw/noise1"]}
    draw = Replay(normal, {"t": critic["draw/u"]}, {"steps": 0}, player="fake", samples=torch.arange(6))
    with torch.no_grad():
        x = method.sample(nets, batch, draw)
    close("the student's sample", x, critic["out/G_x0"], DOUBLE)
    loss, _ = method.fake_loss(x, nets, batch, draw)
    assert draw.used_up
    checked(close, loss, nets.fake.net, critic["out/loss_elem"].mean(), under(critic, "grad"))


# ---- SANA-Sprint ----

SPRINT = 1e-4  # the authors' float32 angle 1.57080 of noise alone moves samples by 7e-6


class Tapped(torch.nn.Module):
    """The stored network; its two features are outputs of the modules h and d."""

    def __init__(self, net):
        super().__init__()
        self.net, self.h, self.d = net, torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x, t, c):
        h, d = self.net(x, t, c, taps=True)
        self.h(h), self.d(d)
        return self.net(x, t, c)


class Judges(torch.nn.Module):
    """Logits [B, 80] of both features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(32, 1, 1), torch.nn.Conv2d(32, 1, 1)

    def forward(self, h, d):
        return torch.cat([self.a(h.tanh()).flatten(1), self.b(d.tanh()).flatten(1)], dim=1)


class Known(torch.nn.Module):
    """The stored log-variance l, of halved latents: there v is twice ours."""

    def __init__(self, l):
        super().__init__()
        self.l = l

    def forward(self, s):
        return self.l - math.log(2)


@pytest.fixture
def sprint(case):
    def read(name):
        stored, facts, Mini = case(f"sprint/{name}")
        told = lambda net, x, t, c: net(x, t, c["c"], g=0.1 * c["guidance"][:, None])
        student = Denoiser(filled(Mini(gdim=1), under(stored, "student")), Flow(1.0), "flow", told)
        teacher = flow(Tapped(filled(Mini(), under(stored, "teacher"))), 1.0, {"c": stored.get("in/null")})
        nets = Nets(teacher, Student(student), (4, 8, 8), disc=filled(Judges(), under(stored, "heads")))
        batch = {"real": stored["in/latents"], "real_c": {"c": stored["in/text"]}}
        return stored, facts, nets, batch

    return read


def sprint_sample(stored, method, nets, batch, n, z):
    """The GAN's sample from the stored numbers."""
    uniform = {"guidance": stored["draw/w"] - 4, "last": stored["draw/u_last"]}
    draw = Replay({"s": stored[f"draw/{n}"], "z": stored[f"draw/{z}"]}, uniform)
    x = method.sample(nets, batch, draw)
    assert draw.used_up
    return x


@pytest.mark.level(4, "Sprint")
@pytest.mark.parametrize("adaptive", (False, True))
@pytest.mark.parametrize("name", cases("sprint", "G_logvar_at_optimum", "G_"))
def test_sprint_student(sprint, close, name, adaptive):
    """With l at its optimum theirs is our sum of squares; our own weight with the stored l is theirs, whatever l is."""
    stored, facts, nets, batch = sprint(name)
    if not adaptive and facts["logvar"] != "opt":
        return
    method = Sprint(warmup=facts["warmup"], gan=facts["adv_lambda"], taps=("h", "d"))
    l = stored["out/logvar"].flatten()
    if adaptive:
        method, nets.weight = replace(method, adaptive=True, prior=True, reduction="mean"), Known(l)
    x = sprint_sample(stored, method, nets, batch, "n_new", "z_new")
    close("the GAN's sample", x, 2 * stored["out/pred_x_0"], SPRINT)
    normal = {"t": stored["draw/n_t"], "eps": stored["draw/noise"], "gan_t": stored["draw/n_D"]}
    draw = Replay(normal | {"gan_eps": stored["draw/z_D"]}, {"guidance": stored["draw/w"] - 4})
    draw.step = facts["global_step"]
    loss, logs = method.student_loss(x, nets, batch, draw)
    assert draw.used_up
    close("loss of the GAN", logs["gan"], stored["out/adv_loss"], SPRINT)
    scm = loss - method.gan * logs["gan"] + (math.log(2) if adaptive else l.mean())
    close("loss of consistency", scm, stored["out/scm_loss"], SPRINT)
    loss.backward()
    grads = gradients(nets.student.denoiser.net)
    close("gradient to the student", whole(grads), whole(under(stored, "grad")), SPRINT)


@pytest.mark.parametrize("name", cases("sprint", "D", "D"))
def test_sprint_heads(sprint, close, name):
    """Theirs is half of the hinge loss."""
    stored, _, nets, batch = sprint(name)
    method = Sprint(taps=("h", "d"))
    with torch.no_grad():
        x = sprint_sample(stored, method, nets, batch, "n_t", "z")
    close("the GAN's sample", x, 2 * stored["out/pred_x_0"], SPRINT)
    normal = {f"gan_{what}_t": stored["draw/n_D"] for what in ("fake", "real")}
    normal |= {f"gan_{what}_eps": stored[f"draw/z_{what}"] for what in ("fake", "real")}
    draw = Replay(normal, player="fake")
    loss, _ = method.fake_loss(x, nets, batch, draw)
    assert draw.used_up
    (loss / 2).backward()
    close("loss of the heads", loss / 2, stored["out/loss_D"], SPRINT)
    close("gradient to the heads", whole(gradients(nets.disc)), whole(under(stored, "grad")), SPRINT)
