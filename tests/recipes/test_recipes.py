"""Every recipe and every row of the digits as a smoke run, end to end.

Train, checkpoint, resume, export, reload by plain diffusers, sample.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from flags import FAST
from hub_server import Hub, environment
from PIL import Image
from safetensors.torch import load_file

from distill.configuration import parse
from distill.diffusion.schedule import EDM
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.training import checkpoint
from distill.training.build import build
from distill.training.loop import train
from pipelines import load, run
from pipelines.components import ExportError, index
from pipelines.export import export, verify
from pipelines.export.card import snippet
from pipelines.export.model_card import collect_card_info
from pipelines.families import edm
from pipelines.teacher import load_teacher
from recipes.digits import TABLE, TEACHER

ROOT = Path(__file__).resolve().parents[2]
FILES = [p.stem for p in (ROOT / "recipes").glob("*.py") if "\nCONFIG = Config(" in p.read_text()]
RECIPES = sorted([*FILES, *TABLE])  # a row of the digits is called as its method
CONVOLUTIONS = "lora.rank 2 --student.lora.targets conv1 conv2 time_emb_proj"
UNMOVED = ("degradation", "sun_sd15", "nct", "nct_sd15")  # the teacher's weights are exported
STUDENTS = [name for name in RECIPES if name not in UNMOVED]
RUNS = {name: (name, "") for name in STUDENTS} | {
    "two steps": ("sid", "--student.steps 2"),
    "adapters": ("dmd2", f"--student.{CONVOLUTIONS}"),
    "adapters on both": ("vsd", f"--student.{CONVOLUTIONS} --fake.lora.rank 2 --fake.lora.targets conv1"),
    "one step": ("dmd2_sdxl", "--student.steps 1"),
    "Euler": ("sid_sdxl", "--student.steps 2 --student.renoise ddim --student.scale None"),
    "half precision": ("dmd2_flux", ""),
    "24 GB": (
        "dmd2_sdxl_lora",
        "--method.gan 0 --method.gan_fake 0 --fake.lora.rank 4 --gradient_accumulation_steps 2",
    ),
}
LAUNCHED = {"half precision": {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}}  # by accelerate
EVERY = {
    "DMD2": "--method.every 1",
    "DiffInstruct": "--method.fake_steps 1",
    "Entropic": "--method.base.every 1",
    "FDistill": "--method.every 1",
    "DisBack": "--method.every 1",
    "PhasedDMD": "--method.every 1",
    "RCM": "--method.every 1 --method.warmup 0",
    "SiD": "--method.fake_steps 1",
    "SiDA": "--method.fake_steps 1 --method.start 0 --method.gan_start 0",
    "VSD": "--method.fake_steps 1",
}
# two steps that move the student, and an average that is neither the student nor the teacher
SEED = 5


def config_of(recipe):
    return TABLE[recipe].config if recipe in TABLE else importlib.import_module(f"recipes.{recipe}").CONFIG


def first_of_each(names, facts_of):
    """The names that show a fact that none before them shows."""
    shown, chosen = set(), []
    for name in names:
        facts = facts_of(config_of(RUNS[name][0]))
        if RUNS[name][1] or name in LAUNCHED or facts - shown:
            chosen.append(name)
        shown |= facts
    return chosen


def calls_of(config):
    """What decides how a pipeline calls a student: noise between calls, one call or several, adapters, by family."""
    student = config.student
    several = student.steps > 1 or len(student.times or ()) > 1
    return {(config.family, student.renoise), (config.family, several), (config.family, bool(student.lora.rank))}


PUBLISHED = [name for name in RUNS if RUNS[name][0] not in TABLE or RUNS[name][1]]
DIGITS = [name for name in RUNS if name not in PUBLISHED]
QUICK = first_of_each(PUBLISHED, lambda config: {type(config.method), config.family})  # `make slow` runs the others
CALLED = first_of_each([*QUICK, *DIGITS], lambda config: {(config.family, config.student.renoise)})
QUICK += [name for name in CALLED if name in DIGITS]
COMPARED = first_of_each(QUICK, calls_of)


def marked(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def argv(name, out):
    recipe, flags = RUNS[name]
    method = EVERY.get(type(config_of(recipe).method).__name__, "")
    return [*FAST.split(), *method.split(), *flags.split(), "--output_dir", f"{out}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """out(run) -> its folder; a run is made when the first test asks for it."""
    root = tmp_path_factory.mktemp("runs")
    folder = lambda name: root / name.replace(" ", "-")
    run_of = lambda name: forked.main(RUNS[name][0], argv(name, folder(name)), LAUNCHED.get(name, {}))
    failure_of = cache(run_of)

    def finished(name):
        assert not failure_of(name), failure_of(name)
        return folder(name)

    return finished


def resumed(name, folder, checkpoint):
    """(teacher, the state at the end) of a run that goes on from a checkpoint."""
    config = run.smoke_config(parse(config_of(RUNS[name][0]), argv(name, folder)))
    guidance_embedded = Requirement.GUIDANCE_EMBEDDING in config.method.requirements
    teacher = load_teacher(config.teacher, guidance_embedded=guidance_embedded)
    data = config.data.open(teacher, config.method.requirements)
    _, student = run.resolve_student_schedule(teacher, run.with_method_times(config.method, teacher, config.student))
    c = {key: value[:1] for key, value in data.fixed(1)[1].items()}
    nets = build(config.method, teacher.denoiser, teacher.shape, c, student, config.fake)
    run.attach_judges(nets, config, teacher, data)
    *_, state = train(config.method, nets, data, config.train, Accelerator(cpu=True), checkpoint)
    return teacher, state


def trained(name, folder):
    """(teacher, state) of a finished run, from its checkpoint and not from its pipeline."""
    return resumed(name, folder, folder / "checkpoint-2")


class Recorder:
    """A pipeline that keeps what it was called with."""

    def __init__(self, pipe):
        self.__dict__["pipe"] = pipe

    def __call__(self, *args, **options):
        self.__dict__["called"] = args, options
        return self.pipe(*args, **options)

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __setattr__(self, name, value):
        pass  # the latents of ConsistencyModelPipeline: it draws them first, from the seed


def noise(teacher):
    torch.manual_seed(SEED)
    pixels = teacher.parts.index["_class_name"] == "ConsistencyModelPipeline"
    z = torch.randn(1, *teacher.shape)
    if not pixels:
        torch.manual_seed(SEED)
    return z


@torch.no_grad()
def sampled(teacher, student, net):
    """An image of the student with these weights, in [0, 1]."""
    prompt = verify.examples(teacher)[1]
    c, z = teacher.encode([prompt]), noise(teacher)
    x = student.using(net).generate(z, c, verify.Generated(teacher))
    return (teacher.decode(x) / 2 + 0.5).clamp(0, 1).numpy()


# ---- what a run leaves ----


@pytest.mark.parametrize("name", marked(RUNS, QUICK))
def test_files(name, out):
    """The configuration, the log, grids of samples, checkpoints, the pipeline; nothing half-made."""
    folder = out(name)
    names = {
        "config.yaml",
        "history.jsonl",
        "log.jsonl",
        "samples",
        "checkpoint-1",
        "checkpoint-2",
        "pipeline",
        "teacher",
    }
    assert {p.name for p in folder.iterdir()} - {"data"} == names
    recipe, flags = RUNS[name][0], argv(name, folder)
    config = run.smoke_config(parse(config_of(recipe), flags))
    assert parse(config_of(recipe), ["--config", f"{folder / 'config.yaml'}"]) == config
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all("student/loss" in line for line in lines)
    assert {p.name for p in (folder / "samples").iterdir()} == {"step-000001.png", "step-000002.png"}
    with Image.open(folder / "samples" / "step-000002.png") as picture:
        assert np.asarray(picture).std() > 5
    facts = json.loads((folder / "pipeline" / "distill.json").read_text())
    assert facts["student"] and facts["steps"] == len(facts["times"]) == config.student.steps
    assert facts["config"] == (folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", marked(RUNS, QUICK))
def test_the_rest_is_the_teachers(name, out):
    """Text encoders, tokenizers and VAE are the teacher's files, byte for byte."""
    folder = out(name)
    ours = ("unet", "transformer", "scheduler")
    parts = [p.name for p in (folder / "teacher").iterdir() if p.is_dir() and p.name not in ours]
    for part in parts:
        for file in (folder / "teacher" / part).rglob("*"):
            assert (
                not file.is_file()
                or file.read_bytes() == (folder / "pipeline" / file.relative_to(folder / "teacher")).read_bytes()
            )


