"""SANA-Sprint's form of SANA: normalised queries and keys, t in [0, 1], a guidance that is told, its own pipeline."""

import copy
import json
import math

import pytest
import torch

from distill.configuration import dump
from distill.diffusion.student import Student
from distill.method import Requirement
from distill.methods import LCD, SCM, VSD, Sprint
from distill.training.config import StudentConfig
from pipelines import load
from pipelines.components import ExportError
from pipelines.export import export, sana_convert, source, verify
from pipelines.export.model_card import collect_card_info
from pipelines.export.schedule import find_student_scheduler
from pipelines.families import sana, tiny

PROMPTS = ["a red fox in the snow"]
PLAIN = {"qk_norm": None, "timestep_scale": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    tiny.save("sana", folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder, guidance_embedded=True)


@pytest.fixture(scope="module")
def heard(teacher):
    """The network of a student that has learnt to hear its guidance."""
    net = copy.deepcopy(teacher.denoiser.net)
    torch.manual_seed(0)
    last = net.time_embed.guidance_embedder.linear_2
    for p in (last.weight, last.bias):
        torch.nn.init.normal_(p, std=1.0)
    return net


@torch.no_grad()
def test_the_embedding_moves_nothing_at_first(folder, teacher, heard):
    """Bit for bit the network without it, at every guidance; once it is not zero, guidance is an input."""
    plain, x, t = load(folder).denoiser, torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.9]).double()
    c = teacher.encode(PROMPTS * 2)
    want = plain(x, t, c).out
    for w in ({}, {"guidance": torch.tensor([4.0, 5.0])}):
        assert torch.equal(teacher.denoiser(x, t, c | w).out, want)
    assert load(folder, guidance_embedded=True).denoiser.net.time_embed.guidance_embedder.linear_1.weight.equal(
        teacher.denoiser.net.time_embed.guidance_embedder.linear_1.weight
    )  # the same on every process
    student = Student(teacher.denoiser).with_network(heard).denoiser
    told = lambda w: student(x, t, c | {"guidance": torch.full((2,), w)}).out
    assert torch.equal(student(x, t, c).out, told(sana.GUIDANCE))
    assert (told(4.0) - told(5.0)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("steps", (1, 2, 3, 4))
def test_sana_sprints_pipeline_gives_what_the_student_gives(teacher, heard, steps):
    """SanaSprintPipeline under SCMScheduler, with its own times, at its own guidance and at another."""
    found, times = find_student_scheduler(teacher, StudentConfig(steps=steps))
    assert type(found).__name__ == "SCMScheduler" and len(times) == steps and times[0] == 1.0
    student, z = Student(teacher.denoiser, times).with_network(heard), torch.randn(1, *teacher.shape)
    pipe = teacher.parts.pipe(scheduler=found, transformer=heard)
    assert type(pipe).__name__ == "SanaSprintPipeline"
    images = []
    for told in (sana.UNCONDITIONAL, 8.0):
        c = teacher.encode(PROMPTS) | ({} if told == sana.UNCONDITIONAL else {"guidance": torch.tensor([told])})
        torch.manual_seed(1)
        want = teacher.decode(student.generate(z, c, verify.GlobalGeneratorDraw(teacher))).clamp(-1, 1) / 2 + 0.5
        torch.manual_seed(1)
        images.append(sana.sample(pipe, PROMPTS, z, steps, told))
        assert (images[-1] - want).abs().max() < 1e-4
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_times():
    """Of the scheduler itself; its first is a little more than a right angle."""
    from diffusers import SCMScheduler

    for steps in (1, 2, 3, 4):
        made = SCMScheduler()
        made.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
        assert made.timesteps[:-1].tolist() == pytest.approx(sana.angles(steps), abs=1e-5)


def test_the_export_is_compared_at_one_two_and_four_steps(teacher, heard, tmp_path, monkeypatch):
    found, times = find_student_scheduler(teacher, StudentConfig(steps=2))
    student = Student(teacher.denoiser, times)
    card = collect_card_info("student", teacher, "base", "sprint", "", None, None)
    gaps = export.export(student, teacher, heard, found, tmp_path / "right", card).gaps
    names = ("pipeline", "pipeline, 1 step", "pipeline, 4 steps")
    assert gaps.keys() > {*names} and max(gaps[name].largest for name in names) < 1e-4
    facts = json.loads((tmp_path / "right" / "model_index.json").read_text())
    assert facts["_class_name"] == "SanaSprintPipeline" and facts["scheduler"] == ["diffusers", "SCMScheduler"]
    text = (tmp_path / "right" / "README.md").read_text()
    assert "    num_inference_steps=2,\n    guidance_scale=4.5,\n" in text
    assert load(tmp_path / "right").shape == teacher.shape
    right = sana.angles
    monkeypatch.setattr(sana, "angles", lambda steps: (math.pi / 2, 1.3, 1.1, 0.6) if steps == 4 else right(steps))
    with pytest.raises(ExportError, match="differs from the student: pipeline, 4 steps by"):
        export.export(student, teacher, heard, found, tmp_path / "wrong", card)


def test_what_is_refused(folder, teacher, tmp_path):
    tiny.save("sana", tmp_path / "plain", **PLAIN)
    with pytest.raises(ValueError, match="expects 1000 t: convert it with\\s+python -m pipelines.sana"):
        load(tmp_path / "plain", guidance_embedded=True)
    for wrong, said in (
        ({"scale": 2.0}, "unit noise"),
        ({"steps": 2, "renoise": "ddim"}, "fresh noise"),
        ({"sigma": 5.0}, "starts at noise alone"),
        ({"steps": 2, "times": (1.0, 0.5)}, "nearest possible times are"),
    ):
        with pytest.raises(ValueError, match=said):
            find_student_scheduler(teacher, StudentConfig(**wrong))
    tiny.save("flux", tmp_path / "schnell", guidance=False)
    with pytest.raises(ValueError, match="needs a guidance embedding"):
        load(tmp_path / "schnell", guidance_embedded=True)
    tiny.save("sd", tmp_path / "sd")
    with pytest.raises(ValueError, match="give --method.guidance one number"):
        load(tmp_path / "sd", guidance_embedded=True)


@torch.no_grad()
def test_the_copy_that_is_fine_tuned(tmp_path):
    """python -m pipelines.sana: every weight of the teacher, norms of ones, a time of [0, 1]; a SanaPipeline."""
    tiny.save("sana", tmp_path / "plain", **PLAIN)
    sana_convert.main(sana_convert.Arguments(f"{tmp_path / 'plain'}", f"{tmp_path / 'copy'}"))
    before, after = (load(tmp_path / name).denoiser.net for name in ("plain", "copy"))
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(new[name], p) for name, p in old.items())
    added = new.keys() - old.keys()
    assert len(added) == 20 * 4 and all((new[name] == 1).all() for name in added)
    assert {name: after.config[name] for name in sana.SPRINT} == sana.SPRINT
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text())["_class_name"] == "SanaPipeline"
    config = json.loads((tmp_path / "copy" / "transformer" / "config.json").read_text())
    config.pop("guidance_embeds")  # a config of an older diffusers
    (tmp_path / "copy" / "transformer" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "copy", guidance_embedded=True).denoiser.net.config.guidance_embeds
    with pytest.raises(SystemExit):
        sana_convert.main(sana_convert.Arguments(f"{tmp_path / 'plain'}", f"{tmp_path / 'copy'}"))


@pytest.mark.parametrize(
    "method, told",
    [(Sprint(), True), (SCM(guidance=(4.0, 5.0)), True), (LCD(guidance=(6.0, 16.0)), True), (SCM(guidance=4.5), False)]
    + [(VSD(guidance=(0.5, 4.0)), False), (Sprint(guidance=1.0), False)]
    + [(LCD(guidance=(6.0, 16.0), embed=False), False)],
)
def test_who_tells(method, told):
    """Told before training, and again when a run is exported from its configuration alone."""
    import yaml

    from distill.configuration import Config

    assert (Requirement.GUIDANCE_EMBEDDING in method.requirements) == told
    text = dump(Config(method, None))
    assert source.embeds_guidance(type(method).__name__.lower(), yaml.safe_load(text)["method"]) == told
