"""Regression on pairs of the teacher's ODE: its optimum is the ODE's map. LPIPS of decoded images, and its gradient."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Line, exact, nets_of, problem, student_gradient, white
from tiny import tiny

from distill.configuration import Config
from distill.data.labels import LabelPairs
from distill.diffusion.schedule import VP
from distill.diffusion.solver import sample
from distill.method import Requirement
from distill.methods import Regression
from distill.random import Draw
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import run
from pipelines.families import latents
from pipelines.families import tiny as tiny_parts
from pipelines.judges.perceptual import load_lpips, random_distance, sample_distance

N = 64
FORMS = {  # derivative of the distance, per element, to delta
    "mse": lambda delta: 2 * delta,
    "huber": lambda delta: delta / (delta**2 + 1e-6).sqrt(),
}


def near(got, want, rtol):
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.3g}"


def ode(law, path, z):
    """The end of the exact trajectory from noise z, as a map (A, b) of z and as its values."""
    start, end = (path.coefficients(torch.tensor([t], dtype=F64)) for t in (1.0, 0.0))
    carried = lambda z: law.carry(start[1] * z, start, end) / end[0]
    b = carried(torch.zeros_like(z[:1]))[0]
    return Line((carried(torch.eye(z.shape[1], dtype=F64)) - b).T, b), carried(z)


@pytest.mark.level(1, "Regression")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("distance", FORMS)
def test_the_optimum_is_the_map_of_the_ode(distance, schedule):
    """There the gradient is zero; elsewhere it is that of the distance, (A - A*, b - b*) for squares."""
    (law, line), path, z = problem(3), SCHEDULES[schedule], white(N, 3)
    best, y = ode(law, path, z)
    method, batch = Regression(distance, reduction="sum"), {"z": z, "y": y}
    loss, *zero = student_gradient(method, nets_of(best, exact(law, path)), None, batch)
    assert float(loss) < 1e-12 and all(g.norm() < 1e-9 for g in zero)
    _, dA, db = student_gradient(method, nets_of(line, exact(law, path)), None, batch)
    slope = FORMS[distance](line(z, None) - y).detach() / N
    near(dA, slope.T @ z, 1e-12)
    near(db, slope.sum(0), 1e-12)
    if distance == "mse":
        near(dA, 2 * (line.A - best.A).detach(), 1e-10)
        near(db, 2 * (line.b - best.b).detach(), 1e-10)


def test_pairs_of_a_solver_lead_there_too():
    """Heun's trajectories through the exact denoiser: the gradient at the exact map falls as their error does."""
    (law, _), path, z = problem(3), SCHEDULES["flow"], white(N, 3)
    best, _ = ode(law, path, z)
    norms = []
    for steps in (20, 80):
        batch = {"z": z, "y": sample(exact(law, path), z, None, steps)}
        _, dA, db = student_gradient(Regression("mse", reduction="sum"), nets_of(best, exact(law, path)), None, batch)
        norms.append(float(dA.norm() + db.norm()))
    assert norms[1] < norms[0] / 4 and norms[1] < 1e-2


def test_mean_and_sum():
    line, teacher = problem(3)[1], exact(problem(3)[0], SCHEDULES["vp"])
    batch = {"z": white(N, 3), "y": torch.zeros(N, 3, dtype=F64)}
    loss = lambda **fields: student_gradient(Regression("mse", **fields), nets_of(line, teacher), None, batch)[0]
    near(loss(reduction="mean") * 3, loss(reduction="sum"), 1e-12)


def looks(x, y):
    """A stand-in of LPIPS: [B]."""
    return (x.sin() - y.sin()).square().flatten(1).sum(1)


def test_lpips_is_asked_for_and_its_gradient_used():
    (law, line), z = problem(3), white(N, 3)
    best, y = ode(law, SCHEDULES["vp"], z)
    nets, batch = nets_of(line, exact(law, SCHEDULES["vp"])), {"z": z, "y": y}
    method = Regression()
    assert method.requirements == (Requirement.PAIRS, Requirement.PERCEPTUAL_DISTANCE)
    assert Regression("mse").requirements == (Requirement.PAIRS,)
    with pytest.raises(ValueError, match="nets.perceptual.*'huber'"):
        student_gradient(method, nets, None, batch)
    nets.perceptual = looks
    loss, dA, db = student_gradient(method, nets, None, batch)
    x = line(z, None).detach()
    slope = 2 * (x.sin() - y.sin()) * x.cos() / N
    near(loss, looks(x, y).mean(), 1e-12)
    near(dA, slope.T @ z, 1e-12)
    near(db, slope.sum(0), 1e-12)


def test_one_call_at_the_students_time_with_its_scale():
    """DMD2's one-step SDXL: told 399, fed the noise itself."""
    teacher = tiny(VP.scaled_linear(), "eps", classes=3)
    c, z = {"label": torch.tensor([0, 1])}, torch.randn(2, 2).double()
    config = StudentConfig(timestep=399, scale=1.0)
    times = (config.first_time(teacher.schedule),)
    nets = build(Regression(), teacher, (2,), c, StudentConfig(times=times, scale=1.0))
    x = Regression().sample(nets, {"z": z, "c": c}, None)
    alpha, sigma = teacher.schedule.coefficients(torch.tensor([399 / 999], dtype=F64))
    want = (z - sigma * teacher.net(z, torch.full((2,), 399.0).double(), **c)) / alpha
    torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-9)


