"""DMD2: the numbers of the authors' own code, through our objects. See CONTRIBUTING.md, Tests.

Stored files spell the stages dm and gen_gan (the student's turn), fake and disc (the turn of the fake score and head).
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from replay import Replay, filled, gradients, load, module, preconditioned, spy, unet, whole
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, VP
from distill.diffusion.student import Student
from distill.methods import DMD2, dmd2
from distill.networks.discriminator import Head
from distill.roles import Nets
from distill.training.config import TrainConfig
from distill.training.loop import train

LOSS, GRADIENT = 1e-4, 1e-3  # allowed errors, all files are float32
OURS = {"dm.": "", "gen_gan.": "gan_", "fake.": "", "disc.fake_": "gan_fake_", "disc.real_": "gan_real_"}


@dataclass
class Case:
    """One stored case: its tensors and numbers, our networks and batch, and the method with the right guidance."""

    stored: dict
    numbers: dict
    nets: Nets
    batch: dict
    method: DMD2

    def draw(self, *stages, turn="", **which):
        """The stored draws of these stages, under our names."""
        normal, uniform = {}, {}
        for stage in stages:
            law = self.method.times if stage == "dm." else self.method.fake_times
            normal[f"{OURS[stage]}eps"] = self.stored[f"draw.{turn}{stage}noise"]
            uniform[f"{OURS[stage]}t"] = whole(law, self.stored[f"draw.{turn}{stage}timesteps"])
        return Replay(normal, uniform, **which)


def table(golden):
    return VP(tuple(load(golden("dmd2/cases/alphas_cumprod.safetensors"))["alphas_cumprod"].tolist()))


def sd(golden, name):
    """Epsilon-prediction by a small UNet, with text."""
    folder, stored = golden("dmd2/models/sd_tiny"), load(golden(f"dmd2/cases/{name}.safetensors"))
    text = lambda which: {"encoder_hidden_states": stored[f"in.{which}_embedding"]}
    null, call = {k: v[:1] for k, v in text("uncond").items()}, lambda net, x, t, c: net(x, t, **c).sample
    roles = (Denoiser(unet(folder, f"{n}_unet"), table(golden), "eps", call, null) for n in ("teacher", "fake"))
    return folder, stored, roles, {"c": text("text"), "real_c": text("real_text")}, "mid_block"


def edm(golden, name):
    """EDM's preconditioned network, with labels. Stored images are named like the latents of the others."""
    folder = golden("dmd2/models/edm_stub")

    class Tapped(module(golden("dmd2/tiny_nets.py")).StubEDM):
        """Its bottleneck is a method; `tap` is a submodule that gives the same."""

        def __init__(self):
            super().__init__()
            self.tap = nn.Identity()

        def bottleneck(self, *args):
            return self.tap(super().bottleneck(*args))

    weights = (load(folder / f"{n}_unet.safetensors") for n in ("teacher", "fake"))
    roles = (Denoiser(filled(Tapped(), w), EDM(), "edm", preconditioned) for w in weights)
    stored = load(golden(f"dmd2/cases/{name}.safetensors"))
    batch = {"c": {"y": stored["in.label"]}, "real_c": {"y": stored["in.real_label"]}}
    rename = lambda name: name.replace("in.image", "in.latents").replace("dloss_dimage", "dloss_dlatents")
    return folder, {rename(k): v for k, v in stored.items()}, roles, batch, "tap"


@pytest.fixture(params=["sd_cfg1", "sd_cfg1.75", "edm_stub"])
def case(request, golden):
    folder, stored, (teacher, fake), batch, tap = (edm if request.param == "edm_stub" else sd)(golden, request.param)
    numbers = json.loads(golden(f"dmd2/cases/{request.param}.json").read_text())
    method = DMD2(numbers.get("real_guidance_scale", 1.0), gan=0.0, gan_fake=0.0, taps=(tap,))
    assert (method.times.low, method.times.high) == (numbers["min_step"], numbers["max_step"])
    disc = filled(Head(64, 1, groups=8), load(folder / "cls_head.safetensors"))
    x = stored["in.latents"].requires_grad_()
    nets = Nets(teacher, Student(teacher), tuple(x.shape[1:]), fake, disc)
    return Case(stored, numbers, nets, batch | {"x": x, "real": stored["in.real_image"]}, method)


def close_norms(close, what, net, stored, total):
    """The norm of every parameter's gradient. Stored as -1: it has none. Far below `total`: rounding noise."""
    ours = {name: g.norm() for name, g in gradients(net).items()}
    assert ours.keys() == {name for name, norm in stored.items() if norm >= 0}
    close(f"{what}: norm of each gradient", ours, {n: stored[n] for n in ours}, GRADIENT, floor=1e-5 * total)
    close(f"{what}: norm of all gradients", torch.stack(list(ours.values())).norm(), total, GRADIENT)


