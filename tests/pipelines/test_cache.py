"""The cache command: what it writes is what the teacher encodes, whatever interrupts it."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.data import Text
from distill.data.online import Texts, crop
from distill.method import Requirement
from distill.random import Draw
from pipelines import load
from pipelines.cache import encodings, writer
from pipelines.families import tiny

ROOT = Path(__file__).resolve().parents[2]
HALF = 2.0**-10  # relative rounding of float16
DRAW = Draw(0, 3, "student", torch.arange(6))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Stable Diffusion `sd`, a tiny SDXL `sdxl`, and prompts and images in `data`."""
    folder = tmp_path_factory.mktemp("home")
    for family in ("sd", "sdxl"):
        tiny.save(family, folder / family)
    Text().smoke(folder / "data")
    return folder


def config(home, output_dir, family="sd", images=False, **options):
    """Of shards of three texts and of nine latents, or so."""
    given = {"prompts": f"{home}/data/prompts.txt", "batch_size": 2, "shard_bytes": 16_000} | options
    given |= {"images": f"{home}/data"} if images else {}
    return encodings.Cache(f"{home / family}", output_dir=f"{output_dir}", **given)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(home):
    """The cache of the prompts and images for the tiny Stable Diffusion."""
    return encodings.run(config(home, home / "made", images=True))


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


