"""Exports of recipes: wrong ones are caught, others are read, the Hub and trackers get them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import ConsistencyModelPipeline
from hub_server import Hub, environment
from PIL import Image
from recipe_runs import ROOT, SEED, argv, config_of, noise, trained
from safetensors.torch import load_file

from distill.diffusion.schedule import EDM
from distill.diffusion.student import Student
from pipelines import load, run
from pipelines.components import ExportError, read_index
from pipelines.export import export, verify
from pipelines.export.model_card import collect_card_info
from pipelines.families import edm, pixels
from recipes import train
from recipes.digits import TABLE, TEACHER

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"
STUDENT = "checkpoint-2/student.safetensors"

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
    folder, right = tmp_path / "pipeline", export.write_pipeline
    assert export.export(student, teacher, net, scheduler, folder, card).gaps["pipeline"].largest < 1e-5
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(export, "write_pipeline", lambda teacher, net, *rest: right(teacher, wrong[which], *rest))
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
    prompts = list(teacher.family.examples(teacher)[:1])
    c = teacher.encode(prompts)
    z = noise(teacher)

    @torch.no_grad()
    def image(c, student=student):
        torch.manual_seed(SEED)
        x = student.with_network(state.ema.net).generate(z, c, verify.GlobalGeneratorDraw(teacher))
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
    wrong = replace(edm.FAMILY, sample=lambda *given: 0.9 * pixels.sample(*given))
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
    right = export.write_pipeline

    def wrong(teacher, net, *rest):
        right(teacher, teacher.denoiser.net, *rest)

    monkeypatch.setattr(export, "write_pipeline", wrong)
    with pytest.raises(SystemExit) as error:
        run.main(config_of("sid"), argv("sid", tmp_path))
    assert error.value.code == 2
    assert "error: the exported pipeline differs from the student" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


# ---- again, and from others ----


def test_export_again(out, tmp_path):
    """The command makes from a checkpoint what the run made at its end; an earlier checkpoint gives another student."""
    folder = out("dmd2_sdxl_lora")
    export.main(export.ExportArguments(run=f"{folder}", output_dir=f"{tmp_path / 'again'}"))
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / unet).read_bytes() == (folder / "pipeline" / unet).read_bytes()
    export.main(export.ExportArguments(run=f"{folder}", checkpoint="checkpoint-1", output_dir=f"{tmp_path / 'first'}"))
    assert (tmp_path / "first" / unet).read_bytes() != (folder / "pipeline" / unet).read_bytes()


def test_export_the_mean_of_two(out, tmp_path, capsys):
    """SwiftBrush v2: the weights are those of both students' averages, by their shares; other calls are refused."""
    a, b, two = out("sid"), out("reward"), out("two steps")
    export.main(export.ExportArguments(f"{a}", other=f"{b}", share=0.75, output_dir=f"{tmp_path / 'mean'}"))
    name = "unet/diffusion_pytorch_model.safetensors"
    mean, first, second = (load_file(f / name) for f in (tmp_path / "mean", a / "pipeline", b / "pipeline"))
    for key in mean:
        torch.testing.assert_close(mean[key], 0.75 * first[key] + 0.25 * second[key])
    assert any(not torch.equal(first[key], second[key]) for key in mean)
    with pytest.raises(SystemExit):
        export.main(export.ExportArguments(f"{a}", other=f"{two}", output_dir=f"{tmp_path / 'no'}"))
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
    export.main(export.ExportArguments(**given, teacher=f"{out(run_) / 'teacher'}", output_dir=f"{tmp_path / 'out'}"))
    facts = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert facts["steps"] == steps and yaml.safe_load(facts["config"])["from"] == file
    assert layout in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def stored_run(tmp_path, monkeypatch):
    """A copy of a run of commit 5d4b015, of DMD2 on a tiny teacher.

    It was stopped after two of its four steps, and holds what the uninterrupted run exported.
    """
    shutil.copytree(ROOT / "tests" / "support" / "stored_run", tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return Path("run")


def test_a_run_of_older_code(stored_run):
    """Its checkpoint resumes to the weights that the older code exported; the older export loads."""
    before = load_file(stored_run / UNET)
    pipe = ConsistencyModelPipeline.from_pretrained("run/pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3], num_inference_steps=1, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (1, 8, 8, 1) and np.isfinite(images).all()
    train.main(["--config", "run/config.yaml", "--resume_from_checkpoint", "latest"])
    after = load_file(stored_run / UNET)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-5, atol=1e-6)
    changed = [not torch.equal(value, after[key]) for key, value in load_file(stored_run / STUDENT).items()]
    assert any(changed), "two more steps change the weights"


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
right = export.write_pipeline
def wrong(teacher, net, *rest):
    right(teacher, teacher.denoiser.net, *rest)
for broken, argv in ((True, {public!r}), (True, {broken!r}), (False, {sent!r})):
    export.write_pipeline = wrong if broken else right
    try:
        run.main(TABLE["sid"].config, argv)
        assert not broken
    except SystemExit as error:
        assert broken and error.code == 2
"""


def test_push_to_hub(tmp_path):
    """The repository is there before the training; what is verified is sent, and nothing else."""
    broken, sent = (
        [*argv("sid", tmp_path / name), "--push_to_hub", "--hub_model_id", f"ada/{name}", "--hub_private", "--license"]
        + ["cc-by-4.0"]
        for name in ("broken", "sent")
    )
    with Hub() as hub:
        public = [*argv("sid", tmp_path / "public"), "--push_to_hub", "--hub_model_id", "ada/public", *sent[-2:]]
        program = PUSHING.format(root=f"{ROOT}", broken=broken, sent=sent, public=public)
        command, env = [sys.executable, "-c", program], environment(hub.url, tmp_path, HF_TOKEN="hf_writer")
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(hub.repos[name].private for name in ("ada/broken", "ada/sent"))
        assert set(hub.repos["ada/broken"].files) <= {".gitattributes"} and "differs from the student" in done.stderr
        assert "has no file of its licence" in done.stderr and not list((tmp_path / "public").glob("checkpoint-*"))
        repo, folder = hub.repos["ada/sent"], tmp_path / "sent" / "pipeline"
        for file in folder.rglob("*"):
            if file.is_file():
                assert repo.files[f"{file.relative_to(folder)}"] == file.read_bytes()
        card = repo.files["README.md"].decode()
        assert 'from_pretrained("ada/sent", torch_dtype=torch.float32)' in card and "license: cc-by-4.0" in card
        assert f"{tmp_path}" not in card


# ---- trackers ----


def test_tensorboard_gets_numbers_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--report_to", "tensorboard", "--tracker_project_name", "lab"]
    run.main(config_of("sid"), [*argv("sid", tmp_path), *flags])
    (events,) = tmp_path.glob("lab/events.out.*")
    found = EventAccumulator(f"{events}").Reload()
    logged = [json.loads(line)["student/loss"] for line in (tmp_path / "log.jsonl").open()]
    assert [e.value for e in found.Scalars("student/loss")] == pytest.approx(logged)
    assert [e.step for e in found.Images("samples")] == [0, 1, 2]
    assert all(e.value > 0 for e in found.Scalars("images_per_second"))
    (file,) = tmp_path.glob("lab/*/hparams.yml")
    values = yaml.safe_load(file.read_text())
    assert [e.value for e in found.Scalars("student/learning_rate")] == pytest.approx([values["learning_rate"]] * 2)
    assert values["method.alpha"] == config_of("sid").method.alpha and values["tracker_project_name"] == "lab"


def test_wandb_offline_gets_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    run.main(config_of("sid"), [*argv("sid", folder), "--report_to", "wandb"])
    assert len(list(folder.rglob("offline-run-*/files/media/images/samples_*.png"))) == 3
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
    assert read_index(tmp_path / "t")["_class_name"] == "ConsistencyModelPipeline"
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
