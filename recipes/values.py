"""The values of any method on any family of teachers, in layers, each with the name of where it comes from.

The class's defaults, then what the family needs, then the method's values on this teacher: a row of recipes/digits.py,
or the recipe in this folder of the same method on this family, or on one with the same kind of schedule.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import fmean

from distill import methods
from distill.configuration import FORMER_CLASSES, Config
from distill.data import Text
from distill.data.labels import LabelPairs, Labels
from distill.data.pairs import Pairs
from distill.diffusion.curriculum import Curriculum
from distill.diffusion.times import Grid, ShiftedTimes, TimeDistribution, Uniform
from distill.layout import RECIPES, module_name
from distill.method import Method, Requirement
from distill.training.config import TrainConfig
from pipelines import fields as stored
from pipelines.components import read_index
from pipelines.families.registry import families, find_family, find_family_of
from recipes import digits, world
from recipes.digits import TABLE
from recipes.table import Row

TABLES: dict[str, dict[str, Row]] = {"digits": digits.TABLE, "world": world.TABLE}  # by the word for their teacher
SYNONYMS = {"CD": "LCD", "LCM": "LCD"}  # other words for methods: consistency distillation
TEACHERS = {digits.TEACHER: "run digits_teacher", world.TEACHER: "run world_teacher"}  # and how to make them
STEMS = {"vsd": "swiftbrush"}  # how the recipe's file begins where several fit and none begins with the method's name


@dataclass(frozen=True)
class Layer:
    """A configuration after one more source of values was applied."""

    source: str
    config: Config


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher of a run comes from.

    name: folder or Hub name; "" where --smoke makes it. table: the key of TABLES that has its values; "" for none.
    """

    name: str
    family: str
    table: str = ""


# ---- names of methods ----


def with_defaults(method: Method) -> Method:
    """The method with the defaults of its class, around the same base and with the same kind of curriculum."""
    default = type(method)()
    parts: dict[str, object] = {}
    for name, part in parts_of(method):
        own = with_defaults(part) if name == "base" else type(part)()
        if getattr(default, name) != own:
            parts[name] = own
    return replace(default, **parts)


def parts_of(method: Method) -> Iterator[tuple[str, Method | Curriculum]]:
    """(field, value) of what a method is made of: the method that it is around, and its curriculum."""
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "base" or isinstance(value, Curriculum):
            yield field.name, value


def structure(method: Method) -> tuple[type, ...]:
    """The classes of a method, of what it is around, and of its curriculum."""
    found = [type(method)]
    for name, part in parts_of(method):
        found += structure(part) if name == "base" else [type(part)]
    return tuple(found)


@cache
def list_methods() -> dict[str, Method]:
    """The methods by name, with the defaults of their classes: the rows of the digits, and the classes without one."""
    found = {name: with_defaults(row.config.method) for name, row in sorted(TABLE.items())}
    classes = {type(method) for method in found.values()}
    for name in methods.__all__:
        kind = getattr(methods, name)
        if kind not in classes:
            found[kind.__module__.rpartition(".")[2]] = kind()
    return found


@cache
def list_words() -> dict[str, str]:
    """Every word for a method -> its name: the name, that of its class and module, the names in its module's title."""
    found = {simplify(name): name for name in list_methods()}
    by_variant = sorted(list_methods().items(), key=lambda item: item[1] != type(item[1])())
    for name, method in by_variant:  # the name of a class stands for its defaults, where a method is these
        for word in class_words(type(method)):
            found.setdefault(simplify(word), name)
    return found | {simplify(other): found[simplify(word)] for other, word in (FORMER_CLASSES | SYNONYMS).items()}


def class_words(kind: type) -> list[str]:
    """The words for a method's class; the title of its module, "ECT and iCT: ...", has the paper's."""
    module = inspect.getmodule(kind)
    title = re.split(r"[:(]", module.__doc__ or "")[0]
    return [kind.__name__, module.__name__.rpartition(".")[2], *re.split(r" and |,", title)]


