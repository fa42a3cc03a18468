"""Images that depend on (seed, i) and their prompt alone: for any batch, any number of processes, after a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import TWO, python

from eval.figures import Folder, score_folder
from eval.images import images as folders
from eval.sampling.conditions import SampleConditions, read_prompts
from eval.sampling.image_set import ProcessGroup, generate, generate_missing_images
from eval.sampling.models import model_name
from eval.sampling.sampler import Sampler, image_generator, load_pipeline, pipeline_sampler, teacher_sampler
from pipelines.families import tiny

WORDS = "fox cat dog tree sea hat cup road hill lamp bird".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny pipelines by the names of their families, made when asked for, and prompts.txt."""
    root = tmp_path_factory.mktemp("models")
    (root / "prompts.txt").write_text("".join(f"a photo of a {w}\n" for w in WORDS))

    def folder(name):
        if not (root / name).exists():
            tiny.save(name, root / name)
        return root / name

    return SimpleNamespace(root=root, folder=folder, prompts=f"{root / 'prompts.txt'}")


@pytest.fixture(scope="module")
def student(home):
    """A two-step EDM student as it is exported: a plain ConsistencyModelPipeline and a distill.json."""
    from pipelines.families import edm

    torch.manual_seed(0)
    folder = home.root / "student"
    edm.pipeline(edm.unet((8, 16)), 0.5, 2.5, 2).save_pretrained(folder)
    (folder / "distill.json").write_text(json.dumps({"student": True, "steps": 2}))
    return folder


