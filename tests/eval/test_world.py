"""The captioned world: scenes and splits, the checker on real, wrong and damaged images, the teacher's parts."""

import itertools

import pytest
import torch
from torch.nn import functional

from distill.diffusion.schedule import VP
from distill.random import Draw
from eval.world import WORLDS, folder, load_world
from eval.world.checker import compare_scenes, inspect
from eval.world.scenes import COLOURS, NEW_PAIRS, SHAPES
from recipes import world_model as model
from recipes.world_teacher import HighNoise, Teacher, WorldImages, main

OF_EACH = 100  # images of a test; `make slow` draws 2,000


def sample(world, n, seed=1):
    scenes = world.scenes[torch.randint(len(world.scenes), (n,), generator=torch.Generator().manual_seed(seed))]
    return scenes, world.draw(scenes, seed)


# ---- scenes ----


@pytest.mark.parametrize("name, sizes", (("world", (754, 110, 216)), ("world-two", (1202, 166, 792))))
def test_splits(name, sizes):
    """The splits share no scene; "new" holds the pairs that the others lack; a caption and its scene are one to one."""
    world = load_world(name)
    assert tuple(len(scenes) for scenes in world.splits.values()) == sizes
    assert sum(sizes) == len(world.scenes) == len({world.caption(scene) for scene in world.scenes})
    assert torch.equal(world.parse([world.caption(scene) for scene in world.scenes]), world.scenes)
    pairs = {}
    for split, scenes in world.splits.items():
        pairs[split] = [
            {(tuple(COLOURS)[row[colour]], SHAPES[row[shape]]) for colour, shape in world.objects}
            for row in scenes.tolist()
        ]
    assert not any(found & NEW_PAIRS for found in pairs["train"] + pairs["unseen"])
    assert all(found & NEW_PAIRS for found in pairs["new"])
    assert set().union(*pairs["unseen"]) <= set().union(*pairs["train"])


