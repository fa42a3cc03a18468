"""Prompts, images and the batches that are drawn from them."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distill.data import Digits, Text, sources
from distill.data.forget_words import Words
from distill.data.labels import Labels
from distill.data.online import Images, crop, squeeze
from distill.data.prefetch import PrefetchingBatches, _integers
from distill.data.shards import Shards, file, narrow, pack, save
from distill.method import Requirement
from distill.random import Draw

TEXTS = ["a cat", "two dogs, running", "caf\u00e9"]


def picture(i=0, size=(20, 12)):
    """A random image of size (width, height)."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))


class TestPrompts:
    def write(self, folder, kind, column="text"):
        path, rows = folder / f"prompts.{kind}", [{"id": i, column: text} for i, text in enumerate(TEXTS)]
        if kind == "txt":
            path.write_text("\n".join(["", *TEXTS, " ", ""]), "utf-8")
        elif kind == "jsonl":
            jsonl(path, rows)
        else:
            import datasets

            data = datasets.Dataset.from_list(rows)
            data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
        return str(path)

    @pytest.mark.parametrize("kind", ("txt", "jsonl", "parquet", "saved"))
    def test_read(self, tmp_path, kind):
        path = self.write(tmp_path, kind)
        assert sources.prompts(path) == TEXTS
        assert sources.prompts(path, limit=2) == TEXTS[:2]

    @pytest.mark.parametrize("kind", ("jsonl", "parquet", "saved"))
    def test_columns(self, tmp_path, kind):
        path = self.write(tmp_path, kind, "words")
        assert sources.prompts(path, "words") == TEXTS
        with pytest.raises(ValueError, match=r"no column called text, caption, prompt; it has \['id', 'words'\]"):
            sources.prompts(path)
        with pytest.raises(ValueError, match="no column 'text'"):
            sources.prompts(path, "text")
        with pytest.raises(ValueError, match="(line|row) 1: 0 is not text"):
            sources.prompts(path, "id", limit=1)

    def test_lines_of_strings(self, tmp_path):
        """A cache's texts.jsonl can be encoded again."""
        jsonl(tmp_path / "t.jsonl", TEXTS)
        assert sources.prompts(f"{tmp_path / 't.jsonl'}") == TEXTS

    @pytest.mark.parametrize(
        "name, content, message",
        (
            ("missing.txt", None, "no prompts at .*missing.txt"),
            ("empty.txt", b"", "empty.txt is empty"),
            ("blank.txt", b"\n \n", "blank.txt holds no prompts"),
            ("latin.txt", "caf\u00e9".encode("latin-1"), "latin.txt is not text in UTF-8"),
            ("a.doc", b"text\ncat", "a.doc' is not something to read: give a file .*jsonl"),
            ("b.jsonl", b'["a", "b"]', r"b.jsonl, line 1: \['a', 'b'\] is not a row: write"),
            ("c.jsonl", b'{"text": {"en": "a"}}', "c.jsonl, line 1: .* is not text"),
            ("d.jsonl", b"[" * 100_000, "d.jsonl, line 1, is not JSON"),
            ("a.json", b'["a", 7]', "a.json, row 2: 7 is not a row"),
            ("b.json", b'{"text": [', "b.json, line 1, is not JSON"),
            ("a.csv", b'text\nb\n"a\nb', "a.csv, line 3, is not CSV: unexpected end"),
            ("b.csv", b"text\nb\na, b", "b.csv, line 3 has more cells than the first line"),
            ("c.csv", b"words\na", r"c.csv, line 2 has no column called text, .*\['words'\]"),
            ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as a Parquet file"),
            ("a.jsonl", b'{"text": "a"}\n{"text', "a.jsonl, line 2, is not JSON"),
        ),
    )
    def test_mistakes(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            sources.prompts(f"{tmp_path / name}")

    def test_a_library_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match=r"read by datasets, which is missing: pip install 'distill-one-step\[data\]'"
        ):
            sources.locate("someone/captions")

    def test_a_dataset_that_is_not_there(self):
        with pytest.raises(ValueError, match="'no/such-dataset' cannot be read as a dataset"):
            sources.prompts("no/such-dataset")