PLAIN = """
import importlib, sys
for room in ("distill", "pipelines", "eval", "recipes"):
    sys.modules[room] = None  # to import it is an error
import json, numpy, torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
logging.disable_progress_bar(), logging.set_verbosity_error()
torch.set_num_threads(1)
for line in sys.stdin:
    folder, base, lora, given, programs, to = json.loads(line)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    args, options = torch.load(given, weights_only=True)
    def made(pipe):
        torch.manual_seed(5)
        done = pipe(*args, **options)
        images = done.images if hasattr(done, "images") else done.frames
        return numpy.asarray(images)
    images = {"pipeline": made(pipe)}
    if lora:
        on_base = DiffusionPipeline.from_pretrained(base, scheduler=pipe.scheduler, local_files_only=True)
        on_base.set_progress_bar_config(disable=True)
        on_base.load_lora_weights(folder, weight_name=lora)
        images["lora"] = made(on_base)
    for program in programs:
        space = {}
        exec(program, space)
        assert space.get("image", space.get("video")) is not None
    numpy.savez(to, **images)
    print("made", flush=True)
"""


@pytest.fixture(scope="module")
def plainly(out, tmp_path_factory):
    """plainly(run) -> {"pipeline" | "lora": images} by diffusers, transformers and peft alone; the card's programs run.

    One process makes the images of all runs, line by line.
    """
    from diffusers import DiffusionPipeline

    where = tmp_path_factory.mktemp("plainly")
    with (where / "said.txt").open("w") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        process = subprocess.Popen([sys.executable, "-c", PLAIN], cwd=where, text=True, **pipes)

    def images(name):
        folder = out(name)
        teacher, pipeline = load(folder / "teacher"), folder / "pipeline"
        family, facts = teacher.family, json.loads((pipeline / "distill.json").read_text())
        pipe = Recorder(DiffusionPipeline.from_pretrained(pipeline, local_files_only=True))
        pipe.pipe.set_progress_bar_config(disable=True)
        prompt = verify.examples(teacher)[1]
        family.sample(pipe, [prompt], noise(teacher), facts["steps"], family.no_guidance)
        torch.save(pipe.called, where / f"{name}.pt")
        lora = [p.name for p in pipeline.glob("*_lora.safetensors")]
        card = (pipeline / "README.md").read_text()
        programs = [snippet(card, i) for i in range(card.count("```python"))]
        job = (
            f"{pipeline}",
            f"{folder / 'teacher'}",
            *(lora or [""]),
            f"{where / name}.pt",
            programs,
            f"{where / name}.npz",
        )
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert "made\n" in iter(process.stdout.readline, ""), (where / "said.txt").read_text()[-3000:]
        return dict(np.load(where / f"{name}.npz"))

    yield images
    process.communicate()


