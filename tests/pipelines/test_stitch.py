"""Pipelines that take turns: what plain diffusers makes of the same calls, on tiny random pipelines."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from distill.diffusion.schedule import EDM
from distill.diffusion.solver import Call, run_calls
from eval.sampling.image_set import generate
from eval.sampling.sampler import image_generator
from pipelines import load
from pipelines.families import edm, pixels, tiny
from pipelines.inference.stitch import SamplingStage, stage_times, stitch, teacher_from_pipeline

PROMPTS = ["a red fox in the snow", "seven cats under the stars"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """SDXL, and a student of it: another network under LCM's scheduler."""
    home = tmp_path_factory.mktemp("models")
    tiny.save("sdxl", home / "sdxl")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe = DiffusionPipeline.from_pretrained(home / "sdxl", unet=tiny_unet())
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=50)
    pipe.save_pretrained(home / "student")
    return home


def tiny_unet():
    from pipelines.families import sdxl

    return sdxl.tiny().unet


def pipe(folder, scheduler=None, **config):
    made = DiffusionPipeline.from_pretrained(folder)
    made.scheduler = made.scheduler if scheduler is None else scheduler.from_config(made.scheduler.config, **config)
    made.set_progress_bar_config(disable=True)
    return made


def generators():
    return [image_generator(0, i) for i in range(len(PROMPTS))]


def noise(pipe):
    return torch.cat([torch.randn(1, *teacher_from_pipeline(pipe).shape, generator=g) for g in generators()])


