"""From a folder of images with classes of any names to a teacher, and from it to students of SiD, DMD2 and CD."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from distill.method import Requirement
from eval.sampling.conditions import label_conditions
from pipelines import load
from pipelines.families.registry import find_family_of
from recipes import pixel_teacher, train

CLASSES = {"red barn": (220, 30, 30), "Zebra": (235, 235, 235), "apple_tree": (30, 180, 40), "0-night": (20, 20, 90)}
NAMES = sorted(CLASSES)
TINY = [
    "--resolution",
    "8",
    "--channels",
    "8",
    "16",
    "--layers",
    "1",
    "--sample_steps",
    "2",
    "--validation_images",
    "4",
]


def draw_images(folder, n, side=(20, 40)):
    """n images a class: its colour with some noise, in any size."""
    random = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            noise = random.integers(-20, 21, (*random.integers(*side, 2), 3))
            image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.png")
    return folder


def train_teacher(images, out, *flags, steps=2):
    options = {"--images": images, "--output_dir": out, "--max_train_steps": steps, "--train_batch_size": 8}
    pixel_teacher.main([*(f"{word}" for pair in options.items() for word in pair), *flags])
    return out / "teacher"


def distill(method, teacher, images, out, *flags, steps=2):
    options = {"--method": method, "--teacher": teacher, "--data.images": images, "--output_dir": out}
    options |= {"--max_train_steps": steps, "--train_batch_size": 8, "--validation_images": 4}
    train.main([*(f"{word}" for pair in options.items() for word in pair), "--no_gradient_checkpointing", *flags])
    return out / "pipeline"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), 3)


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    return train_teacher(images, tmp_path_factory.mktemp("run"), *TINY)


def test_the_teacher_is_a_plain_pipeline(teacher):
    """With the classes' names in the order of its labels; diffusers samples any label."""
    facts = json.loads((teacher / "distill.json").read_text())
    assert (facts["student"], facts["class_names"], facts["null_class"]) == (False, NAMES, 4)
    page = (teacher / "README.md").read_text()
    assert all(f"| {label} | {name} |" in page for label, name in enumerate(NAMES))
    pipe = DiffusionPipeline.from_pretrained(teacher)
    found = pipe(2, class_labels=[0, 3], num_inference_steps=2, output_type="np").images
    assert found.shape == (2, 8, 8, 3) and np.isfinite(found).all()
    loaded = load(teacher)
    assert (loaded.family.name, loaded.denoiser.kind, loaded.shape) == ("ddpm", "v", (3, 8, 8))
    assert find_family_of(json.loads((teacher / "model_index.json").read_text()), teacher) is loaded.family
    assert int(loaded.null()["class_labels"]) == 4


def test_it_goes_on_with_a_run(images, teacher, tmp_path, capsys):
    """The same command with more steps and --resume_from_checkpoint; another network or other names are refused."""
    out = teacher.parent
    before = load(teacher).denoiser.net.conv_in.weight
    train_teacher(images, out, *TINY, "--resume_from_checkpoint", "latest", steps=3)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()][-1] == 3
    assert not torch.equal(load(teacher).denoiser.net.conv_in.weight, before)
    for flags, message in (
        ([*TINY, "--gray"], "begun with other values of gray"),
        ([*TINY, "--resolution", "9"], "2 levels need a multiple of 2"),
        ([*TINY, "--sample_steps", "3"], "must divide 1000"),
        ([*TINY, "--train_batch_size", "0"], "train_batch_size is 0"),
        ([*TINY, "--images", f"{tmp_path}"], "no images in one subfolder a class"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_teacher(images, out, *flags, "--resume_from_checkpoint", "latest", steps=4)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dmd2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sid", "lcd"))])
def test_a_student_of_it(method, images, teacher, tmp_path):
    """Trained on the folder's images, exported, verified; it knows the names, and plain diffusers calls it."""
    folder = distill(method, teacher, images, tmp_path)
    facts = json.loads((folder / "distill.json").read_text())
    assert facts["class_names"] == NAMES and len(facts["times"]) == 1
    assert label_conditions(folder, None, 6).values == [0, 1, 2, 3, 0, 1]  # eval leaves out the label for none
    found = DiffusionPipeline.from_pretrained(folder)(class_labels=[1], num_inference_steps=1, output_type="np").images
    assert found.shape == (1, 8, 8, 3)


def test_other_names_are_refused(images, teacher, tmp_path, capsys):
    (tmp_path / "images").symlink_to(images)
    other = draw_images(tmp_path / "other", 1)
    (other / "Zebra").rename(other / "Horse")
    with pytest.raises(SystemExit, match="2"):
        distill("dmd2", teacher, other, tmp_path / "run")
    assert "has the classes Horse, which the teacher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").glob("checkpoint-*")]


def test_one_class_has_no_labels(tmp_path):
    """Its network is not told one, and no label is dropped."""
    cfg = pixel_teacher.PixelTeacher(
        resolution=8, gray=True, channels=(8, 16), layers=1, prediction="epsilon", sample_steps=2
    )
    loaded = load(pixel_teacher.make_start(cfg, ("Zebra",), tmp_path / "start"))
    assert loaded.denoiser.null is None and loaded.denoiser.net.config.num_class_embeds is None
    assert (loaded.denoiser.kind, loaded.shape) == ("eps", (1, 8, 8))
    config = pixel_teacher.make_config(cfg, ("Zebra",), tmp_path / "start")
    assert config.method.p_drop == 0 and config.method.requirements == (Requirement.REAL,)
    assert "class_labels" not in pixel_teacher.render_page(cfg, ("Zebra",))


@torch.no_grad()
def find_colours(folder, steps):
    """(class of the nearest colour, distance to the own class's colour) of eight samples a class."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    labels = [i % 4 for i in range(32)]
    torch.manual_seed(0)
    found = pipe(32, class_labels=labels, num_inference_steps=steps, output_type="np").images.mean((1, 2)) * 255
    distances = np.linalg.norm(found[:, None] - np.array([CLASSES[name] for name in NAMES]), axis=-1)
    return distances.argmin(1).tolist() == labels, distances[range(32), labels].mean()


@pytest.mark.slow
def test_every_sample_has_the_colour_of_its_class(tmp_path):
    """From twelve images a class to one call. Mean distances were 17 (teacher), 4 (CD), 7 (DMD2), 11 (SiD) of 255."""
    images = draw_images(tmp_path / "images", 12)
    network = ["--resolution", "8", "--channels", "16", "32", "--layers", "1", "--lr_warmup_steps", "20"]
    quiet = ["--validation_steps", "0"]
    teacher = train_teacher(images, tmp_path / "t", *network, *quiet, "--learning_rate", "1e-3", steps=400)
    correct, distance = find_colours(teacher, 25)
    assert correct and distance < 30
    for method, flags in (("lcd", "3e-4"), ("dmd2", "1e-4 --lr_warmup_steps 0"), ("sid", "1e-4 --ema_half_life 1000")):
        options = [*quiet, "--learning_rate", *flags.split()]
        correct, distance = find_colours(distill(method, teacher, images, tmp_path / method, *options, steps=200), 1)
        assert correct and distance < 25, (method, distance)