class TestPictures:
    def write(self, folder, kind):
        """Three captioned images; what names them as a source."""
        images = [picture(i) for i in range(3)]
        if kind == "tar":
            for shard, rows in enumerate(((0, 1), (2,))):
                with tarfile.open(folder / f"s-{shard:02}.tar", "w") as tar:
                    for i in rows:
                        caption = ("txt", TEXTS[i].encode()) if i else ("json", json.dumps({"text": TEXTS[0]}).encode())
                        for suffix, content in (("seg.png", b"not this"), ("png", png(images[i])), caption):
                            info = tarfile.TarInfo(f"a/{i}.{suffix}")
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
            return f"{folder}/s-{{00..01}}.tar"
        if kind == "saved":
            import datasets

            features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
            rows = {"image": images, "caption": TEXTS}
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
            return str(folder)
        (folder / "sub").mkdir()
        for i, image in enumerate(images):
            image.save(folder / "sub" / f"{i}.png")
            if kind == "beside":
                (folder / "sub" / f"{i}.txt").write_text(f"{TEXTS[i]}\n", "utf-8")
        if kind == "metadata":
            jsonl(folder / "metadata.jsonl", [{"file_name": f"sub/{i}.png", "text": TEXTS[i]} for i in (2, 0, 1)])
        return str(folder)

    @pytest.mark.parametrize("kind", ("beside", "metadata", "tar", "saved"))
    def test_read(self, tmp_path, kind):
        source = self.write(tmp_path, kind)
        found = sources.pictures(source)
        assert found.captions == TEXTS and len(found) == 3
        for i in (2, 0, 1):
            assert np.array_equal(np.array(found[i]), np.array(picture(i)))
        assert sources.pictures(source, limit=2).captions == TEXTS[:2]

    def test_stars(self, tmp_path):
        self.write(tmp_path, "tar")
        assert sources.pictures(f"{tmp_path}/s-*.tar").captions == TEXTS

    def test_upright_and_rgb(self, tmp_path):
        """A photo that a camera stored on its side, and a grey one with transparency."""
        turned, exif = picture(size=(8, 4)), Image.Exif()
        exif[0x0112] = 6
        turned.save(tmp_path / "a.png", exif=exif)
        picture().convert("LA").save(tmp_path / "b.png")
        jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": name} for name in "ab"])
        found = sources.pictures(f"{tmp_path}")
        assert found[0].size == (4, 8) and found[1].mode == "RGB"

    def test_mistakes(self, tmp_path):
        with pytest.raises(ValueError, match="holds no images"):
            sources.pictures(f"{tmp_path}")
        picture().save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="a.png has no caption: put it into a .txt or .caption file"):
            sources.pictures(f"{tmp_path}")
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").write_text("b")
        (tmp_path / "b.png").write_bytes(png(picture())[:-200])
        found = sources.pictures(f"{tmp_path}")
        found[0]
        with pytest.raises(sources.UnreadableImage, match="b.png cannot be read: .*truncated"):
            found[1]

    def test_mistakes_of_tars(self, tmp_path):
        pattern = self.write(tmp_path, "tar")
        with pytest.raises(ValueError, match="no tar at .*s-02.tar"):
            sources.pictures(pattern.replace("01}", "02}"))
        with pytest.raises(ValueError, match="no tar at .*none-.*local shards"):
            sources.pictures(f"{tmp_path}/none-*.tar")
        (tmp_path / "s-01.tar").write_bytes((tmp_path / "s-00.tar").read_bytes()[:700])
        with pytest.raises(ValueError, match="s-01.tar is not a complete, uncompressed tar"):
            sources.pictures(pattern)


