"""The model card: what the Hub reads from it, whose licence it carries, and that its own programs run."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub, Repo, environment

from pipelines.export.card import NEGATIVE, Card, Result, python_block, render_program
from pipelines.export.license import BASES, UNKNOWN, License, find_license, hub_name

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
    assert "student of teacher with" in text and NEGATIVE not in text


def test_nothing_inside_ends_a_block_or_becomes_markup():
    """Backticks in the configuration and in the code, a name, a base and a licence of markup."""
    config = "prompt: |\n  a\n  ```\n  <b>\n  ## Evaluation\n"
    code, name = 'pipe = """\n```\n"""', "<img src=x onerror=y> [a](b)"
    facts = {"config": config, "code": code, "name": name, "base": f"runs/{name.replace('/', '')}"}
    text = made(**facts, license=License("other", name, "javascript:y"))
    assert python_block(text) == code and f"````yaml\n{config.strip()}\n````" in text
    body = text.split("---\n", 2)[2]
    assert (
        body.startswith("\n# &lt;img src=x onerror=y&gt; [a\\](b)\n")
        and "<img" not in body
        and "](javascript" not in body
    )
    assert "[GPL](https://a.org/b%28c%29)" in made(license=License("other", "GPL", "https://a.org/b(c)"))
    assert "[GPL](LICENSE.md)" in made(license=License("other", "GPL", "LICENSE.md"))


def test_it_reads_like_a_sentence():
    """One call or several, the method by its name, an unknown licence, and what each file is for."""
    assert "with 4 network calls, distilled with DMD2. Plain" in made()
    assert "with one network call. Plain" in made(steps=1, method="")
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


def seeded(program):
    return program.replace("image = ", "import torch; torch.manual_seed(1); image = ")


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
