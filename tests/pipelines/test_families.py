"""Every family of teachers on its tiny random pipeline: what diffusers' own pipeline gives, ours gives."""

import functools
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from distill.diffusion.guidance import CFG, null_of
from distill.diffusion.schedule import Trig
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines import load
from pipelines.export.schedule import find_student_scheduler as student_scheduler
from pipelines.families import flux, tiny
from pipelines.families.registry import families, find_family, known_pipelines

PROMPTS = ["a red fox in the snow", "seven cats, and a very long road under the stars of a winter night; " * 3]
PROMPTS_OF = {"cogview4": ["a red fox in the snow", "seven cats on a long road"]}  # padded to one length
NAMES = [name for name in families() if name != "edm"]  # edm: tests/recipes/test_recipes.py
VARIANTS = {  # of a family: its name, what its tiny pipeline differs in, how it is loaded
    "sd-v": ("sd", {"prediction_type": "v_prediction"}, {}),
    "sd3-without-t5": ("sd3", {"t5": False}, {}),
    "flux-schnell": ("flux", {"guidance": False}, {}),
    "pixart-alpha": ("pixart", {"kind": "PixArtAlphaPipeline", "sample_size": 128}, {"resolution": 16}),
    "sana-1": ("sana", {"qk_norm": None, "timestep_scale": 1.0}, {}),  # SANA-Sprint's teacher is the default
    "wan-5b": ("wan", {"expand_timesteps": True}, {}),
    "ddpm-v": ("ddpm", {"prediction_type": "v_prediction"}, {}),
    "ddpm-without-labels": ("ddpm", {"kind": "DDPMPipeline", "labels": False}, {}),
    "ddim-x0": ("ddpm", {"kind": "DDIMPipeline", "labels": False, "prediction_type": "sample"}, {}),
}


@pytest.fixture(scope="module", params=[*NAMES, *VARIANTS])
def family(request, tmp_path_factory):
    """The family, its tiny pipeline's folder, its teacher, and inputs z, x, c of two samples with these prompts."""
    folder = tmp_path_factory.mktemp(request.param)
    name, config, options = VARIANTS.get(request.param, (request.param, {}, {}))
    tiny.save(name, folder, **config)
    teacher = load(folder, **options)
    torch.manual_seed(0)
    z, x = torch.randn(2, 2, *teacher.shape)
    prompts = [3, 7] if teacher.family.labels else PROMPTS_OF.get(name, PROMPTS)
    c = teacher.encode(prompts)
    return SimpleNamespace(family=teacher.family, folder=folder, teacher=teacher, z=z, x=x, c=c, prompts=prompts)


def unpacked(f, x):
    """What a pipeline that packs its latents keeps, as the teacher's x."""
    if x.ndim == len(f.teacher.shape) + 1:
        return x
    C, H, W = f.teacher.shape
    return x.reshape(-1, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, C, H, W)


def watched(pipe):
    """The steps that a pipeline takes, filled as it runs: (input, timestep, sigma, output of the network, its x0)."""
    steps, scheduler = [], pipe.scheduler
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", lambda x, t: x)
    scheduler.scale_model_input = lambda x, t: x.clone() if (seen := scale(x, t)) is x else seen

    @functools.wraps(step)
    def watch(out, t, x, *args, **options):
        told = scale(x, t)
        found = step(out, t, x, *args, **{**options, "return_dict": True})
        sigma = scheduler.sigmas[scheduler.step_index - 1] if hasattr(scheduler, "sigmas") else None
        x0 = getattr(found, "pred_original_sample", None)
        if x0 is None and hasattr(scheduler, "convert_model_output"):  # of a multistep solver: its own reading of out
            scheduler._step_index -= 1
            x0 = scheduler.convert_model_output(out, sample=x)
            scheduler._step_index += 1
        steps.append((told, t, sigma, out, x - sigma * out if x0 is None else x0))
        return (found.prev_sample,)

    scheduler.step = watch
    return steps