class TestCuts:
    """Of an image whose red is its column and whose green is its row."""

    RAMP = np.stack([*np.meshgrid(np.arange(0, 240, 2), np.arange(0, 160, 2)), np.zeros((80, 120))], 2)

    @pytest.fixture
    def image(self):
        return Image.fromarray(self.RAMP.astype(np.uint8))  # 120 wide, 80 high

    def test_squeezed(self, image):
        """The whole image: columns by 3, rows by 2."""
        x = squeeze(image, (40, 40))
        assert x.shape == (3, 40, 40)
        red, green = (x[:2] + 1) * 127.5
        want = torch.arange(40.0)
        torch.testing.assert_close(red[20, 5:-5], (6 * want + 2)[5:-5], atol=1.5, rtol=0)
        torch.testing.assert_close(green[5:-5, 20], (4 * want + 1)[5:-5], atol=1.5, rtol=0)

    @pytest.mark.parametrize("place, left", (((0.0, 0.0), 0), ((0.3, 0.5), 10), ((0.999, 0.999), 20)))
    def test_cropped(self, image, place, left):
        """The shorter side fills the square, so all rows are there; of 60 columns the 40 from `left` on."""
        x, sizes = crop(image, (40, 40), place)
        assert x.shape == (3, 40, 40) and sizes == [80, 120, 0, left, 40, 40]
        red = (x[0, 20] + 1) * 127.5
        torch.testing.assert_close(red[5:-5], (4 * (torch.arange(40.0) + left) + 1)[5:-5], atol=1.5, rtol=0)

    def test_of_a_photo(self, image):
        """By default its middle, with its proportions: of 60 columns those from 10 on. Squeezed on demand."""
        teacher = SimpleNamespace(shape=(3, 40, 40), parts=SimpleNamespace(device="cpu"), latent=lambda x, eps: x)
        photo = sources.Pictures(["a.png"], ["a"], lambda i: image)
        whole, middle = (Images(teacher, photo, [0], squeeze=s).read([0]) for s in (True, False))
        assert whole.keys() == middle.keys() == {"x", "caption"}
        assert torch.equal(whole["x"][0], squeeze(image, (40, 40)))
        red, green = (middle["x"][0, :2] + 1) * 127.5
        want = torch.arange(40.0)
        torch.testing.assert_close(red[20, 5:-5], (4 * (want + 10) + 1)[5:-5], atol=1.5, rtol=0)
        torch.testing.assert_close(green[5:-5, 20], (4 * want + 1)[5:-5], atol=1.5, rtol=0)

    @pytest.mark.parametrize("size", ((40, 40), (30, 70), (333, 17)))
    def test_any_size(self, image, size):
        assert crop(image, size, (0.999, 0.999))[0].shape == (3, *size)


class Count:
    """A table whose row i is the number i. It counts what is read."""

    def __init__(self, n):
        self.n, self.reads = n, []

    def __len__(self):
        return self.n

    def read(self, rows):
        self.reads.append(list(rows))
        return {"x": torch.tensor(rows).float(), "caption": torch.tensor(rows) % 7}


def feed(p_empty=0.0):
    """Ten prompts "0" .. "9" and the empty one, 40 images whose captions are 0 .. 6."""
    return PrefetchingBatches(Count(11), Count(40), 10, [str(i) for i in range(10)], p_empty)


def numbers(batch):
    return torch.stack([batch["c"]["x"], batch["real"], batch["real_c"]["x"]])


