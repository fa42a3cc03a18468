"""Controls: nothing where no picture is shown, pictures of samples, finished students, a run and its export."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from accelerate import Accelerator
from flags import FAST
from safetensors.torch import load_file

from distill.configuration import parse
from distill.diffusion.student import Student
from distill.methods import NCT
from distill.random import Draw
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import StudentConfig
from distill.training.loop import train
from pipelines import load, run
from pipelines.export import control_error, export, verify
from pipelines.export.schedule import find_student_scheduler, student_config_of_export
from pipelines.families import tiny
from pipelines.inference import controlnet
from pipelines.planning.command import Plan, resolve_config
from pipelines.planning.memory_plan import Run
from pipelines.teacher import load_teacher
from recipes import nct_sd15
from recipes.digits import TABLE

F64 = torch.float64
RECIPES = {"nct": (TABLE["nct"].config, "edm"), "nct_sd15": (nct_sd15.CONFIG, "sd")}


# ---- pictures ----


def step(*heights):
    """Bands of rows that are dark on the left and of these brightnesses on the right."""
    images = torch.zeros(1, 3, 16, 16)
    for i, height in enumerate(heights):
        images[..., i * 16 // len(heights) : (i + 1) * 16 // len(heights), 8:] = height
    return images


def test_canny():
    """One line of pixels along a step; none along a faint one, and along one between only where a strong one leads."""
    edges = controlnet.canny(step(1.0))
    assert edges.shape == (1, 1, 16, 16) and set(edges.unique().tolist()) == {0, 1}
    assert edges.sum() == 16 and edges[..., 7:9].sum() == 16
    assert controlnet.canny(step(1.0).transpose(2, 3)).sum() == 16
    assert (
        controlnet.canny(step(0.09)).sum() == controlnet.canny(step(0.15)).sum() == 0
    )  # |g| = .36, .6; .39 and .78 bound
    assert controlnet.canny(step(0.3, 0.15))[..., 12:, :].sum() == 4
    disc = (torch.arange(32) - 15.5).square()
    ring = controlnet.canny(((disc + disc[:, None]) < 100).float().expand(1, 3, 32, 32))
    assert 50 < ring.sum() < 90 and ring[..., 12:20, 12:20].sum() == 0


def test_gray_and_downsample():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    want = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    torch.testing.assert_close(controlnet.gray(images), want)
    small = controlnet.downsample(images, 4)
    torch.testing.assert_close(small[0, 1, 4:, :4], images[0, 1, 4:, :4].mean().expand(4, 4))
    torch.testing.assert_close(controlnet.gray(images[:, :1]), images[:, :1])
    with pytest.raises(ValueError, match="factor is 3; it must divide"):
        controlnet.downsample(images, 3)


# ---- the adapter ----


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """{family: tiny teacher}."""
    found = {}
    for family in ("edm", "sd", "sdxl", "sana"):
        tiny.save(family, folder := tmp_path_factory.mktemp(family))
        found[family] = load(folder)
    return found


def again(teacher):
    """The same teacher, with a network of its own."""
    return replace(teacher, denoiser=teacher.denoiser.copy())


@pytest.mark.parametrize("family", ("edm", "sd", "sdxl"))
@torch.no_grad()
def test_zero_is_the_base(family, teachers):
    """A new adapter changes no bit; one that has learned does, and only where it is shown a picture."""
    teacher, base = again(teachers[family]), teachers[family].denoiser
    torch.manual_seed(0)
    controlnet.install_adapter(teacher)
    c = teacher.encode([0, 1] if family == "edm" else ["a cat", "a dog"])
    x, t = torch.randn(2, *teacher.shape), torch.full((2,), 0.6, dtype=F64)
    told = c | controlnet.example_picture(teacher.denoiser, teacher)
    want = base(x, t, c).out
    assert torch.equal(teacher.denoiser(x, t, told).out, want) and torch.equal(teacher.denoiser(x, t, c).out, want)
    for p in teacher.denoiser.net.control.parameters():
        p.add_(0.1 * torch.randn_like(p))
    one = teacher.denoiser(x, t, told).out
    assert (one - want).norm() > 0.01 * want.norm() and torch.equal(teacher.denoiser(x, t, c).out, want)
    other = teacher.denoiser(x, t, told | {"control": 1 - told["control"]}).out
    assert (other - one).norm() > 1e-3 * want.norm()
    assert torch.equal(controlnet.without_controlnet(teacher.denoiser)(x, t, c).out, want)
    assert (
        not hasattr(controlnet.without_controlnet(teacher.denoiser).net, "control")
        and controlnet.without_controlnet(base) is base
    )


@pytest.mark.parametrize("family", ("sd", "sdxl"))
@torch.no_grad()
def test_features_go_where_diffusers_puts_them(family, teachers):
    """To the bit as a UNet2DConditionModel adds what it is given as additional residuals."""
    net = copy.deepcopy(teachers[family].denoiser.net)
    adapter = controlnet.build_adapter(net, 3, 2)
    for p in adapter.parameters():
        p.add_(0.1 * torch.randn_like(p))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, net.config.cross_attention_dim)
    sizes = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.rand(2, 6)}}
    given, picture = sizes if family == "sdxl" else {}, torch.rand(1, 3, 16, 16)
    skips, middle = adapter(x, t, text, picture.expand(2, -1, -1, -1), return_dict=False, **given)
    told = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
    want, before = (net(x, t, text, **given, **more).sample for more in (told, {}))
    with controlnet.show_picture(net, adapter, picture):
        assert torch.equal(net(x, t, encoder_hidden_states=text, **given).sample, want)
    assert torch.equal(net(x, t, text, **given).sample, before) and (want - before).norm() > 0.01 * before.norm()


def test_other_networks_are_refused(teachers):
    with pytest.raises(ValueError, match="UNets of SD, SDXL and EDM; this network is a Sana"):
        controlnet.install_adapter(again(teachers["sana"]))


# ---- finished students ----


@pytest.mark.parametrize(
    "family, config",
    (
        ("edm", StudentConfig(sigma=2.5)),
        ("edm", StudentConfig(sigma=2.5, steps=2)),
        ("sd", StudentConfig(timestep=399, scale=1.0)),
        ("sd", StudentConfig(steps=4, scale=1.0)),
        ("sdxl", StudentConfig(steps=2, renoise="ddim")),
        ("sana", StudentConfig(steps=2)),
    ),
    ids=lambda value: value if isinstance(value, str) else f"{value.steps} {value.renoise}",
)
@torch.no_grad()
def test_a_finished_student_is_called_as_it_was(family, config, teachers, tmp_path):
    """Read back from its exported folder it samples what it sampled."""
    teacher = teachers[family]
    made, times = find_student_scheduler(teacher, config)
    export.write_pipeline(teacher, teacher.denoiser.net, made, tmp_path / "s")
    (tmp_path / "s" / "distill.json").write_text(json.dumps({"student": True, "steps": config.steps}))
    c = teacher.encode([1] if family == "edm" else ["a cat"])
    z, draw = torch.randn(1, *teacher.shape), Draw(0, 0, "student", torch.arange(1))
    want = Student(teacher.denoiser, times, config.scale, config.renoise).generate(z, c, draw)
    other = load(tmp_path / "s")
    found = student_config_of_export(other, StudentConfig(steps=3, sigma=1.0))
    got = Student(other.denoiser, find_student_scheduler(other, found)[1], found.scale, found.renoise).generate(
        z, c, draw
    )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert student_config_of_export(teacher, config) is config  # no student's folder


# ---- a run ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{recipe: the folder of its smoke run}."""
    found = {}
    for name in RECIPES:
        found[name] = tmp_path_factory.mktemp("runs") / name
        said = forked.main(name, [*FAST.split(), "--output_dir", f"{found[name]}"])
        assert not said, said
    return found