def placed(images, like):
    """As [1, C, (T,) H, W] in [0, 1], whatever the pipeline's layout is."""
    if images.shape == like.shape:
        return images
    return np.moveaxis(images, -1, 1) if images.ndim == 4 else np.swapaxes(images, 1, 2)


@pytest.mark.parametrize("name", marked(RUNS, COMPARED))
def test_pipeline_is_the_averaged_student(name, out, plainly):
    """Under diffusers alone it samples the images of our student with its average; other weights give others."""
    teacher, state = trained(name, out(name))
    student, net = state.nets.student, state.ema.net
    own = sampled(teacher, student, net)
    for what, images in plainly(name).items():
        assert np.abs(placed(images, own) - own).max() < (1e-4 if what == "pipeline" else verify.LARGEST)
        others = [student.denoiser.net] + [teacher.denoiser.net] * (not hasattr(net, "end"))  # the teacher knows no end
        for other in others:
            assert np.abs(placed(images, own) - sampled(teacher, student, other)).max() > 10 * verify.TOLERANCE


@pytest.mark.parametrize("name", marked(STUDENTS, COMPARED))
def test_resumes(name, out, tmp_path):
    """From its first checkpoint it ends bit for bit where it ended."""
    folder = out(name)
    _, state = resumed(name, folder, folder / "checkpoint-1")
    assert state.step == 2
    again = checkpoint.save(state, tmp_path)
    for file in (folder / "checkpoint-2").glob("*.safetensors"):
        mine, theirs = load_file(again / file.name), load_file(file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), file.name