class TestFeed:
    @pytest.mark.parametrize("sizes", ((32, 32), (1, 5, 58), (16,) * 4))
    def test_independent_of_the_split(self, sizes):
        """One process or many, small batches or large: a sample has its prompt and its image."""
        want, parts = feed(), [feed() for _ in sizes]
        for step in range(3):
            whole = numbers(want(Draw(0, step, "student", torch.arange(64))))
            pieces = [f(Draw(0, step, "student", s)) for f, s in zip(parts, torch.arange(64).split(sizes))]
            assert torch.equal(whole, torch.cat([numbers(piece) for piece in pieces], 1))

    @pytest.mark.parametrize("change", (dict(seed=1), dict(step=1), dict(player="fake")))
    def test_depends_on(self, change):
        base = dict(seed=0, step=0, player="student", samples=torch.arange(64))
        a, b = (numbers(feed()(Draw(**draw))) for draw in (base, base | change))
        assert (a[:2] != b[:2]).float().mean() > 0.8

    def test_captions_belong_to_images_and_prompts_do_not(self):
        c, real, real_c = numbers(feed()(Draw(0, 0, "student", torch.arange(4000))))
        assert torch.equal(real_c, real % 7)
        assert set(c.tolist()) == set(range(10)) and set(real.tolist()) == set(range(40))
        assert abs(torch.corrcoef(torch.stack([c, real]))[0, 1]) < 0.05

    def test_uniform_over_many_rows(self):
        """24 bits would give multiples of 64 only."""
        rows = _integers(Draw(0, 0, "student", torch.arange(4096)), "prompt", 1 << 30)
        assert rows.min() >= 0 and rows.max() < 1 << 30
        counts = torch.bincount(rows % 64, minlength=64)
        assert counts.min() > 32 and counts.max() < 110  # 64 each

    @pytest.mark.parametrize("p", (0.0, 0.25, 1.0))
    def test_share_of_empty_prompts(self, p):
        c, real, real_c = numbers(feed(p)(Draw(0, 0, "student", torch.arange(4000))))
        for row in (c, real_c):
            assert abs((row == 10).float().mean() - p) < 0.03
        assert 0.25 < p or ((c == 10) & (real_c == 10)).float().mean() < 0.1  # drawn apart

    @pytest.mark.parametrize("every", (1, 5))
    def test_read_ahead(self, every):
        """From its third turn on, a player's batch is read before it is asked for; it is the same batch."""
        ahead = feed()
        for step in range(0, 8 * every, every):
            draw = Draw(0, step, "student", torch.arange(4))
            if step > every:
                assert ahead._ahead["student", (0, 1, 2, 3)][0] == (0, step, "student", (0, 1, 2, 3))
            assert torch.equal(numbers(ahead(draw)), numbers(feed()(draw)))
        ahead._thread.shutdown()
        assert len(ahead.images.reads) == 9 + (every > 1)  # the one after the last, and a first wrong guess

    def test_looking_back_keeps_what_was_read_ahead(self):
        """A generation that goes on over steps has the prompts of the step in which it began."""
        walk = feed()
        for step in range(6):
            draw, began = (Draw(0, s, "fake", torch.arange(4)) for s in (step, step - step % 3))
            assert step == 0 or walk._ahead["fake", (0, 1, 2, 3)][0][1] == step
            for each in (draw, began):
                assert torch.equal(numbers(walk(each)), numbers(feed()(each)))

    def test_a_repeated_or_earlier_step(self):
        again, draw = feed(), lambda step: Draw(0, step, "student", torch.arange(4))
        want = [numbers(feed()(draw(step))) for step in (5, 5, 2)]
        assert all(torch.equal(a, numbers(again(draw(step)))) for a, step in zip(want, (5, 5, 2)))

    def test_numbers_of_samples_are_fetched_once(self):
        """A view of the same memory is known, one that was written to is read again."""
        f, samples = feed(), torch.arange(8)
        first, second = samples.split(4)
        assert f._host(first) == (0, 1, 2, 3) and f._host(second) == (4, 5, 6, 7)
        assert f._host(samples.split(4)[1]) is f._host(second)
        samples += 1
        assert f._host(samples.split(4)[1]) == (5, 6, 7, 8)

    def test_an_error_is_told(self):
        broken = feed()
        broken.images.read = lambda rows: (_ for _ in ()).throw(sources.UnreadableImage("image a.png"))
        with pytest.raises(
            ValueError, match="image a.png: put a readable image into its place, then go on with --resume"
        ):
            broken(Draw(0, 0, "student", torch.arange(4)))

    def test_fixed(self):
        names, c = feed().fixed(12)
        assert names == [*"0123456789", "0", "1"] and c["x"].tolist() == [*range(10), 0, 1]