def close_stored_gradients(close, case, prefix):
    """The few whole gradients that are stored, of the fake score and of the head."""
    ours = gradients(case.nets.fake.net) | {f"head.{name}": g for name, g in gradients(case.nets.disc).items()}
    stored = {name[len(prefix) :]: g for name, g in case.stored.items() if name.startswith(prefix)}
    if stored:
        close("whole gradients", {name: ours[name] for name in stored}, stored, GRADIENT)


# ---- one loss at a time ----


def test_schedules(golden, close):
    close("scaled-linear table", VP.scaled_linear().alphas_cumprod, table(golden).alphas_cumprod, 1e-6)
    sigmas = load(golden("dmd2/cases/edm_stub.safetensors"))["karras_sigmas"]
    close("sigmas of Karras", EDM().native(torch.arange(1000).double() / 999), sigmas, 1e-6)


def test_distribution_matching(case, close, monkeypatch):
    stored, numbers, x = case.stored, case.numbers, case.batch["x"]
    teacher, scores = spy(monkeypatch, CFG, "__call__"), spy(monkeypatch, Denoiser, "__call__")
    pushes, draw = spy(monkeypatch, dmd2, "gradient_surrogate"), case.draw("dm.")
    loss, _ = case.method.student_loss(x, case.nets, case.batch, draw)
    loss.backward()
    assert draw.used_up
    real, fake, g = teacher[0][1], scores[-1][1], pushes[0][0][1]
    close("noisy latents", fake.x, stored["out.dm.noisy_latents"], LOSS)
    close("x0 of the teacher", real.x0, stored["out.dm.pred_real_image"], LOSS)
    close("x0 of the fake score", fake.x0, stored["out.dm.pred_fake_image"], LOSS)
    close("g", g, stored["out.dm.grad"], GRADIENT)
    close("norm of g", g.norm(), numbers["dm_gradient_norm"], GRADIENT)
    close("loss", loss, numbers["loss_dm"], LOSS)
    close("gradient to the latents", x.grad, stored["out.dm.dloss_dlatents"], GRADIENT)


def test_gan_of_the_student(case, close):
    x, draw = case.batch["x"], case.draw("dm.", "gen_gan.")
    _, logs = replace(case.method, gan=1.0).student_loss(x, case.nets, case.batch, draw)
    logs["gan"].backward()
    assert draw.used_up
    close("loss", logs["gan"], case.numbers["gen_cls_loss"], LOSS)
    close("gradient to the latents", x.grad, case.stored["out.gen_gan.dloss_dlatents"], GRADIENT)


def test_fake_score(case, close, monkeypatch):
    stored, numbers, x = case.stored, case.numbers, case.batch["x"].detach()
    scores, draw = spy(monkeypatch, Denoiser, "__call__"), case.draw("fake.")
    loss, _ = case.method.fake_loss(x, case.nets, case.batch, draw)
    loss.backward()
    assert draw.used_up
    ((_, pred),) = scores
    if "out.fake.noisy_latents" in stored:
        close("noisy latents", pred.x, stored["out.fake.noisy_latents"], LOSS)
    close("x0 of the fake score", pred.x0, stored["out.fake.x0_pred"], LOSS)
    close("loss", loss, numbers["loss_fake_mean"], LOSS)
    close_norms(close, "fake score", case.nets.fake.net, numbers["fake_grad_norms"], numbers["fake_grad_total"])
    close_stored_gradients(close, case, "out.fake.grad.")


def test_discriminator(case, close, monkeypatch):
    stored, numbers, x = case.stored, case.numbers, case.batch["x"].detach()
    logits, draw = spy(monkeypatch, DMD2, "logits"), case.draw("fake.", "disc.fake_", "disc.real_")
    _, logs = replace(case.method, gan_fake=1.0).fake_loss(x, case.nets, case.batch, draw)
    logs["gan"].backward()
    assert draw.used_up
    fake, real = logits[0][1].sigmoid().flatten().chunk(2)
    close("probability of the fakes", fake, stored["out.disc.sigmoid_fake"], LOSS)
    close("probability of the reals", real, stored["out.disc.sigmoid_real"], LOSS)
    close("loss", logs["gan"], numbers["guidance_cls_loss"], LOSS)
    for what, net, name in (
        ("head", case.nets.disc, "disc_head"),
        ("fake score", case.nets.fake.net, "disc_fake_unet"),
    ):
        close_norms(close, what, net, numbers[f"{name}_grad_norms"], numbers[f"{name}_grad_total"])
    close_stored_gradients(close, case, "out.disc.grad.")


# ---- both turns, by train() ----


class Given(DMD2):
    """DMD2 on given samples."""

    def sample(self, nets, batch, draw):
        return batch["x"]