@torch.no_grad()
def told(pipe, z, steps, guidance, latent=False, **options):
    """What the pipeline itself makes, images in [-1, 1] or latents."""
    kind = "latent" if latent else "pt"
    options |= {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": guidance}
    images = pipe(PROMPTS, latents=z, output_type=kind, **options).images
    return images if latent else images * 2 - 1


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_one_turn_is_the_pipeline(home, scheduler):
    """Euler's and DDIM's start and steps; two turns of the same calls are one."""
    base = pipe(home / "sdxl", scheduler, clip_sample=False)
    want = told(base, noise(base), 6, 4.0)
    turn = SamplingStage(base, 6, 4.0)
    got = stitch([turn], PROMPTS, generators())
    assert (got - want).abs().max() < 1e-3 and want.std() > 0.01
    assert stitch([turn, SamplingStage(base, 6, 4.0, skip=2)], PROMPTS, generators()).equal(got)


def test_a_student_is_its_pipeline(home):
    """LCM's fresh noise, from each image's own generator."""
    student = pipe(home / "student")
    z, sources = noise(student), generators()
    [torch.randn(1, *teacher_from_pipeline(student).shape, generator=g) for g in sources]
    step = student.scheduler.step
    student.scheduler.step = lambda *args, **options: step(*args, **options | {"generator": sources})
    want = told(student, z, 4, 0.0)
    got = stitch([SamplingStage(pipe(home / "student"), 4)], PROMPTS, generators())
    assert (got - want).abs().max() < 1e-3


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_the_hybrid_is_that_of_plain_diffusers(home, scheduler):
    """The base pipeline is stopped on its way, and the student is given its latents; Euler's are x / alpha."""
    base = pipe(home / "sdxl", scheduler, timestep_spacing="trailing", clip_sample=False)
    student = pipe(home / "student")
    at = stage_times(teacher_from_pipeline(base), base.scheduler, 8).index(
        pytest.approx(stage_times(teacher_from_pipeline(student), student.scheduler, 2)[1])
    )

    def stop(pipe, i, t, found):
        pipe._interrupt = i + 1 == at
        return found

    x = told(base, noise(base), 8, 4.0, latent=True, callback_on_step_end=stop)
    n, c = base.scheduler.timesteps[at], teacher_from_pipeline(student).encode(PROMPTS)
    added = {"text_embeds": c["pooled"], "time_ids": c["time_ids"]}
    x, alpha = base.scheduler.scale_model_input(x, n), base.scheduler.alphas_cumprod[int(n)]
    eps = student.unet(x, n, c["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    want = student.vae.decode(x0 / student.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
    got = stitch([SamplingStage(base, 8, 4.0), SamplingStage(student, 2, skip=1)], PROMPTS, generators())
    assert (got - want).abs().max() < 1e-3
    assert (got - stitch([SamplingStage(student, 2)], PROMPTS, generators())).abs().max() > 0.05


@torch.no_grad()
def test_flows_and_their_shift(tmp_path):
    """Packed latents, a shift by the size, guidance twice: what the teacher samples under its own scheduler."""
    tiny.save("flux", tmp_path / "flux")
    teacher = load(tmp_path / "flux")
    z = torch.cat([torch.randn(1, *teacher.shape, generator=g) for g in generators()])
    want = teacher.decode(teacher.sample(z, teacher.encode(PROMPTS), 3, 2.0)).clamp(-1, 1)
    assert (stitch([SamplingStage(teacher, 3, 2.0)], PROMPTS, generators()) - want).abs().max() < 1e-4


@torch.no_grad()
def test_pixels(tmp_path):
    """An EDM student as its pipeline samples it, and after a teacher on EDM's grid."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        edm.pipeline(edm.unet((8, 16)), 0.5, 80.0, 2).save_pretrained(tmp_path / "student")
    tiny.save("edm", tmp_path / "teacher")
    student, teacher, labels, sources = pipe(tmp_path / "student"), load(tmp_path / "teacher"), [3, 7], generators()
    z = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in sources])
    step = student.scheduler.step
    student.scheduler.step = lambda *args, **options: step(*args, **options | {"generator": sources})
    want = pixels.sample(student, labels, z, 2, 0.0) * 2 - 1
    assert (stitch([SamplingStage(pipe(tmp_path / "student"), 2)], labels, generators()) - want).abs().max() < 1e-4
    first = SamplingStage(teacher, 6, 2.0, solver="heun")
    got = stitch([first, SamplingStage(teacher_from_pipeline(student), 2, skip=1)], labels, generators())
    calls = [
        call for call in first.calls(teacher, None) if call.t > (level := float(EDM().time(torch.tensor(80 / 2**7))))
    ]
    x = run_calls([*calls, Call(teacher_from_pipeline(student).denoiser, level)], z, teacher.encode(labels)).clamp(
        -1, 1
    )
    assert len(calls) == 4 and (got - x).abs().max() < 1e-5


def test_the_handover_meets_the_students_level(home):
    """Whose grid has another level there: the last step of the base goes to it."""
    base, student = teacher_from_pipeline(pipe(home / "sdxl")), teacher_from_pipeline(pipe(home / "student"))
    heard = []
    for role in (base, student):
        role.denoiser.net.register_forward_pre_hook(
            lambda net, args, r=role: heard.append((r is student, float(args[1].reshape(-1)[0])))
        )
    stitch([SamplingStage(base, 7), SamplingStage(student, 4, skip=1)], PROMPTS, generators())
    assert [who for who, _ in heard] == sorted(who for who, _ in heard)
    first = next(n for who, n in heard if who)
    assert first == float(stage_times(student, student.parts.scheduler(), 4)[1] * 999) < heard[0][1]
    assert sum(who for who, _ in heard) == 3


def test_mistakes(home):
    student = pipe(home / "student")
    with pytest.raises(ValueError, match="no call above the level"):
        stitch([SamplingStage(student, 4, skip=1)], PROMPTS, generators())
    with pytest.raises(ValueError, match="skip is 0, .* before would do nothing"):  # this student starts at the top
        stitch([SamplingStage(pipe(home / "sdxl"), 8), SamplingStage(student, 4)], PROMPTS, generators())
    base = pipe(home / "sdxl", DPMSolverMultistepScheduler)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does between two calls is none of our steps"):
        stitch([SamplingStage(base, 4)], PROMPTS, generators())
    assert stitch([SamplingStage(base, 4, solver="ddim")], PROMPTS, generators()).isfinite().all()


def test_from_the_command_line(home, tmp_path):
    """eval.generate: the hybrid counts its calls."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    common = {"prompts": f"{tmp_path / 'p.txt'}", "steps": 4}
    made = generate(
        home / "student", tmp_path / "a", first=f"{home / 'sdxl'}", first_steps=8, first_guidance=3.0, **common
    )
    assert made["nfe"] == 2 + 3 and made["request"]["first_steps"] == 8 and made["request"]["first"] == "sdxl"
    plain = generate(home / "student", tmp_path / "b", **common)
    assert plain["hash"] != made["hash"] and "first" not in plain["request"]
    with pytest.raises(ValueError, match=r"another run \(first_steps 8, not 9\)"):
        generate(
            home / "student", tmp_path / "a", first=f"{home / 'sdxl'}", first_steps=9, first_guidance=3.0, **common
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"first": "sdxl", "steps": 1}, "skip is 1, and .*student makes 1 call.*use 0 to 0"),
        ({"first": "sdxl", "steps": 4, "skip": 4}, "use 0 to 3"),
        ({"first": "sdxl", "steps": 4, "skip": -1}, "skip is -1; it must be at least 0"),
        ({"first": "exported", "steps": 4}, "exported, a student; .* give a teacher"),
        ({"skip": 2}, "skip is 2, which nothing reads without --first"),
        ({"first_solver": "heun"}, "first_solver is heun, which nothing reads without --first"),
        ({"pag_layers": ("down_blocks",)}, "pag_layers is .*, which nothing reads without --pag_scale"),
        ({"solver": "cfg++", "guidance": 7.5}, r"guidance is 7.5, which is lambda under cfg\+\+"),
    ],
)
def test_flags_that_do_not_go_together(home, tmp_path, flags, message):
    """One message, before anything is written."""
    (home / "exported").mkdir(exist_ok=True)
    (home / "exported" / "distill.json").write_text('{"student": true}')
    (home / "exported" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    flags |= {"first": f"{home / flags['first']}"} if "first" in flags else {}
    with pytest.raises(ValueError, match=message):
        generate(home / "student", tmp_path / "out", prompts="none.txt", **flags)
    assert not (tmp_path / "out").exists()


def test_no_label_for_none(tmp_path):
    """Guidance of an EDM network without one is refused before work."""
    tiny.save("edm", tmp_path / "edm")
    (tmp_path / "edm" / "distill.json").write_text('{"student": true, "steps": 2}')
    with pytest.raises(ValueError, match="edm has no label for none"):
        generate(tmp_path / "edm", tmp_path / "out", 2, solver="cfg++")


def test_a_request_that_fails_at_once_holds_no_folder(home, tmp_path):
    """What the network itself refuses, after its loading: the folder is free for the next request."""
    (tmp_path / "p.txt").write_text("a red fox")
    common = {"prompts": f"{tmp_path / 'p.txt'}", "steps": 1, "solver": "ddim"}
    with pytest.raises(ValueError, match="no self-attention in 'nothing'"):
        generate(home / "sdxl", tmp_path / "out", pag_scale=1.0, pag_layers=("nothing",), **common)
    assert generate(home / "sdxl", tmp_path / "out", **common)["complete"]


def test_cfgpp_from_the_command_line(home, tmp_path):
    """Of a teacher, and of a student that keeps its noise (Lightning), which is called twice a step but the last."""
    (tmp_path / "p.txt").write_text("a red fox")
    common = {"prompts": f"{tmp_path / 'p.txt'}", "solver": "cfg++"}
    assert generate(home / "sdxl", tmp_path / "a", steps=3, guidance=0.6, **common)["nfe"] == 6
    student = pipe(home / "student", EulerDiscreteScheduler, timestep_spacing="trailing")
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "distill.json").write_text(json.dumps({"student": True, "steps": 3}))
    made = generate(tmp_path / "student", tmp_path / "b", **common)
    assert made["nfe"] == 5 and made["guidance"] == 1
    plain = generate(tmp_path / "student", tmp_path / "c", prompts=common["prompts"])
    assert plain["nfe"] == 3 and plain["hash"] != made["hash"]
    with pytest.raises(ValueError, match="it is for teachers"):
        generate(tmp_path / "student", tmp_path / "d", prompts=common["prompts"], solver="ddim")