class TestShards:
    """Rows of each kind that a condition or a latent may have."""

    ROWS = {
        "full": torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)),
        "padded": torch.ones(7, 5, 2) * (torch.arange(5) < torch.tensor([2, 0, 5, 1, 0, 3, 4])[:, None])[..., None],
        "sizes": torch.full((7, 6), 4097.0) + torch.arange(7.0)[:, None],
        "mask": torch.arange(7)[:, None] > torch.arange(5),
        "caption": torch.arange(7),
    }

    @pytest.fixture
    def shards(self, tmp_path):
        for i, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 7))):
            part = narrow({key: value[rows] for key, value in self.ROWS.items()}, torch.float16)
            save(pack(part), tmp_path / file("t", i), {})
        shapes = {key: list(value.shape[1:]) for key, value in self.ROWS.items()}
        return Shards(tmp_path, "t", {"rows": [3, 0, 4], "shapes": shapes})

    @pytest.mark.parametrize("rows", ((0,), (6, 2, 3, 2), tuple(range(7))))
    def test_round_trip(self, shards, rows):
        found = shards.read(rows)
        assert len(shards) == 7 and found.keys() == self.ROWS.keys()
        for key, value in self.ROWS.items():
            want = value if value[0].numel() < 20 else value.half()
            assert torch.equal(found[key], want[list(rows)]), key

    def test_only_what_is_asked_for_is_opened(self, shards):
        assert not shards.opened
        shards.read([4])
        assert list(shards.opened) == [2]

    def test_padding_takes_no_bytes(self, shards):
        assert load_file(shards.files[2])["padded"].shape == (1 + 0 + 3 + 4, 2)
        assert load_file(shards.files[2])["full"].shape == (4, 5, 4)

    def test_does_not_fit(self):
        with pytest.raises(ValueError, match="x does not fit float16: take a wider --dtype"):
            narrow({"x": torch.full((1, 20), 1e5)}, torch.float16)
        with pytest.raises(ValueError, match="x was encoded as NaN or infinity"):
            narrow({"x": torch.full((1, 20), torch.nan)}, torch.float32)


class TestWords:
    """What SFD forgets in prompts."""

    @pytest.mark.parametrize(
        "forget, override, text, want",
        (
            (("Brad Pitt",), ("a man",), "BRAD PITT and brad pitt's dog", "a man and a man's dog"),
            (("cat",), ("dog",), "a category of Cat", "a category of dog"),
            (("cat",), ("dog",), "a category", None),
            (("Brad", "Brad Pitt"), ("a boy", "a man"), "Brad Pitt, Brad", "a man, a boy"),  # the longest first
            (("C++",), ("Ada",), "C++ and C++!", "Ada and Ada!"),
            (
                ("\u76ae\u7279",),
                ("\u7537\u4eba",),
                "\u5e03\u62c9\u5fb7\u76ae\u7279\u5fae\u7b11",
                "\u5e03\u62c9\u5fb7\u7537\u4eba\u5fae\u7b11",
            ),
            (("cat",), (r"a \1 dog",), "cat", r"a \1 dog"),
        ),
    )
    def test_overridden(self, forget, override, text, want):
        words = Words(forget, override)
        words.validate()
        assert words.replace_words(text) == want

    def test_rule(self):
        texts = ["a cat", "a fox", "a dog", "two CATS and a cat", "two CATS and a dog", ""]
        rule = Words(("cat",), ("dog",)).override_rows(texts, 5, "here")
        assert rule.tolist() == [2, 1, 2, 4, 4, 5]

    @pytest.mark.parametrize(
        "forget, override, texts, message",
        (
            (("cat", "fox"), ("dog", "dog"), ["a cat", "a dog"], "no prompt of here holds .'fox'."),
            (("cat",), ("dog",), ["a cat", "a fox"], "1 of 1 prompts .* are not in here, 'a dog' for one"),
            (("big dog", "cat"), ("wolf", "dog"), ["big cat", "big dog", "wolf"], "'big dog' still holds one"),
        ),
    )
    def test_mistakes(self, forget, override, texts, message):
        with pytest.raises(ValueError, match=message):
            Words(forget, override).override_rows([*texts, ""], len(texts), "here")

    @pytest.mark.parametrize("override", ((), ("Cat",), ("",), ("dog", "fox")))
    def test_overrides(self, override):
        with pytest.raises(ValueError, match="give one override for each"):
            Words(("cat",), override).validate()