def simplify(word: str) -> str:
    """The word in small letters, without spaces, dots and dashes."""
    return re.sub(r"[^a-z0-9]", "", word.lower())


def find_method(word: str) -> str:
    """The method's name for any of its words; ValueError with the nearest one for an unknown word."""
    words = list_words()
    if simplify(word) in words:
        return words[simplify(word)]
    nearest = difflib.get_close_matches(simplify(word), words, 1)
    hint = f"; {words[nearest[0]]} is the nearest" if nearest else ""
    raise ValueError(f"there is no method {word!r}{hint}. Give one of: {', '.join(sorted(list_methods()))}")


# ---- the teacher ----


def find_teacher(name: str, method: str, revision: str | None = None, smoke: bool = False) -> TeacherSource:
    """The teacher that a name stands for: `digits`, `world`, a folder, a Hub name or, with --smoke, a family.

    Nothing is loaded. Of a Hub name that no recipe has, model_index.json is downloaded.
    """
    if name in TABLES:
        table = TABLES[name]
        if method not in table:
            raise ValueError(f"{name} has no values for {method}; it has some for {', '.join(sorted(table))}")
        return TeacherSource(table[method].config.teacher, table[method].config.family, name)
    if Path(name).exists():
        family = find_family_of(read_index(name), name).name
        built_in = "digits" if family == "edm" and method in TABLE and has_digits_shape(Path(name)) else ""
        return TeacherSource(name, family, built_in)
    if name in families():
        if not smoke:
            raise ValueError(
                f"--teacher {name} is a family, whose tiny random teacher is made with --smoke: add --smoke, or give "
                "the folder or Hub name of a pipeline"
            )
        return TeacherSource("", name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("runs/"):
        return TeacherSource(name, find_hub_family(name, revision))
    try:
        read_index(name)
    except ValueError as error:
        nearest = difflib.get_close_matches(name, (*TABLES, *families()), 1)
        hint = f"; {nearest[0]} is the nearest word" if nearest else ""
        raise ValueError(
            f"{error}{hint}. Give a folder, a Hub name, digits, world or, with --smoke, a family"
        ) from None


def has_digits_shape(folder: Path) -> bool:
    """Whether a pipeline makes gray pictures of 8 x 8 pixels with labels: the only data of this size are the digits."""
    if not (folder / "unet" / "config.json").is_file():
        return False
    config = stored.read(folder / "unet" / "config.json")
    classes = config.get("num_class_embeds") or 0
    return (config.get("sample_size"), config.get("in_channels")) == (8, 1) and classes >= 10


def find_hub_family(name: str, revision: str | None) -> str:
    """The family of a pipeline on the Hub."""
    from pipelines.planning.models import MODELS

    known = [config.family for _, config in list_recipes() if config.teacher == name]
    known += [find_family(model.pipeline, name).name for model in MODELS.values() if model.hub == name]
    if known:
        return known[0]
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "model_index.json", revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(f"{error}".split())
        raise ValueError(f"no pipeline {name!r}, as a folder or on the Hub: {reason}") from None
    return find_family_of(read_index(Path(file).parent), name).name


def describe_missing_teacher(config: Config) -> str:
    """How to make the teacher of a row of a table that is not there; nothing where it is, or needs not be."""
    path = config.teacher
    rows = [(name, key, row) for name, table in TABLES.items() for key, row in table.items()]
    if config.smoke or path not in {row.config.teacher for _, _, row in rows} or Path(path).exists():
        return ""
    made = [(name, key) for name, key, row in rows if path == f"{row.config.train.output_dir}/pipeline"]
    command = f"train --method {made[0][1]} --teacher {made[0][0]}" if made else TEACHERS[path]
    return f"no pipeline at {path} (seen from {Path.cwd()}): make it with\n  accelerate launch -m distill {command}"


# ---- the layers ----


def resolve_layers(name: str, teacher: TeacherSource) -> list[Layer]:
    """The configurations of a method on a teacher, from the class's defaults to the values that are used.

    ValueError for a method that the family's network cannot serve.
    """
    method = list_methods()[name]
    family = teacher.family
    check_family(name, method, family)
    if teacher.table:
        row = replace(TABLES[teacher.table][name].config, teacher=teacher.name)
        return [Layer("default", Config(method, type(row.data)())), Layer(f"table: {teacher.table}", row)]
    recipe = find_recipe(name, family)
    data = type(recipe[1].data)() if recipe else data_for(method, family)
    start = Config(method, data, train=TrainConfig())
    layers = [Layer("default", start)]
    layers.append(Layer(f"family {family}", fit_family(start, name, family)))
    if recipe:
        stem, config = recipe
        layers.append(Layer(f"recipe {stem}", apply_recipe(layers[-1].config, config)))
    layers.append(Layer(f"method {name}", fit_method(layers[-1].config)))
    return layers


def check_family(name: str, method: Method, family: str) -> None:
    """ValueError for a method that the family's network cannot serve."""
    attention = {Requirement.CROSS_ATTENTION, Requirement.NEGATIVE_ADAPTER} & {*method.requirements}
    readers = [other for other, one in families().items() if one.cross_attention_tokens]
    unets = [other for other, one in families().items() if one.unet]
    if attention and family not in readers:
        raise ValueError(
            f"{name} changes what the cross-attention reads, and the network of {family} has no cross-attention with "
            f"text: give a teacher of {', '.join(readers)}"
        )
    if Requirement.CONTROL_PICTURE in method.requirements and family not in unets:
        raise ValueError(
            f"{name} adds a ControlNet, which needs a UNet, and {family} has none: give a teacher of {', '.join(unets)}"
        )


def data_for(method: Method, family: str) -> object:
    """The data that a method reads: prompts or labels, with images or pairs where it needs them."""
    if Requirement.PAIRS in method.requirements:
        return LabelPairs() if families()[family].labels else Pairs()
    return Labels() if families()[family].labels else Text()


def fit_family(config: Config, name: str, family: str) -> Config:
    """With what a family needs: its taps, LoRA targets and times and, of a latent family, rates that it survives."""
    facts = families()[family]
    targets = facts.lora_targets
    method = replace_taps(config.method, facts.taps)
    student = config.student
    fake = config.fake
    train = replace(config.train, output_dir=f"runs/{name}_{family}")
    if targets:
        student = replace(student, lora=replace(student.lora, targets=targets))
        fake = replace(fake, lora=replace(fake.lora, targets=targets))
    if facts.schedule == "flow":
        method = replace_grids(method, facts.flow_shift)
    if facts.schedule == "table":
        student = replace(student, scale=1.0)  # the first input is the noise itself
    if not facts.labels:
        train = replace(train, learning_rate=1e-6, max_grad_norm=1.0, gradient_checkpointing=True)
    return replace(config, method=method, student=student, fake=fake, train=train, family=family)


def replace_taps(method: Method, taps: tuple[str, ...], every: bool = False) -> Method:
    """The method, whose discriminator or reward reads these modules, where it has its class's own or `every` is set."""
    default = type(method)()
    names = [field.name for field in fields(method) if field.name.endswith("taps")]
    values: dict[str, object] = {
        name: taps for name in names if every or getattr(method, name) == getattr(default, name)
    }
    if hasattr(method, "base"):
        values["base"] = replace_taps(method.base, taps, every)
    return replace(method, **values)


def replace_grids(method: Method, shift: float) -> Method:
    """The method with the times of a flow in place of a table's timesteps: uniform, shifted to the noisier ones."""
    values: dict[str, object] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Grid):
            values[field.name] = ShiftedTimes(Uniform(value.low / value.N, (value.high + 1) / value.N), shift)
        if field.name == "base":
            values["base"] = replace_grids(value, shift)
    return replace(method, **values)