def test_adapters_are_merged(out):
    """The exported weights have the backbone's names, and hold the adapters."""
    teacher = load(out("adapters") / "teacher")
    (file,) = (out("adapters") / "pipeline" / "unet").glob("*.safetensors")
    stored, backbone = load_file(file), teacher.denoiser.net.state_dict()
    assert stored.keys() == backbone.keys()
    changed = {name for name in stored if not torch.equal(stored[name], backbone[name])}
    adapted = {name for name in stored if name.split(".")[-2] in ("conv1", "conv2", "time_emb_proj")}
    assert changed == {name for name in adapted if name.endswith("weight")}


def test_times(out):
    """DMD2's four steps, its one step at 399, SiD-LSG's at 625, LCM's training grid: the scheduler's own timesteps."""
    from diffusers import DiffusionPipeline

    told = {"dmd2_sdxl": [999, 749, 499, 249], "one step": [399], "sid_sd15": [625], "swiftbrush_sd21": [999]}
    grid = [999, 759, 499, 259]
    told |= {"lcm_lora_sdxl": grid, "tcd_sdxl": grid, "pcm_sdxl": [999, 749, 499, 249]}
    for name, wanted in told.items():
        scheduler = DiffusionPipeline.from_pretrained(out(name) / "pipeline", local_files_only=True).scheduler
        scheduler.set_timesteps(len(wanted))
        assert scheduler.timesteps.tolist() == wanted
    again = export.trained(export.Again(run=f"{out('lcm_lora_sdxl')}"))[0]
    assert [round(999 * t) for t in again.times] == grid  # its config.yaml names no times


# ---- an export that is wrong is caught ----


@pytest.fixture(scope="module")
def one(out):
    """A finished run of SDXL: everything that an export is made of."""
    teacher, state = trained("dmd2_sdxl", out("dmd2_sdxl"))
    scheduler, _ = run.resolve_student_schedule(teacher, config_of("dmd2_sdxl").student)
    card = collect_card_info("student", teacher, "base", "dmd2", "", None, None)
    return teacher, state, scheduler, card


@pytest.mark.parametrize("which", ("teacher", "raw", "stale"))
def test_wrong_weights_are_caught(which, one, out, tmp_path, monkeypatch):
    """The folder of an earlier export stays as it is."""
    teacher, state, scheduler, card = one
    net, student = state.ema.net, state.nets.student
    stale = load_file(out("dmd2_sdxl") / "checkpoint-1" / "ema.safetensors")
    wrong = {"teacher": teacher.denoiser.net, "raw": student.denoiser.net}
    if which == "stale":
        wrong["stale"] = state.nets.student.denoiser.copy().net
        wrong["stale"].load_state_dict(stale)
    folder, right = tmp_path / "pipeline", export.write
    assert export.export(student, teacher, net, scheduler, folder, card).gaps["pipeline"].largest < 1e-5
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(export, "write", lambda teacher, net, *rest: right(teacher, wrong[which], *rest))
    with pytest.raises(ExportError, match="differs from the student: pipeline by"):
        export.export(student, teacher, net, scheduler, folder, card)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "change", ({"original_inference_steps": 50}, {"beta_end": 0.011}, {"prediction_type": "sample"})
)
def test_a_wrong_scheduler_is_caught(change, one, tmp_path):
    teacher, state, scheduler, card = one
    wrong = type(scheduler).from_config(scheduler.config, **change)
    with pytest.raises(ExportError, match="differs from the student: pipeline by"):
        export.export(state.nets.student, teacher, state.ema.net, wrong, tmp_path / "pipeline", card)