@torch.no_grad()
def test_the_denoiser_gives_what_the_pipelines_network_and_scheduler_give(family):
    f = family
    pipe, denoiser = f.teacher.parts.pipe(), f.teacher.denoiser
    steps = watched(pipe)
    f.family.sample(pipe, f.prompts, f.z, 5, f.family.no_guidance)
    assert len(steps) == 5
    last = denoiser.schedule.native(torch.ones(1))
    for x, n, sigma, out, x0 in steps:
        t = ((n / last) if f.family.name != "cogview4" else sigma).double().reshape(1)  # it is told another timestep
        pred = denoiser(unpacked(f, x), t.expand(2), f.c)
        torch.testing.assert_close(pred.out, unpacked(f, out), rtol=1e-4, atol=1e-4)
        told = abs(sigma - t) * out.abs().max() if denoiser.kind == "flow" else 0  # solvers tell a flow whole times
        assert told < 1e-2
        torch.testing.assert_close(pred.x0, unpacked(f, x0), rtol=1e-4, atol=1e-4 + float(told))
        on = denoiser.on_schedule(Trig())
        seen = on.path.time(denoiser.schedule.ratio(t.expand(2)))
        alpha, sine = on.path.coefficients(seen)
        a, s = denoiser.schedule.coefficients(t.expand(2))
        scale = (torch.hypot(alpha, sine) / torch.hypot(a, s)).reshape(-1, *[1] * (f.x.ndim - 1)).float()
        torch.testing.assert_close(on(scale * unpacked(f, x), seen, f.c).x0, pred.x0, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_teacher_samples_what_the_pipeline_samples(family):
    """Labels have no negative prompt, and guidance is built into their pipeline."""
    f = family
    cases = [(1.0, None)] if f.family.labels else [(1.0, None), (4.0, None), (1.0, "blurry"), (4.0, "blurry")]
    for guidance, negative in cases:
        told = f.family.no_guidance if guidance == 1 else guidance
        torch.manual_seed(1)  # DDPMScheduler draws noise
        expected = f.family.sample(f.teacher.parts.pipe(), f.prompts, f.z, 4, told, negative)
        null = None if negative is None else f.teacher.negative([negative])
        torch.manual_seed(1)
        images = f.teacher.decode(f.teacher.sample(f.z, f.c, 4, guidance, null))
        assert (images.clamp(-1, 1) / 2 + 0.5 - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", ["ddpm-without-labels", "ddim-x0"], indirect=True)
def test_the_pipeline_of_the_folder_samples_the_same(family):
    """A DDPMPipeline and a DDIMPipeline as diffusers loads them; ours calls the same network in another pipeline."""
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    assert type(pipe).__name__ in ("DDPMPipeline", "DDIMPipeline")
    torch.manual_seed(1)
    expected = torch.from_numpy(pipe(2, num_inference_steps=4, output_type="np").images).permute(0, 3, 1, 2)
    torch.manual_seed(1)
    z = torch.randn(2, *family.teacher.shape)
    images = family.teacher.decode(family.teacher.sample(z, family.c, 4))
    assert (images / 2 + 0.5 - expected).abs().max() < 1e-5


@torch.no_grad()
def test_guidance_with_the_null_condition(family):
    f = family
    t, w = torch.full((2,), 0.6).double(), 3.0
    denoiser = f.teacher.denoiser
    if f.family.labels and denoiser.null is None:  # a teacher without labels has nothing to guide by
        assert torch.equal(denoiser(f.x, t, f.c).out, denoiser(f.x, t, None).out)
        return
    null = f.teacher.null()
    assert all(len(v) == 1 for v in null.values())
    cond, empty = denoiser(f.x, t, f.c).out, denoiser(f.x, t, null_of(null, f.c)).out
    assert (cond - empty).abs().max() > 1e-3
    torch.testing.assert_close(CFG(denoiser, w)(f.x, t, f.c).out, empty + w * (cond - empty), rtol=1e-3, atol=1e-4)


def test_taps_give_features_with_gradient(family):
    f = family
    x = f.x.clone().requires_grad_()
    taps = f.family.taps + ("norm_out",) * hasattr(
        f.teacher.denoiser.net, "norm_out"
    )  # the last norm, of SiD-DiT's GAN
    t = torch.full((2,), 0.6).double()
    assert f.teacher.denoiser.taps == f.family.taps  # of a method that names none
    for feature in f.teacher.denoiser.features(x, t, f.c, taps):
        assert feature.ndim >= 3 and len(feature) == 2 and feature.std() > 0
        (grad,) = torch.autograd.grad(feature.square().sum(), x, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().amax(dim=tuple(range(1, x.ndim))).min() > 0


@torch.no_grad()
def test_every_input_moves_the_output(family):
    """By 100 times the tolerance of an export (1e-3 of an image in [0, 1]): none could be lost unnoticed."""
    f = family
    t = torch.full((2,), 0.6).double()
    inputs = {"t": (f.x, t / 4, f.c), "x": (f.x.flip(0), t, f.c)}
    read = f.family.condition(f.teacher.denoiser.net.config)
    for key, value in ((key, value) for key, value in f.c.items() if key in read or not f.family.labels):
        other = value.flip(0) if not torch.equal(value, value.flip(0)) else 3 * value + 1
        inputs[key] = (f.x, t, f.c | {key: other})
    base = f.teacher.denoiser(f.x, t, f.c)
    moved = {key: f.teacher.denoiser(*given) for key, given in inputs.items()}
    outputs = {key: float((pred.out - base.out).std() / base.out.std()) for key, pred in moved.items()}
    assert min(outputs.values()) > 1e-2, outputs
    image = f.teacher.decode(base.x0).clamp(-1, 1)
    images = {key: float((f.teacher.decode(p.x0).clamp(-1, 1) - image).abs().max() / 2) for key, p in moved.items()}
    assert min(images.values()) > 0.1, images


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_an_embedded_guidance_is_an_input(family):
    f = family
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "latents": flux.pack(f.z), "output_type": "pt"}
    seen = []
    for w in [1.0, 3.5, 8.0]:
        seen.append(f.teacher.decode(f.teacher.sample(f.z, f.c | {"guidance": torch.full((2,), w)}, 2)) / 2 + 0.5)
        expected = f.teacher.parts.pipe()(f.prompts, guidance_scale=w, **options).images
        assert (seen[-1].clamp(0, 1) - expected).abs().max() < 1e-4
    assert (seen[0] - seen[2]).clamp(-1, 1).abs().max() > 0.1
    unsaid = f.teacher.decode(f.teacher.sample(f.z, f.c, 2)) / 2 + 0.5
    torch.testing.assert_close(unsaid, seen[1])


@torch.no_grad()
def test_conditions_have_one_shape_and_do_not_depend_on_the_batch(family):
    f = family
    short, long = f.teacher.encode([0] if f.family.labels else [""]), f.teacher.encode(f.prompts[1:])
    for key, value in f.c.items():
        assert len(value) == 2 and value.shape[1:] == short[key].shape[1:] == long[key].shape[1:]
        torch.testing.assert_close(value[1:], long[key], rtol=1e-4, atol=1e-5)
    if f.family.labels:  # a network without labels reads none of c
        known = f.teacher.denoiser.net.config.num_class_embeds
        assert f.family.condition(f.teacher.denoiser.net.config) == ({"class_labels": ()} if known else {})
    elif f.teacher.parts.index["_class_name"] != "PixArtAlphaPipeline":  # 120 tokens, Sigma 300: no config says so
        shapes = {key: value.shape[1:] for key, value in f.c.items()}
        assert shapes == f.family.condition(f.teacher.denoiser.net.config)
        assert f.family.cross_attention_tokens in (0, len(f.c["prompt_embeds"][0]))


@torch.no_grad()
def test_images_to_latents_and_back(family, monkeypatch):
    f = family
    if f.family.labels:
        assert torch.equal(f.teacher.latent(f.x, torch.ones_like(f.x)), f.x)
        return
    images, vae, seen = f.teacher.decode(f.x), f.teacher.parts.vae, {}
    encode, decode = vae.encode, vae.decode
    monkeypatch.setattr(vae, "encode", lambda image: seen.setdefault("encoded", encode(image)))
    monkeypatch.setattr(vae, "decode", lambda x, **options: seen.update(decoded=x) or decode(x, **options))
    x = f.teacher.latent(images, torch.zeros_like(f.x))
    assert x.shape == f.x.shape and f.teacher.decode(x).shape == images.shape
    raw = seen["encoded"].latent if hasattr(seen["encoded"], "latent") else seen["encoded"].latent_dist.mode()
    torch.testing.assert_close(seen["decoded"], raw, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    again = f.teacher.latent(images, torch.ones_like(f.x)) - x  # the posterior's deviation, in the latent's scale
    assert (again == 0).all() if f.family.name == "sana" else (again > 0).all()


@torch.no_grad()
def test_the_resolution_is_a_choice(family):
    f = family
    pixels = f.teacher.decode(f.x).shape[-1]
    double = load(f.folder, resolution=2 * pixels)
    assert double.shape == (*f.teacher.shape[:-2], *(2 * side for side in f.teacher.shape[-2:]))
    z = torch.randn(1, *double.shape)
    torch.manual_seed(1)
    expected = f.family.sample(double.parts.pipe(), f.prompts[:1], z, 2, f.family.no_guidance)
    torch.manual_seed(1)
    images = double.decode(double.sample(z, double.encode(f.prompts[:1]), 2))
    assert (images.clamp(-1, 1) / 2 + 0.5 - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="resolution is .* multiple of"):
        load(f.folder, resolution=pixels + 1)


class Global:
    """Noise between the calls as the pipeline draws it: from torch's own generator, in the pipeline's layout."""

    before = None

    def __init__(self, f):
        self.f = f

    def normal(self, name, shape):
        return self.f.family.draw_noise(shape)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_the_pipeline_under_the_students_scheduler_gives_what_the_student_gives(family, steps):
    f = family
    config = StudentConfig(steps=steps, scale=1.0)
    scheduler, times = student_scheduler(f.teacher, config)
    assert len(times) == steps
    student = Student(f.teacher.denoiser, times, config.scale, config.renoise)
    torch.manual_seed(1)
    expected = f.teacher.decode(student.generate(f.z, f.c, Global(f))).clamp(-1, 1) / 2 + 0.5
    torch.manual_seed(1)
    pipe = f.teacher.parts.pipe(scheduler=scheduler)
    images = f.family.sample(pipe, f.prompts, f.z, steps, f.family.no_guidance)
    assert (images - expected).abs().max() < 1e-3


def test_every_module_that_a_lora_names_is_there(family):
    modules = [f".{name}" for name, _ in family.teacher.denoiser.net.named_modules()]
    assert not [t for t in family.family.lora_targets if not any(name.endswith(f".{t}") for name in modules)]


def test_the_registry_finds_every_family():
    """By the name of its module, its pipelines and, where two families read one, the class of its scheduler."""
    assert all(importlib.import_module(f"pipelines.families.{name}").FAMILY is one for name, one in families().items())
    readers = {pipeline: [one.name for one in found] for pipeline, found in known_pipelines().items()}
    assert {pipeline: names for pipeline, names in readers.items() if len(names) > 1} == {
        "ConsistencyModelPipeline": ["ddpm", "edm"]
    }
    both = [find_family("ConsistencyModelPipeline", "a", kind).name for kind in (None, "DDIMScheduler")]
    assert both == ["edm", "ddpm"]
    with pytest.raises(ValueError, match="a is a DiTPipeline; supported pipelines are .*SanaSprintPipeline"):
        find_family("DiTPipeline", "a")


def test_checkpointing_keeps_outputs_and_gradients(family):
    f = family
    net, t = f.teacher.denoiser.net, torch.full((2,), 0.6).double()

    def result():
        x = f.x.clone().requires_grad_()
        out = f.teacher.denoiser(x, t, f.c).out
        out.square().mean().backward()
        return out.detach(), x.grad, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    net.requires_grad_(True).train()
    try:
        plain = result()
        net.zero_grad()
        net.enable_gradient_checkpointing()
        torch.testing.assert_close(result(), plain, rtol=1e-5, atol=1e-6)
    finally:
        net.disable_gradient_checkpointing()
        net.zero_grad()
        net.requires_grad_(False).eval()


def test_auraflow_ends_with_its_positions(tmp_path):
    tiny.save("auraflow", tmp_path)
    assert load(tmp_path, 32).shape == (4, 16, 16)
    with pytest.raises(ValueError, match="resolution is 36; the positions of this teacher end at 32"):
        load(tmp_path, 36)


@torch.no_grad()
def test_a_learned_variance_is_left_out(tmp_path):
    """The network has the first half of the outputs, and its config says so; other numbers of them are refused."""
    tiny.save("ddpm", tmp_path, kind="DDPMPipeline", labels=False, variance_type="learned_range")
    net = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    config = dict(net.config) | {"out_channels": 6}
    wide = UNet2DModel.from_config(config)
    wide.save_pretrained(tmp_path / "unet")
    teacher = load(tmp_path)
    x, t = torch.randn(2, *teacher.shape), torch.full((2,), 0.6).double()
    expected = wide(x, teacher.denoiser.schedule.native(t).float()).sample[:, :3]
    torch.testing.assert_close(teacher.denoiser(x, t, None).out, expected, rtol=1e-4, atol=1e-5)
    assert teacher.denoiser.net.config.out_channels == 3
    assert teacher.sample(x, None, 2).isfinite().all()  # the scheduler asks for no variance
    UNet2DModel.from_config(config | {"out_channels": 4}).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="has 3 channels and predicts 4"):
        load(tmp_path)


@torch.no_grad()
def test_cogview4_reads_prompts_of_any_length(tmp_path):
    """In one batch as the pipeline reads each alone. A fixed shift, that of students, is refused."""
    tiny.save("cogview4", tmp_path)
    teacher = load(tmp_path)
    z = torch.randn(2, *teacher.shape)
    images = teacher.decode(teacher.sample(z, teacher.encode(PROMPTS), 2)).clamp(-1, 1) / 2 + 0.5
    pipe = teacher.parts.pipe()
    alone = [teacher.family.sample(pipe, [p], z[i : i + 1], 2, 1.0) for i, p in enumerate(PROMPTS)]
    assert (images - torch.cat(alone)).abs().max() < 1e-4
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": False}))
    with pytest.raises(ValueError, match="use_dynamic_shifting of its scheduler is false"):
        load(tmp_path)


def test_wan_says_what_it_cannot_carry(tmp_path):
    tiny.save("wan", tmp_path)
    assert load(tmp_path).shape == (16, 2, 4, 4) and load(tmp_path, 480, 81).shape == (16, 21, 60, 104)
    with pytest.raises(ValueError, match="frames is 6; this autoencoder needs a multiple of 4 plus 1"):
        load(tmp_path, frames=6)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boundary_ratio": 0.875}))
    with pytest.raises(ValueError, match="two experts"):
        load(tmp_path)
