"""Pairs of the teacher's ODE: what is stored is what the teacher samples, from noise that is a function of its row."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file, save_file

from distill.data import Text
from distill.data.labels import LabelPairs
from distill.data.pairs import Pairs, noise
from distill.diffusion.guidance import CFG
from distill.diffusion.solver import sample
from distill.method import Requirement
from distill.random import Draw
from pipelines import load
from pipelines.cache import encodings, pairs
from pipelines.families import edm, sdxl, tiny

HALF = 2.0**-10  # relative rounding of float16
DRAW = Draw(0, 3, "student", torch.arange(6))
N, STEPS, GUIDANCE = 11, 3, 4.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny SDXL `sdxl` and eight prompts `data/prompts.txt`."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save("sdxl", folder / "sdxl")
    Text().smoke(folder / "data")
    return folder


def config(home, output_dir, **options):
    given = {"prompts": f"{home}/data/prompts.txt", "n": N, "steps": STEPS, "guidance": GUIDANCE, "batch_size": 4}
    return pairs.Sampling(f"{home}/sdxl", output_dir=f"{output_dir}", **given | options)


@pytest.fixture(scope="module")
def made(home):
    """Eleven pairs, in shards of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SHARD", 4)
        return pairs.run(config(home, home / "made"))


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture(scope="module")
def teacher(home):
    return load(home / "sdxl")


def samples(folder):
    files = sorted(folder.glob("image-*.safetensors"))
    return torch.cat([load_file(file)["x"] for file in files]).float(), [len(load_file(file)["x"]) for file in files]


def encoded(home, teacher, n=N):
    names = (home / "data" / "prompts.txt").read_text().split("\n")
    return {key: torch.cat([v, v])[:n] for key, v in teacher.encode(names).items()}


close = lambda a, b: torch.testing.assert_close(a, b, rtol=2 * HALF, atol=2e-2)  # float16, of numbers up to 10