def test_wrong_input():
    world = load_world("world")
    for call, message in (
        (lambda: load_world("moon"), "choose one of world, world-two"),
        (lambda: load_world("world", 20), "a multiple of 8, at least 16"),
        (lambda: world.captions("test"), "choose one of train, unseen, new"),
        (lambda: world.parse(["a huge red circle"]), "no scene 'a huge red circle'. A caption reads like 'a small"),
        (lambda: compare_scenes(world, torch.zeros(2, 3, 16, 16), world.scenes[:1]), "one scene for each image"),
        (lambda: compare_scenes(world, torch.zeros(1, 3, 32, 32), world.scenes[:1]), r"this world's are \(3, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(world.parse(["  A small RED circle at the top on a white background"])[0], world.scenes[7])


# ---- the checker ----


def assert_all_correct(name, side, n):
    world = load_world(name, side)
    scenes, images = sample(world, n)
    shares = compare_scenes(world, images, scenes).accuracies(world)
    assert shares == dict.fromkeys([*(a.name for a in world.attributes), "clean", "all"], 1.0)


@pytest.mark.parametrize("name", WORLDS)
def test_real_images(name):
    assert_all_correct(name, 16, OF_EACH)


@pytest.mark.slow
@pytest.mark.parametrize("name, side", [*itertools.product(WORLDS, (16, 32))])
def test_many_real_images(name, side):
    assert_all_correct(name, side, 2000)


@pytest.mark.parametrize("name", WORLDS)
def test_each_wrong_attribute_is_seen(name):
    """An image of a scene that differs from the caption in one attribute is wrong in that attribute alone."""
    world = load_world(name)
    known = {tuple(scene) for scene in world.scenes.tolist()}
    scenes, _ = sample(world, 10)
    for column, attribute in enumerate(world.attributes):
        pairs = [
            (scene, other)
            for scene in map(tuple, scenes.tolist())
            for value in range(len(attribute.values))
            if (other := (*scene[:column], value, *scene[column + 1 :])) != scene and other in known
        ]
        asked, shown = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
        correct = compare_scenes(world, world.draw(shown, 2), asked).correct
        others = [i for i in range(len(world.attributes)) if i != column]
        assert not correct[:, column].any(), attribute.name
        if name == "world" or attribute.name != "relation":  # objects at other places are matched as seen best
            assert correct[:, others].all(), attribute.name


@pytest.mark.parametrize("name", WORLDS)
def test_damage_is_seen(name):
    """Of images with blur, a ghost of another scene or noise few count as right, of empty ones none."""
    world = load_world(name)
    scenes, images = sample(world, 60)
    _, others = sample(world, 60, seed=3)
    blur = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noise = images + 0.14 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    empty = images[:, :, :1, :1].expand_as(images)
    ghost = 0.6 * images + 0.4 * others
    for damage, most in ((blur, 0.2), (noise, 0.1), (empty, 0.0), (ghost, 0.05)):
        assert compare_scenes(world, damage, scenes).right.float().mean() <= most
    assert inspect(ghost, len(world.objects)).residual.mean() > 4 * inspect(images, len(world.objects)).residual.mean()


def test_spread():
    """Uniform variation within +-h has the deviation h / sqrt(3); the nominal scenes have none."""
    world = load_world("world")
    scenes, images = sample(world, 300)
    spread = compare_scenes(world, images, scenes).spread()
    assert spread["position"] == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert spread["radius"] == pytest.approx(0.06 / 3**0.5, rel=0.4)  # a radius step is 2.5 % of the radius
    assert spread["tint"] == pytest.approx(0.05 / 3**0.5, rel=0.05)
    still = compare_scenes(world, world.render(scenes, torch.zeros(len(scenes), world.variations)), scenes).spread()
    assert still["position"] < 0.02 and still["radius"] < 0.02 and still["tint"] < 1e-4


# ---- folders ----


def test_folders(tmp_path, capsys):
    """Data have the training captions; real images score 1; wrong captions are seen, unknown ones refused."""
    folder.write_data(tmp_path / "data", n=60)
    world = load_world("world")
    assert (tmp_path / "data" / "prompts.txt").read_text().splitlines() == world.captions()
    figures = folder.score(tmp_path / "data" / "images")
    assert (
        figures["all"].value == 1
        and figures["all"].low > 0.9
        and figures["spread of position"] == pytest.approx(1, abs=0.3)
    )
    assert "spread of tint" in capsys.readouterr().out
    folder.write_prompts(tmp_path / "new.txt", split="new", n=300)
    lines = (tmp_path / "new.txt").read_text().splitlines()
    assert len(lines) == 300 and set(lines) == set(world.captions("new"))
    metadata = tmp_path / "data" / "images" / "metadata.jsonl"
    text = metadata.read_text()
    metadata.write_text(text.replace("red", "blue").replace(" on a blue", " on a white"))
    assert folder.score(tmp_path / "data" / "images")["colour"].value < 1
    for content, message in (
        (text.replace("circle", "disc"), "the world has no scene"),
        (text.split("\n")[0], "has 1 prompts for 60 images"),
    ):
        metadata.write_text(content)
        with pytest.raises(ValueError, match=message):
            folder.score(tmp_path / "data" / "images")
    metadata.unlink()
    with pytest.raises(ValueError, match="has no metadata.jsonl"):
        folder.score(tmp_path / "data" / "images")


# ---- the teacher's parts ----


def test_autoencoder_is_the_identity():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    vae = model.build_autoencoder(16)
    assert (vae.encode(images).latent_dist.sample() - images).abs().max() < 1e-4
    assert (vae.decode(images).sample - images).abs().max() < 1e-4


@pytest.mark.parametrize("name", WORLDS)
def test_a_word_is_a_token(name):
    world = load_world(name)
    tokenizer = model.build_tokenizer(world.vocabulary)
    for caption in world.captions("new")[:20]:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    assert len(max(map(str.split, world.captions()), key=len)) + 2 <= model.LENGTH


def test_high_noise():
    """The share above `start` is share + (1 - share) (1 - start), and t increases with the random number."""
    law = HighNoise(0.6, 0.55)
    t = law(Draw(0, 0, "x", torch.arange(20_000)), "t", 20_000, VP((0.99, 0.01)))
    assert (t >= 0.55).double().mean().item() == pytest.approx(0.6 + 0.4 * 0.45, abs=0.01)
    assert ((t >= 0) & (t <= 1)).all() and (t < 0.275).double().mean().item() == pytest.approx(0.11, abs=0.01)


def test_images_depend_on_the_sample():
    """Two processes with half of the samples each see the images of one process."""
    world = load_world("world")
    ids = torch.arange(len(world.splits["train"]))[:, None]
    data = WorldImages(world, ids, 1.5)
    batch = data(Draw(0, 3, "student", torch.arange(8)))
    part = data(Draw(0, 3, "student", torch.arange(4, 8)))
    assert torch.equal(batch["real"][4:], part["real"]) and torch.equal(
        batch["real_c"]["input_ids"][4:], part["real_c"]["input_ids"]
    )
    scenes = world.splits["train"][batch["real_c"]["input_ids"][:, 0]]
    assert compare_scenes(world, batch["real"] / 1.5, scenes).right.all()


def test_teacher(tmp_path, capsys):
    """The recipe writes a plain StableDiffusionPipeline, whose UNet and text encoder were trained."""
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "teacher"
    main(Teacher(output_dir=f"{out}", max_train_steps=2, train_batch_size=4, channels=(16, 16)))
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    prompt = load_world("world").captions()[0]
    assert pipe([prompt], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
    assert pipe.text_encoder.get_input_embeddings().weight.std() > 0.4
    for flags, message in (
        ({}, "already holds a teacher"),
        ({"output_dir": f"{tmp_path / 'b'}", "world": "moon"}, "choose one of world"),
        ({"output_dir": f"{tmp_path / 'b'}", "channels": (10,)}, "multiples of 16"),
        ({"output_dir": f"{tmp_path / 'b'}", "side": 18}, "--side is 18"),
    ):
        with pytest.raises(SystemExit):
            main(Teacher(**{"output_dir": f"{out}"} | flags))
        assert message in capsys.readouterr().err