class TestWhatIsRead:
    def test_it_is_what_the_teacher_encodes(self, home, made):
        """Conditions and latents against the teacher, called directly."""
        teacher = load(home / "sd")
        data = Text(cache=f"{made}")
        data.validate((Requirement.REAL, Requirement.NULL_CONDITION))
        feed = data.open(teacher, (Requirement.REAL, Requirement.NULL_CONDITION))
        prompts = (home / "data" / "prompts.txt").read_text().split("\n")
        with torch.no_grad():
            want = teacher.encode(prompts)["prompt_embeds"]
            empty = teacher.encode([""])["prompt_embeds"]
        names, c = feed.fixed(8)
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=HALF, atol=1e-6)
        assert names == prompts
        close(c["prompt_embeds"], want)
        close(teacher.denoiser.null["prompt_embeds"], empty)

        batch = feed(DRAW)
        assert batch["c"]["prompt_embeds"].shape == (6, 77, 32) and batch["real"].shape == (6, 4, 8, 8)
        found = [(want - row).abs().amax((1, 2)) for row in batch["real_c"]["prompt_embeds"]]
        for x, distance in zip(batch["real"], found):
            i = int(distance.argmin())  # image i has prompt i as its caption
            assert distance[i] < 1e-2 < distance.sort().values[1]
            eps = Draw(0, 0, "images", torch.tensor([i])).normal("eps", (1, 4, 8, 8))
            image, _ = crop(Image.open(home / "data" / f"{i}.png"), (16, 16), (0.5, 0.5))
            close(x, teacher.latent(image[None], eps)[0])

    @pytest.mark.parametrize("family, crops", (("sd", 0), ("sdxl", 3)))
    def test_online_is_equal(self, home, made, tmp_path, family, crops):
        folder = made if family == "sd" else encodings.run(config(home, tmp_path / "c", family, True, crops=crops))
        online = Text("online", prompts=f"{home}/data/prompts.txt", images=f"{home}/data", crops=crops, p_empty=0.3)
        online.validate((Requirement.REAL,))
        feeds = [
            data.open(load(home / family), (Requirement.REAL,))
            for data in (online, Text(cache=f"{folder}", p_empty=0.3))
        ]
        for step in range(3):  # the last ones are read ahead
            a, b = (feed(Draw(0, step, "student", torch.arange(6))) for feed in feeds)
            for x, y in zip((a["c"], a["real_c"], {"x": a["real"]}), (b["c"], b["real_c"], {"x": b["real"]})):
                assert x.keys() == y.keys()
                for key in x:
                    torch.testing.assert_close(x[key], y[key], rtol=HALF, atol=1e-6)
        if crops:
            sizes = b["real_c"]["time_ids"]
            assert sizes[:, 0].eq(24).all() and sizes[:, 1].ge(20).all()  # the images are 24 high and 20 to 27 wide
            assert len(sizes.unique(dim=0)) > 3 and sizes[:, 4:].eq(16).all()
            assert b["c"]["time_ids"].eq(torch.tensor([16.0, 16, 0, 0, 16, 16])).all()

    def test_words_to_forget(self, home, tmp_path):
        """What a prompt is overridden by stands beside it, in a cache and online; only such prompts are in forget_c."""
        texts = ["Brad Pitt eats", "a cat", "smiling BRAD PITT", "Brad Pittsburgh", "a man eats", "smiling a man"]
        lines = {"all": texts, "few": texts[:4]}
        for name, some in lines.items():
            (tmp_path / f"{name}.txt").write_text("\n".join(some))
        words = {"forget": ("Brad Pitt",), "override": ("a man",), "p_empty": 0.2}
        folder = encodings.run(config(home, tmp_path / "c", prompts=f"{tmp_path / 'all.txt'}"))
        online = Text("online", prompts=f"{tmp_path / 'all.txt'}", **words)
        teachers = [load(home / "sd"), load(home / "sd")]
        feeds = [
            d.open(t, (Requirement.FORGOTTEN_PROMPTS,))
            for d, t in zip((online, Text(cache=f"{folder}", **words)), teachers)
        ]
        with torch.no_grad():
            known = teachers[0].encode([*texts, ""])["prompt_embeds"]
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=HALF, atol=1e-6)
        row = lambda x: int((known - x).abs().amax((1, 2)).argmin())
        seen, rule = set(), [4, 1, 5, 3, 4, 5, 6]
        for step in range(6):
            a, b = (feed(Draw(0, step, "student", torch.arange(6))) for feed in feeds)
            assert a.keys() == {"c", "forget_c"}
            for key in a:
                for of in ("prompt_embeds", "override.prompt_embeds"):
                    close(a[key][of], b[key][of])
                pairs = [
                    (row(x), row(y)) for x, y in zip(*(a[key][k] for k in ("prompt_embeds", "override.prompt_embeds")))
                ]
                assert all(rule[i] == j for i, j in pairs)
                assert key == "c" or {i for i, _ in pairs} == {0, 2}
                seen |= {i for i, _ in pairs}
        assert seen == {*range(7)}
        rewarded = online.open(teachers[0], (Requirement.FORGOTTEN_PROMPTS, Requirement.REWARD))(DRAW)["forget_c"]
        assert {*rewarded["prompt"].tolist()} <= {4, 5}  # rewards are of what is told, not of what is forgotten
        null = teachers[0].denoiser.null
        close(null["override.prompt_embeds"], null["prompt_embeds"])
        few = Text("online", prompts=f"{tmp_path / 'few.txt'}", **words).open(
            load(home / "sd"), (Requirement.FORGOTTEN_PROMPTS,)
        )
        assert few.prompts == 4 and few.text.texts == [*texts[:4], *texts[4:], ""]
        folder = encodings.run(config(home, tmp_path / "d", prompts=f"{tmp_path / 'few.txt'}"))
        with pytest.raises(ValueError, match="2 of 2 prompts .* are not in the cache .*, 'a man eats' for one"):
            Text(cache=f"{folder}", **words).open(load(home / "sd"), (Requirement.FORGOTTEN_PROMPTS,))
        with pytest.raises(ValueError, match="no prompt of the cache .* holds .'fox'., which"):
            Text(cache=f"{folder}", forget=("fox",), override=("cat",)).open(
                load(home / "sd"), (Requirement.FORGOTTEN_PROMPTS,)
            )

    def test_null_of_a_family_stays(self, home, tmp_path):
        """SDXL's is zeros; where the empty prompt takes its place, the sizes stay those of the image."""
        folder, teacher = encodings.run(config(home, tmp_path / "c", "sdxl")), load(home / "sdxl")
        zeros = teacher.denoiser.null
        Text(cache=f"{folder}").open(teacher, ())
        assert teacher.denoiser.null is zeros
        teacher.denoiser.null = None
        Text(cache=f"{folder}").open(teacher, ())
        assert teacher.denoiser.null.keys() == {"prompt_embeds", "pooled"}
        assert teacher.denoiser.null["pooled"].abs().max() > 0

    def test_without_encoders(self, home, made, capsys):
        teacher = load(home / "sd")
        Text(cache=f"{made}", squeeze=True).open(teacher, (Requirement.REAL, Requirement.NULL_CONDITION))(DRAW)
        assert "made holds cropped images; those of this recipe are squeezed: " in capsys.readouterr().err
        assert not {"text", "vae"} & vars(teacher.parts).keys()

    def test_the_command_reads_no_weights_of_the_network(self, home):
        teacher = encodings.encoders(config(home, "c", images=True, precision="bfloat16"), torch.device("cpu"))
        assert all(p.is_meta for p in teacher.denoiser.net.parameters())
        assert teacher.parts.text.text_encoder.dtype == torch.bfloat16 and teacher.parts.vae.dtype == torch.float32

    def test_captions_are_the_prompts_where_there_are_no_others(self, home, made, tmp_path):
        folder = encodings.run(config(home, tmp_path / "c", images=True, prompts="", max_samples=5))
        index = json.loads((folder / "index.json").read_text())
        assert index["prompts"] == 5 and index["tables"]["text"]["total"] == 6
        feed = Text(cache=f"{folder}").open(load(home / "sd"), (Requirement.REAL,))
        assert feed.fixed(6)[0] == [*feed.names, feed.names[0]] and len(feed.names) == 5

    def test_rows_are_kept_once(self, made):
        """Captions that are prompts as well are encoded once; the empty prompt is the last row."""
        index = json.loads((made / "index.json").read_text())
        assert index["tables"]["text"]["total"] == 9 and index["tables"]["image"]["shapes"]["caption"] == []
        assert len(index["tables"]["text"]["rows"]) == 3 and sum(index["tables"]["text"]["rows"]) == 9


