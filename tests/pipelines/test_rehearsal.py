"""Teachers as others publish them: what an export carries, and what is refused before the first step of training."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.data import Digits
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines import load
from pipelines.components import ExportError, Parts
from pipelines.export import export, rehearsal
from pipelines.export.model_card import collect_card_info
from pipelines.families import edm, latents, pixels, schedulers, sd, tiny
from pipelines.run import resolve_student_schedule

ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def student_of(teacher, **config):
    """(student, scheduler) of a teacher that is not trained."""
    config = StudentConfig(**config)
    scheduler, config = resolve_student_schedule(teacher, config)
    return Student(teacher.denoiser, config.times, config.scale, config.renoise), scheduler


def rehearsed(folder, **config):
    """The teacher and its student, whose export was rehearsed."""
    teacher = load(folder)
    student, scheduler = student_of(teacher, **config)
    rehearsal.rehearse(student, teacher, scheduler, collect_card_info("x", teacher, "base", "sid", "", None, None))
    return teacher, student, scheduler


def exported(teacher, student, scheduler, folder):
    card = collect_card_info("student", teacher, "base", "sid", "", None, None)
    return export.export(student, teacher, student.denoiser.net, scheduler, folder, card)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("teachers") / "sd"
    tiny.save("sd", made)
    return made


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the teacher, to be changed."""
    return shutil.copytree(folder, tmp_path / "teacher")


# ---- schedulers ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_of_diffusers_is_read_or_refused_by_name():
    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
    classes = {name: getattr(diffusers.schedulers, name) for name in names}
    assert (
        len(classes) > 40
        and {*schedulers.TABLES, *schedulers.FLOWS, *schedulers.EDM} - {"DPMSolverSDEScheduler"} <= classes.keys()
    )
    for name, cls in classes.items():
        keys = inspect.signature(cls.__init__).parameters
        if name in schedulers.TABLES and name != "DPMSolverSDEScheduler":  # it needs a library that is not installed
            made = cls(**SD)
            assert schedulers.table(made)[0].alphas_cumprod == tuple(made.alphas_cumprod.double().tolist())
        if name in schedulers.FLOWS:
            assert schedulers.flow(cls(**({"use_flow_sigmas": True} if "use_flow_sigmas" in keys else {}))) == 1000
        found = type(name, (), {})()
        for read, those in ((schedulers.table, schedulers.TABLES), (schedulers.flow, schedulers.FLOWS)):
            if name not in those:
                with pytest.raises(ValueError, match=f"scheduler is {name} \\(_class_name in .*: .*EulerDiscrete"):
                    read(found)