def bytes_of(folder):
    """{name: contents} of every image."""
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.png"))}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_the_folder(tmp_path, channels):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3 * channels).reshape(3, channels, 16, 16)
    manifest = folders.write_folder(tmp_path / "a", folders.restore(levels), [4, 5, 6], seed=7)
    images, labels, read = folders.read_folder(tmp_path / "a")
    assert folders.quantize(images).equal(levels) and labels.tolist() == [4, 5, 6]
    assert read == manifest and read["seed"] == 7 and read["n"] == 3
    assert folders.read_folder(tmp_path / "a", first=2)[0].equal(images[:2])
    assert folders.quantize(torch.tensor([-3.0, -1.0, 0.002, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_bad_folders_are_one_clear_error(tmp_path):
    x = torch.zeros(3, 1, 8, 8)

    def fresh(name, **meta):
        folders.write_folder(tmp_path / name, x, **meta)
        return tmp_path / name

    def fails(folder, match):
        with pytest.raises(ValueError, match=match):
            folders.read_folder(folder)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no image")
    fails(tmp_path / "absent", "no folder")
    mixed = fresh("mixed")
    Image.new("L", (9, 8)).save(mixed / "000001.png")
    fails(mixed, "000001.png is 9 x 8 .* 000000.png is 8 x 8")
    corrupt = fresh("corrupt")
    (corrupt / "000002.png").write_bytes((corrupt / "000002.png").read_bytes()[:40])
    fails(corrupt, "000002.png cannot be read: .*; remove or replace it")
    short = fresh("short")
    (short / "000002.png").unlink()
    fails(short, "holds 2 images, its manifest says 3")
    fails(fresh("half", complete=False), "not complete: 3 of 3 images are there; run the command")
    edited = fresh("edited")
    Image.new("L", (8, 8), 9).save(edited / "000001.png")
    fails(edited, "not those that its manifest describes")
    lies = fresh("lies")
    for text, match in (
        ("null", "is not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"n": 3, "labels": [1, 2]}', "2 labels for n = 3 images"),
        ('{"n": 3, "labels": ["a", 1, 2]}', "labels is .* must be a list of labels"),
        ('{"n": 3, "nfe": "<script>"}', "nfe is '<script>'; it must be a finite number"),
        ('{"n": 3, "seconds": NaN}', "seconds is nan; it must be a finite number"),
        ('{"n": true}', "n is True; it must be a number of images"),
        ('{"complete": false}', "not complete: 3 of None"),
    ):
        (lies / folders.MANIFEST).write_text(text)
        fails(lies, match)
    (lies / folders.MANIFEST).unlink()
    os.mkfifo(lies / folders.MANIFEST)
    fails(lies, "is not a regular file; generate the folder again")
    with pytest.raises(ValueError, match="not empty"):
        folders.write_folder(edited, x)
    folders.write_folder(edited, x, overwrite=True)
    assert len(folders.read_folder(edited)[0]) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="it is not a folder of images"):
        folders.write_folder(tmp_path / "mine", x, overwrite=True)
    with pytest.raises(ValueError, match="image 1 holds NaN"):
        folders.write_folder(tmp_path / "nan", torch.stack([x[0], x[0] * math.nan]))
    assert not (tmp_path / "nan").exists() and not list(tmp_path.glob(".*"))


def test_noise_belongs_to_seed_and_index():
    draws = [torch.randn(4, generator=image_generator(s, i)) for s, i in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert draws[0].equal(draws[1])
    assert not any(draws[0].equal(other) for other in draws[2:]) and not draws[2].equal(draws[3])


@pytest.mark.parametrize("rows", [1, 3])
def test_any_batch_gives_the_same_bits(home, tmp_path, rows):
    """Of calls with a fixed number of rows, whichever images they hold: files of batch 1 and 7, n 5 and 9, alike."""
    for name in ("sd", "edm"):
        made = {}
        prompts = {} if name == "edm" else {"prompts": home.prompts}
        steps = 1 if name == "edm" else 2
        for batch, n in ((1, 9), (7, 9), (None, 5)):
            out = tmp_path / f"{name}-{batch}"
            told = generate(home.folder(name), out, n, steps, seed=3, rows=rows, batch=batch, **prompts)
            made[batch] = bytes_of(out)
            assert told["rows"] == rows and told["n"] == len(made[batch]) == n
        assert made[1] == made[7]
        assert made[None].items() <= made[1].items()
        assert len({*made[1].values()}) == 9


@pytest.fixture(scope="module")
def noisy(home):
    """Folders whose schedulers add fresh noise between two calls; SD3's and FLUX's pipelines pass them no generator."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    for name in ("sdxl", "sd3", "flux"):
        old = json.loads((home.folder(name) / "scheduler/scheduler_config.json").read_text())
        cls = LCMScheduler if name == "sdxl" else FlowMatchEulerDiscreteScheduler
        own = {"original_inference_steps": 4} if name == "sdxl" else {"stochastic_sampling": True}
        cls.from_config(old, **own).save_pretrained(home.root / f"noisy-{name}")
    return home


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_noise_between_steps_is_the_images_own(noisy, tmp_path, name):
    """Its rows are those of calls alone, up to rounding; without fresh noise, and by another seed, images differ."""
    model, common = noisy.folder(name), {"n": 3, "steps": 3, "guidance": 1.0, "prompts": noisy.prompts}
    scheduler = {"scheduler": f"{noisy.root / f'noisy-{name}'}"}
    told = generate(model, tmp_path / "one", **common, **scheduler)
    assert told["nfe"] == 3 and told["kind"] == "pipeline" and told["complete"]
    assert told["scheduler"] == ("LCMScheduler" if name == "sdxl" else "FlowMatchEulerDiscreteScheduler")
    one = folders.read_folder(tmp_path / "one")[0]
    generate(model, tmp_path / "three", **common, **scheduler, rows=3)
    assert (folders.read_folder(tmp_path / "three")[0] - one).abs().max() <= 2 / 255 + 1e-6
    for other in ({}, scheduler | {"seed": 1}):
        generate(model, tmp_path / "other", **common, **other, overwrite=True)
        assert (folders.read_folder(tmp_path / "other")[0] - one).abs().amax((1, 2, 3)).min() > 0.1


def test_a_pipeline_of_no_known_family(home, tmp_path):
    """DiT: labels, noise by generators; its sampler is ancestral and gets none from the pipeline."""
    from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}
    net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, **sizes)
    torch.nn.init.normal_(net.proj_out_2.weight, std=0.3)
    DiTPipeline(net, tiny.vae(), DDPMScheduler()).save_pretrained(home.root / "dit")
    with pytest.raises(ValueError, match="knows 1000 labels; say how many are classes, --classes 1000"):
        generate(home.root / "dit", tmp_path / "a", n=4)
    common = {"n": 4, "steps": 2, "classes": 1000, "guidance": 2.0}
    told = [generate(home.root / "dit", tmp_path / f"{rows}", **common, rows=rows) for rows in (1, 3)]
    assert [(m["nfe"], m["labels"], m["scheduler"]) for m in told] == [(4, [0, 1, 2, 3], "DDPMScheduler")] * 2
    one, three = (folders.read_folder(tmp_path / f"{rows}")[0] for rows in (1, 3))
    assert (one - three).abs().max() <= 2 / 255 + 1e-6 and (one[0] - one[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_a_pipeline_without_labels_and_prompts(kind, tmp_path):
    """Its own size; under --solver pipeline image i is the pipeline's own of the same generator, in any batch."""
    from pipelines.families import ddpm

    pipe = ddpm.tiny(kind, labels=False)
    pipe.save_pretrained(tmp_path / "model")
    facts = generate(tmp_path / "model", tmp_path / "a", n=5, steps=3, solver="pipeline")
    assert (facts["rows"], facts["nfe"], facts["shape"], facts["labels"]) == (50, 3, [3, 8, 8], [0] * 5)
    pipe.set_progress_bar_config(disable=True)
    for i in (0, 4):
        image = pipe(1, generator=[image_generator(0, i)], num_inference_steps=3, output_type="np").images[0]
        level = folders.read_levels(tmp_path / "a" / f"00000{i}.png").permute(1, 2, 0)
        assert (level.double() - torch.from_numpy(image * 255)).abs().max() < 0.51 + 1e-3
    with pytest.raises(ValueError, match="classes is 4, and .*model takes no labels: leave out --classes"):
        generate(tmp_path / "model", tmp_path / "b", n=4, classes=4)
    with pytest.raises(ValueError, match="has no label for none"):
        generate(tmp_path / "model", tmp_path / "b", n=4, solver="ddim", steps=3, guidance=2.0)
    facts = generate(tmp_path / "model", tmp_path / "c", n=2, steps=3)
    assert (facts["kind"], facts["solver"], facts["nfe"]) == ("teacher", "heun", 5), "by default our solver, as for EDM"


def test_shared_noise_is_refused():
    """A pipeline that draws from torch's own state: alone a function of (seed, i), with others an error."""

    class Pipe:
        scheduler = SimpleNamespace(step=lambda out: out)

        def set_progress_bar_config(self, **_):
            pass

        def __call__(self, prompt, generator=None, output_type="pt"):
            return SimpleNamespace(images=torch.rand(len(prompt), 3, 2, 2))

    sampler = pipeline_sampler(Pipe(), 1, None)
    torch.manual_seed(5)
    first = sampler.make([image_generator(0, 4)], ["x"])
    torch.manual_seed(6)
    assert sampler.make([image_generator(0, 4)], ["x"]).equal(first)
    assert not sampler.make([image_generator(0, 5)], ["x"]).equal(first)
    with pytest.raises(ValueError, match="draws noise that images of one call share: pass --rows 1"):
        sampler.make([image_generator(0, 4), image_generator(0, 5)], ["x", "y"])


def test_teacher_by_our_solvers(home, tmp_path):
    """Heun on the EDM teacher: guidance doubles the calls; student and teacher start from the same noise."""
    import pipelines

    teacher = pipelines.load(home.folder("edm"))
    assert [teacher_sampler(teacher, 3, guidance=g).nfe() for g in (0.0, 1.0, 2.0)] == [5, 5, 10]
    told = generate(home.folder("edm"), tmp_path / "a", n=11, steps=3, seed=3)
    assert (told["kind"], told["nfe"], told["scheduler"]) == ("teacher", 5, "heun")
    assert told["labels"] == [*range(10), 0] and told["shape"] == [1, 8, 8] and told["size"] == 8
    for i, image in enumerate(folders.read_folder(tmp_path / "a")[0][:3]):
        expected = teacher_sampler(teacher, 3).make([image_generator(3, i)], [i])[0]
        assert (image - expected).abs().max() < 1.01 / 127.5
    z = []
    teacher.denoiser.net.register_forward_pre_hook(lambda net, args: z.append(args[0]))
    teacher_sampler(teacher, 1).make([image_generator(3, 1)], [1])
    first = torch.randn(1, 1, 8, 8, generator=image_generator(3, 1))
    scale = z[0].norm() / first.norm()
    torch.testing.assert_close(z[0], first * scale)
    student = []
    pipe = SimpleNamespace(
        set_progress_bar_config=lambda **_: None, scheduler=SimpleNamespace(step=lambda out: out), device="cpu",
        dtype=torch.float32, components={},
    )  # fmt: skip
    family = SimpleNamespace(sample=lambda pipe, c, z, *_: student.append(z) or z, no_guidance=0.0)
    pipeline_sampler(pipe, 1, None, family, (1, 8, 8)).make([image_generator(3, 1)], [1])
    assert student[0].equal(first)


def test_generate_repeats_reuses_and_refuses(student, tmp_path):
    out = tmp_path / "out"
    first = generate(student, out, n=11, seed=1)
    assert first["nfe"] == 2 and first["student"] and first["kind"] == "pipeline" and first["parameters"] > 1000
    assert first["model"] == "student" and first["hash"] and first["hardware"] and first["seconds"] > 0
    written = (out / "000000.png").stat().st_mtime_ns
    assert generate(student, out, n=11, seed=1) == first
    assert (out / "000000.png").stat().st_mtime_ns == written  # the same request: nothing was done
    with pytest.raises(ValueError, match="images of another run .seed 1, not 2"):
        generate(student, out, n=11, seed=2)
    assert generate(student, out, n=11, seed=2, overwrite=True)["hash"] != first["hash"]
    assert generate(student, tmp_path / "one", n=11, seed=1, steps=1)["nfe"] == 1
    told = generate(student, tmp_path / "digits", n=12, seed=1, protocol="digits", kind="teacher")
    assert told["protocol"] == "digits" and told["kind"] == "teacher" and told["labels"] == [*range(10), 0, 1]


def test_wrong_input_is_one_clear_error(home, student, tmp_path):
    sd, new = home.folder("sd"), tmp_path / "new"
    (tmp_path / "empty.txt").write_text("\n")
    broken, alien = tmp_path / "broken", tmp_path / "alien"
    tiny.save("sd", broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    alien.mkdir()
    (alien / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    code = tmp_path / "code"
    (code / "unet").mkdir(parents=True)
    (code / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["my_code", "Net"]})
    )
    text = {"prompts": home.prompts}
    for model, wrong, match in (
        (student, {"guidance": 2.0}, "guidance is 2.0"),
        (student, {"steps": 3}, "made for 2"),
        (student, {"steps": 0}, "steps is 0"),
        (student, {"batch": 0}, "batch is 0"),
        (student, {"n": 0}, "n is 0"),
        (student, {"n": 10**12}, "n is 1000000000000; it must be at least 1 and at most 1,000,000"),
        (student, {"steps": 10**9}, "steps is 1000000000"),
        (student, {"device": "xyz"}, "device is 'xyz'; it must be cpu"),
        (student, {"classes": 12}, "classes is 12, and the network of .* knows 11 labels"),
        (sd, {**text, "guidance": float("nan")}, "guidance is nan; it must be finite"),
        (sd, {**text, "n": None, "per_prompt": 10**6}, "asks for 11,000,000 images; a folder holds 1,000,000"),
        (student, text, "takes labels, not prompts"),
        (student, {"solver": "heun"}, "solver is heun: it is for teachers"),
        (student, {"protocol": "coco"}, "no protocol 'coco'"),
        (student, {"protocol": "coco30k-gigagan"}, "gives prompts, which .* does not take"),
        (student, {"protocol": "cifar10-edm"}, "32 x 32 pixels, and these images are 8 x 8"),
        (tmp_path / "nothing", {}, "nothing"),
        (sd, {}, "takes prompts: pass --prompts"),
        (sd, {"prompts": f"{tmp_path / 'no.txt'}"}, "no prompts at"),
        (sd, {"prompts": f"{tmp_path / 'empty.txt'}"}, "holds no prompts"),
        (sd, {**text, "n": 12}, "holds 11 prompts, fewer than the 12 images"),
        (sd, {**text, "scheduler": "Nothing"}, "scheduler is 'Nothing'; give a class of diffusers"),
        (sd, {**text, "scheduler_config": "{"}, "not JSON"),
        (sd, {**text, "scheduler_config": '{"a": 1}'}, "DDIMScheduler has no a"),
        (sd, {**text, "scheduler_config": '{"beta_start": NaN}'}, "beta_start is nan; it must be a number above 0"),
        (sd, {**text, "base": "x"}, "no LoRA's .safetensors file"),
        (sd, {"protocol": "coco10k-dmd2"}, "lacks data"),
        (tmp_path / "x.safetensors", {}, "no LoRA file"),
        (weights, text, "say by --base"),
        (weights, {**text, "base": f"{sd}"}, "does not load onto"),
        (broken, text, "broken does not load as a StableDiffusionPipeline"),
        (alien, text, "NoSuchPipeline, which diffusers .* does not have"),
        (code, text, "'my_code', code that is not run from here"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, new, **({"n": 2} | wrong), overwrite=True)
        assert not bytes_of(new)
    with pytest.raises(ValueError, match="there is no folder"):  # a request that failed leaves nothing behind
        folders.read_folder(new)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not a folder of images"):
        generate(student, tmp_path / "mine", n=2, overwrite=True)


def share(out, prompts, rows=1):
    """What `fill` is told."""
    facts = {"seed": 0, "plan": None, "batch": None, "frame": None}
    return SimpleNamespace(out=out, conditions=SampleConditions(prompts, True), rows_per_call=rows, **facts)


def test_a_video_is_one_of_its_pictures(tmp_path):
    def make(generators, conditions):
        return torch.linspace(-1, 1, 5).reshape(1, 1, 5, 1, 1).expand(len(generators), 3, 5, 2, 2)

    sampler, work = Sampler(make, lambda: 1, {}), share(tmp_path, ["a"])
    with pytest.raises(ValueError, match="videos of 5 pictures, and frame is None: choose the one to keep"):
        generate_missing_images(work, sampler, ProcessGroup())
    work.frame = 4
    generate_missing_images(work, sampler, ProcessGroup())
    assert folders.read_levels(tmp_path / "000000.png").eq(255).all()


def test_nan_is_named(tmp_path):
    bad = Sampler(lambda g, c: torch.full((len(g), 3, 2, 2), math.nan), lambda: 1, {})
    with pytest.raises(ValueError, match="image 0 holds NaN or infinite values; it was not written"):
        generate_missing_images(share(tmp_path, ["a"] * 3, 2), bad, ProcessGroup())
    assert not list(tmp_path.iterdir())


def test_a_lora_on_its_base(home, tmp_path):
    """The file as diffusers saves it; the scheduler beside it is the one that it runs under."""
    from diffusers import DiffusionPipeline, LCMScheduler
    from peft import LoraConfig, get_peft_model_state_dict

    sd = home.folder("sd")
    pipe = DiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet), weight_name="my.safetensors")
    LCMScheduler.from_config(pipe.scheduler.config).save_pretrained(tmp_path / "lora" / "scheduler")
    text = {"prompts": home.prompts, "n": 2, "steps": 2, "guidance": 0.0}
    told = generate(tmp_path / "lora" / "my.safetensors", tmp_path / "a", base=f"{sd}", **text)
    assert (told["kind"], told["model"], told["scheduler"], told["nfe"]) == ("lora", "my", "LCMScheduler", 2)
    generate(sd, tmp_path / "b", scheduler="LCMScheduler", **text)
    with_lora, without = (folders.read_folder(tmp_path / name)[0] for name in "ab")
    assert (with_lora - without).abs().amax((1, 2, 3)).min() > 0.02


def test_prompts_and_their_images(home, tmp_path):
    """Several images of a prompt; the folder is a data set of captioned images; guidance costs a second call."""
    from distill.data.sources import pictures

    told = generate(home.folder("sd"), tmp_path / "a", n=5, steps=2, guidance=3.0, prompts=home.prompts, per_prompt=2)
    assert told["nfe"] == 4 and told["guidance"] == 3.0 and told["labels"] is None and len(told["prompts"]) == 16
    assert pictures(f"{tmp_path / 'a'}").captions == [f"a photo of a {w}" for w in ("fox", "fox", "cat", "cat", "dog")]
    assert len({*bytes_of(tmp_path / "a").values()}) == 5
    prompts = tmp_path / "texts"
    prompts.mkdir()
    for name, text in (("b", "two"), ("a", "one")):
        (prompts / f"{name}.txt").write_text(f"{text}\n")
    generate(home.folder("sd"), tmp_path / "b", steps=1, prompts=f"{prompts}")
    assert pictures(f"{tmp_path / 'b'}").captions == ["one", "two"]


def test_a_protocol_replaces_components(home, tmp_path, monkeypatch):
    """coco10k-dmd2-tokenizer1: the second encoder reads what the first tokenizer writes. On 16 pixels."""
    from dataclasses import replace

    from eval.protocols import PROTOCOLS
    from eval.sampling import request as module

    monkeypatch.setenv("DISTILL_DATA", f"{tmp_path / 'data'}")
    plan = replace(PROTOCOLS["coco10k-dmd2-tokenizer1"], n=2, size=16)
    monkeypatch.setattr(module, "find_protocol", lambda name: plan)
    plan.folder.mkdir(parents=True)
    (plan.folder / "prompts.txt").write_text("a fox\na cat\n")
    sdxl = home.folder("sdxl")
    told = generate(sdxl, tmp_path / "a", steps=1, guidance=0.0, protocol=plan.name)
    assert told["protocol"] == plan.name and told["protocol_hash"] == plan.hash and told["n"] == 2
    pipe = load_pipeline(sdxl, None, None, {}, None, torch.float32, plan.components)
    assert pipe.tokenizer_2 is pipe.tokenizer
    with pytest.raises(ValueError, match="replaces tokenizer_2, which .* does not have"):
        generate(home.folder("sd"), tmp_path / "b", steps=1, protocol=plan.name)


def command(model, out, *flags):
    return ["-m", "eval.generate", "--model", model, "--out", out, "--num_images", 40, "--seed", 2, *flags]


def test_two_processes_and_a_kill_give_the_same_files(home, tmp_path):
    """Killed (-9) in the middle, gone on with by two processes: every image is there, and none was made twice."""
    model, flags = home.folder("edm"), ("--steps", 9, "--rows", 4, "--classes", 10)
    whole = generate(model, tmp_path / "whole", n=40, seed=2, steps=9, rows=4, classes=10)
    out = tmp_path / "killed"
    line = [sys.executable, *map(str, command(model, out, *flags))]
    process = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}"})
    while len(before := bytes_of(out)) < 8:
        assert process.poll() is None and time.sleep(0.002) is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {file: (out / file).stat().st_mtime_ns for file in bytes_of(out)}
    assert 8 <= len(before) < 40
    with pytest.raises(ValueError, match="is not complete: .* run the command that makes them again"):
        folders.read_folder(out)
    python(*TWO, *command(model, out, *flags))
    assert bytes_of(out) == bytes_of(tmp_path / "whole") and len(bytes_of(out)) == 40
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())
    told = folders.read_manifest(out)
    assert told["processes"] == 2 and told["hash"] == whole["hash"] and not list(out.glob(".*"))
    told["complete"] = False
    folders.write_manifest(out, told)  # killed after the last image
    assert generate(model, out, n=40, seed=2, steps=9, rows=4, classes=10)["hash"] == whole["hash"]


def test_a_model_is_named_by_its_run(student, tmp_path):
    """The name that any export has is no name; images under another name are the same images."""
    names = {
        "runs/dmd2/pipeline": "dmd2",
        "runs/dmd2/pipeline/": "dmd2",
        "runs/dmd2/pipeline/../pipeline": "dmd2",
        "runs/dmd2/watch/checkpoint-500/pipeline": "dmd2-checkpoint-500",
        "runs/lcm/pytorch_lora_weights.safetensors": "lcm",
        "runs/lcm/lcm_4step_lora.safetensors": "lcm_4step_lora",
        "runs/teacher": "teacher",
        "runs/v1.5": "v1.5",
    }
    assert {path: model_name(Path(path)) for path in names} == names
    shutil.copytree(student, tmp_path / "a" / "pipeline")
    shutil.copytree(student, tmp_path / "b" / "pipeline")
    first = generate(tmp_path / "a" / "pipeline", tmp_path / "out", n=3)
    again = generate(tmp_path / "b" / "pipeline", tmp_path / "out", n=3)
    assert (first["model"], again["model"]) == ("a", "b") and first["hash"] == again["hash"]
    assert again["commit"] == score_folder(tmp_path / "out", metrics=("vendi",), extractor="random")["commit"]


def test_prompts_of_evaluation_have_limits(home, tmp_path):
    """A megabyte is refused before a network is loaded: a tokenizer took a minute for it. A mark of order is none."""
    (tmp_path / "long.txt").write_text("a fox\n" + "fox " * 250_000)
    with pytest.raises(ValueError, match="long.txt.* 1,000,000 characters; at most 20,000|long.txt.*999,999"):
        generate(home.folder("sd"), tmp_path / "out", prompts=f"{tmp_path / 'long.txt'}")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a.txt").write_bytes(b"\xef\xbb\xbfa fox")
    assert read_prompts(f"{tmp_path / 'many'}") == ["a fox"]
    (tmp_path / "many" / "b.txt").write_text("fox " * 250_000)
    with pytest.raises(ValueError, match="b.txt: a text of 999,999 characters"):
        read_prompts(f"{tmp_path / 'many'}")
    (tmp_path / "many" / "b.txt").unlink()
    os.mkfifo(tmp_path / "many" / "b.txt")
    with pytest.raises(ValueError, match="b.txt is not a regular file"):
        read_prompts(f"{tmp_path / 'many'}")
    with_mark = tmp_path / "images"
    folders.write_folder(with_mark, torch.zeros(1, 3, 8, 8))
    (with_mark / "metadata.jsonl").write_text('{"file_name": "000000.png", "text": "a fox"}\n', "utf-8-sig")
    assert Folder(with_mark).texts == ["a fox"]


def test_a_mistake_is_one_line(tmp_path):
    line = [sys.executable, "-m", "eval.generate", "--model", "absent", "--out", f"{tmp_path / 'x'}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no pipeline at 'absent'")
    assert "Traceback" not in done.stderr


def test_help_is_light():
    heavy = ("diffusers", "transformers", "peft", "accelerate", "matplotlib", "sklearn", "scipy")
    run = "runpy.run_module('eval.generate', None, '__main__', True)"
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: {run}\n"
    code += f"except SystemExit: pass\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]" and "--protocol" in done.stdout, done.stderr


def test_layouts_of_benchmarks(tmp_path):
    """GenEval: 00000/samples/00000.png with the line of its prompt; DPG-Bench: NAME.png, two by two."""
    from eval.leaderboard.layouts import export

    lines = [{"tag": "single_object", "prompt": f"a photo of a {w}"} for w in ("fox", "cat")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prompts").mkdir()
    for name, line in zip(("10", "9"), lines, strict=True):
        (tmp_path / "prompts" / f"{name}.txt").write_text(line["prompt"])
    wanted = SampleConditions([lines[i // 4]["prompt"] for i in range(8)], True)
    levels = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 3, 2, 2)
    folder, out = tmp_path / "images", tmp_path / "out"
    folders.write_folder(folder, folders.restore(levels), prompts=wanted.hash)
    assert export(folder, "geneval", tmp_path / "evaluation_metadata.jsonl", out) == 2
    assert [*sorted(p.name for p in out.iterdir())] == ["00000", "00001"]
    assert sorted(p.name for p in (out / "00001" / "samples").iterdir()) == [f"{j:05d}.png" for j in range(4)]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == lines[1]
    assert (out / "00001/samples/00002.png").read_bytes() == (folder / "000006.png").read_bytes()
    assert export(folder, "dpg", tmp_path / "prompts", tmp_path / "dpg") == 2
    grid = folders.read_levels(tmp_path / "dpg" / "9.png")
    assert grid.shape == (3, 4, 4) and grid[0, ::2, ::2].tolist() == [[4, 5], [6, 7]]
    (tmp_path / "other.jsonl").write_text('{"prompt": "a dog"}\n')
    for layout, prompts, place, match in (
        ("geneval", "other.jsonl", "new", "8 images that were not made from the 1 prompts"),
        ("geneval", "prompts", "new", "prompts of geneval are evaluation_metadata.jsonl"),
        ("dpg", "evaluation_metadata.jsonl", "new", "prompts of dpg are the folder"),
        ("dpg", "prompts", "dpg", "is not empty"),
    ):
        with pytest.raises(ValueError, match=match):
            export(folder, layout, tmp_path / prompts, tmp_path / place)
    folders.write_folder(
        tmp_path / "few", folders.restore(levels[:2]), prompts=SampleConditions(wanted.values[::4], True).hash
    )
    with pytest.raises(ValueError, match="1 image.s. of a prompt; DPG-Bench reads 4"):
        export(tmp_path / "few", "dpg", tmp_path / "prompts", tmp_path / "new")
    assert not (tmp_path / "new").exists()
