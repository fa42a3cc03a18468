"""Runs of every recipe and of every row of the digits: their flags, which of them are quick, how they are read."""

import importlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from flags import FAST

from distill.configuration import parse
from distill.method import Requirement
from distill.training.build import build
from distill.training.loop import train
from pipelines import run
from pipelines.export import verify
from pipelines.teacher import load_teacher
from recipes.digits import TABLE

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
LONG = (  # 20 seconds or more with all their tests
    "twinflow_qwen",
    "half precision",
    "scm_sana",
    "sana_sprint",
    "sana_sprint_teacher",
    "meanflow_sana",
    "ladd_sd3",
)
SHORT = [name for name in PUBLISHED if name not in LONG]
QUICK = first_of_each(SHORT, lambda config: {type(config.method), config.family})  # `make slow` runs the others
CALLED = first_of_each([*QUICK, *DIGITS], lambda config: {(config.family, config.student.renoise)})
QUICK += [name for name in CALLED if name in DIGITS]
COMPARED = first_of_each(QUICK, calls_of)


def marked(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def argv(name, out):
    recipe, flags = RUNS[name]
    method = EVERY.get(type(config_of(recipe).method).__name__, "")
    return [*FAST.split(), *method.split(), *flags.split(), "--output_dir", f"{out}"]


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
    prompt = teacher.family.examples(teacher)[1]
    c, z = teacher.encode([prompt]), noise(teacher)
    x = student.with_network(net).generate(z, c, verify.GlobalGeneratorDraw(teacher))
    return (teacher.decode(x) / 2 + 0.5).clamp(0, 1).numpy()
