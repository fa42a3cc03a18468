"""Perturbed-attention guidance: as diffusers' own pipelines have it, in closed form, and of the teacher alone."""

import importlib
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gaussian import (
    F64,
    RATIOS,
    SCHEDULES,
    Gaussian,
    Line,
    Oracle,
    Whitened,
    exact,
    kl_gradient,
    nets_of,
    problem,
    student_gradient,
)
from shallow import shorten, taps_of

from distill.configuration import Config
from distill.data import Digits
from distill.diffusion.guidance import CFG, WorseModelGuided, null_of
from distill.diffusion.schedule import Trig
from distill.diffusion.times import Fixed
from distill.methods import DMD2, VSD, SiD
from distill.networks.lora import LoRA
from distill.training import precision
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig
from eval.sampling.image_set import generate
from pipelines import load, run
from pipelines.families import tiny
from pipelines.inference import pag
from pipelines.planning import flop_counter, memory_plan
from pipelines.planning.models import Meta
from recipes import swiftbrush_sd21

S, W = 3.0, 4.0
PROMPTS = ["a red fox in the snow", "seven cats, and a very long road"]
FAMILIES = {  # module: (what its tiny pipeline differs in, diffusers' class, our name of a layer, diffusers')
    "sd": ({}, "StableDiffusionPAGPipeline", "mid_block", "mid"),
    "sdxl": ({}, "StableDiffusionXLPAGPipeline", "mid_block", "mid"),
    "sd3": ({}, "StableDiffusion3PAGPipeline", "transformer_blocks.2", "blocks.2"),
    "pixart": ({}, "PixArtSigmaPAGPipeline", "transformer_blocks.3", "blocks.3"),
    "sana": ({"timestep_scale": 1.0}, "SanaPAGPipeline", "transformer_blocks.2", "transformer_blocks.2"),
}
KINDS = ("sd", "sd3", "sana")  # of attention


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    config, kind, layer, theirs = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save(request.param, folder, **config)
    teacher = shorten(load(folder), 3)
    for module in teacher.denoiser.net.modules():  # diffusers' PAG processors know nothing of norms of Q and K
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(module, name, None) if getattr(module, name, None) is not None else None
    torch.manual_seed(0)
    return SimpleNamespace(
        module=importlib.import_module(f"pipelines.families.{request.param}"),
        teacher=teacher,
        pipeline=kind,
        layers=(layer,),
        theirs=[theirs],
        c=teacher.encode(PROMPTS),
        x=torch.randn(2, *teacher.shape),
        t=torch.full((2,), 0.6, dtype=F64),
    )


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny.save("sd", folder)
    return load(folder)


@torch.no_grad()
def test_is_diffusers_pag(family):
    """Its pipelines sample the same images, with guidance and without; PAG moves them."""
    import diffusers

    f = family
    pipe = f.teacher.parts.pipe()
    kind = getattr(diffusers, f.pipeline)
    parts = {name: part for name, part in pipe.components.items() if name in inspect.signature(kind).parameters}
    theirs = kind(**parts, pag_applied_layers=f.theirs)
    theirs.set_progress_bar_config(disable=True)
    before = dict(f.teacher.denoiser.net.attn_processors)
    guided = replace(f.teacher, denoiser=pag.with_pag(f.teacher.denoiser, S, f.layers))
    for w in (1.0, W):
        told = f.teacher.family.no_guidance if w == 1 else w
        expected = f.teacher.family.sample(theirs, PROMPTS, f.x, 3, told)  # pag_scale is 3 by default
        f.teacher.denoiser.net.set_attn_processor(dict(before))  # they are left perturbed
        images, plain = (t.decode(t.sample(f.x, f.c, 3, w)).clamp(-1, 1) / 2 + 0.5 for t in (guided, f.teacher))
        assert (images - expected).abs().max() < 1e-4 < (images - plain).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS, indirect=True)