def state_of(name, folder, step):
    """(teacher, state at the end) of a run that goes on from its checkpoint."""
    argv = [*FAST.split(), "--output_dir", f"{folder}"]
    config = run.smoke_config(parse(RECIPES[name][0], argv))
    teacher = load_teacher(config.teacher)
    controlnet.install_adapter(teacher)
    data = config.data.open(teacher, config.method.requirements)
    _, student = run.resolve_student_schedule(teacher, run.with_method_times(config.method, teacher, config.student))
    c = {key: value[:1] for key, value in data.fixed(1)[1].items()}
    nets = build(config.method, teacher.denoiser, teacher.shape, c, student, config.fake)
    run.attach_judges(nets, config, teacher, data)
    *_, state = train(config.method, nets, data, config.train, Accelerator(cpu=True), folder / f"checkpoint-{step}")
    return teacher, state


@pytest.mark.parametrize("name", RECIPES)
def test_resumes(name, runs, tmp_path):
    """From its first checkpoint, lambda with it, it ends bit for bit where it ended; the base has not moved."""
    teacher, state = state_of(name, runs[name], 1)
    folder = checkpoint.save(state, tmp_path)
    for file in (runs[name] / "checkpoint-2").glob("*.safetensors"):
        mine, theirs = load_file(folder / file.name), load_file(file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), file.name
    stored = load_file(folder / "student.safetensors")
    assert "multiplier.value" in stored and stored["multiplier.value"] != NCT().dual
    assert {k.partition(".")[0] for k in stored} - {"multiplier"} <= {"control"}
    theirs = load(runs[name] / "teacher").denoiser.net.state_dict()
    assert all(torch.equal(p, theirs[k]) for k, p in teacher.denoiser.net.state_dict().items())