def test_every_input_counts(one):
    """What verification compares depends on each input by 100 times its tolerance."""
    teacher, state, _, _ = one
    student = state.nets.student
    prompts = list(verify.EXAMPLES[:1])
    c = teacher.encode(prompts)
    z = noise(teacher)

    @torch.no_grad()
    def image(c, student=student):
        torch.manual_seed(SEED)
        x = student.using(state.ema.net).generate(z, c, verify.Generated(teacher))
        return (teacher.decode(x) / 2 + 0.5).clamp(0, 1)

    one = image(c)
    changed = {key: c | {key: -c[key]} for key in ("prompt_embeds", "pooled")}
    changed["time_ids"] = c | {"time_ids": c["time_ids"] + 512}
    for key, given in changed.items():
        assert (image(given) - one).abs().max() > 100 * verify.TOLERANCE, key
    later = Student(student.denoiser, tuple(0.5 * t for t in student.times), student.scale)
    assert (image(c, later) - one).abs().max() > 100 * verify.TOLERANCE


def test_a_recipe_fails_before_its_first_step(tmp_path, monkeypatch, capsys):
    """Its export is rehearsed: a pipeline that samples something else ends the run before it has a folder's files."""
    wrong = replace(edm.FAMILY, sample=lambda *given: 0.9 * edm.sample(*given))
    monkeypatch.setattr(edm, "FAMILY", wrong)
    with pytest.raises(SystemExit) as error:
        run.main(config_of("sid"), argv("sid", tmp_path))
    said = capsys.readouterr().err
    assert error.value.code == 2 and "error: the export would not be the student: rehearsed" in said
    assert not (tmp_path / "config.yaml").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_the_average_is_exported(tmp_path):
    run.main(config_of("sid"), argv("sid", tmp_path))
    (stored,) = (load_file(f) for f in (tmp_path / "pipeline" / "unet").glob("*.safetensors"))
    average, raw = (load_file(tmp_path / "checkpoint-2" / f"{role}.safetensors") for role in ("ema", "student"))
    assert all(torch.equal(stored[k], average[k]) for k in stored)
    assert any(not torch.equal(stored[k], raw[k]) for k in stored)


def test_two_steps_are_exported(tmp_path):
    run.main(config_of("sid"), [*argv("sid", tmp_path), "--student.steps", "2"])
    facts = json.loads((tmp_path / "pipeline" / "distill.json").read_text())
    assert facts["times"] == pytest.approx(EDM().time(torch.tensor([2.5, 2.5 / 2**7])).tolist())


def test_a_recipe_fails_with_its_export(tmp_path, monkeypatch, capsys):
    right = export.write

    def wrong(teacher, net, *rest):
        right(teacher, teacher.denoiser.net, *rest)

    monkeypatch.setattr(export, "write", wrong)
    with pytest.raises(SystemExit) as error:
        run.main(config_of("sid"), argv("sid", tmp_path))
    assert error.value.code == 2
    assert "error: the exported pipeline differs from the student" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


# ---- again, and from others ----


def test_export_again(out, tmp_path):
    """The command makes from a checkpoint what the run made at its end; an earlier checkpoint gives another student."""
    folder = out("dmd2_sdxl_lora")
    export.main(export.Again(run=f"{folder}", output_dir=f"{tmp_path / 'again'}"))
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / unet).read_bytes() == (folder / "pipeline" / unet).read_bytes()
    export.main(export.Again(run=f"{folder}", checkpoint="checkpoint-1", output_dir=f"{tmp_path / 'first'}"))
    assert (tmp_path / "first" / unet).read_bytes() != (folder / "pipeline" / unet).read_bytes()