def test_formula(family):
    """null + w (cond - null) + s (cond - cond^), on any schedule; of one branch alone, that of this branch."""
    f = family
    denoiser, t, c = f.teacher.denoiser, f.t, f.c
    guided = pag.with_pag(denoiser, S, f.layers)
    null = null_of(f.teacher.null(), c)
    guided.null = denoiser.null
    worse = replace(denoiser, net=guided.worse)
    cond, empty, bad = denoiser(f.x, t, c).out, denoiser(f.x, t, null).out, worse(f.x, t, c).out
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (cond - bad).abs().max() > 1e-3
    near(CFG(guided, W)(f.x, t, c).out, empty + W * (cond - empty) + S * (cond - bad))
    near(CFG(guided, W).predict_with_null(f.x, t, c)[1].out, empty)  # CFG++ goes on with that
    near(CFG(guided, torch.full((2,), W)).on_schedule(Trig())(f.x, t, c).eps, _on(denoiser, worse, f, W))
    near(CFG(guided, 1.0)(f.x, t, c).out, cond + S * (cond - bad))
    near(CFG(guided, 0.0)(f.x, t, c).out, empty + S * (empty - worse(f.x, t, null).out))
    assert torch.equal(replace(guided, s=0.0)(f.x, t, c).out, cond)


def _on(denoiser, worse, f, w):
    cond, empty, bad = (
        d.on_schedule(Trig())(f.x, f.t, c).eps
        for d, c in ((denoiser, f.c), (denoiser, null_of(denoiser.null, f.c)), (worse, f.c))
    )
    return empty + w * (cond - empty) + S * (cond - bad)


@pytest.mark.parametrize("family", KINDS, indirect=True)
def test_features_and_gradient_are_the_networks_own(family):
    """A tap is never of the worse network, and the loss's gradient to x is through both, with recomputation too."""
    f = family
    guided, taps = pag.with_pag(f.teacher.denoiser, S, f.layers), taps_of(f.teacher)
    (want,) = f.teacher.denoiser.features(f.x, f.t, f.c, taps)
    assert torch.equal(guided.features(f.x, f.t, f.c, taps)[0], want)
    assert torch.equal(guided.predict_with_features(f.x, f.t, f.c, taps)[1][0], want)
    grads = []
    for recomputed in (False, True):
        for net in (guided.net, guided.worse):
            net.enable_gradient_checkpointing() if recomputed else None
        x = f.x.clone().requires_grad_()
        grads.append(torch.autograd.grad(guided(x, f.t, f.c).out.square().sum(), x)[0])
    for net in (guided.net, guided.worse):
        net.disable_gradient_checkpointing()
    assert torch.equal(*grads) and grads[0].abs().max() > 0
    x = f.x.clone().requires_grad_()
    plain = torch.autograd.grad(f.teacher.denoiser(x, f.t, f.c).out.square().sum(), x)[0]
    assert (grads[0] - plain).abs().max() > 1e-3 * plain.abs().max()


@torch.no_grad()
def test_nothing_to_perturb(sd):
    """Where attention is the identity already, of a single token, PAG is the network itself; of four it is not."""
    guided, t, c = pag.with_pag(sd.denoiser, S, ("mid_block",)), torch.full((2,), 0.6, dtype=F64), sd.encode(PROMPTS)
    for size, off in ((2, False), (4, True)):  # of the middle: 1 and 2
        x = torch.randn(2, 4, size, size)
        gap = (guided(x, t, c).out - sd.denoiser(x, t, c).out).abs().max()
        assert gap > 1e-3 if off else gap < 1e-5


@pytest.mark.parametrize("rank", (None, 2))
def test_no_other_role_is_perturbed(sd, rank):
    """Student and fake say what they said, full copies and adapters on the same tensors; no tensor is new."""
    lora, x, t = LoRA(rank, 4.0, ("to_q", "to_v")), torch.randn(2, *sd.shape), torch.full((2,), 0.6, dtype=F64)
    c = sd.encode(PROMPTS)
    sd.null()
    nets = build(SiD(), sd.denoiser, sd.shape, c, StudentConfig(lora=lora), FakeConfig(lora))
    said = lambda: [d(x, t, c).out for d in (nets.student.denoiser, nets.fake, sd.denoiser)]
    before, teacher = said(), nets.teacher
    pag.attach_pag(nets, 0.0, ("nowhere",))
    assert nets.teacher is teacher and "worse" not in nets.frozen()
    pag.attach_pag(nets, S, ("mid_block",))
    assert all(map(torch.equal, before, said()))
    assert (nets.teacher(x, t, c).out - before[2]).abs().max() > 1e-3
    assert not any(isinstance(d, WorseModelGuided) for d in (nets.student.denoiser, nets.fake))
    own = {id(p) for p in sd.denoiser.net.parameters()}
    assert {id(p) for p in nets.frozen()["worse"].parameters()} == own
    precision.recompute(nets)
    assert nets.frozen()["worse"].is_gradient_checkpointing
    sd.denoiser.net.disable_gradient_checkpointing()