class TestWhatIsStored:
    def test_it_is_what_the_teacher_samples(self, home, made, teacher):
        """From the noise of each row, under its prompt, with guidance and the pipeline's own scheduler."""
        y, rows = samples(made)
        assert rows == [4, 4, 3]
        z, c = noise(0, range(N), teacher.shape), encoded(home, teacher)
        close(y, teacher.sample(z, c, STEPS, GUIDANCE))
        assert (y - teacher.sample(z, c, STEPS, 1.0)).abs().max() > 1  # the guidance is seen

    def test_noise_is_a_function_of_seed_and_row(self, teacher):
        z = noise(0, [5, 3], teacher.shape)
        assert torch.equal(z[1], noise(0, [3], teacher.shape)[0])
        assert not torch.equal(z[0], z[1]) and not torch.equal(z, noise(1, [5, 3], teacher.shape))
        many = noise(0, range(200), teacher.shape)
        assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02

    def test_a_batch_holds_pairs(self, home, made, teacher):
        """Noise, sample and condition belong together; rows beyond the prompts use them over again."""
        data = Pairs(cache=f"{made}")
        data.validate((Requirement.PAIRS,))
        feed = data.open(teacher, (Requirement.PAIRS,))
        batch = feed(DRAW)
        assert batch.keys() == {"z", "y", "c", "real", "real_c"} and torch.equal(batch["real"], batch["y"])
        assert all(v.dtype == torch.float32 for v in (batch["z"], batch["y"]))
        close(batch["y"], teacher.sample(batch["z"], batch["c"], STEPS, GUIDANCE))
        every, c = noise(0, range(N), teacher.shape), encoded(home, teacher)
        rows = [int((every - z).abs().amax((1, 2, 3)).argmin()) for z in batch["z"]]
        assert len(set(rows)) > 2
        for key, v in batch["c"].items():
            torch.testing.assert_close(v, c[key][rows], rtol=HALF, atol=1e-6)
        assert torch.equal(feed(DRAW)["y"], batch["y"])
        names, fixed = feed.fixed(9)
        assert names[8] == names[0] and len(set(names)) == 8 and len(fixed["prompt_embeds"]) == 9

    def test_another_seed_is_other_noise(self, home, made, teacher, tmp_path):
        other = pairs.run(config(home, tmp_path / "other", seed=1, n=4))
        assert (samples(other)[0] - samples(made)[0][:4]).abs().max() > 0.1
        batch = Pairs(cache=f"{other}").open(teacher, ())(DRAW)
        close(batch["y"], teacher.sample(batch["z"], batch["c"], STEPS, GUIDANCE))

    def test_eulers_steps_are_the_pipelines_under_that_scheduler(self, home, teacher, tmp_path):
        """Trailing, as in DMD2: the images of StableDiffusionXLPipeline from the same noise."""
        folder = pairs.run(config(home, tmp_path / "euler", scheduler="euler", n=2, dtype="float32"))
        given = EulerDiscreteScheduler.from_config(teacher.parts.scheduler().config, timestep_spacing="trailing")
        names = (home / "data" / "prompts.txt").read_text().split("\n")[:2]
        want = sdxl.sample(
            teacher.parts.pipe(scheduler=given), names, noise(0, range(2), teacher.shape), STEPS, GUIDANCE
        )
        got = (teacher.decode(samples(folder)[0]) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert got.std() > 0.05
        assert type(teacher.parts.scheduler()) is EulerDiscreteScheduler
        assert teacher.parts.scheduler().config.timestep_spacing == "leading"

    def test_prompts_of_a_cache(self, home, made, tmp_path, capfd):
        """The command reads encoded prompts too, and says how many bytes it takes."""
        encodings.run(encodings.Cache(f"{home}/sdxl", f"{home}/data/prompts.txt", output_dir=f"{tmp_path}/text"))
        flags = f"--n {N} --steps {STEPS} --guidance {GUIDANCE} --output_dir {tmp_path}/pairs"
        where = f"--pretrained_model_name_or_path {home}/sdxl --data.cache {tmp_path}/text"
        capfd.readouterr()
        pairs.main(f"{where} {flags}".split())
        close(samples(tmp_path / "pairs")[0], samples(made)[0])
        said = capfd.readouterr().err
        assert "image: 11 x 520 bytes = 5.7 kB in 1 shard\n" in said and "train with --data.cache" in said
        same = (tmp_path / "pairs" / "texts.jsonl").read_text()
        assert same == (made / "texts.jsonl").read_text() and len(same.splitlines()) == 8

    def test_they_are_images_to_other_methods(self, made, teacher):
        """A cache of the teacher's own samples, with their prompts."""
        batch = Text(cache=f"{made}").open(teacher, (Requirement.REAL,))(DRAW)
        y = samples(made)[0]
        assert all(any(torch.equal(x, row) for row in y) for x in batch["real"])


class TestInterruption:
    def test_it_goes_on(self, home, copy, made, monkeypatch):
        """A shard that is missing is made again, the same; the others are not touched."""
        (copy / "image-00001.safetensors").unlink()
        index = json.loads((copy / "index.json").read_text())
        for entry in index["tables"].values():
            del entry["rows"]
        (copy / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="not finished"):
            Pairs(cache=f"{copy}").validate(())
        asked = []
        read = pairs.Trajectories.read
        monkeypatch.setattr(pairs.Trajectories, "read", lambda self, rows: asked.extend(rows) or read(self, rows))
        pairs.run(config(home, copy))
        assert asked == [0, 0, 4, 5, 6, 7]  # the first two look whether the sampler is an ODE's
        torch.testing.assert_close(samples(copy)[0], samples(made)[0], rtol=2 * HALF, atol=1e-3)
        Pairs(cache=f"{copy}").validate(())

    def test_other_work_is_refused(self, home, made):
        for change in ({"steps": 4}, {"seed": 1}, {"guidance": 2.0}, {"scheduler": "euler"}, {"n": 12}):
            with pytest.raises(ValueError, match="other ode: choose another --output_dir"):
                pairs.run(config(home, made, **change))

    def test_a_disk_too_small(self, home, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=92_000))
        with pytest.raises(ValueError, match=r"needs .* more .* 92.0 kB free: .* fewer pairs \(--n 4 fits\)"):
            pairs.run(config(home, tmp_path / "out"))
        assert not (tmp_path / "out").exists()