def test_export_the_mean_of_two(out, tmp_path, capsys):
    """SwiftBrush v2: the weights are those of both students' averages, by their shares; other calls are refused."""
    a, b, two = out("sid"), out("reward"), out("two steps")
    export.main(export.Again(f"{a}", other=f"{b}", share=0.75, output_dir=f"{tmp_path / 'mean'}"))
    name = "unet/diffusion_pytorch_model.safetensors"
    mean, first, second = (load_file(f / name) for f in (tmp_path / "mean", a / "pipeline", b / "pipeline"))
    for key in mean:
        torch.testing.assert_close(mean[key], 0.75 * first[key] + 0.25 * second[key])
    assert any(not torch.equal(first[key], second[key]) for key in mean)
    with pytest.raises(SystemExit):
        export.main(export.Again(f"{a}", other=f"{two}", output_dir=f"{tmp_path / 'no'}"))
    assert "not mixed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "run_, file, layout, steps",
    (
        ("dmd2_sdxl", "dmd2_sdxl_4step_unet.safetensors", "dmd2", 4),
        ("one step", "one-step_1step_unet.safetensors", "dmd2", 1),
        ("dmd2_sdxl", "dmd2_sdxl_4step_unet.safetensors", "lightning", 2),
        ("dmd2_sdxl", "dmd2_sdxl_4step_unet.safetensors", "lightning", 1),
        ("lcm_lora_sdxl", "lcm_lora_sdxl_4step_lora_comfy.safetensors", "lcm", 4),
    ),
)
def test_export_from_others(run_, file, layout, steps, out, tmp_path):
    """A published file becomes the same verified folder, with its card."""
    given = {"published": f"{out(run_) / 'pipeline' / file}", "layout": layout, "steps": steps}
    export.main(export.Again(**given, teacher=f"{out(run_) / 'teacher'}", output_dir=f"{tmp_path / 'out'}"))
    facts = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert facts["steps"] == steps and yaml.safe_load(facts["config"])["from"] == file
    assert layout in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ("AutoPipelineForImage2Image", "AutoPipelineForInpainting"))
def test_students_in_other_pipelines(kind, out):
    """img2img and inpainting run on an exported SDXL student; a LoRA from elsewhere changes what it makes."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(out("dmd2_sdxl") / "pipeline", local_files_only=True)
    other = getattr(diffusers, kind).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    given = {"image": picture, "num_inference_steps": 4, "strength": 0.5, "guidance_scale": 0, "output_type": "np"}
    if "Inpainting" in kind:
        given["mask_image"] = Image.fromarray(np.full((16, 16), 255, np.uint8))
        given |= {"height": 16, "width": 16}

    def image():
        return other("a cat", generator=torch.Generator().manual_seed(0), **given).images

    before = image()
    assert np.isfinite(before).all()
    other.load_lora_weights(out("lcm_lora_sdxl") / "pipeline", weight_name="lcm_lora_sdxl_4step_lora.safetensors")
    assert np.abs(image() - before).max() > 1e-3


# ---- the Hub ----

PUSHING = """
import sys
sys.path.insert(0, {root!r})
from pipelines.export import export
from pipelines import run
from recipes.digits import TABLE
right = export.write
def wrong(teacher, net, *rest):
    right(teacher, teacher.denoiser.net, *rest)
for broken, argv in ((True, {broken!r}), (False, {sent!r})):
    export.write = wrong if broken else right
    try:
        run.main(TABLE["sid"].config, argv)
        assert not broken
    except SystemExit as error:
        assert broken and error.code == 2
