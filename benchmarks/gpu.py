"""What a GPU shows in ten minutes, the most important rows first. It writes docs/gpu.md and docs/gpu.json.

    agreement   losses and gradients of five methods on the digits' network: those of the GPU against those of the CPU
    waits       how often a step of the loop waits for the GPU
    resume      a run that was interrupted, against the same run without a break, bit for bit
    SDXL        a step of DMD2 at the size of SDXL with random weights: seconds, TFLOP/s, memory

Every row is on the disk when it ends: the script may be stopped at any time. `--tiny` rehearses all of it on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from benchmarks import digits, sdxl

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from distill.training.state import State

# Relative errors (loss, gradient) that a row allows. On a CPU bfloat16 is off by at most .0009 and .02 of float32.
LIMITS = {"no": (1e-4, 1e-3), "bf16": (0.01, 0.1)}
BATCH = 64  # of the digits' network
HEADERS = {
    "agreement": "Losses and gradients: relative distance of the GPU's from the CPU's in float32. Allowed are "
    f"{LIMITS['no']} in float32 and {LIMITS['bf16']} in bfloat16",
    "waits": "Times a step that the host waits for the GPU: once a player, to see that its gradient is finite",
    "resume": "A resumed run against the uninterrupted one",
    "sdxl": "A step at the size of SDXL, with random weights",
}


@dataclass(frozen=True)
class Bench:
    """What to measure, and for how long."""

    tiny: bool = False  # rehearse on any machine, on narrow networks
    output: Path | None = None  # folder of gpu.md and gpu.json; None: docs (a rehearsal: runs/gpu)
    minutes: float = 10.0  # no measurement starts later than this
    only: tuple[str, ...] = ()  # sections to measure; (): all


@dataclass
class Row:
    """One line of a table: the measured figures, and the reason if they are wrong."""

    section: str
    name: str
    figures: dict[str, str] = field(default_factory=dict)
    fault: str | None = None  # why the row fails


Measure = Callable[[], Row]


def use_device(place: str, precision: str) -> Accelerator:
    """An accelerator on "cpu" or on the GPU. The one before it, a state of the process, is dropped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return Accelerator(cpu=place == "cpu", mixed_precision=precision)


def build_nets(method: Any) -> tuple[Any, Any]:
    """(teacher, roles) on the digits' network with the random weights of one seed.

    Every role has weights of its own: where student, fake score and teacher are equal, the gradients of score
    distillation are differences of equal numbers.
    """
    import torch

    from distill.training.build import build
    from distill.training.config import StudentConfig
    from pipelines.families import edm

    torch.manual_seed(0)
    teacher = edm.teacher(edm.unet((32, 64)), 0.75, 10)
    nets = build(method, teacher.denoiser, teacher.shape, teacher.encode([0]), StudentConfig(sigma=2.5))
    with torch.no_grad():
        for net in nets.modules().values():
            for weight in net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return teacher, nets


