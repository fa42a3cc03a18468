"""Any method on any family: the values, where they come from, and what is refused before anything is loaded."""

import json
from dataclasses import fields, replace

import pytest
import yaml

from benchmarks.results import models
from distill import methods
from distill.configuration import Config, parse
from distill.data import Digits, Text
from distill.data.labels import LabelPairs, Labels
from distill.data.pairs import Pairs
from distill.diffusion.times import Grid, ShiftedTimes
from distill.layout import RECIPES
from distill.method import Requirement
from distill.ranges import validate_ranges
from pipelines import run
from pipelines.families.registry import families
from recipes import train, values
from recipes.digits import TABLE, TEACHER
from recipes.values import Layer, TeacherSource

FAMILIES = sorted(families())
PAIRS = [  # every method on two families, every family with several methods
    (name, FAMILIES[(i + shift) % len(FAMILIES)])
    for i, name in enumerate(sorted(values.list_methods()))
    for shift in (0, 4)
]
NO_ATTENTION = [
    (name, family) for name in ("nasa", "sun") for family in FAMILIES if not families()[family].cross_attention_tokens
]
NO_UNET = [("nct", family) for family in FAMILIES if not families()[family].unet]


def last(name, family):
    return values.resolve_layers(name, TeacherSource("", family))[-1].config


@pytest.fixture
def idle(monkeypatch):
    """No run starts: what reaches one is an error."""

    def start(*given):
        raise AssertionError(f"a run starts with {given}")

    monkeypatch.setattr(run, "main", start)


@pytest.fixture
def refused(idle, capsys, monkeypatch, tmp_path):
    """refused(flags) -> the message of exit status 2."""
    monkeypatch.chdir(tmp_path)

    def refused(flags):
        with pytest.raises(SystemExit) as error:
            train.main(flags.split())
        streams = capsys.readouterr()
        assert error.value.code == 2 and not streams.out
        return " ".join(streams.err.split())

    return refused


# ---- values ----


@pytest.mark.parametrize("name, family", PAIRS)
def test_every_method_has_values_on_a_family(name, family):
    """They are in range, fit the family and the method, and are those of the command line where no flag changes one."""
    if (name, family) in NO_ATTENTION + NO_UNET:
        with pytest.raises(ValueError, match=f"{family} has no"):
            last(name, family)
        return
    config = last(name, family)
    validate_ranges(config, "--")
    assert values.structure(config.method) == values.structure(values.list_methods()[name])
    assert (config.family, config.train.output_dir) == (family, f"runs/{name}_{family}")
    pairs = Requirement.PAIRS in config.method.requirements
    if recipe := values.find_recipe(name, family):
        assert type(config.data) is type(recipe[1].data)
    else:
        assert (
            type(config.data)
            is {True: (LabelPairs, Labels), False: (Pairs, Text)}[families()[family].labels][not pairs]
        )
    if families()[family].lora_targets:
        assert (
            config.student.lora.targets
            and config.student.lora.rank
            or (config.student.lora.targets == families()[family].lora_targets)
        )
    assert config.method.noises is None or not config.method.noises or config.student.renoise in config.method.noises
    assert parse(config, []) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_discriminator_reads_modules_of_the_family(family):
    """Those of a recipe on the family itself, those of the family elsewhere; within a wrapper, too."""
    for name in ("dmd2", "esd", "rglcd", "sida", "sprint"):
        config = last(name, family)
        recipe = values.find_recipe(name, family)
        own = recipe is not None and recipe[1].family == family
        method = getattr(config.method, "base", config.method)
        for holder in (config.method, method):
            for field in fields(holder):
                if field.name.endswith("taps") and not own:
                    assert getattr(holder, field.name) == families()[family].taps, (name, field.name)


def test_times_of_a_flow():
    """Timesteps of a table are uniform times of a flow, shifted to the noisier ones; Wan's by more."""
    method = last("f_distill", "sana").method
    assert not any(isinstance(getattr(method, field.name), Grid) for field in fields(method))
    assert isinstance(method.times, ShiftedTimes) and (method.times.s, method.times.law.low) == (3.0, 0.02)
    assert last("f_distill", "wan").method.times.s == 5.0
    assert isinstance(last("dmd2", "sdxl").method.times, Grid)


@pytest.mark.parametrize(
    "name, family, recipe",
    (
        ("dmd2", "sdxl", "dmd2_sdxl"),
        ("dmd2", "wan", "dmd2_wan"),
        ("dmd2", "pixart", "dmd2_sd15"),
        ("dmd2", "qwen", "dmd2_flux"),
        ("dmd2", "edm", "dmd2_imagenet64"),
        ("lcd", "sdxl", "lcm_lora_sdxl"),
        ("vsd", "sdxl", "swiftbrush_sd21"),
        ("ict", "edm", "ict_cifar10"),
        ("ect", "edm", "ect_cifar10"),
        ("esd", "edm", None),
        ("boot", "sdxl", None),
    ),
)
def test_the_recipe_that_has_the_values(name, family, recipe):
    found = values.find_recipe(name, family)
    assert (found and found[0]) == recipe