"""


def test_push_to_hub(tmp_path):
    """The repository is there before the training; what is verified is sent, and nothing else."""
    broken, sent = (
        [*argv("sid", tmp_path / name), "--push_to_hub", "--hub_model_id", f"ada/{name}", "--hub_private"]
        for name in ("broken", "sent")
    )
    sent += ["--license", "cc-by-4.0"]
    with Hub() as hub:
        program = PUSHING.format(root=f"{ROOT}", broken=broken, sent=sent)
        command, env = [sys.executable, "-c", program], environment(hub.url, tmp_path, HF_TOKEN="hf_writer")
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(hub.repos[name].private for name in ("ada/broken", "ada/sent"))
        assert set(hub.repos["ada/broken"].files) <= {".gitattributes"} and "differs from the student" in done.stderr
        repo, folder = hub.repos["ada/sent"], tmp_path / "sent" / "pipeline"
        for file in folder.rglob("*"):
            if file.is_file():
                assert repo.files[f"{file.relative_to(folder)}"] == file.read_bytes()
        card = repo.files["README.md"].decode()
        assert 'from_pretrained("ada/sent", torch_dtype=torch.float32)' in card and "license: cc-by-4.0" in card


# ---- trackers ----


def test_tensorboard_gets_numbers_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.main(config_of("sid"), [*argv("sid", tmp_path), "--report_to", "tensorboard"])
    (events,) = tmp_path.rglob("events.out.*")
    found = EventAccumulator(f"{events}").Reload()
    logged = [json.loads(line)["student/loss"] for line in (tmp_path / "log.jsonl").open()]
    assert [e.value for e in found.Scalars("student/loss")] == pytest.approx(logged)
    assert [e.step for e in found.Images("samples")] == [1, 2]


def test_wandb_offline_gets_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    run.main(config_of("sid"), [*argv("sid", folder), "--report_to", "wandb"])
    assert len(list(folder.rglob("offline-run-*/files/media/images/samples_*.png"))) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}  # nothing beside the run's folder


# ---- the teacher and the demo ----


def test_a_teacher_and_its_student(tmp_path):
    """The teacher's folder is read back as a guidable denoiser, smooth in time, and is never overwritten."""
    from recipes import digits_teacher

    config = digits_teacher.Teacher(output_dir=f"{tmp_path / 't'}", max_train_steps=3, channels=(8, 16))
    for wrong in ({"max_train_steps": 0}, {"sigma_d": float("nan")}, {"channels": (7,)}, {"channels": (8,) * 5}):
        with pytest.raises(SystemExit):
            digits_teacher.main(replace(config, **wrong))
    assert not (tmp_path / "t").exists()
    digits_teacher.main(config)
    with pytest.raises(SystemExit):
        digits_teacher.main(config)
    assert index(tmp_path / "t")["_class_name"] == "ConsistencyModelPipeline"
    teacher = load(tmp_path / "t")
    assert (teacher.denoiser.sigma_d, teacher.shape) == (0.75, (1, 8, 8))
    assert teacher.denoiser.null["class_labels"].tolist() == [10]
    weight = teacher.denoiser.net.time_embedding.linear_1.weight.clone()
    edm.smooth(teacher.denoiser.net, config.max_frequency)
    assert torch.equal(teacher.denoiser.net.time_embedding.linear_1.weight, weight) and (weight == 0).any()
    flags = f"--teacher {tmp_path / 't'} --output_dir {tmp_path / 's'} --method.guidance 2 --max_train_steps 1"
    run.main(config_of("vsd"), flags.split())
    assert (tmp_path / "s" / "pipeline" / "model_index.json").is_file()


def test_the_demo_plans_every_method(tmp_path):
    """Each job waits only for jobs that exist; every student is sampled from its exported pipeline."""
    from recipes import digits_demo

    names = [name for name, row in TABLE.items() if row.config.teacher == TEACHER]
    todo = digits_demo.jobs(digits_demo.Demo(methods=tuple(names)), tmp_path)
    assert all(set(job.after) <= todo.keys() for job in todo.values())
    for name in names:
        assert f"{tmp_path / name / 'pipeline'}" in todo[f"{name}-1"].command
        assert todo[f"{name}-1"].after == (name,)