@cache
def list_recipes() -> tuple[tuple[str, Config], ...]:
    """(file's stem, CONFIG) of every recipe in this folder."""
    stems = [file.stem for file in sorted(RECIPES.glob("*.py")) if "\nCONFIG = Config(" in file.read_text()]
    return tuple((stem, import_module(module_name(f"recipes.{stem}")).CONFIG) for stem in stems)


def find_recipe(name: str, family: str) -> tuple[str, Config] | None:
    """The recipe of a method on this family or, where there is none, on one with the same kind of schedule.

    Of several the one that begins with the method's name; None where none does. A family with labels takes only recipes
    with labels, in the end of any kind of schedule.
    """
    wanted = structure(list_methods()[name])
    same_method = [(stem, config) for stem, config in list_recipes() if structure(config.method) == wanted]
    for names in list_related_families(family):
        fits = [(stem, config) for stem, config in same_method if config.family in names]
        by_name = [(stem, config) for stem, config in fits if stem.startswith((f"{name}_", STEMS.get(name, "?")))]
        if by_name or len(fits) == 1:
            return (by_name or fits)[0]
    return None


def list_related_families(family: str) -> list[list[str]]:
    """The families whose recipes serve this one, the nearest first: itself, of its kind of schedule, of labels."""
    facts = families()[family]
    alike = {other: one for other, one in families().items() if one.labels == facts.labels}
    kind = [other for other, one in alike.items() if one.schedule == facts.schedule]
    return [[family], kind, [*alike] if facts.labels else []]


