"""LCM, PCM and CD: consistency distillation on a grid, the numbers of the authors' code. See CONTRIBUTING.md, Tests.

Every case that is stored runs. LCM and PCM are float32: losses to 1e-4, gradients to 1e-3 of the largest of all.
"""

import json

import pytest
import torch
from replay import Replay, cases, filled, gradients, load, module, under

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import embedding
from distill.diffusion.schedule import EDM, VP
from distill.diffusion.solver import heun
from distill.diffusion.student import Student
from distill.diffusion.times import phase
from distill.methods import LCD, PCM
from distill.networks.discriminator import HeadList, Pixels
from distill.roles import Nets

LOSS, GRADIENT, DOUBLE = 1e-4, 1e-3, 1e-8
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@pytest.fixture
def case(golden):
    """case("lcm/eps_huber") -> the stored tensors, the stored numbers, and the class of the small networks."""

    def read(name):
        tensors = load(golden(f"consistency/{name}.safetensors"))
        facts = json.loads(golden(f"consistency/{name}.json").read_text())
        return tensors, facts, module(golden("consistency/tiny_nets.py")).Mini

    return read


def table(tensors, facts, net, call, null=None):
    schedule = VP(tuple(tensors["table/alphas_cumprod"].double().tolist()))
    return Denoiser(net, schedule, KINDS[facts["prediction"]], call, null)


def close_gradients(close, net, want, tol):
    """All gradients to a network as one tensor: an error is relative to the largest of them."""
    names, ours = sorted(want), gradients(net)
    assert names == sorted(ours)
    one = lambda grads: torch.cat([grads[name].double().flatten() for name in names])
    close("gradient", one(ours), one(want), tol)


def read_text(net, x, n, c):
    """Call a Mini with its text and, where the condition has one, LCM's embedding of the guidance."""
    g = embedding(c["guidance"] - 1, net.told.in_features) if "guidance" in c else None
    return net(x, n, c["text"], g)


def points(tensors, N, key="draw/index"):
    """The uniform numbers in the middle of those that lead to the stored indices."""
    return (tensors[key].double() + 0.5) / N


# ---- LCM ----


def lcm(tensors, facts, Mini):
    """(method, roles, batch, draw) of a case."""
    make = lambda role: filled(Mini(**facts["net"]), under(tensors, role))
    student, target = (table(tensors, facts, make(role), read_text) for role in ("student", "target"))
    teacher = table(tensors, facts, make("teacher"), read_text, {"text": tensors["in/uncond"][:1]})
    low, high = facts["omega_range"]
    huber = facts["huber_c"] if facts["loss_type"] == "huber" else None
    method = LCD(facts["N"], (low + 1.0, high + 1.0), huber_c=huber)
    batch = {"real_c": {"text": tensors["in/text"]}}
    nets = Nets(teacher, Student(student), (4, 8, 8), target=target)
    draw = Replay(
        {"eps": tensors["draw/noise"]}, {"t": points(tensors, facts["N"]), "guidance": tensors["draw/u_guidance"]}
    )
    return method, nets, batch, draw


@pytest.mark.level(4, "LCD")
@pytest.mark.parametrize("name", [name for name in cases("lcm", "eps_huber") if not name.startswith("loop")])
def test_lcm(case, close, name):
    tensors, facts, Mini = case(f"lcm/{name}")
    method, nets, batch, draw = lcm(tensors, facts, Mini)
    i = tensors["draw/index"]
    times = {key: (method.time(i + k, nets) * 999).round() for key, k in (("start_timesteps", 1), ("timesteps", 0))}
    assert all(torch.equal(n.long(), tensors[f"out/{key}"]) for key, n in times.items())
    out, target, _ = method.solutions(tensors["in/latents"], nets, batch, draw)
    assert draw.used_up
    loss, _ = method.distance(out - target)
    loss.backward()
    close("student at x_t", out, tensors["out/model_pred"], GRADIENT)
    close("target at x_s", target, tensors["out/target"], GRADIENT)
    close("loss", loss, tensors["out/loss"], LOSS)
    close_gradients(close, nets.student.denoiser.net, under(tensors, "grad"), GRADIENT)
    assert not gradients(nets.target.net)


# ---- PCM ----


def heads(weights):
    """The stored heads as ours, by the numbers in their names."""
    made = {}
    for name, value in weights.items():
        number, _, rest = name.partition(".")
        made.setdefault(int(number), {})[rest.removeprefix("0.")] = value
    return HeadList(filled(Pixels(len(own["conv_out.weight"][0])), own) for _, own in sorted(made.items()))