REFUSED = {
    "epsilon": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true with prediction_type 'epsilon'"),
    "prediction": ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'; it must be one of"),
    "time": ({"timestep_type": "continuous"}, "timestep_type 'continuous'.*only 'discrete'"),
    "table": ({"trained_betas": [0.1, 0.0, 0.2]}, "no usable table of noise .*trained_betas"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_are_refused(name):
    config, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"EulerDiscreteScheduler has .*{words}|EulerDiscreteScheduler has {words}"):
        schedulers.table(diffusers.EulerDiscreteScheduler(**SD | config))


TABLES = {
    "scaled linear": {},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "its own": {"trained_betas": torch.linspace(0.001, 0.02, 300).tolist(), "num_train_timesteps": 300},
    "zero": ZERO,
}


def test_a_scheduler_whose_library_is_not_installed(copy):
    edit(copy / "model_index.json", scheduler=["diffusers", "CosineDPMSolverMultistepScheduler"])
    with pytest.raises(ValueError, match="its scheduler is a CosineDPMSolverMultistepScheduler: .*torchsde"):
        load(copy)


@pytest.mark.parametrize("name", TABLES)
def test_a_student_has_the_teachers_table(name):
    """All of it, or its beginning, of every kind of table; of a zero terminal SNR by its key."""
    teacher = diffusers.DDIMScheduler(**SD | TABLES[name])
    schedule, _ = schedulers.table(teacher)
    last = len(schedule.alphas_cumprod) - 1
    for n in (last, last // 2):
        keys = schedulers.betas(teacher, schedule, n)
        assert ("rescale_betas_zero_snr" in keys) == (name == "zero" and n == last)
        for cls in (diffusers.LCMScheduler, diffusers.EulerDiscreteScheduler):
            made = cls(num_train_timesteps=n + 1, **keys).alphas_cumprod.double()
            torch.testing.assert_close(made, teacher.alphas_cumprod[: n + 1].double(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("config", ({"steps": 1}, {"steps": 4, "scale": 1.0}, {"steps": 2, "renoise": "ddim"}))
def test_zero_terminal_snr(copy, config):
    edit(copy / "scheduler/scheduler_config.json", **ZERO)
    teacher, student, scheduler = rehearsed(copy, **config)
    assert scheduler.config.rescale_betas_zero_snr and teacher.denoiser.kind == "v"
    alpha, sigma = teacher.denoiser.schedule.coefficients(torch.ones(1).double())
    assert float(alpha) == pytest.approx(2**-12) and float(sigma) == pytest.approx(1)
    assert student.times[0] == 1 and len(student.times) == config["steps"]
    found = exported(teacher, student, scheduler, copy.parent / "out")
    assert found.gaps["pipeline"].psnr > 80  # Euler subtracts numbers of 4096 in float32
    assert json.loads((copy.parent / "out/scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"]


# ---- other parts of a teacher ----


def test_latents_that_are_standardised(tmp_path, monkeypatch):
    """SDXL's pipeline reads latents_mean and latents_std of its VAE, as Playground v2.5's has them."""
    tiny.save("sdxl", tmp_path)
    mean, std = [0.3, -0.2, 0.1, 0.5], [2.0, 1.5, 0.5, 1.0]
    edit(tmp_path / "vae/config.json", latents_mean=mean, latents_std=std, scaling_factor=0.5)
    teacher, *_ = rehearsed(tmp_path)
    x, seen = torch.randn(2, *teacher.shape), []
    vae = teacher.parts.vae
    monkeypatch.setattr(vae, "decode", lambda x, **options: seen.append(x) or (x,))
    teacher.decode(x)
    of = lambda values: torch.tensor(values).reshape(4, 1, 1)
    torch.testing.assert_close(seen[0], x * of(std) / 0.5 + of(mean))
    monkeypatch.setattr(vae, "encode", lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x, std=0 * x)))
    torch.testing.assert_close(teacher.latent(seen[0], x), x)
    monkeypatch.setattr(latents, "channel_scale_and_shift", latents.scale_only)
    with pytest.raises(ExportError, match="differs from the student's own by .*Nothing was trained"):
        rehearsed(tmp_path)


def test_a_network_that_is_told_its_guidance(copy):
    """An LCM's: 7.5 where nothing is said, the pipeline's own default; the card's call says it."""
    (copy / "unet").rename(copy / "other")
    torch.manual_seed(1)
    tiny.amplify(sd.unet(time_cond_proj_dim=16), 5.0, "cond_proj").save_pretrained(copy / "unet")
    teacher, student, scheduler = rehearsed(copy, steps=2, scale=1.0)
    found = exported(teacher, student, scheduler, copy.parent / "out")
    assert found.gaps["pipeline"].largest < 1e-3
    assert "guidance_scale=7.5" in (copy.parent / "out/README.md").read_text()
    x, t, c = torch.randn(1, *teacher.shape), torch.ones(1).double(), teacher.encode(["a fox"])
    with torch.no_grad():
        told = {w: teacher.denoiser(x, t, c | ({} if w is None else {"guidance": torch.tensor([w])})).out
                for w in (None, 7.5, 2.0)}  # fmt: skip
    assert torch.equal(told[None], told[7.5]) and (told[None] - told[2.0]).abs().max() > 1e-2


def test_a_safety_checker_that_is_a_pickle(copy):
    """No training loads it, and no export copies it; the folder says that there is none."""
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/pytorch_model.bin").write_bytes(b"pickled")
    (copy / "safety_checker/config.json").write_text("{}")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(copy / "model_index.json", safety_checker=checker)
    teacher, student, scheduler = rehearsed(copy)
    exported(teacher, student, scheduler, copy.parent / "out")
    index = json.loads((copy.parent / "out/model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and not (copy.parent / "out/safety_checker").exists()


def test_a_variant_of_some_components(copy):
    """The network in half precision, the rest as it is; an export has both under their plain names."""
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    save_file({k: v.half() for k, v in whole.items()}, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    path.unlink()
    teacher = load(copy, variant="fp16")
    for name, tensor in teacher.parts.net.state_dict().items():
        assert torch.equal(tensor, whole[name].half().float()), name
    assert teacher.parts.vae.dtype == torch.float32 and teacher.encode(["a fox"])["prompt_embeds"].isfinite().all()
    student, scheduler = student_of(teacher)
    exported(teacher, student, scheduler, copy.parent / "out")
    for part in ("vae", "text_encoder"):
        names = {f.name for f in (copy.parent / "out" / part).iterdir()}
        assert names == {f.name for f in (copy / part).iterdir()}
    with pytest.raises(ValueError, match="no component of .* has weights of the variant 'bf16': leave --variant out"):
        Parts(copy, "bf16")


def test_fewer_than_eight_classes(tmp_path):
    """An export is verified on the labels that there are, without that of "no label"."""
    edm.pipeline(edm.unet((8, 16), classes=4), 0.5, 80.0, 1).save_pretrained(tmp_path / "three")
    (tmp_path / "three/distill.json").write_text('{"null_class": 1}')
    teacher, student, scheduler = rehearsed(tmp_path / "three")
    assert pixels.examples(teacher) == (0, 2, 3)
    assert exported(teacher, student, scheduler, tmp_path / "out").gaps["pipeline"].largest < 1e-5
    with pytest.raises(ValueError, match="knows the labels 0 .. 3, and the digits have ten: give --data.classes"):
        Digits().open(teacher, ())
    assert Digits(classes=(0, 2)).open(teacher, ()).classes == (0, 2)
    tiny.save("edm", tmp_path / "ten")
    assert pixels.examples(load(tmp_path / "ten")) == tuple(range(8))
    other = diffusers.EDMEulerScheduler()
    other.save_pretrained(tmp_path / "ten/scheduler")
    edit(tmp_path / "ten/model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(ValueError, match="EDMEulerScheduler .*CMStochasticIterativeScheduler"):
        load(tmp_path / "ten")


# ---- the rehearsal itself ----


def test_what_a_rehearsal_leaves(folder):
    """No random number is drawn, nothing stays loaded, no call of the network is made."""
    teacher, calls = load(folder), []
    teacher.denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1))
    student, scheduler = student_of(teacher, steps=4, scale=1.0)
    card = collect_card_info("x", teacher, "base", "sid", "", None, None)
    state = torch.get_rng_state()
    rehearsal.rehearse(student, teacher, scheduler, card)
    assert torch.equal(state, torch.get_rng_state()) and not calls
    assert not {"text", "vae"} & vars(teacher.parts).keys()
    text = teacher.parts.text
    rehearsal.rehearse(student, teacher, scheduler, card)
    assert teacher.parts.text is text and text.unet is None


WRONG = (
    {"beta_end": 0.011},
    {"prediction_type": "sample"},
    {"original_inference_steps": 50},
    {"timestep_scaling": 1e-3},
)


def test_what_a_rehearsal_catches(folder):
    """Wrong schedulers, texts, times and noise, and pipelines that fail."""
    teacher = load(folder)
    student, scheduler = student_of(teacher, steps=4, scale=1.0)
    card = collect_card_info("x", teacher, "base", "sid", "", None, None)

    def refused(words, student=student, teacher=teacher, scheduler=scheduler):
        with pytest.raises(ExportError, match=words):
            rehearsal.rehearse(student, teacher, scheduler, card)

    for change in WRONG:
        refused("in 4 step.* differs", scheduler=type(scheduler).from_config(scheduler.config, **change))
    refused("differs", replace(student, times=(1.0, 0.7, 0.5, 0.25)))
    refused("differs", replace(student, renoise="ddim"))
    refused("differs", replace(student, scale=0.9))
    refused("differs", teacher=replace(teacher, encode=lambda prompts: teacher.encode(["another"])))
    refused("differs", teacher=replace(teacher, decode=lambda x: 0.9 * teacher.decode(x)))
    failing = replace(teacher.family, sample=lambda *_: {}["no key"])
    said = "StableDiffusionPipeline under LCMScheduler fails with KeyError: 'no key'. Nothing was trained"
    refused(said, teacher=replace(teacher, family=failing))


# ---- the folder and the files beside ----


def test_an_export_into_a_link(folder, tmp_path):
    """The folder that it names is replaced, the link stays; one that leads nowhere is refused at the start."""
    teacher = load(folder)
    student, scheduler = student_of(teacher)
    (tmp_path / "big disk").mkdir()
    link = tmp_path / "pipeline"
    link.symlink_to(tmp_path / "big disk" / "mine")
    for _ in range(2):
        export.check_replaceable(link)
        exported(teacher, student, scheduler, link)
        assert link.is_symlink() and (tmp_path / "big disk/mine/model_index.json").is_file()
    assert [f.name for f in (tmp_path / "big disk").iterdir()] == ["mine"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="choose another --output_dir"):
        export.check_replaceable(tmp_path / "loop")


def test_single_files_that_fail_are_left_out(folder, tmp_path, monkeypatch):
    """With the reason, on the card too; the pipeline is kept, and a workflow for such a file goes with it."""
    teacher = load(folder)
    student, scheduler = student_of(teacher, steps=4, scale=1.0)
    monkeypatch.setattr(export, "PSNR", 200.0)
    found = exported(teacher, student, scheduler, tmp_path / "out")
    name = "student_4step_unet.safetensors"
    assert found.gaps.keys() == {"pipeline"} and found.gaps["pipeline"].largest < 1e-3
    assert re.fullmatch(r"its images differ .* PSNR \d+\.\d dB \(allowed 0.25 and 200 dB\)", found.left[name])
    assert not list((tmp_path / "out").glob("student_*"))
    assert f"There is no {name}: its images differ" in (tmp_path / "out/README.md").read_text()

    monkeypatch.undo()
    net = teacher.denoiser.copy().net
    with torch.no_grad():
        net.time_embedding.linear_2.bias[0] = 1e6
    found = exported(teacher, student.with_network(net), scheduler, tmp_path / "out")
    assert "does not fit into torch.float16: its largest entry is 1e+06" in found.left[name]
    assert found.gaps.keys() == {"pipeline"}
    monkeypatch.setattr(export, "load_single_file", lambda *_: {}["key"])
    found = exported(teacher, student, scheduler, tmp_path / "out")
    assert set(found.left.values()) == {"diffusers does not load it (KeyError: 'key')"}
    assert found.left.keys() == {name, "student_4step_checkpoint.safetensors"}
    text = (tmp_path / "out/README.md").read_text()
    assert "## What was verified" in text and "sampler with the student's weights" in text