class TestCheck:
    """What is missing is told before anything is loaded."""

    @pytest.mark.parametrize(
        "data, requirements, message",
        (
            (Text(), (), "no data given: encode it once with\n  python -m pipelines.cache .* --prompts .*online"),
            (Text(), (Requirement.REAL,), "--images IMAGES --output_dir cache\n.*--data.images IMAGES"),
            (Text(cache="none"), (), "no cache at 'none'; make one with\n.*--output_dir none"),
            (Text(cache="none", prompts="a.txt", crops=2), (), "leave out --data.prompts and --data.crops"),
            (Text("online"), (), "no data given: pass --data.prompts prompts.txt"),
            (Text("online", cache="c", prompts="a.txt"), (), "--data.cache is read with --data.text cached"),
            (Text("online", prompts="a.txt"), (), "no prompts at 'a.txt'"),
            (
                Text("online", prompts="a.txt"),
                (Requirement.REAL, Requirement.NULL_CONDITION),
                "needs real images: pass --data.images",
            ),
            (
                Text("online", prompts="a.txt"),
                (Requirement.FORGOTTEN_PROMPTS,),
                "nothing to forget: pass --data.forget",
            ),
            (Text("online", forget=("cat",), override=("dog",)), (), "which SFD alone reads"),
            (Text("online", forget=("cat",)), (Requirement.FORGOTTEN_PROMPTS,), "give one override for each"),
            (Text("online", prompts="a.txt", crops=2, squeeze=True), (), "squeeze leaves nothing for --data.crops 2"),
            (
                Text("online", forget=("cat",), override=("a Cat",)),
                (Requirement.FORGOTTEN_PROMPTS,),
                "holds nothing that is to be forgotten",
            ),
            (Digits(), (Requirement.FORGOTTEN_PROMPTS,), "nothing to forget: pass --method.forget"),
            (Labels(), (Requirement.FORGOTTEN_PROMPTS,), "nothing to forget: pass --method.forget"),
            (Digits(), (Requirement.PAIRS,), "needs pairs of the teacher"),
            (Labels(), (Requirement.PAIRS,), "needs pairs of the teacher"),
            (Text("online", prompts="a.txt"), (Requirement.PAIRS,), "needs pairs of the teacher"),
        ),
    )
    def test_mistakes(self, data, requirements, message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            data.validate(requirements)

    @pytest.mark.parametrize("values", (dict(p_empty=1.5), dict(crops=-1), dict(max_samples=0)))
    def test_values(self, values):
        with pytest.raises(ValueError, match=f"{next(iter(values))} is {next(iter(values.values()))}"):
            Text(**values).validate(())

    def test_smoke(self, tmp_path):
        data = Text(cache="mine").smoke(tmp_path)
        data.validate((Requirement.REAL,))
        prompts, pictures = data.sources
        assert len(prompts) == len(pictures) == 8 and pictures.captions == prompts
