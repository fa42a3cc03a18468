"""Every method on every family of teachers, full and as LoRA, two steps each; the README's table says what ran here.

DISTILL_WRITE=1 python -m pytest tests/test_matrix.py    writes that table
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.lora import LoRA
from distill.methods import DMD2, LCD, SCM, VSD, SiD
from distill.roles import FakeConfig, StudentConfig, build
from distill.schedule import VP
from distill.trainer import TrainConfig, train
from pipelines import FAMILIES, load, tiny

README = Path(__file__).resolve().parent.parent / "README.md"
NAMES = {
    "sd": "SD 1.5, 2.1",
    "sdxl": "SDXL",
    "sd3": "SD 3, 3.5",
    "flux": "FLUX.1",
    "pixart": "PixArt",
    "sana": "SANA",
    "qwen": "Qwen-Image",
    "wan": "Wan 2.x video",
    "edm": "EDM, pixels",
}
METHODS = {
    "SiD": lambda taps: SiD(alpha=1.0, kappa=(1.5, 1.5, 1.5, 1.5)),
    "DMD2": lambda taps: DMD2(guidance=2.0, every=1, taps=taps),
    "VSD": lambda taps: VSD(guidance=2.0),
    "CD / LCM": lambda taps: LCD(guidance=2.0),
    "sCM": lambda taps: SCM(guidance=2.0, warmup=1),
}
RAN = {}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {}

    def teacher(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder)
            made[name] = load(folder)
            made[name].null()
        return made[name]

    return teacher


def test_every_family_has_a_name():
    assert NAMES.keys() == set(FAMILIES.values())


@pytest.mark.parametrize("adapted", (False, True), ids=("full", "lora"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", NAMES)
def test_trains(family, method, adapted, teachers):
    """The losses are finite, every player moves, the teacher does not."""
    teacher = teachers(family)
    module, B = teacher.parts.family, 2
    prompts = [0, 1] if family == "edm" else ["a cat", "a dog on the moon"]
    c = teacher.encode(prompts)
    lora = LoRA(2, 2.0, getattr(module, "TARGETS", ("conv1", "conv2"))) if adapted else LoRA()
    unit = 1.0 if isinstance(teacher.denoiser.schedule, VP) else None
    steps = 2 if method in ("SiD", "DMD2") else 1
    algorithm = METHODS[method](getattr(module, "TAPS", ("mid_block",)))
    student = StudentConfig(steps=steps, scale=unit, lora=lora)
    nets = build(
        algorithm,
        replace(teacher.denoiser),
        teacher.shape,
        {k: v[:1] for k, v in c.items()},
        student,
        FakeConfig(lora=lora),
    )
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.modules().items()}
    frozen = [p.detach().clone() for p in teacher.denoiser.net.parameters()]

    def data(draw):
        return {"c": c, "real": draw.normal("real", (B, *teacher.shape)), "real_c": c}

    cfg = TrainConfig(max_train_steps=2, train_batch_size=B, learning_rate=1e-3, lr_warmup_steps=0)
    for state in train(algorithm, nets, data, cfg, Accelerator(cpu=True)):
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in state.logs.values())
    for role, net in nets.modules().items():
        assert any(not torch.equal(a, b) for a, b in zip(before[role], net.parameters(), strict=True)), role
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.denoiser.net.parameters(), strict=True))
    RAN.setdefault((family, method), []).append("LoRA" if adapted else "full")


def test_the_readme_says_what_ran(request):
    if len(RAN) < len(NAMES) * len(METHODS):  # a selection of the tests, or a failure that is reported above
        assert request.session.testsfailed or len(request.session.items) < len(NAMES) * len(METHODS)
        return
    rows = ["| teacher | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for family, title in NAMES.items():
        cells = (", ".join(RAN.get((family, method), ["-"])) for method in METHODS)
        rows.append(f"| {title} ([{family}.py](pipelines/{family}.py)) | " + " | ".join(cells) + " |")
    first, last = "<!-- what tests/test_matrix.py ran -->\n", "<!-- end -->"
    text = README.read_text()
    head, _, rest = text.partition(first)
    table, _, tail = rest.partition(last)
    if os.environ.get("DISTILL_WRITE"):
        README.write_text(head + first + "\n".join(rows) + "\n" + last + tail)
    else:
        assert table == "\n".join(rows) + "\n"