@pytest.mark.parametrize("stem, config", values.list_recipes(), ids=[stem for stem, _ in values.list_recipes()])
def test_a_recipe_on_its_own_family_keeps_its_values(stem, config):
    """All but what the family adds: targets of adapters that a flag may ask for, modules for the heads."""
    start = Config(values.with_defaults(config.method), type(config.data)(), family=config.family)
    made = values.apply_recipe(start, config)
    assert replace(made.train, output_dir=config.train.output_dir) == config.train and made.data == config.data
    assert replace(made.student, lora=config.student.lora) == config.student
    before = dict(values.list_values(config.method))
    assert {name for name, value in values.list_values(made.method) if value != before[name]} <= {"taps", "proxy_taps"}


def test_a_guidance_that_cannot_be_told():
    """A range of guidance is told to SANA's network; elsewhere it is not told, or is one number."""
    assert last("sprint", "sana").method.guidance == (4.0, 5.0)
    assert last("sprint", "qwen").method.guidance == 4.5
    method = last("tcd", "wan").method
    assert method.guidance == (3.0, 15.0) and not method.embed


# ---- the digits and the captioned world ----


@pytest.mark.parametrize("table, name", [(table, name) for table in values.TABLES for name in values.TABLES[table]])
def test_values_of_a_table(table, name):
    row = values.TABLES[table][name]
    layers = values.resolve_layers(name, TeacherSource("t", row.config.family, table))
    assert layers[-1].config == replace(row.config, teacher="t")
    assert {source for *_, source in values.list_sources(layers)} == {f"table: {table}"}
    validate_ranges(row.config, "--")
    assert isinstance(row.config.data, Digits | LabelPairs | Text) and row.advice.startswith("Choose it ")


def test_a_teacher_of_a_table_that_is_not_there(tmp_path, monkeypatch):
    """The message says how to make it: by its recipe, or as the student of another row."""
    monkeypatch.chdir(tmp_path)
    for table, name, command in (
        ("digits", "sid", "run digits_teacher"),
        ("digits", "pso", "train --method lcd --teacher digits"),
        ("world", "dmd2", "run world_teacher"),
    ):
        config = values.TABLES[table][name].config
        assert values.describe_missing_teacher(config).endswith(f"accelerate launch -m distill {command}")


def test_the_table_is_what_was_measured():
    """docs/digits.json has the students of the table, with the calls that the table gives them."""
    rows = json.loads((RECIPES.parent / "docs" / "digits.json").read_text())["rows"]
    measured = {f"{row['model']}-{row['cost']['nfe']:g}" for row in rows if row["model"] != "teacher"}
    assert measured <= {name for name in models() if not name.startswith("teacher")}
    assert {row["model"] for row in rows} - {"teacher"} <= TABLE.keys()