@pytest.mark.level(2, "Regression")
def test_it_learns_the_teachers_trajectories():
    """On a teacher of three classes, over all pairs: by a factor of 600 in 300 steps."""
    teacher = tiny(VP.scaled_linear(), "v", dtype=torch.float32, classes=3, width=32)
    rows = torch.arange(256)
    z, c = Draw(0, 0, "pairs", rows).normal("z", (256, 2)), {"label": rows % 3}
    y = sample(teacher, z, c, 20)

    def pairs(draw):
        pick = draw.integers("pair", 256)
        return {"z": z[pick], "y": y[pick], "c": {"label": c["label"][pick]}}

    method = Regression("mse")
    nets = build(method, teacher, (2,), c, StudentConfig(scale=1.0))
    student = nets.student.denoiser.net
    for p in student.parameters():
        p.data += 0.2 * torch.randn_like(p)  # not the teacher
    distance = lambda: float((nets.student.generate(z, c) - y).detach().square().mean())
    before, teacher_before = distance(), [p.clone() for p in teacher.net.parameters()]
    cfg = TrainConfig(max_train_steps=300, train_batch_size=64, learning_rate=3e-3)
    *_, state = train(method, nets, pairs, cfg, Accelerator(cpu=True))
    assert float(state.logs["student/mse"]) == pytest.approx(float(state.logs["student/loss"]))
    assert distance() < before / 50, (before, distance())
    assert all(torch.equal(a, b) for a, b in zip(teacher.net.parameters(), teacher_before, strict=True))


# ---- LPIPS of decoded images ----


@pytest.fixture(scope="module")
def teacher():
    """A KL autoencoder alone, frozen, as a teacher has it."""
    torch.manual_seed(0)
    vae = tiny_parts.vae(scaling_factor=0.5).requires_grad_(False)
    return SimpleNamespace(decode=latents.kl(SimpleNamespace(vae=vae), latents.scale_only)[0], shape=(4, 4, 4), vae=vae)


@pytest.fixture(scope="module")
def features():
    """In place of LPIPS's network: images [B, 3, H, W], twice -> [B, 1, 1, 1]."""
    return random_distance()


def gradient(distance, x, y):
    x = x.clone().requires_grad_()
    found = distance(x, y)
    return found.detach(), torch.autograd.grad(found.sum(), x)[0]


def test_images_are_compared_not_latents(teacher, features):
    """The features see decoded images; the gradient reaches x through the decoder, which stays as it is."""
    x, y = torch.randn(2, 3, *teacher.shape)
    by_hand = lambda x, y: features(teacher.vae.decode(x / 0.5).sample, teacher.vae.decode(y / 0.5).sample).flatten()
    want = gradient(by_hand, x, y)
    for each in (False, True):
        y.requires_grad_()
        got = gradient(sample_distance(teacher, each=each, features=features), x, y)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
        assert got[1].abs().max() > 1e-3 and y.grad is None
    assert all(not p.requires_grad and p.grad is None for p in teacher.vae.parameters())


def test_half_precision_around_it_changes_nothing(teacher, features):
    x, y = torch.randn(2, 3, *teacher.shape)
    distance = sample_distance(teacher, features=features)
    want = distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), want)
        assert torch.equal(distance(x.bfloat16(), y), distance(x.bfloat16().float(), y))


def test_a_video_is_its_frames(features):
    x, y = torch.rand(2, 2, 3, 5, 8, 8)
    found = sample_distance(SimpleNamespace(decode=lambda x: x), features=features)(x, y)
    want = torch.stack([features(x[:, :, i], y[:, :, i]).flatten() for i in range(5)]).mean(0)
    torch.testing.assert_close(found, want)


def test_a_small_autoencoder_decodes(teacher, features, tmp_path):
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    vae.save_pretrained(tmp_path / "tiny")
    x, y = torch.randn(2, 3, *teacher.shape)
    found = sample_distance(teacher, f"{tmp_path / 'tiny'}", features=features)(x, y)
    torch.testing.assert_close(found, features(vae.decode(x).sample, vae.decode(y).sample).flatten().detach())
    with pytest.raises(ValueError, match="no AutoencoderTiny at .*nowhere"):
        sample_distance(teacher, f"{tmp_path / 'nowhere'}", features=features)
    with pytest.raises(ValueError, match="decodes 4 channels, the teacher's samples have 16"):
        sample_distance(SimpleNamespace(shape=(16, 4, 4)), f"{tmp_path / 'tiny'}", features=features)


def test_without_the_package_it_says_what_to_install(monkeypatch, teacher, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"distill-one-step\[lpips\].*--method.distance huber"):
        sample_distance(teacher)
    with pytest.raises(ValueError, match=r"distill-one-step\[lpips\]"):
        load_lpips(pnet_rand=True)
    with pytest.raises(ValueError, match=r"distill-one-step\[lpips\]"):  # a recipe says so before it loads a teacher
        run.validate_run(Config(Regression(), LabelPairs(), family="sdxl", teacher="a/b"), tmp_path)
    run.validate_run(Config(Regression("huber"), LabelPairs(), family="sdxl", teacher="a/b"), tmp_path)