def pcm(tensors, facts, Mini):
    low, high = facts["omega_range"]
    make = lambda role: filled(Mini(scale=1000.0), under(tensors, role))
    teacher = table(tensors, facts, make("teacher"), read_text, {"text": tensors["in/uncond"][:1]})
    student = table(tensors, facts, make("student"), read_text)
    M = facts["multiphase"]
    edges = [1000 * (m * facts["N"] // M) // facts["N"] - 1 for m in range(M, 0, -1)]
    taps = {"d and d/2": ("down", "half"), "h and d": ("first", "down")}[facts["features"].partition(",")[0]]
    method = PCM(facts["N"], (low + 1.0, high + 1.0), huber_c=facts["huber_c"], gan=facts["adv_weight"], taps=taps)
    times = tuple(n / 999 for n in edges)
    nets = Nets(teacher, Student(student, times, 1.0, "tcd"), (4, 8, 8), disc=heads(under(tensors, "heads")))
    nets.teacher.features = lambda x, t, c, taps: read(nets.teacher, x, t, c, taps)
    method.on_build(nets)
    return method, nets, {"real_c": {"text": tensors["in/text"]}}


def read(teacher, x, t, c, taps):
    """The features that the stored heads see, of the networks' own taps."""
    h, d = teacher.net(x, teacher.schedule.native(t).float(), c["text"], taps=True)
    return [{"first": h, "down": d, "half": d / 2}[tap] for tap in taps]


def drawn(tensors, facts, both):
    """The draws of a turn of the student, or of the heads, which see the target too."""
    share = (tensors["draw/gan_timesteps"].double() + 1) / 1000 * facts["N"]
    end = torch.where(tensors["out/end_timesteps"] > 0, tensors["out/end_timesteps"] + 1, 0) / 1000 * facts["N"]
    normal = {"eps": tensors["draw/noise"], "gan_eps0": tensors["draw/gan_noise_fake"]}
    uniform = {"t": points(tensors, facts["N"]), "guidance": tensors["draw/u_guidance"]}
    low, high = phase(end.round(), facts["N"], facts["multiphase"])
    uniform["gan_t"] = (share.round() - end.round()) / (high - low)
    return Replay(normal | ({"gan_eps1": tensors["draw/gan_noise_real"]} if both else {}), uniform)


@pytest.mark.level(4, "PCM")
@pytest.mark.parametrize("name", cases("pcm", "four_phases_N40"))
def test_pcm(case, close, name):
    tensors, facts, Mini = case(f"pcm/{name}")
    method, nets, batch = pcm(tensors, facts, Mini)
    i, x = tensors["draw/index"].double(), tensors["in/latents"]
    assert torch.equal((method.time(i + 1, nets) * 999).round().long(), tensors["out/start_timesteps"])
    assert torch.equal((method.time(i, nets) * 999).round().long(), tensors["out/timesteps"])
    draw = drawn(tensors, facts, False)
    e = method.time(method.end_index(i, nets, draw), nets)
    assert torch.equal((e * 999).round().long(), tensors["out/end_timesteps"])
    out, target, _ = method.solutions(x, nets, batch, drawn(tensors, facts, False))
    close("student at e", out, tensors["out/model_pred"], GRADIENT)
    close("target at e", target, tensors["out/target"], GRADIENT)
    loss, logs = method.student_loss(x, nets, batch, draw)
    assert draw.used_up
    loss.backward()
    close("loss", loss, tensors["out/loss"], LOSS)
    close("adversarial loss", method.gan * logs["gan"], tensors["out/g_loss"], LOSS)
    close_gradients(close, nets.student.denoiser.net, under(tensors, "grad"), GRADIENT)
    nets.disc.zero_grad()
    draw = drawn(tensors, facts, True)
    loss, _ = method.fake_loss(x, nets, batch, draw)
    assert draw.used_up
    loss.backward()
    close("loss of the heads", loss, tensors["out/d_loss"], LOSS)
    want = {name.replace(".0.", ".", 1): grad for name, grad in under(tensors, "grad_heads").items()}
    close_gradients(close, nets.disc, want, GRADIENT)


# ---- CD ----


def plain(net, x, sigma, c):
    return net(x / (sigma**2 + 0.25).sqrt()[:, None, None, None], 250 * (sigma + 1e-44).log(), c["text"])


def clean(low):
    """A call that gives x0 by EDM's scalings, shifted by sigma_min, but for the root, so that it is x there."""

    def call(net, x, sigma, c):
        s = sigma[:, None, None, None]
        return 0.25 / ((s - low) ** 2 + 0.25) * x + 0.5 * (s - low) / (s**2 + 0.25).sqrt() * plain(net, x, sigma, c)

    return call


@pytest.mark.level(4, "LCD")
@pytest.mark.parametrize("name", cases("cd", "N18"))
def test_cd(case, close, name):
    tensors, facts, Mini = case(f"cd/{name}")
    low, high = facts["sigma"]
    path, N = EDM(low, high, facts["rho"]), facts["num_scales"] - 1

    make = lambda role, *how: Denoiser(filled(Mini(ch=3, scale=1000.0), under(tensors, role)), path, *how)
    teacher = make("teacher", "edm", plain)
    student, target = (make(role, "x0", clean(low)) for role in ("student", "target"))
    method = LCD(N, solver=heun, huber_c=None)
    nets = Nets(teacher, Student(student), (3, 8, 8), target=target)
    draw = Replay({"eps": tensors["draw/eps"]}, {"t": (N - 1 - tensors["draw/index"].double() + 0.5) / N})
    out, aim, _ = method.solutions(tensors["in/x"], nets, {"real_c": {"text": tensors["in/text"]}}, draw)
    assert draw.used_up
    loss, _ = method.distance(out - aim)
    loss.backward()
    close("loss of each sample", ((out - aim) ** 2).flatten(1).mean(1), tensors["out/loss_elem"], DOUBLE)
    close("loss", loss, tensors["out/loss_elem"].mean(), DOUBLE)
    close_gradients(close, student.net, under(tensors, "grad"), DOUBLE)
    assert not gradients(target.net)
