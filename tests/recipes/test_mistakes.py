"""What a user may get wrong ends in one message, exit status 2, before work is begun or without work being lost."""

import importlib
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro

from distill.data import Text
from distill.diffusion.times import Grid, Karras, Uniform
from distill.training import checkpoint
from pipelines.cache import encodings, pairs
from pipelines.export import edm_convert, export
from pipelines.families import tiny

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "--pretrained_model_name_or_path "
PLAIN = "--method.gan 0 --method.gan_fake 0"  # DMD2 from prompts alone
SHORT = "--max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 0 --validation_steps 0 --method.every 1"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny pipelines `sdxl`, `sd` and `edm`; caches `text` of prompts and `both` of prompts and images, for `sdxl`."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("sdxl", "sd", "edm"):
        tiny.save(name, folder / name)
    data = Text().smoke(folder / "photos")
    (folder / "junk.safetensors").write_bytes(b"junk" * 9)
    (folder / "empty.txt").write_text("\n\n")
    (folder / "words.jsonl").write_text('{"words": "a red fox"}\n')
    shutil.copytree(folder / "photos", folder / "torn")
    (folder / "torn" / "2.png").write_bytes((folder / "torn" / "2.png").read_bytes()[:200])
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("the only copy")
    damage = {
        "no_vae": lambda copy: shutil.rmtree(copy / "vae"),
        "no_text": lambda copy: shutil.rmtree(copy / "text_encoder_2"),
        "no_unet": lambda copy: shutil.rmtree(copy / "unet"),
        "no_weights": lambda copy: (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "cut": lambda copy: (copy / "model_index.json").write_text("{"),
    }
    for name, change in damage.items():
        shutil.copytree(folder / "sdxl", folder / name)
        change(folder / name)
    for name, images in (("text", ""), ("both", data.images)):
        encodings.run(encodings.Cache(f"{folder / 'sdxl'}", data.prompts, images, f"{folder / name}"))
    return folder


@pytest.fixture
def said(capsys, home, monkeypatch):
    """said(command, flags) -> its one message, of exit status 2; HOME in flags is the folder of `home`."""
    monkeypatch.chdir(home)

    def said(command, flags=""):
        argv = flags.replace("HOME", f"{home}").split()
        with pytest.raises(SystemExit) as end:
            if command == "export":
                export.main(tyro.cli(export.ExportArguments, args=argv, use_underscores=True))
            elif command in (encodings, edm_convert, pairs):
                command.main(argv)
            else:
                module = importlib.import_module(f"recipes.{command}")
                module.main(module.CONFIG, argv, module.__doc__)
        text = "".join(capsys.readouterr())
        assert end.value.code == 2 and "Traceback" not in text, text
        return " ".join("".join(c if c.isascii() else " " for c in text).split())

    return said


# ---- recipes without arguments ----


def test_recipes_say_what_is_missing():
    """At once: no network, and none of the libraries that take seconds."""
    script = """
import io, runpy, socket, sys
from contextlib import redirect_stderr
def refuse(*_): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
for path in sys.argv[1:]:
    said, sys.argv = io.StringIO(), [path]
    try:
        with redirect_stderr(said):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        assert error.code == 2, (path, said.getvalue())
    else:
        raise AssertionError(path)
    text = said.getvalue()
    words = ("pipelines.cache", "pipelines.pairs", "pipelines.edm_convert", "no pipeline at", "--data.images")
    assert text.startswith("error: no ") and any(word in text for word in words), (path, text)
heavy = {"diffusers", "transformers", "peft", "accelerate", "datasets", "sklearn"} & sys.modules.keys()
assert not heavy, heavy
"""
    recipes = [p for p in sorted((ROOT / "recipes").glob("*.py")) if "\nCONFIG = Config(" in p.read_text()]
    assert len(recipes) > 15
    command = [sys.executable, "-c", script, *map(str, recipes)]
    done = subprocess.run(command, cwd=ROOT / "docs", capture_output=True, text=True, timeout=10 * len(recipes))
    assert done.returncode == 0, done.stderr[-2000:]


# ---- before the run's folder is made ----

BOTH = "--teacher sdxl --data.cache both --output_dir run"
IMPOSSIBLE = {  # what: (recipe, flags, words of the message)
    "a teacher without VAE": ("--teacher no_vae", "no_vae is not a complete pipeline: model_index.json names vae,"),
    "a teacher without text encoder": ("--teacher no_text", "names text_encoder_2, and there is no such folder"),
    "a teacher without network": ("--teacher no_unet", "names unet, and there is no such folder"),
    "a teacher without weights": (
        "--teacher no_weights",
        "no_weights: its unet .* cannot be read: Error no file named",
    ),
    "a cut model_index.json": ("--teacher cut", "cut/model_index.json is damaged: Expecting"),
    "a path from elsewhere": ("--teacher nowhere", "no pipeline at 'nowhere': .* a model_index.json .seen from HOME"),
    "another family": ("--teacher sd", "'sdxl', this teacher is StableDiffusionPipeline 'sd'"),
    "another resolution": ("--resolution 32", "the cache both was made for .* --resolution 32"),
    "half a pixel": ("--resolution 17", "resolution is 17; this teacher needs a multiple of 2"),
    "frames of an image": ("--frames 9", "frames is 9, but sdxl is a StableDiffusionXLPipeline, which makes no videos"),
    "a GAN without images": (
        "--data.cache text",
        "the cache text has no images, which this method needs: make",
    ),
    "LoRA of rank 0": ("--student.lora.rank 0", "--student.lora.rank is 0; it must be at least 1"),
    "LoRA targets that match nothing": (
        "--student.lora.rank 2 --student.lora.targets to_q qkv",
        r"no module's name ends in the LoRA targets \['qkv'\]; the layers here end in \[.*'to_q'",
    ),
    "taps of another family": (
        "--method.taps transformer_blocks.3",
        r"no submodule \['transformer_blocks.3'\] to tap .*the top-level modules are \['conv_in'.*'mid_block'",
    ),
    "no taps": ("--method.taps", "--method.taps is empty; give at least one"),
    "freezing nothing": ("--student.freeze neck", "no module 'neck' to freeze .*at the top there are .*'mid_block'"),
    "never a student": ("--method.every 0", "--method.every is 0; it must be at least 1"),
    "an empty range of times": (
        "--method.times.low 990",
        r"times from low = 990 to high = 980; both lie in \[0, 9",
    ),
    "a grid of no images": (
        "--validation_images 0",
        "--validation_images is 0; it must be at least 1",
    ),
    "a family that is none": ("--family sdxk", "--family is 'sdxk'; sdxl, .*it must be one of .*'sdxl'"),
    "an attention that is none": ("--attention nope", "attention is 'nope'; it must be None or one of .*'native'"),
    "a name that the Hub has not": ("--hub_model_id a/b/c", "--hub_model_id is 'a/b/c'; it must be user/name or name"),
    "a start from nothing": ("--student.init nowhere", "student.init is 'nowhere', which holds no weights; it may be"),
    "a start from text": ("--fake.init empty.txt", "fake.init is 'empty.txt', which holds no weights; it may be"),
    "a start from a VAE": ("--student.init sdxl/vae", "student.init 'sdxl/vae' does not fit: it has no conv_in.weight"),
    "a start from junk": ("--student.init junk.safetensors", "junk.safetensors is damaged or no safetensors file"),
    "a file as output": ("--output_dir empty.txt", "HOME/empty.txt is not a writable folder"),
    "a folder that is not ours": (
        "--output_dir kept",
        "kept/pipeline exists and is not an earlier export",
    ),
    "not logged in": ("--push_to_hub", "--push_to_hub needs a login, and there is none"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_runs(what, said, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (home / "kept" / "pipeline").mkdir(parents=True, exist_ok=True)
    (home / "kept" / "pipeline" / "sales.csv").write_text("1")
    flags, words = IMPOSSIBLE[what]
    text = said("dmd2_sdxl", f"{BOTH} {SHORT} {flags}")
    assert re.search(words.replace("HOME", f"{home}"), text), text
    assert not (home / "run").exists() and [p.name for p in (home / "kept" / "pipeline").iterdir()] == ["sales.csv"]


def test_ranges_of_times():
    for law in (lambda: Uniform(0.5, 0.4), lambda: Grid(1000, 0, 1000), lambda: Karras(2, 1)):
        with pytest.raises(ValueError, match="both lie in"):
            law()
    with pytest.raises(ValueError, match="low is -0.1; it must be at least 0 and at most 1"):
        Uniform(-0.1, 1)


# ---- the commands ----

COMMANDS = {  # what: (command, flags, words of the message); ON: --pretrained_model_name_or_path
    "no prompts": (encodings, "ON sdxl --prompts empty.txt", "empty.txt holds no prompts"),
    "another column": (encodings, "ON sdxl --prompts words.jsonl", "no column called text, .*words"),
    "a column that is not there": (
        encodings,
        "ON sdxl --prompts words.jsonl --prompt_column a",
        "no column 'a'",
    ),
    "prompts that are not there": (encodings, "ON sdxl --prompts no.txt", "no prompts at 'no.txt'"),
    "a torn image": (encodings, "ON sdxl --images torn", "torn/2.png cannot be read.*--skip_broken"),
    "an encoder that is not there": (encodings, "ON no_text --images photos", "names text_encoder_2"),
    "half a pixel": (
        encodings,
        "ON sdxl --images photos --resolution 17",
        "needs a multiple of 2",
    ),
    "a file in the way": (encodings, "ON sdxl --images photos --output_dir empty.txt", "empty.txt"),
    "pairs without prompts": (pairs, "ON sdxl", "--cache|--prompts"),
    "no checkpoint of EDM": (edm_convert, "empty.txt OUT", "empty.txt is not a checkpoint of EDM"),
    "nothing to export": ("export", "", "give a run's folder, or a published student with --from FILE"),
    "no run": ("export", "sdxl", "no run at 'sdxl': a run's folder has a config.yaml"),
    "a run without checkpoint": ("export", "begun", "begun has no checkpoint yet: go on training"),
    "the user's folder": (
        "export",
        "begun --output_dir mine",
        "mine exists and is not an earlier export",
    ),
    "here": ("export", "begun --output_dir .", "exists and is not an earlier export"),
    "a file's place": ("export", "begun --output_dir empty.txt", "empty.txt exists and is not an earlier export"),
    "no base": ("export", "--from OTHER --output_dir OUT", "needs its base: --pretrained_model_name_or_path"),
    "no layout": ("export", "--from OTHER --teacher sdxl --output_dir OUT", "say with --layout which it is, one of"),
    "a file of another base": (
        "export",
        "--from OTHER --layout dmd2 --teacher sdxl --output_dir OUT",
        r"diffusion_pytorch_model.safetensors is not a network like the base's: .* tensors lack \['add_embedding",
    ),
    "a file of junk": (
        "export",
        "--from junk.safetensors --layout dmd2 --teacher sdxl --output_dir OUT",
        "junk.safetensors is damaged or no safetensors file",
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_commands(what, said, home):
    command, flags, words = COMMANDS[what]
    (home / "begun").mkdir(exist_ok=True)
    run = "# DMD2\nteacher: sdxl\nmethod: {}\nstudent: {}\noutput_dir: begun\nseed: 0\n"
    (home / "begun" / "config.yaml").write_text(run)
    other = "sd/unet/diffusion_pytorch_model.safetensors"
    before = sorted(home.rglob("*"))
    text = said(command, flags.replace("OTHER", other).replace("OUT", "made").replace("ON ", TEACHER))
    assert re.search(words, text), text
    new = {path.relative_to(home).parts[0] for path in set(home.rglob("*")) - set(before)}
    assert new <= {"cache"} and sorted(set(before) - set(home.rglob("*"))) == []
    shutil.rmtree(home / "cache", ignore_errors=True)  # what a torn image's neighbours gave


# ---- a full disk ----


@contextmanager
def full(module, name, call=1):
    """While module.name runs for the call-th time, no file grows beyond 100 kB, for Python and for safetensors."""
    right, free, calls = getattr(module, name), resource.getrlimit(resource.RLIMIT_FSIZE), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, free[1]) if len(calls) == call else free)
        try:
            return right(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)

    with patch.object(module, name, wrapped):
        yield


def test_a_full_disk(said, home):
    """While a checkpoint is written, or the export: what was whole stays, nothing half-made, and one can go on."""
    flags = f"--teacher sdxl --data.cache text {PLAIN} {SHORT} --output_dir disk --checkpointing_steps 1"
    run, listing = home / "disk", lambda folder: {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with full(checkpoint.write, "write_files", 2):
        text = said("dmd2_sdxl", flags)
    assert "the disk is full" in text and "go on with --resume_from_checkpoint latest" in text
    assert [p.name for p in checkpoint.list_intact_checkpoints(run)] == ["checkpoint-1"] and not list(run.glob(".*"))

    assert said("dmd2_sdxl", flags).startswith("error: disk already holds a run")
    with full(export, "write_pipeline"):
        text = said("dmd2_sdxl", f"{flags} --resume_from_checkpoint latest")
    assert "the disk is full" in text and "go on with --resume_from_checkpoint latest" in text
    assert [p.name for p in checkpoint.list_intact_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    assert not (run / "pipeline").exists() and not list(run.glob(".*"))

    with full(export, "write_pipeline"):
        text = said("dmd2_sdxl", f"{flags} --resume_from_checkpoint latest")
    assert "checkpoint-2 is at --max_train_steps already: nothing to train" in text

    export.main(export.ExportArguments("disk", output_dir="a student"))
    made = home / "a student"
    assert (made / "a-student_4step_unet.safetensors").is_file(), "its name went into the files' as it was"
    assert len({p.stat().st_mode for p in listing(made)}) == 1, "some of it can be read by its owner alone"
    made = made.rename(home / "student")
    before = listing(made)
    with full(export, "write_pipeline"):
        text = said("export", "disk --checkpoint disk/checkpoint-1 --output_dir student")
    assert "the disk is full" in text and "give the same command again" in text
    assert listing(made) == before and not list(home.glob(".*"))
