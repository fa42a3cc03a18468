"""Every method on every family of teachers, full and as LoRA, two steps each; docs/families.md says what runs here.

Half of it runs at once, the other half with `make slow`: each family and each method both in full and as LoRA.

make tables    writes its two tables
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from shallow import shorten, taps_of
from zoo import CLASSES, example

from distill.diffusion.guidance import with_override
from distill.diffusion.schedule import VP
from distill.method import Requirement
from distill.methods import DMD2, LCD, PCM, SCM, TCM, VSD, SiD
from distill.networks.lora import LoRA
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import load
from pipelines.families import tiny
from pipelines.families.registry import families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
NAMES = {name: family.title for name, family in sorted(families().items(), key=lambda item: item[1].title)}
KINDS = ("full", "lora")
METHODS = {
    "SiD": SiD(alpha=1.0, kappa=(1.5, 1.5, 1.5, 1.5)),
    "DMD2": DMD2(guidance=2.0, every=1),
    "VSD": VSD(guidance=2.0),
    "CD / LCM": LCD(guidance=2.0),
    "sCM": SCM(guidance=2.0, warmup=1),
}
FIRST = ("SiD", "DMD2", "VSD", "LCD", "SCM")  # their classes
APART = (
    "NCT",
)  # its student is an adapter of its own, pipelines/inference/controlnet.py: tests/pipelines/test_control.py
REFUSED = {
    (name, family.name): "no cross-attention"
    for name in ("NASAT", "SUN")
    for family in families().values()
    if not family.cross_attention_tokens
}
REFUSED |= {("SUN", family): "needs a teacher with text conditions" for family in ("ddpm", "edm")}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {}

    def teacher(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder)
            made[name] = shorten(load(folder))
            made[name].denoiser.taps = taps_of(made[name])  # of a method that names none
            made[name].null()
        return made[name]

    return teacher


def two_steps(algorithm, family, teacher, adapted, steps=1):
    """Train; the losses are finite, every player moves, the teacher does not."""
    B = 2
    prompts = [0, 1] if families()[family].labels else ["a cat", "a dog on the moon"]
    c = teacher.encode(prompts)
    lora = LoRA(2, 2.0, teacher.family.lora_targets or ("conv1", "conv2")) if adapted else LoRA()
    unit = 1.0 if isinstance(teacher.denoiser.schedule, VP) else None
    words = (
        c["prompt_embeds"].shape[1]
        if Requirement.NEGATIVE_ADAPTER in algorithm.requirements and "prompt_embeds" in c
        else 0
    )
    denoiser, also = replace(teacher.denoiser), {}
    if Requirement.FORGOTTEN_PROMPTS in algorithm.requirements:
        c, denoiser.null = with_override(c, c), with_override(denoiser.null, denoiser.null)
        also["forget_c"] = c
    nets = build(
        algorithm,
        denoiser,
        teacher.shape,
        {k: v[:1] for k, v in c.items()},
        StudentConfig(
            steps=steps,
            scale=unit,
            renoise="tcd" if isinstance(algorithm, PCM) else "fresh",
            lora=LoRA() if words else lora,
            negative=words,
        ),
        FakeConfig(lora=lora),
    )
    nets.perceptual, nets.reward = lambda x, y: (x - y).square().flatten(1).mean(1), lambda x, c: x.flatten(1).mean(1)
    nets.control = lambda x: x
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.modules().items()}
    frozen = [p.detach().clone() for p in teacher.denoiser.net.parameters()]

    def data(draw):
        some = lambda name: draw.normal(name, (B, *teacher.shape))
        return {"c": c, "real": some("real"), "real_c": c, "z": some("z"), "y": some("y"), **also}

    cfg = TrainConfig(max_train_steps=2, train_batch_size=B, learning_rate=1e-3, lr_warmup_steps=0)
    for state in train(algorithm, nets, data, cfg, Accelerator(cpu=True)):
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in state.logs.values())
    for role, net in nets.modules().items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[role], net.parameters(), strict=True))
        assert moved != (role == "target" and isinstance(algorithm, TCM)), role  # TCM's target is its first stage
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.denoiser.net.parameters(), strict=True))


def pairs():
    for k, family in enumerate(NAMES):
        for i, method in enumerate(METHODS):
            for adapted in (False, True):
                slow = pytest.mark.slow if (i + k + adapted) % 2 else ()
                yield pytest.param(family, method, adapted, marks=slow, id=f"{family}-{method}-{KINDS[adapted]}")


@pytest.mark.parametrize("family, method, adapted", [*pairs()])
def test_trains(family, method, adapted, teachers):
    teacher = teachers(family)
    two_steps(METHODS[method], family, teacher, adapted, 2 if method in ("SiD", "DMD2") else 1)


def others():
    """Every other method on every family; without `make slow` on one of them in turn, in full or as LoRA."""
    for i, name in enumerate(name for name in CLASSES if name not in FIRST + APART):
        families = [family for family in NAMES if (name, family) not in REFUSED]
        chosen = families[i % len(families)], bool(i % 2)
        for family in families:
            for adapted in (False, True):
                slow = () if (family, adapted) == chosen else pytest.mark.slow
                yield pytest.param(name, family, adapted, marks=slow, id=f"{name}-{family}-{KINDS[adapted]}")


@pytest.mark.parametrize("name, family, adapted", [*others()])
def test_every_other_method_trains(name, family, adapted, teachers):
    teacher = teachers(family)
    method = example(name)  # heads read the family's own features
    if name == "TCD":
        method = replace(method, guidance=3.0)  # a range needs a network that is told it
    if name == "SFD" and not families()[family].labels:
        method = replace(method, forget=(), override=())  # prompts, of the data
    two_steps(
        method,
        family,
        teacher,
        adapted,
        2 if {Requirement.SEVERAL_CALLS, Requirement.EXPORTED_TEACHER} & {*method.requirements} else 1,
    )


@pytest.mark.parametrize("name, family", REFUSED)
def test_what_does_not_fit_is_refused(name, family, teachers):
    with pytest.raises(ValueError, match=REFUSED[name, family]):
        two_steps(example(name), family, teachers(family), False)


def family_rows():
    """The table of families."""
    yield "| `--teacher` | `_class_name` in `model_index.json` | for example | methods that are refused |"
    yield "|---|---|---|---|"
    for name, family in families().items():
        example = next((model.hub for model in family.models.values()), "")
        refused = ["NASA-T", "SUN"] if not family.cross_attention_tokens else []
        refused += ["NCT"] if not family.unet else []
        yield f"| `{name}` | {', '.join(family.pipelines)} | {example} | {', '.join(refused)} |"


def matrix_rows():
    """The table of the cases of `pairs`."""
    runs = {}
    for case in pairs():
        family, method, adapted = case.values
        runs.setdefault((family, method), []).append("LoRA" if adapted else "full")
    yield "| teacher | " + " | ".join(METHODS) + " |\n" + "|---" * (len(METHODS) + 1) + "|"
    for family, title in NAMES.items():
        cells = (", ".join(runs[family, method]) for method in METHODS)
        yield f"| {title} ([{family}.py](../pipelines/families/{family}.py)) | " + " | ".join(cells) + " |"


@pytest.mark.parametrize(
    "first, rows",
    (
        ("<!-- the families of pipelines/families/registry.py -->\n", family_rows),
        ("<!-- what tests/recipes/test_matrix.py ran -->\n", matrix_rows),
    ),
)
def test_the_page_says_what_runs(first, rows):
    head, _, rest = PAGE.read_text().partition(first)
    table, _, tail = rest.partition("<!-- end -->")
    written = "\n".join(rows()) + "\n"
    if os.environ.get("DISTILL_WRITE"):
        PAGE.write_text(head + first + written + "<!-- end -->" + tail)
    else:
        assert table == written