class TestMistakes:
    def test_what_is_missing(self, home, made, tmp_path):
        command = "python -m pipelines.pairs"
        for data in (Pairs(), Pairs(cache=f"{tmp_path}"), Pairs(cache=f"{made}", prompts="x"), Pairs("online")):
            with pytest.raises(ValueError, match=f"{command}|leave out|--data.prompts"):
                data.validate((Requirement.PAIRS,))
        for change, said in (
            ({"prompts": ""}, "no prompts: pass --cache"),
            ({"prompts": f"{tmp_path}/none.txt"}, "none.txt"),
        ):
            with pytest.raises(ValueError, match=said):
                pairs.run(config(home, tmp_path / "out", **change))
        with pytest.raises(ValueError, match="n is 0"):
            config(home, tmp_path, n=0)
        with pytest.raises(ValueError, match="leave out --prompts or --cache"):
            config(home, tmp_path, cache="x")

    def test_a_cache_of_images_has_no_pairs(self, made, copy):
        index = json.loads((copy / "index.json").read_text())
        del index["ode"]
        (copy / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="are not the teacher's: make pairs"):
            Pairs(cache=f"{copy}").validate((Requirement.PAIRS,))

    def test_pairs_of_another_network(self, home, made, tmp_path):
        """A finetune has the same text encoders and autoencoder, and yet other trajectories."""
        other = shutil.copytree(home / "sdxl", tmp_path / "finetune")
        (file,) = (other / "unet").glob("*.safetensors")
        weights = load_file(file)
        weights["conv_in.weight"] += 0.1
        save_file(weights, file)
        with pytest.raises(ValueError, match="sampled from 'sdxl', whose unet is another one than that of .*finetune"):
            Pairs(cache=f"{made}").open(load(other), (Requirement.PAIRS,))

    def test_a_scheduler_that_adds_noise(self, home, tmp_path):
        other = shutil.copytree(home / "sdxl", tmp_path / "lcm")
        LCMScheduler.from_pretrained(other, subfolder="scheduler").save_pretrained(other / "scheduler")
        index = json.loads((other / "model_index.json").read_text()) | {"scheduler": ["diffusers", "LCMScheduler"]}
        (other / "model_index.json").write_text(json.dumps(index))
        work = dataclasses.replace(config(home, tmp_path / "out"), teacher=f"{other}")
        with pytest.raises(ValueError, match="LCMScheduler adds noise of its own.* pass --scheduler euler"):
            pairs.run(work)
        assert not list((tmp_path / "out").glob("image-*"))

    def test_euler_is_for_tables(self, tmp_path):
        tiny.save("sana", tmp_path / "sana")
        with pytest.raises(ValueError, match="--scheduler euler is for tables of betas"):
            pairs.load_pairs_teacher(pairs.Sampling(f"{tmp_path}/sana", scheduler="euler"), torch.device("cpu"))


def test_a_smoke_samples_online(teacher, tmp_path, monkeypatch):
    """The network is called while a step waits for its batch: never beside the training, which hooks and moves it."""
    data, calls = Pairs().smoke(tmp_path), []
    data.validate((Requirement.PAIRS,))
    feed, right = data.open(teacher, (Requirement.PAIRS,)), type(teacher).sample
    monkeypatch.setattr(type(teacher), "sample", lambda *given: calls.append(1) or right(*given))
    batch = feed(DRAW)
    feed._thread.submit(int).result()  # after all that it was given
    assert len(calls) == 1
    torch.testing.assert_close(batch["y"], teacher.sample(batch["z"], batch["c"], 2, 8.0), rtol=1e-4, atol=1e-4)
    assert len(feed.fixed(8)[0]) == 8


class TestLabels:
    """Pairs of a teacher of class labels, sampled when a run opens them."""

    @pytest.fixture(scope="class")
    def digits(self):
        torch.manual_seed(0)
        return edm.teacher(edm.unet((8, 16)), 0.5, null_class=10)

    def test_noise_sample_and_label_belong_together(self, digits):
        """In blocks, over all labels in turn, with guidance; another run has the same, another seed does not."""
        data = LabelPairs(n=70, steps=3, guidance=2.0)
        data.validate((Requirement.PAIRS,))
        feed = data.open(digits, (Requirement.PAIRS,))
        batch = feed(DRAW)
        assert batch.keys() == {"z", "y", "c"}
        want = sample(CFG(digits.denoiser, 2.0), batch["z"], batch["c"], 3).detach()
        torch.testing.assert_close(batch["y"], want, rtol=1e-4, atol=1e-4)
        plain = sample(digits.denoiser, batch["z"], batch["c"], 3)
        assert (batch["y"] - plain).abs().max() > 1e-2 and batch["y"].std() > 0.1
        assert len({z.sum().item() for z in batch["z"]}) > 2
        assert torch.equal(feed.labels, torch.arange(70) % 10)
        assert torch.equal(data.open(digits, ())(DRAW)["y"], batch["y"])
        assert not torch.equal(dataclasses.replace(data, seed=1).open(digits, ())(DRAW)["z"], batch["z"])
        names, c = feed.fixed(12)
        assert names[10:] == [0, 1] and c["class_labels"].tolist() == names

    def test_mistakes(self):
        with pytest.raises(ValueError, match="needs real images, and --data has pairs"):
            LabelPairs().validate((Requirement.REAL,))