class TestBytes:
    """Half a million prompts."""

    @pytest.mark.parametrize(
        "shapes, told",
        (
            ({"prompt_embeds": (77, 768 + 1280), "pooled": (1280,), "time_ids": (6,)}, "159 GB"),
            ({"prompt_embeds": (512, 4096), "pooled": (768,)}, "2.1 TB"),
        ),
        ids=("sdxl", "flux"),
    )
    def test_of_a_teacher(self, shapes, told):
        rows = {key: torch.ones(1, *shape) for key, shape in shapes.items()}
        entry = writer.table_entry(encodings.Cache().writing, 500_000, rows)
        assert writer.human(entry["total"] * entry["bytes"]) == told
        assert entry["per_shard"] * entry["bytes"] <= 10**9 < (entry["per_shard"] + 1) * entry["bytes"]

    @pytest.mark.parametrize(
        "n, told", ((0, "0 bytes"), (999, "999 bytes"), (1e3, "1.0 kB"), (2.098e12, "2.1 TB"), (3.7e15, "3700 TB"))
    )
    def test_human(self, n, told):
        assert writer.human(n) == told

    def test_told_is_written(self, home, made):
        index = json.loads((made / "index.json").read_text())
        for name, entry in index["tables"].items():
            stored = [t for path in made.glob(f"{name}-*") for t in load_file(path).values()]
            assert sum(t.nbytes for t in stored) == entry["bytes"] * entry["total"]

    def test_a_disk_too_small(self, home, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=44_000))
        message = (
            r"needs 44.4 kB more and the disk of .* has 44.0 kB free: .* or fewer prompts \(--max_samples 7 fits\), or"
        )
        with pytest.raises(ValueError, match=message):
            encodings.run(config(home, tmp_path / "c"))
        assert not (tmp_path / "c").exists()
        encodings.run(config(home, tmp_path / "c", max_samples=7))

    @pytest.mark.parametrize("dtype, need, free", (("float16", "2.1 TB", 3e12), ("float32", "4.2 TB", 1e12)))
    def test_the_disk_of_half_a_million_prompts_of_flux(self, tmp_path, monkeypatch, capsys, dtype, need, free):
        """Its bytes and those of the disk are printed before a file is written, with what makes it smaller."""
        rows = {"prompt_embeds": torch.ones(1, 512, 4096), "pooled": torch.ones(1, 768)}
        entry = writer.table_entry(writer.Writing(16, dtype), 500_000, rows)
        index = {"dtype": dtype, "prompts": 499_999, "tables": {"text": entry}}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        online = r"no cache: encode while training \(--data.text online\)"
        if free > 2.1e12:
            writer.announce(tmp_path / "c", index)
            size = f"(?s)text: 500,000 x 4,195,840 bytes = {need} in .*{need} to write; .* 3.0 TB free\n"
            assert re.search(f"{size}this is a lot: fewer prompts, or {online}", capsys.readouterr().err)
        else:
            fewer = rf"fewer prompts \(--max_samples 119164 fits\), or --dtype bfloat16, half the bytes, or {online}"
            with pytest.raises(ValueError, match=f"needs {need} more .* 1.0 TB free: .*{fewer}"):
                writer.announce(tmp_path / "c", index)