def test_a_folder_is_known_as_a_teacher_of_digits(tmp_path):
    """By its size, channel and labels."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "ConsistencyModelPipeline"}')
    for size, classes, table in ((8, 11, "digits"), (8, None, ""), (32, 11, "")):
        config = {"sample_size": size, "in_channels": 1, "num_class_embeds": classes}
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        assert values.find_teacher(f"{tmp_path}", "dmd2") == TeacherSource(f"{tmp_path}", "edm", table)
    assert not values.find_teacher(f"{tmp_path}", "pcm").table


def test_the_family_of_a_name_on_the_hub():
    """Of a teacher of a recipe or of `plan` nothing is downloaded."""
    for name, family in (("black-forest-labs/FLUX.1-dev", "flux"), ("stabilityai/stable-diffusion-3.5-large", "sd3")):
        assert values.find_teacher(name, "sid") == TeacherSource(name, family)


# ---- sources ----


def test_each_value_has_its_source(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    flags = f"--method DMD2 --teacher={tmp_path} --method.guidance 3 --method.every 7 --fake.lora.rank 8"
    selection = train.select(flags.split())
    config = parse(selection.layers[-1].config, selection.flags)
    layers = [*selection.layers, Layer("command line", config)]
    found = {name: (value, source) for name, value, source in values.list_sources(layers)}
    assert found["method.guidance"] == (3.0, "command line") and found["method.every"] == (7, "command line")
    assert found["learning_rate"] == (5e-7, "recipe dmd2_sdxl") and found["student.steps"] == (4, "recipe dmd2_sdxl")
    assert found["fake.lora.targets"] == (families()["sdxl"].lora_targets, "family sdxl")
    assert found["teacher"] == (f"{tmp_path}", "command line") and found["family"] == ("sdxl", "family sdxl")
    assert "method.gan" not in found and "adam_beta2" not in found
    text = train.format_sources(layers)
    assert text.startswith("DMD2 on sdxl; ") and len(text.splitlines()) == 1 + len(found)
    line = next(line for line in text.splitlines() if "--method.guidance" in line)
    assert line.split() == ["--method.guidance", "3.0", "command", "line"]


def test_the_last_flag_counts():
    argv = ["--teacher", "a", "--pretrained-model-name-or-path", "b", "--seed", "3"]
    assert train.pop_flag(argv, train.TEACHER) == ("b", ["--seed", "3"])


# ---- names ----


@pytest.mark.parametrize("word", [*methods.__all__, *TABLE])
def test_classes_and_rows_are_names(word):
    assert values.find_method(word) in values.list_methods()
    assert values.find_method(word.upper()) == values.find_method(word)


@pytest.mark.parametrize(
    "word, name",
    (
        ("f-distill", "f_distill"),
        ("Phased DMD", "phased"),
        ("SANA-Sprint", "sprint"),
        ("sCM", "scm"),
        ("iCT", "ict"),
        ("CT", "ect"),
        ("NASA-T", "nasa"),
        ("RG-LCD", "rglcd"),
        ("Diff-Instruct", "diff_instruct"),
        ("PSO offline", "pso_offline"),
        ("CD", "lcd"),
        ("LCM", "lcd"),
    ),
)
def test_a_word_for_a_method(word, name):
    assert values.find_method(word) == name


# ---- what is refused ----


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--teacher digits", "no method given: pass --method, one of boot, "),
        ("--method", "--method needs a value"),
        ("--method dmd2", "no teacher given: pass --teacher"),
        ("--method dmd22 --teacher digits", "there is no method 'dmd22'; dmd2 is the nearest. Give one of: boot, "),
        ("--method dmd2 --teacher digit", "no pipeline at 'digit'"),
        ("--method dmd2 --teacher digit", "digits is the nearest word. Give a folder, a Hub name, digits, world or"),
        ("--method dmd2 --teacher sdxl", "--teacher sdxl is a family, whose tiny random teacher is made with --smoke"),
        ("--method pcm --teacher digits", "digits has no values for pcm; it has some for boot, "),
        ("--method dmd2 --teacher digits", f"no pipeline at {TEACHER}"),
        ("--method dmd2 --teacher digits", "make it with accelerate launch -m distill run digits_teacher"),
        ("--method pso --teacher digits", "accelerate launch -m distill train --method lcd --teacher digits"),
        ("--method nct --teacher digits", "accelerate launch -m distill train --method dmd2 --teacher digits"),
        ("--method nct --teacher flux --smoke", "nct adds a ControlNet, which needs a UNet, and flux has none"),
        ("--method sun --teacher sd3 --smoke", "the network of sd3 has no cross-attention with text"),
        ("--method nasa --teacher edm --smoke", "give a teacher of pixart, sana, sd, sdxl, wan"),
        ("--method sid --teacher sdxl --smoke --max_train_step 3", "Unrecognized options: --max_train_step"),
        ("--method sid --teacher sdxl --smoke --train_batch_size 0", "train_batch_size is 0"),
    ),
)
def test_mistakes(flags, message, refused):
    """Before anything is loaded, in one message; no values are printed."""
    assert message in refused(flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_with_a_unet(family):
    networks = {model.network for model in families()[family].models.values()}
    assert networks or family == "edm"  # whose networks are converted
    assert families()[family].unet == all("UNet" in network for network in networks)


# ---- a run ----


def test_a_run_on_a_tiny_sdxl(tmp_path, capsys):
    """Values are printed before it starts; its config.yaml has them, and names method and teacher by itself."""
    out = tmp_path / "run"
    flags = f"--method dmd2 --teacher sdxl --smoke --output_dir {out} --method.every 1 --validation_steps 0"
    train.main(flags.split())
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["--method.guidance", "8.0", "recipe", "dmd2_sdxl"] in lines and [
        "--smoke",
        "True",
        "command",
        "line",
    ] in lines
    tree = yaml.safe_load((out / "config.yaml").read_text())
    assert (tree["method"]["guidance"], tree["method"]["every"], tree["adam_beta1"]) == (8.0, 1, 0.9)
    assert (out / "pipeline" / "model_index.json").is_file() and (out / "checkpoint-2").is_dir()
    for flags in (["--config", f"{out / 'config.yaml'}"], ["--replay", f"{out}"]):  # a replay's folder has one, too
        selection = train.select(flags)
        config = parse(selection.layers[-1].config, selection.flags)
        assert (config.family, config.method.every, config.method.guidance) == ("sdxl", 1, 8.0)