def apply_recipe(config: Config, recipe: Config) -> Config:
    """A recipe's values on a family. On another family than its own, modules and times of calls are the family's."""
    same = recipe.family == config.family
    method = replace_taps(recipe.method, families()[config.family].taps, every=not same)
    student = recipe.student
    fake = recipe.fake
    if not same:
        student = replace(student, times=None)
    if families()[recipe.family].schedule != families()[config.family].schedule:
        student = replace(student, scale=config.student.scale)
    if not same or student.lora.rank is None:
        student = replace(student, lora=replace(student.lora, targets=config.student.lora.targets))
    if not same or fake.lora.rank is None:
        fake = replace(fake, lora=replace(fake.lora, targets=config.fake.lora.targets))
    return replace(
        config,
        method=method,
        student=student,
        fake=fake,
        data=recipe.data,
        train=replace(recipe.train, output_dir=config.train.output_dir),
        validation_images=recipe.validation_images,
    )


def fit_method(config: Config) -> Config:
    """With what the method cannot do without: its noise between calls, calls, an adapter, a guidance to be told."""
    method = config.method
    student = config.student
    requirements = method.requirements
    if method.noises and student.renoise not in method.noises:
        student = replace(student, renoise=method.noises[-1])
    if Requirement.SEVERAL_CALLS in requirements and student.steps == 1:
        student = replace(student, steps=2)
    if Requirement.NEGATIVE_ADAPTER in requirements:
        student = replace(student, negative=families()[config.family].cross_attention_tokens)
    if Requirement.GUIDANCE_EMBEDDING in requirements and not families()[config.family].guidance_embedding:
        untold = {"embed": False} if hasattr(method, "embed") else {"guidance": fmean(method.guidance)}
        method = replace(method, **untold)
    return replace(config, method=method, student=student)


# ---- where a value comes from ----


def list_values(config: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(flag, value) of every field; a law of times or a curriculum is one value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not is_dataclass(value) or isinstance(value, TimeDistribution | Curriculum):
            yield f"{path}{field.name}", value
        elif f"{path}{field.name}" == "train":
            yield from list_values(value)
        else:
            yield from list_values(value, f"{path}{field.name}.")


def list_sources(layers: list[Layer]) -> list[tuple[str, object, str]]:
    """(flag, value, source) of every value that a layer changed; the source is the last layer that did."""
    sources: dict[str, str] = {}
    before = dict(list_values(layers[0].config))
    for layer in layers[1:]:
        now = dict(list_values(layer.config))
        changes = [name for name, value in now.items() if name not in before or before[name] != value]
        sources |= dict.fromkeys(changes, layer.source)
        before = now
    return [(name, value, sources[name]) for name, value in list_values(layers[-1].config) if name in sources]