def test_costs_one_pass_more(sd):
    """Planned for a turn of the student: the perturbed network's own forward pass, under c alone, and no weights."""
    method = VSD(guidance=W, fake_steps=1)
    runs = [
        memory_plan.Run(Config(method, Digits(), pag_scale=s), Meta.from_folder(sd.parts.folder), half=False)
        for s in (0.0, S)
    ]
    without, costs = (next(t.loss for t in r.cost.updates if t.player == "student") for r in runs)
    teacher, c, nets = runs[1].networks
    flops = lambda net: flop_counter.forward(replace(teacher.denoiser, net=net), teacher.shape, c)
    assert costs - without == flops(nets.teacher.worse) * runs[1].micro
    assert runs[0].unsharded_memory == runs[1].unsharded_memory


def test_generate(tmp_path, sd):
    """A teacher's images by a flag, under a solver of ours: the manifest, the request and the calls say so."""
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    told = {"n": 1, "steps": 2, "guidance": W, "solver": "ddim", "prompts": f"{tmp_path / 'prompts.txt'}"}
    ask = lambda out, **more: generate(sd.parts.folder, tmp_path / out, **(told | more))
    plain, moved, other = ask("a"), ask("b", pag_scale=S), ask("c", pag_scale=S, pag_layers=("up_blocks.0",))
    assert len({found["hash"] for found in (plain, moved, other)}) == 3
    assert moved["request"]["pag_scale"] == S and "pag_scale" not in plain["request"]
    assert other["pag_layers"] == ["up_blocks.0"] and (plain["nfe"], moved["nfe"]) == (4, 6)
    with pytest.raises(ValueError, match="pass --solver ddim"):
        ask("d", pag_scale=S, solver="pipeline")


def test_refusals(tmp_path, sd):
    with pytest.raises(ValueError, match=r"no self-attention in 'mid'; it is in .*mid_block"):
        pag.with_pag(sd.denoiser, S, ("mid_block", "mid"))
    with pytest.raises(ValueError, match="no self-attention in ''"):
        pag.with_pag(sd.denoiser, S, ())
    for name in ("edm", "flux"):
        tiny.save(name, tmp_path / name)
        with pytest.raises(ValueError, match="PAG perturbs self-attention, and .* has none of a kind"):
            pag.with_pag(load(tmp_path / name).denoiser, S, ("mid_block",))


def guided(strong, weak, path, s, kind="v"):
    return WorseModelGuided(**vars(exact(strong, path, kind)), worse=Oracle(weak.denoise, path, kind), s=s)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_students_variance(schedule):
    """Precisions 1 / (v + r^2) and, of the worse network, 1 / (v' + r^2), at r = sigma / alpha.

    With guidance, it is (1 + s) / (v + r^2) - s / (v' + r^2): DMD's gradient is that of a Gaussian teacher with this
    precision, and vanishes where the student has its variance, below v for v' > v. One network in two schedules.
    """
    path, v, bad = SCHEDULES[schedule], 0.8, 1.7
    law = lambda var: Gaussian(torch.zeros(2, dtype=F64), var * torch.eye(2, dtype=F64))
    method = DMD2(gan=0, gan_fake=0, normalise=False, reduction="sum")
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        at, r = replace(method, times=Fixed(float(t)), fake_times=Fixed(float(t))), float(path.ratio(t))
        teacher = guided(law(v), law(bad), path, s := 0.5)
        best = 1 / ((1 + s) / (v + r**2) - s / (bad + r**2)) - r**2
        assert 0 < best < v
        for line in (problem(2)[1], Line(best**0.5 * torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))):
            nets = nets_of(line, teacher, fake=exact(line.law, path, "v"))
            _, *got = student_gradient(at, nets, Whitened(256, 2))
            for one, want in zip(got, kl_gradient(law(best), line.A.detach(), line.b.detach(), r), strict=True):
                assert (one - r**2 * want).norm() <= 1e-9 * (1 + r**2 * want.norm())
        assert got[0].norm() < 1e-9


def test_a_run(tmp_path):
    """The flags of any recipe: another student than without them, and the exported card says so."""
    found = []
    for s in ("0", "3"):
        flags = f"--smoke --validation_steps 0 --pag_scale {s} --output_dir {tmp_path / s}"
        run.main(swiftbrush_sd21.CONFIG, flags.split())
        folder = tmp_path / s / "pipeline"
        assert ("pag_scale: 3.0" in (folder / "README.md").read_text()) == (s == "3")
        found.append((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert found[0] != found[1]