def gradients(method: Any, place: str, mode: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By player, the loss and the gradient [n] of its first update in float64 on the CPU, the draws always the same."""
    import torch

    from distill.data import Digits
    from distill.random import Draw
    from distill.training import precision
    from distill.training.config import TrainConfig
    from distill.training.prepare import prepare_state
    from distill.training.step import set_trainable

    accelerator = use_device(place, mode)
    _, nets = build_nets(method)
    state = prepare_state(nets, Digits(), TrainConfig(train_batch_size=BATCH), accelerator)
    players = {name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}
    samples = torch.arange(BATCH, device=accelerator.device)
    found = {}
    for update in method.updates():
        set_trainable(players, update.player)
        draw = Draw(0, 0, update.player, samples)
        batch = Digits()(draw)
        with precision.autocast(accelerator):
            with torch.set_grad_enabled(update.player == "student"):
                x = method.sample(nets, batch, draw)
            loss, _ = update.loss(x, nets, batch, draw)
        parts = torch.autograd.grad(loss, players[update.player], materialize_grads=True, allow_unused=True)
        gradient = torch.cat([part.detach().flatten().double().cpu() for part in parts])
        found[update.player] = loss.detach().double().cpu(), gradient
    return found


def compare_gradients(name: str, place: str) -> Row:
    """The losses and gradients of a method in float32 and bfloat16 on the device, against float32 on the CPU."""
    method = digits.methods()[name]
    row = Row("agreement", name)
    reference = gradients(method, "cpu", "no")
    faults = []
    for precision, limits in LIMITS.items():
        errors = [0.0, 0.0]
        for player, values in gradients(method, place, precision).items():
            for i, (value, wanted) in enumerate(zip(values, reference[player], strict=True)):
                error = float((value - wanted).norm() / wanted.norm().clamp(min=1e-20))
                errors[i] = error if error != error else max(errors[i], error)
        kind = "float32" if precision == "no" else "bfloat16"
        row.figures[f"loss, {kind}"], row.figures[f"gradient, {kind}"] = (f"{error:.1e}" for error in errors)
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            faults.append(f"{kind} exceeds the limits {limits}")
    row.fault = "; ".join(faults) or None
    return row


def count_waits(name: str, place: str) -> Row:
    """How often the host waits in a step of train(), the batch being on the device already.

    On a CPU, where every number that Python reads is counted, the scale of a player's input is one more.
    """
    import torch

    from distill.training.config import TrainConfig
    from distill.training.loop import train

    method = digits.methods()[name]
    accelerator = use_device(place, "bf16")
    teacher, nets = build_nets(method)
    label = torch.arange(BATCH, device=accelerator.device) % 10
    real = torch.randn(BATCH, *teacher.shape, device=accelerator.device)
    batch = {"c": {"class_labels": label}, "real": real, "real_c": {"class_labels": label}}
    settings = TrainConfig(max_train_steps=10**9, train_batch_size=BATCH)
    with closing(train(method, nets, lambda draw: dict(batch), settings, accelerator)) as states:  # type: ignore[type-var]
        for _ in range(3):
            next(states)
        waits = sdxl.host_reads(lambda: next(states))
    players = len({update.player for update in method.updates()})
    allowed = players if place == "cuda" else 2 * players
    fault = f"more than {allowed}" if waits > allowed else None
    return Row("waits", name, {"waits": f"{waits}", "players": f"{players}"}, fault)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Kernels that give the same bits again."""
    import torch

    from distill.training import precision

    precision.deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def train_until(last: int, method: Any, place: str, resume: Path | None = None) -> State:
    """The state after `last` steps."""
    from distill.data import Digits
    from distill.training.config import TrainConfig
    from distill.training.loop import train

    accelerator = use_device(place, "bf16")
    settings = TrainConfig(max_train_steps=last, train_batch_size=BATCH, deterministic=True)
    *_, state = train(method, build_nets(method)[1], Digits(), settings, accelerator, resume)
    return state


def compare_resume(name: str, place: str) -> Row:
    """Four steps, against two steps, a checkpoint, and two more."""
    import torch

    from distill.training import checkpoint

    method = digits.methods()[name]
    with deterministic_kernels(), tempfile.TemporaryDirectory() as folder:
        whole = train_until(4, method, place)
        saved = checkpoint.save(train_until(2, method, place), Path(folder))
        resumed = train_until(4, method, place, saved)
    differ = total = 0
    for role, net in whole.nets.modules().items():
        other = resumed.nets.modules()[role].state_dict()
        for key, tensor in net.state_dict().items():
            total += 1
            differ += not torch.equal(tensor, other[key])
    fault = f"{differ} of {total} tensors differ" if differ else None
    return Row("resume", name, {"tensors": f"{total}", "differ": f"{differ}"}, fault)


def measure_sdxl(name: str, cfg: Bench) -> Row:
    """One of the cases of `make sdxl`, with two measured cycles."""
    import torch

    bench = sdxl.Bench(tiny=cfg.tiny, cycles=1 if cfg.tiny else 2, rank=2 if cfg.tiny else 64)
    result = sdxl.measure(name, sdxl.cases()[name], bench, sdxl.largest_product(cfg.tiny))
    gc.collect()
    torch.cuda.empty_cache()
    number = lambda value, form: "-" if value is None else format(value, form)
    return Row(
        "sdxl",
        name,
        {
            "student and fake step, s": f"{result.student_step:.3g}",
            "fake step, s": number(result.fake_step, ".3g"),
            "TFLOP/s": f"{result.tflops:.3g}",
            "of the largest product": f"{result.share:.1%}",
            "peak GiB": number(result.peak_gib, ".1f"),
            "waits a step": f"{result.host_reads:.1f}",
        },
    )


def rows(cfg: Bench, place: str) -> list[tuple[str, str, Measure]]:
    """(section, name, function that measures it), in order of importance."""
    cases = ("DMD2 LoRA", "DMD2 full", "DMD2 LoRA, float32", "DMD2 LoRA, blocks kept", "SiD LoRA")
    made: list[tuple[str, str, Measure]] = []
    made += [("agreement", m, lambda m=m: compare_gradients(m, place)) for m in digits.PASSES]  # type: ignore[misc]
    made += [("waits", m, lambda m=m: count_waits(m, place)) for m in digits.PASSES]  # type: ignore[misc]
    made += [("resume", m, lambda m=m: compare_resume(m, place)) for m in ("DMD2", "SiD")]  # type: ignore[misc]
    made += [("sdxl", m, lambda m=m: measure_sdxl(m, cfg)) for m in cases[: 2 if cfg.tiny else None]]  # type: ignore[misc]
    return [row for row in made if not cfg.only or row[0] in cfg.only]


def render_page(done: list[Row], pending: list[str], seconds: float, cfg: Bench) -> str:
    """The page in Markdown."""
    import torch

    lines = [
        f"# On a GPU: {sdxl.hardware()}",
        "",
        f"`make gpu`: torch {torch.__version__}, CUDA {torch.version.cuda}, {seconds:.0f} seconds.",
    ]
    if cfg.tiny:
        lines += [
            "",
            "**A rehearsal on narrow networks: it shows that the script runs, not how a GPU behaves.**",
        ]
    for section, header in HEADERS.items():
        table = [row for row in done if row.section == section]
        if not table:
            continue
        names = next((list(row.figures) for row in table if row.figures), [])
        title, _, note = header.partition(". ")
        lines += [
            "",
            f"## {title}",
            *[f"{note}."] * bool(note),
            "",
            f"| {' | '.join(['', *names, 'verdict'])} |",
            "|---" * (len(names) + 2) + "|",
        ]
        for row in table:
            figures = [row.figures.get(name, "-") for name in names]
            lines.append(f"| {' | '.join([row.name, *figures, row.fault or 'right'])} |")
    if pending:
        lines += ["", f"Not reached in time: {', '.join(pending)}."]
    return "\n".join(lines) + "\n"


def run_row(section: str, name: str, measure: Measure) -> Row:
    """The measured row, or a row with the error, so that one failure does not stop the others."""
    import torch

    try:
        return measure()
    except torch.OutOfMemoryError:
        return Row(section, name, fault="out of memory")
    except Exception as error:
        return Row(section, name, fault=f"{type(error).__name__}: {error}".replace("|", "/").replace("\n", " ")[:200])


def main(cfg: Bench) -> int:
    """Measure the rows; the exit status is 1 if one is wrong."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first call of CUDA
    import torch

    place = sdxl.device()
    if unknown := set(cfg.only) - HEADERS.keys():
        raise SystemExit(f"error: no section {sorted(unknown)}; there are {list(HEADERS)}")
    if place == "cpu" and not cfg.tiny:
        raise SystemExit("error: torch sees no GPU here; --tiny rehearses on the CPU")
    out = cfg.output or Path("runs/gpu" if cfg.tiny else "docs")
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started = time.monotonic()
    done = []
    todo = rows(cfg, place)
    for i, (section, name, measure) in enumerate(todo):
        seconds = time.monotonic() - started
        if seconds > 60 * cfg.minutes:
            break
        sys.stderr.write(f"{seconds:5.0f} s  {i + 1} of {len(todo)}  {section}: {name}\n")
        torch.backends.cuda.matmul.allow_tf32 = section == "sdxl"
        done.append(run_row(section, name, measure))
        pending = [f"{section} of {name}" for section, name, _ in todo[len(done) :]]
        page = render_page(done, pending, time.monotonic() - started, cfg)
        (out / "gpu.md").write_text(page)
        facts = {"hardware": sdxl.hardware(), "torch": torch.__version__, "tiny": cfg.tiny}
        text = json.dumps({**facts, "rows": [asdict(row) for row in done], "pending": pending}, indent=1)
        (out / "gpu.json").write_text(text + "\n")
    sys.stdout.write((out / "gpu.md").read_text())
    return int(any(row.fault for row in done))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Bench, use_underscores=True, description=__doc__)))
