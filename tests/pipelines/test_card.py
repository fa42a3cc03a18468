"""The model card: what the Hub reads from it, whose licence it carries, and that its own programs run."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub, Repo, environment
from programs import on_cpu
from torch import nn

from distill.configuration import dump
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP, Flow
from distill.diffusion.student import Student
from pipelines.export import license as licenses
from pipelines.export.card import NEGATIVE, Card, Result, python_block, render_program
from pipelines.export.configuration import changed_values
from pipelines.export.license import BASES, UNKNOWN, License, find_license, hub_name, refuse_public_push
from pipelines.export.usage import describe_usage, sampler_settings
from recipes import dmd2_sdxl_lora

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CONFIG = "method:\n  guidance: 7.0\nmax_train_steps: 2\n"


def made(**changes):
    facts = {"name": "student", "base": SDXL, "family": "sdxl", "method": "dmd2", "steps": 4, "config": CONFIG}
    return Card(**facts | {"license": find_license(SDXL), "code": "pipe = ..."} | changes).render()


def metadata(text):
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_the_hub_reads_it():
    found = metadata(made(samples="samples.png", prompt="a 'red' fox: running", datasets=["org/prompts"]))
    assert found == {
        "license": "openrail++",
        "base_model": SDXL,
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "few-step", "dmd2", "sdxl"],
        "datasets": ["org/prompts"],
        "widget": [{"text": "a 'red' fox: running", "output": {"url": "samples.png"}}],
    }
    text = made(samples="samples.png")
    assert "![samples](samples.png)" in text and NEGATIVE in text and "(4 network" not in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(CONFIG)


def test_an_adapter_one_step_and_an_unknown_base():
    found = metadata(made(code="", lora="pipe = 1", steps=1, task="text-to-video"))
    assert found["base_model_relation"] == "adapter" and found["pipeline_tag"] == "text-to-video"
    assert found["tags"] == ["text-to-video", "diffusers", "one-step", "dmd2", "sdxl", "lora"]
    assert python_block(made(code="", lora="pipe = 1")) == "pipe = 1"
    both = made(lora="pipe = 1")
    assert (python_block(both), python_block(both, 1)) == ("pipe = ...", "pipe = 1")
    text = made(base="runs/digits/teacher", license=License("mit"), limits=())
    assert not {"base_model", "base_model_relation"} & metadata(text).keys(), "the Hub refuses a path"
    assert "student of teacher, distilled" in text and NEGATIVE not in text


def test_nothing_inside_ends_a_block_or_becomes_markup():
    """Backticks in the configuration and in the code, a name, a base and a licence of markup."""
    config = "prompt: |\n  a\n  ```\n  <b>\n  ## Evaluation\n"
    code, name = 'pipe = """\n```\n"""', "<img src=x onerror=y> [a](b)"
    facts = {"config": config, "code": code, "name": name, "base": f"runs/{name.replace('/', '')}"}
    text = made(**facts, license=License("other", name, "javascript:y"))
    (shown,) = re.findall(r"^````yaml\n(.*?)\n````$", text, re.DOTALL | re.MULTILINE)
    assert python_block(text) == code and yaml.safe_load(shown) == yaml.safe_load(config)
    body = text.split("---\n", 2)[2]
    assert (
        body.startswith("\n# &lt;img src=x onerror=y&gt; [a\\](b)\n")
        and "<img" not in body
        and "](javascript" not in body
    )
    assert "[GPL](https://a.org/b%28c%29)" in made(license=License("other", "GPL", "https://a.org/b(c)"))
    assert "[GPL](LICENSE.md)" in made(license=License("other", "GPL", "LICENSE.md"))


def test_it_reads_like_a_sentence():
    """One call or several, the method by its name with its paper, an unknown licence, and what each file is for."""
    assert (
        f"student of [{SDXL}](https://huggingface.co/{SDXL}), distilled with [DMD2](https://arxiv.org/abs/2405.14867)"
        in made()
    )
    assert ". An image takes 4 network calls, without" in made() and "distilled with lightning. An" in made(
        method="lightning"
    )
    assert "teacher. A video takes one network call," in made(
        steps=1, method="", base="a/b/teacher", task="text-to-video"
    )
    assert "`your-name/...` stands for a repository" in made() and "stands for" not in made(model="ada/student")
    assert metadata(made(method=""))["tags"] == ["text-to-image", "diffusers", "few-step", "sdxl"]
    assert "the same licence, which was not found: name it with `--license`" in made(license=UNKNOWN)
    text = made(files=["README.md", "a_4step_lora.safetensors", "a_4step_lora_comfy.safetensors"])
    assert "- `a_4step_lora.safetensors`: the LoRA, for" in text and "`README.md`" not in text
    assert "- `a_4step_lora_comfy.safetensors`: the same LoRA in kohya's format" in text
    assert "Files beside" not in made()


def test_an_evaluation_is_the_model_index():
    results = [Result("COCO 2014, 30k", "FID", 12.345), Result("COCO 2014, 30k", "CLIP score", 0.31)]
    text = made(results=results)
    (index,) = metadata(text)["model-index"]
    (block,) = index["results"]  # one task and data set: one block of metrics
    assert index["name"] == "student" and block["task"] == {"type": "text-to-image"}
    assert block["dataset"] == {"name": "COCO 2014, 30k", "type": "coco-2014-30k"}
    assert [(m["type"], m["value"], m["name"]) for m in block["metrics"]] == [
        ("fid", 12.345, "FID"),
        ("clip-score", 0.31, "CLIP score"),
    ]
    assert "| FID | 12.35 | COCO 2014, 30k |" in text


def test_the_licence_is_the_teachers(tmp_path):
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    flux = License("other", "flux-1-dev-non-commercial-license", link)
    cached = "/home/ada/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0a1b"
    for base in ("black-forest-labs/FLUX.1-dev", "/models/FLUX.1-dev", cached):
        assert hub_name(base) == "black-forest-labs/FLUX.1-dev" and find_license(base) == flux
    text = made(base="/models/FLUX.1-dev", license=flux)
    assert metadata(text) | dict(zip(("license", "license_name", "license_link"), flux)) == metadata(text)
    assert f"[flux-1-dev-non-commercial-license]({link})" in text

    (tmp_path / "Qwen-Image").mkdir()
    readme = tmp_path / "Qwen-Image" / "README.md"
    readme.write_text("---\ntags: [x]\n---\n# no licence in it\n")
    assert find_license(readme.parent) == License("apache-2.0"), "by its name, where the page says nothing"
    readme.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: TERMS.md\n---\n")
    own = "https://huggingface.co/Qwen/Qwen-Image/blob/main/TERMS.md"
    assert find_license(readme.parent) == License("other", "own", own), "what the folder says goes first"
    assert find_license(readme.parent, "mit") == License("mit")
    assert find_license(tmp_path, "my terms,https://x.org/t") == License("other", "my terms", "https://x.org/t")
    for unknown in (tmp_path, "someone/some-finetune", "runs/teacher"):
        with pytest.raises(ValueError, match="--license") as error:
            find_license(unknown)
        assert repr(str(unknown)) in str(error.value)
    assert all(find_license(base).link is None or "://" in find_license(base).link for base in BASES)


def refusal_message(function, *arguments):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_public_push_carries_the_licence(tmp_path, monkeypatch):
    """Its files are fetched from the Hub beside the components; without them, or under other terms, nothing is sent."""
    folder = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    own = find_license(folder)
    message = refusal_message(refuse_public_push, folder, folder, own)
    assert "has no file of its licence" in message and "--hub_private" in message and f"into {folder}" in message

    def download(name, revision, allow_patterns):
        assert (name, revision) == ("black-forest-labs/FLUX.1-dev", "0a1b") and "README.md" in allow_patterns
        for file in ("LICENSE.md", "NOTICE"):
            assert any(fnmatch(file, pattern) for pattern in allow_patterns)
            (folder / file).write_text("terms")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    licenses.fetch_license_files(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # they are there: nothing is asked for
    licenses.fetch_license_files(folder)
    assert [file.name for file in licenses.license_files(folder)] == ["LICENSE.md", "NOTICE"]
    refuse_public_push(folder, folder, own)
    message = refusal_message(refuse_public_push, folder, folder, License("apache-2.0"))
    assert "--license apache-2.0" in message and "flux-1-dev-non-commercial-license" in message
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    refuse_public_push(folder, folder, License("apache-2.0"))  # commerce is allowed: the user's word counts
    names = (
        "LICENSE",
        "license.txt",
        "LICENCE.md",
        "NOTICE",
        "Notice.txt",
        "COPYING",
        "Stability_LICENSE.md",
        "USE_POLICY.md",
    )
    assert all(map(licenses.is_license_file, names)) and not any(
        map(licenses.is_license_file, ("README.md", "noticed.py"))
    )
    text = made(terms=["LICENSE.md", "NOTICE"])
    assert "Its files are part of this folder: [LICENSE.md](LICENSE.md), [NOTICE](NOTICE)." in text
    (tmp_path / "README.md").write_text(made(license=UNKNOWN))
    with pytest.raises(ValueError, match="is not known"):  # a student of a student whose licence was not found
        find_license(tmp_path)


def test_the_configuration_without_defaults():
    """Values of the recipe alone: no nulls, no defaults, no folders of this machine, nothing about its start."""
    config = dmd2_sdxl_lora.CONFIG
    train = dataclasses.replace(config.train, output_dir="/home/ada/runs/x", seed=3, report_to="wandb")
    data = dataclasses.replace(config.data, cache="/data/ada/cache", prompts="prompts.txt")
    found = yaml.safe_load(changed_values(dump(dataclasses.replace(config, train=train, data=data, teacher="/m/sdxl"))))
    assert found["student"]["lora"]["rank"] == 64 and found["student"]["timestep"] == 399 and found["seed"] == 3
    assert found["data"] == {"cache": "cache", "prompts": "prompts.txt", "squeeze": True}
    assert found["teacher"] == "sdxl" and "ada/" not in str(found) and "wandb" not in str(found)
    assert not {"taps", "walk", "fake_space"} & found["method"].keys() and found["method"]["guidance"] == 8.0
    assert {"output_dir", "optimizer", "revision", "adam_beta2"}.isdisjoint(found)
    assert changed_values("not: [closed") == "not: [closed" and changed_values("just words") == "just words"


def network(kind):
    return type(kind, (nn.Linear,), {})(1, 1)


def student(kind, times, schedule, **facts):
    prediction = "flow" if isinstance(schedule, Flow) else "eps"
    return Student(Denoiser(network(kind), schedule, prediction), times, **facts)


def simple(table, steps):
    """The levels of the scheduler "simple" of ComfyUI and A1111: from a table of 1000, the last first."""
    return [table[-(1 + int(i * (1000 / steps)))] for i in range(steps)]


@pytest.mark.parametrize("steps", (1, 2, 3, 4, 8))
def test_settings_of_a_plain_sampler(steps):
    """The sampler that a card names visits the student's levels; of other levels it names none."""
    indices = simple(range(1000), steps)
    table = student("UNet2DConditionModel", tuple(n / 999 for n in indices), VP.scaled_linear(), scale=1.0)
    assert sampler_settings(table) == ("lcm", steps, None)
    s = 2.37
    shifted = [s * t / (1 + (s - 1) * t) for t in ((n + 1) / 1000 for n in range(1000))]
    flow = student("SD3Transformer2DModel", tuple(simple(shifted, steps)), Flow(), renoise="ddim")
    sampler, calls, shift = sampler_settings(flow)
    assert (sampler, calls) == ("euler", steps) and shift == (None if steps == 1 else pytest.approx(s, abs=1e-3))
    early = student("UNet2DConditionModel", tuple(n * 0.9 / 999 for n in indices), VP.scaled_linear(), scale=1.0)
    assert sampler_settings(early) is None
    if steps > 2:
        assert (
            sampler_settings(
                student("SD3Transformer2DModel", tuple(1 - (i / steps) ** 2 for i in range(steps)), Flow())
            )
            is None
        )


def test_where_the_files_go():
    """The folder of each file and the settings, by what ComfyUI and A1111 read."""
    grid = tuple(n / 999 for n in (999, 749, 499, 249))
    lcm = student("UNet2DConditionModel", grid, VP.scaled_linear(), scale=1.0)
    told = lambda student, *files: describe_usage(student, student.denoiser.net, "BASE", (1024, 1024), files)
    text = told(lcm, "x_4step_comfyui.json", "x_4step_lora.safetensors", "x_4step_lora_comfy.safetensors")
    assert (
        "1. Copy `x_4step_lora_comfy.safetensors` to `models/loras`" in text
        and "2. Open `x_4step_comfyui.json`" in text
    )
    assert "3. In a workflow of your own: KSampler with sampler `lcm`, scheduler `simple`, 4 steps, CFG 1. " in text
    assert (
        "`<lora:x_4step_lora_comfy:1>`" in text
        and "method LCM, schedule type Simple, 4 steps, CFG scale 1, 1024 x" in text
    )
    text = told(lcm, "x_4step_unet.safetensors", "x_4step_comfyui.json")
    assert (
        "`x_4step_unet.safetensors` to `models/diffusion_models`" in text and "A1111 reads no file of a network" in text
    )
    text = told(lcm, "x_4step_checkpoint.safetensors", "x_4step_unet.safetensors", "x_4step_comfyui.json")
    assert "1. Copy `x_4step_checkpoint.safetensors` to `models/checkpoints`" in text
    assert "It also needs `x_4step_unet.safetensors`" in text
    assert "Copy `x_4step_checkpoint.safetensors` to `models/Stable-diffusion` and choose it" in text
    early = student("UNet2DConditionModel", (399 / 999,), VP.scaled_linear(), scale=1.0)
    text = told(early, "x_1step_lora_comfy.safetensors", "x_1step_comfyui.json")
    assert (
        "has other times than this student: use the workflow above." in text and "A1111 cannot call the network" in text
    )
    flow = student("FluxTransformer2DModel", (1.0, 0.9), Flow(), renoise="ddim")
    text = told(flow, "x_2step_transformer.safetensors")
    assert (
        "sampler `euler`, scheduler `simple`, 2 steps, CFG 1; node ModelSamplingFlux with max_shift = base_shift = "
        in text
    )
    assert f"{math.log(9):.4g}." in text and "A1111 does not read this network." in text
    assert "FluxGuidance" not in text
    flow.denoiser.net.config = {"guidance_embeds": True}
    assert "; node FluxGuidance with the guidance_scale of the program" in told(flow, "x_2step_transformer.safetensors")
    flow = student("QwenImageTransformer2DModel", (1.0, 0.9), Flow(), renoise="ddim")
    assert "node ModelSamplingAuraFlow with shift 9." in told(flow, "x_2step_transformer.safetensors")
    wan = student("WanTransformer3DModel", (1.0,), Flow())
    assert (
        "Neither reads a WanTransformer3DModel" in told(wan, "x_1step_transformer.safetensors")
        and told(wan, "README.md") == ""
    )


def seeded(program):
    return on_cpu(program).replace("image = ", "import torch; torch.manual_seed(1); image = ")


def pixels(image):
    return np.asarray(image, dtype=int)


def run(program, **names):
    """The image that a program leaves, from the same noise each time."""
    exec(seeded(program), names)
    return pixels(names["image"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny SD pipeline of two steps and a LoRA on its UNet; the folders, and the images that they must give."""
    from diffusers import LCMScheduler
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from pipelines.families import sd

    root = tmp_path_factory.mktemp('an "export"')
    torch.manual_seed(0)
    pipe = sd.tiny()
    pipe.save_pretrained(root / "base")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=2)
    pipe.save_pretrained(root / "student")
    call = 'image = pipe("a fox", num_inference_steps=2, guidance_scale=0).images[0]'
    images = [run(call, pipe=pipe)]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    lora = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(root / "student", lora, weight_name="s_lora.safetensors")
    images.append(run(call, pipe=pipe))
    assert abs(images[0] - images[1]).max() > 0, "the LoRA must be seen"
    return root, call, images


def test_its_programs_run(exported):
    root, call, images = exported
    student, base = str(root / "student"), str(root / "base")
    lora = render_program(call, student, base, "s_lora.safetensors", "LCMScheduler")
    text = made(code=render_program(call, student), lora=lora, steps=2)
    for n, expected in enumerate(images):
        assert (run(python_block(text, n)) == expected).all()


def test_its_program_runs_from_the_hub(exported, tmp_path):
    """Run the card's program of a repository elsewhere, as a user would: test_hub.py pushes one."""
    root, call, (expected, _) = exported
    folder = shutil.copytree(root / "student", tmp_path / "student")
    (folder / "README.md").write_text(made(code=render_program(call, "ada/student"), steps=2))
    with Hub() as hub:
        files = {f"{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.repos["ada/student"] = Repo(files=files)
        program = seeded(python_block(files["README.md"].decode())) + "; image.save('image.png')"
        command, env = [sys.executable, "-c", program], environment(hub.url, tmp_path, PYTHONPATH="")
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    assert (pixels(Image.open(tmp_path / "image.png")) == expected).all()