def flags(options):
    """The command line of a configuration."""
    names = {"teacher": "pretrained_model_name_or_path"}
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    given = {name: value for name, value in given.items() if value not in (None, "", False)}
    return [part for name, value in given.items() for part in (f"--{names.get(name, name)}", f"{value}")]


class TestInterrupted:
    KILL = """
import os, signal, sys
from pipelines.cache import encodings

replace, calls = os.replace, []

def killed(a, b):
    calls.append(b)
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else replace(a, b)

os.replace = killed
encodings.main(sys.argv[1:])
"""

    def test_killed(self, home, made, tmp_path, capsys):
        """Killed between writing the third shard and giving it its name; the same command goes on."""
        options = config(home, tmp_path / "c", images=True)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
        done = subprocess.run([sys.executable, "-c", self.KILL, *flags(options)], env=environment, capture_output=True)
        assert done.returncode == -9, done.stderr
        left = {path.name for path in (tmp_path / "c").iterdir()}
        assert {re.sub(r"\.\d+\.partial$", ".partial", name) for name in left} == {  # without the process's number
            *("index.json", "texts.jsonl", "text-00000.safetensors", "text-00001.safetensors"),
            *(".lock", ".text-00002.safetensors.partial"),
        }
        with pytest.raises(ValueError, match="c is not finished: run the command that began it again"):
            Text(cache=f"{tmp_path / 'c'}").validate(())
        (tmp_path / "c" / ".tmpAbCdEf").write_bytes(b"half a shard")
        before = (tmp_path / "c" / "text-00001.safetensors").stat().st_mtime_ns
        encodings.main(flags(options))
        assert (tmp_path / "c" / "text-00001.safetensors").stat().st_mtime_ns == before
        assert "in 3 shards, 2 of them written" in capsys.readouterr().err
        assert content(tmp_path / "c") == content(made)

    def test_killed_before_the_index(self, home, made, tmp_path):
        """What it began to write is in nobody's way."""
        folder = tmp_path / "c"
        folder.mkdir()
        for name in ("texts.jsonl", ".index.json.partial"):
            (folder / name).write_text('"half')
        assert content(encodings.run(config(home, folder, images=True))) == content(made)

    def test_a_full_disk(self, home, made, tmp_path, capfd):
        """The system refuses to write the first shard of images whole; there is no trace of it, the others stay."""
        options, limit = config(home, tmp_path / "c", images=True), resource.getrlimit(resource.RLIMIT_FSIZE)
        options = dataclasses.replace(options, shard_bytes=5000)  # one text, or nine latents
        encodings.run(dataclasses.replace(options, output_dir=f"{tmp_path / 'whole'}"))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
            with pytest.raises(SystemExit, match="2"):
                encodings.main(flags(options))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        told = capfd.readouterr().err
        assert "text-00000.safetensors could not be written: " in told and "give the same command again" in told
        assert not list((tmp_path / "c").glob("*.safetensors*")) + list((tmp_path / "c").glob(".*"))
        encodings.main(flags(options))
        assert content(tmp_path / "c") == content(tmp_path / "whole")

    def test_processes_share_the_shards(self, home, made, tmp_path):
        """What two processes write, one after the other here, is what one writes."""
        options = config(home, tmp_path / "c", images=True)
        teacher = encodings.encoders(options, torch.device("cpu"))
        text = Texts(teacher, (home / "data" / "prompts.txt").read_text().split("\n"))
        entry = json.loads((made / "index.json").read_text())["tables"]["text"]
        (tmp_path / "c").mkdir()
        for rank, files in ((1, {1}), (0, {0, 1, 2})):
            state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
            writer.write_table(tmp_path / "c", "text", text, entry, options.writing, state)
            assert {int(path.stem[-5:]) for path in (tmp_path / "c").iterdir()} == files
        assert content(tmp_path / "c").items() <= content(made).items()


