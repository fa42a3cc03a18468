"""Several networks in one pipeline: what is exported, what calls whom, and that the images are the student's."""

import json
import shutil

import pytest
import torch

from eval.images import images
from eval.sampling.image_set import generate
from pipelines import run
from pipelines.inference import experts
from recipes import phased_wan
from recipes.digits import TABLE

FAST = [
    "--smoke",
    "--learning_rate",
    "1e-2",
    "--lr_warmup_steps",
    "0",
    "--ema_half_life",
    "0",
    "--validation_steps",
    "0",
]


def trained(config, out, *flags):
    run.main(config, [*FAST, "--output_dir", f"{out}", *flags])
    return out / "pipeline"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Both phases of the digits."""
    out, student = tmp_path_factory.mktemp("digits"), ["--student.experts", "1/checkpoint-2"]
    trained(TABLE["phased"].config, out / "1", "--method.every", "1")
    student[1] = f"{out / '1' / 'checkpoint-2'}"
    return trained(TABLE["phased"].config, out / "2", "--method.every", "1", *student)


def test_phases(digits, tmp_path):
    """The run has read the folder back (an ExportError else); without the router it samples something else."""
    from diffusers import DiffusionPipeline

    facts = json.loads((digits / experts.INDEX).read_text())
    assert facts["by"] == "timestep" and len(facts["bounds"]) == 1
    assert 250 * torch.tensor([0.625]).log() < facts["bounds"][0] < 250 * torch.tensor([80.0]).log()
    assert "experts.json" in (digits / "README.md").read_text()
    made = generate(digits, tmp_path / "a", 4, rows=4)
    assert made["nfe"] == 2
    plain = tmp_path / "plain"
    shutil.copytree(digits, plain, ignore=shutil.ignore_patterns(experts.INDEX))
    assert made["hash"] != generate(plain, tmp_path / "b", 4, rows=4)["hash"]
    pipe = experts.install(DiffusionPipeline.from_pretrained(digits), digits)
    calls, x = [], torch.randn(2, 1, 8, 8)
    for k, net in enumerate((pipe.unet.experts[0], pipe.unet.mid_block)):
        net.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
    for told in (1000.0, -1000.0):
        pipe.unet(x, torch.tensor(told), class_labels=torch.zeros(2).long())
    assert calls == [0, 1]


@pytest.mark.slow
def test_phases_of_wan_with_adapters(tmp_path):
    """DMD2 + Phased + LoRA: two adapters on one backbone, exported as diffusers' own WanPipeline of two."""
    from diffusers import DiffusionPipeline

    flags = ["--method.every", "1", "--student.lora.rank", "2"]
    trained(phased_wan.CONFIG, tmp_path / "1", *flags)
    first = f"{tmp_path / '1' / 'checkpoint-2'}"
    folder = trained(phased_wan.CONFIG, tmp_path / "2", *flags, "--student.experts", first)  # read back and compared
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert not (folder / experts.INDEX).exists()
    bound = 1000 * pipe.config.boundary_ratio
    pipe.scheduler.set_timesteps(4)
    assert [bool(t >= bound) for t in pipe.scheduler.timesteps] == [True, True, False, False]
    nets = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
    assert {name for name in nets[0] if not torch.equal(nets[0][name], nets[1][name])}
    made = generate(folder, tmp_path / "images", prompts=prompts(tmp_path), frame=0)
    assert made["nfe"] == 4


def prompts(folder):
    file = folder / "prompts.txt"
    file.write_text("a red fox\n")
    return f"{file}"


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two students of SiD, of five digits each."""
    out, parts = tmp_path_factory.mktemp("students"), ("01234", "56789")
    return [trained(TABLE["sid"].config, out / part[0], "--data.classes", *part, "--seed", part[0]) for part in parts]


def test_students_of_parts(students, tmp_path):
    """Every image is the one of its label's student, bit for bit, in one call."""
    experts.gather_students(students, tmp_path / "all")
    made = generate(tmp_path / "all", tmp_path / "images", 10, rows=10)
    assert made["nfe"] == 1
    level = lambda name, i: images.read_levels(tmp_path / name / images.file_name(i))
    for k, student in enumerate(students):
        generate(student, tmp_path / f"{k}", 10, rows=10)
    for i in range(10):
        own, other = (level(f"{k}", i) for k in (i // 5, 1 - i // 5))
        assert torch.equal(level("images", i), own) and not torch.equal(own, other)


def test_one_part_is_all(students):
    from distill.data import Digits
    from distill.random import Draw

    draw = Draw(0, 0, "student", torch.arange(64))
    whole, named, part = (Digits(classes)(draw) for classes in ((), tuple(range(10)), (7, 3)))
    assert torch.equal(whole["real"], named["real"]) and torch.equal(*(d["c"]["class_labels"] for d in (whole, named)))
    for labels in (part["c"], part["real_c"]):
        assert {*labels["class_labels"].tolist()} == {3, 7}
    assert Digits((7, 3)).fixed(4)[0] == [7, 3, 7, 3]


def test_mistakes(students, digits, tmp_path):
    for given, said in (
        ((), "two or more folders"),
        (students[:1], "two or more folders"),
        ((students[0], students[0]), "none has two"),
        ((students[0], digits), "each needs its own"),
        ((students[0], students[0].parent / "teacher"), "no exported student"),
    ):
        with pytest.raises(ValueError, match=said):
            experts.gather_students(given, tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist yet"):
        experts.gather_students(students, tmp_path)
    with pytest.raises(SystemExit):
        trained(TABLE["sid"].config, tmp_path / "run", "--data.classes", "10")
    assert not list(tmp_path.iterdir())