PLAIN = """
import sys
for room in ("distill", "pipelines", "eval", "recipes"):
    sys.modules[room] = None  # to import it is an error
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
folder, given, to = sys.argv[1:]
torch.set_num_threads(1)
z, picture = torch.load(given, weights_only=True)
options = dict(num_inference_steps=1, guidance_scale=0.0, latents=z, output_type="pt")
adapter = ControlNetModel.from_pretrained(folder, subfolder="controlnet")
pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=adapter, safety_checker=None)
base = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
torch.save([pipe("a cat", image=picture, **options).images, base("a cat", **options).images], to)
"""


def test_plain_diffusers_shows_it_pictures(runs, tmp_path):
    """A ControlNet pipeline of diffusers alone gives the trainer's own samples, and without it the base student's."""
    folder = runs["nct_sd15"]
    teacher, state = state_of("nct_sd15", folder, 2)
    student = state.nets.student.with_network(state.ema.net)
    z, picture = torch.randn(1, *teacher.shape), controlnet.example_picture(student.denoiser, teacher)["control"]
    torch.save([z, picture], tmp_path / "given")
    command = [sys.executable, "-c", PLAIN, *map(str, (folder / "pipeline", tmp_path / "given", tmp_path / "made"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shown, base = torch.load(tmp_path / "made", weights_only=True)
    c = teacher.encode(["a cat"])
    with torch.no_grad():
        for got, told in ((shown, c | {"control": picture}), (base, c)):
            own = (teacher.decode(student.generate(z, told)) / 2 + 0.5).clamp(0, 1)
            torch.testing.assert_close(got, own, rtol=0, atol=1e-4)
    assert (shown - base).abs().max() > 10 * verify.TOLERANCE


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_adapter_is_caught(name, runs, tmp_path, monkeypatch):
    """The command exports again what the run exported; an adapter that was not trained is refused."""
    folder, file = runs[name], "controlnet/diffusion_pytorch_model.safetensors"
    export.main(export.ExportArguments(run=f"{folder}", output_dir=f"{tmp_path / 'again'}"))
    assert (tmp_path / "again" / file).read_bytes() == (folder / "pipeline" / file).read_bytes()
    weights = next((folder / "teacher" / "unet").glob("*.safetensors"))
    ours = load_file(tmp_path / "again" / "unet" / weights.name)
    assert all(torch.equal(value, ours[key]) for key, value in load_file(weights).items()) and len(ours)
    right = controlnet.load_adapter

    def wrong(path):
        found = right(path)
        for p in found.controlnet_mid_block.parameters():
            p.data.add_(1.0)
        return found

    monkeypatch.setattr(controlnet, "load_adapter", wrong)
    with pytest.raises(SystemExit):
        export.main(export.ExportArguments(run=f"{folder}", output_dir=f"{tmp_path / 'wrong'}"))
    assert not (tmp_path / "wrong").exists()


def test_plan(teachers):
    """The base is counted once, of the student the adapter alone is trained and averaged."""
    folder = teachers["sd"].parts.folder
    plan = Run(
        *resolve_config(Plan(Path("recipes/nct_sd15.py")), ["--teacher", f"{folder}", "--train_batch_size", "2"])
    )
    teacher = again(teachers["sd"])
    base, _ = (sum(p.numel() for p in teacher.denoiser.net.parameters()), controlnet.install_adapter(teacher))
    adapter = sum(p.numel() for p in teacher.denoiser.net.control.parameters())
    assert plan.parameters == {"teacher": (base, 0), "student": (base + adapter, adapter)}
    assert plan.unsharded_memory.average == 4 * (adapter + 1) and plan.cost.flops > 0  # and lambda


def test_consistency_command(runs, tmp_path, capsys):
    """It reads the folder alone; where the adapter is as it began, being told changes nothing."""
    folder = shutil.copytree(runs["nct"] / "pipeline", tmp_path / "p")
    found = control_error.measure_control_error(control_error.Arguments(f"{folder}", n=2))
    assert found["told"] != found["untold"] and 0 < found["told"] < 1
    adapter = controlnet.build_adapter(load(runs["nct"] / "teacher").denoiser.net, 1, 1)
    adapter.save_pretrained(folder / "controlnet")
    control_error.main(control_error.Arguments(f"{folder}", n=2))
    found = json.loads(capsys.readouterr().out)
    assert found["told"] == found["untold"]
    shutil.rmtree(folder / "controlnet")
    with pytest.raises(ValueError, match="has no controlnet"):
        control_error.measure_control_error(control_error.Arguments(f"{folder}", n=2))