class TestRefused:
    @pytest.mark.parametrize(
        "change, what",
        (
            (dict(dtype="bfloat16"), "dtype"),
            (dict(max_samples=4), "prompts, sources"),
            (dict(crops=1), "crops"),
            (dict(squeeze=True), "squeeze"),
            (dict(resolution=32), "shape"),
            (dict(teacher="sdxl"), "teacher"),
        ),
    )
    def test_other_work_in_the_folder(self, home, made, change, what):
        family, before = change.pop("teacher", "sd"), content(made)
        with pytest.raises(ValueError, match=f"holds a cache of other {what}: choose another --output_dir"):
            encodings.run(config(home, made, family, True, **change))
        assert content(made) == before

    def test_a_folder_of_something_else(self, home):
        with pytest.raises(ValueError, match="data is not empty and holds no cache"):
            encodings.run(config(home, home / "data"))

    def test_another_teacher(self, home, made):
        with pytest.raises(
            ValueError,
            match="(?s)made was made for StableDiffusionPipeline 'sd', this teacher is StableDiffusionXLPipeline 'sdxl'"
            r" \(its class differs, its text encoder differs\): make one for it with.*pipelines.cache.*/sdxl --prompts",
        ):
            Text(cache=f"{made}").open(load(home / "sdxl"), ())

    @pytest.mark.parametrize("part, requirements", (("text_encoder", ()), ("vae", (Requirement.REAL,))))
    def test_another_teacher_of_the_same_shapes(self, home, made, tmp_path, part, requirements):
        """One weight differs. Latents belong to their autoencoder; prompts do not care about it."""
        folder = shutil.copytree(home / "sd", tmp_path / "tuned")
        file = next((folder / part).glob("*.safetensors"))
        weights = load_file(file)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, file, {"format": "pt"})
        what = {"text_encoder": "text encoder", "vae": "autoencoder"}[part]
        with pytest.raises(ValueError, match=f"this teacher is StableDiffusionPipeline 'tuned' .its {what} differs"):
            Text(cache=f"{made}").open(load(folder), requirements)
        if part == "vae":
            Text(cache=f"{made}").open(load(folder), ())

    def test_another_resolution(self, home, made, tmp_path):
        """Latents have a size, and so have SDXL's conditions; the prompts of others have none."""
        larger = load(home / "sd", 32)
        Text(cache=f"{made}").open(larger, ())
        with pytest.raises(ValueError, match=r"its samples are \(4, 16, 16\), those of the cache \(4, 8, 8\)"):
            Text(cache=f"{made}").open(larger, (Requirement.REAL,))
        folder = encodings.run(config(home, tmp_path / "c", "sdxl", max_samples=2))
        with pytest.raises(ValueError, match="its samples are"):
            Text(cache=f"{folder}").open(load(home / "sdxl", 32), ())

    def test_a_lost_shard(self, home, copy):
        (copy / "text-00001.safetensors").unlink()
        with pytest.raises(ValueError, match="has lost text-00001.safetensors: run the cache command again"):
            Text(cache=f"{copy}").open(load(home / "sd"), ())

    def test_no_images(self, home, tmp_path):
        folder = encodings.run(config(home, tmp_path / "c", max_samples=2))
        with pytest.raises(ValueError, match="has no images, which this method needs: make one with"):
            Text(cache=f"{folder}").validate((Requirement.REAL,))