@pytest.mark.level(4, "DMD2")
@pytest.mark.parametrize("case", ["sd_cfg1", "sd_cfg1.75"], indirect=True)
def test_turns(case, close):
    """The student's turn, then the fake's on the same samples: totals, gradient; and the teacher stays frozen."""
    generator, critic, x = case.numbers["turn_generator"], case.numbers["turn_guidance"], case.batch["x"]
    method = Given(case.method.guidance, gan=generator["weight"], gan_fake=critic["weight"])
    stages = {
        "student": ("turn_generator.", "dm.", "gen_gan."),
        "fake": ("turn_guidance.", "fake.", "disc.fake_", "disc.real_"),
    }
    used = []

    def draw(seed, step, player, samples):
        turn, *names = stages[player]
        used.append(case.draw(*names, turn=turn, step=step, player=player, samples=samples))
        return used[-1]

    nets = replace(case.nets, student=Student(case.nets.teacher.copy()))
    teacher = {name: w.clone() for name, w in nets.teacher.net.state_dict().items()}
    config = TrainConfig(max_train_steps=1, train_batch_size=len(x))
    (state,) = train(method, nets, lambda draw: case.batch, config, Accelerator(cpu=True), draw=draw)
    assert len(used) == 2 and all(d.used_up for d in used)
    logs = state.logs
    close("student: adversarial loss", logs["student/gan"], generator["gen_cls_loss"], LOSS)
    matching = logs["student/loss"] - method.gan * logs["student/gan"]
    close("student: distribution matching", matching, generator["loss_dm"], LOSS)
    close("student: total", logs["student/loss"], generator["total"], LOSS)
    close("student: gradient to the latents", x.grad, case.stored["out.turn_generator.dloss_dlatents"], GRADIENT)
    close("fake: discriminator", logs["fake/gan"], critic["guidance_cls_loss"], LOSS)
    close("fake: denoising", logs["fake/loss"] - method.gan_fake * logs["fake/gan"], critic["loss_fake_mean"], LOSS)
    close("fake: total", logs["fake/loss"], critic["total"], LOSS)
    close("fake: norm of the gradient", logs["fake/grad_norm"], critic["grad_norm"], GRADIENT)
    # the authors' toggle of requires_grad also releases the teacher; ours does not
    assert case.numbers["real_unet_requires_grad_after_toggle"]
    assert not any(p.requires_grad or p.grad is not None for p in nets.teacher.net.parameters())
    assert all(torch.equal(w, teacher[name]) for name, w in nets.teacher.net.state_dict().items())


# ---- the student's calls: backward simulation, one step ----


@pytest.fixture
def sdxl(golden):
    """The few-step student of SDXL and a list of what its network is called with."""
    seen = []

    def call(net, x, t, c):
        seen.append((x, t))
        text, added = c["encoder_hidden_states"], {k: c[k] for k in ("text_embeds", "time_ids")}
        return net(x, t, text, added_cond_kwargs=added).sample

    net = unet(golden("dmd2/models/sdxl_tiny"), "generator_unet")
    return Denoiser(net, table(golden), "eps", call), seen


def sdxl_batch(stored):
    ids = torch.tensor([512.0, 512, 0, 0, 512, 512]).expand(len(stored["in.noise"]), -1)
    text, pooled = stored["out.text_embedding"], stored["out.pooled"]
    return {"c": {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids}}


@pytest.mark.parametrize("step", [0, 2], ids="step {}".format)
def test_backward_simulation(golden, sdxl, step, close):
    """k + 1 calls where the stored index is k. The first noise is new, later noise is that of the next call's input."""
    (denoiser, seen), stored = sdxl, load(golden(f"dmd2/cases/sdxl_backsim_step{step}.safetensors"))
    numbers = json.loads(golden(f"dmd2/cases/sdxl_backsim_step{step}.json").read_text())
    assert numbers["selected_step"] == step == int(stored["draw.selected_step"])
    noise = [*(stored[f"draw.backsim_renoise{i}"] for i in range(step - 1)), stored["in.noise"]]
    first = {"z": stored["draw.backsim_init_noise"] if step else noise.pop()}
    student = Student(denoiser, tuple(n / 999 for n in (999, 749, 499, 249)), scale=1.0)
    renoise = {f"renoise{i}": eps for i, eps in enumerate(noise)}
    draw = Replay(first | renoise, index={"steps": step}, samples=torch.arange(2))
    nets = Nets(denoiser, student, tuple(stored["in.noise"].shape[1:]))
    x = DMD2().sample(nets, sdxl_batch(stored), draw)
    assert draw.used_up and len(seen) == step + 1
    close("input of the graded call", seen[-1][0], stored["out.noisy_image"], LOSS)
    close("its time", seen[-1][1], stored["out.timesteps"], LOSS)
    close("sample", x, stored["out.generated_image"], LOSS)
    assert x.requires_grad and not seen[-1][0].requires_grad


def test_one_step(golden, sdxl, close):
    (denoiser, seen), stored = sdxl, load(golden("dmd2/cases/sdxl_onestep_cond999.safetensors"))
    x = Student(denoiser, scale=1.0).generate(stored["in.noise"], sdxl_batch(stored)["c"])
    close("its time", seen[0][1], stored["out.timesteps"], LOSS)
    close("sample", x, stored["out.generated_image"], LOSS)