class TestBroken:
    @pytest.fixture
    def torn(self, home, tmp_path):
        """Images 0 to 7, of which the third is cut short."""
        folder = shutil.copytree(home / "data", tmp_path / "torn")
        (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
        return folder

    def test_named(self, home, torn, tmp_path):
        with pytest.raises(ValueError, match=r"image .*torn/2.png cannot be read: .*--skip_broken"):
            encodings.run(dataclasses.replace(config(home, tmp_path / "c"), images=f"{torn}"))

    def test_left_out(self, home, made, torn, tmp_path, capsys):
        """The others are what they were."""
        options = dataclasses.replace(config(home, tmp_path / "c"), images=f"{torn}", crops=2, skip_broken=True)
        folder = encodings.run(dataclasses.replace(options, shard_bytes=2000))
        assert "1 left out:\n  image " in (told := capsys.readouterr().err) and "2.png" in told
        rows = json.loads((folder / "index.json").read_text())["tables"]["image"]["rows"]
        assert sum(rows) == 14 and len(rows) > 3
        feed = Text(cache=f"{folder}").open(load(home / "sd"), (Requirement.REAL,))
        captions = feed.images.read(range(14))["caption"].tolist()
        assert captions == [i for i in range(8) if i != 2 for _ in range(2)]


class TestMistakes:
    @pytest.mark.parametrize(
        "change, message",
        (
            (dict(teacher=""), "no teacher given: pass --pretrained_model_name_or_path"),
            (dict(teacher="{home}/data"), "no pipeline at .*: a diffusers folder has a model_index.json"),
            (dict(teacher="{home}/none"), "no pipeline at .*none"),
            (dict(prompts=""), "nothing to encode: pass --prompts"),
            (dict(prompts="{home}/none.txt"), "no prompts at .*none.txt"),
            (dict(images="{home}/sd"), "sd holds no images"),
            (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
            (dict(crops=-1), "crops is -1"),
        ),
    )
    def test_one_message(self, home, tmp_path, capsys, change, message):
        options = flags(config(home, tmp_path / "c"))
        for name, value in change.items():
            name = {"teacher": "pretrained_model_name_or_path"}.get(name, name)
            value = value.format(home=home) if isinstance(value, str) else f"{value}"
            options += [f"--{name}", value]
        with pytest.raises(SystemExit, match="2"):
            encodings.main(options)
        told = capsys.readouterr().err
        assert re.search(message, told) and "Traceback" not in told
        assert not (tmp_path / "c").exists()

    def test_numbers_that_do_not_fit(self, home, tmp_path, monkeypatch):
        """Half precision ends at 65,504."""
        encode = encodings.Texts.read
        monkeypatch.setattr(
            encodings.Texts, "read", lambda self, rows: {k: 1e6 * v for k, v in encode(self, rows).items()}
        )
        with pytest.raises(ValueError, match="prompt_embeds does not fit float16: take a wider --dtype"):
            encodings.run(config(home, tmp_path / "c"))
        encodings.run(config(home, tmp_path / "c", dtype="bfloat16"))


class TestDamaged:
    """A cache that lost something, or holds what no command has written."""

    def told(self, home, copy):
        data = Text(cache=f"{copy}")
        data.validate((Requirement.REAL,))
        data.open(load(home / "sd"), (Requirement.REAL,))

    @pytest.mark.parametrize(
        "change, message",
        (
            (lambda index: "{", "index.json is damaged .*is not JSON"),
            (lambda index: [index], "index.json is damaged .an entry is missing or of another kind"),
            (lambda index: {}, "index.json is damaged .*'teacher'"),
            (lambda index: index | {"prompts": "8"}, "it has '8' prompts"),
            (lambda index: index | {"prompts": 99}, "it has 99 prompts, and 9 rows of them"),
            (lambda index: index | {"tables": {"text": {}}}, "index.json is damaged .*'total'"),
            (lambda index: index["tables"]["text"]["rows"].append("x") or index, "its table text has 9 rows"),
        ),
    )
    def test_index(self, home, copy, change, message):
        changed = change(json.loads((copy / "index.json").read_text()))
        (copy / "index.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            self.told(home, copy)
        with pytest.raises(ValueError, match=message):
            encodings.run(config(home, copy, images=True))

    @pytest.mark.parametrize("content, message", (("7\n", "line 1, is damaged .it is not text"), ("", "0 of 8 texts")))
    def test_texts(self, home, copy, content, message):
        (copy / "texts.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            self.told(home, copy)

    def test_a_torn_shard_is_made_again(self, home, made, copy):
        path = copy / "image-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match="image-00000.safetensors is truncated .*: run the cache command again"):
            self.told(home, copy)
        encodings.run(config(home, copy, images=True))
        assert content(copy) == content(made)

    @pytest.mark.parametrize(
        "change, message",
        (
            (lambda rows: rows.pop("x"), "has no tensor x: remove it"),
            (lambda rows: rows.update(x=rows["x"][:2]), "tensor x is .2, 4, 8, 8. and not 8 rows of .4, 8, 8."),
        ),
    )
    def test_tensors(self, home, copy, change, message):
        path = copy / "image-00000.safetensors"
        rows = load_file(path)
        change(rows)
        save_file(rows, path)
        with pytest.raises(ValueError, match=message):
            self.told(home, copy)

    def test_a_caption_that_is_not_there(self, home, copy):
        path = copy / "image-00000.safetensors"
        save_file(load_file(path) | {"caption": torch.full((8,), 99)}, path)
        feed = Text(cache=f"{copy}").open(load(home / "sd"), (Requirement.REAL,))
        with pytest.raises(ValueError, match="there is no row 99 of 9"):
            feed(DRAW)
