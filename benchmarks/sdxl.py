"""What SDXL costs on this machine: its UNet from the public config with random weights, at 1024 pixels, in train().

The DMD2 four-step cycle and SiD, full and LoRA; then DMD2-LoRA with each saving taken away. A step is the loop's own:
losses, backward, clipping, optimizer, average. TFLOP/s are counted without recomputed blocks, over the largest product
of matrices that this chip was seen to do. `--tiny` is a narrow network, for CI: its figures say nothing about SDXL.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.digits import clock

TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    tiny: bool = False  # a narrow network
    output: Path | None = Path("runs/bench")  # folder of sdxl.json and sdxl.md; None: the terminal only
    only: tuple[str, ...] = ()  # cases by name; none: all
    batch: int = 1
    cycles: int = 4  # measured, after one that warms up
    rank: int = 64
    cap: float | None = None  # GiB of the GPU that may be used: 22 for a 24 GB card


@dataclass(frozen=True)
class Case:
    """One configuration of the loop."""

    method: Any
    lora: bool = True
    half: bool = True  # bfloat16 autocast, and a bfloat16 backbone
    checkpointing: bool = True
    steps: int = 4  # calls of the student


@dataclass(frozen=True)
class Result:
    """Seconds are medians; the peak of memory is CUDA's allocator's, None on a CPU."""

    name: str
    student_step: float  # a step in which both players move
    fake_step: float | None  # a step of the fake score alone
    tflops: float  # TFLOP/s over a cycle, without recomputation
    share: float  # of the largest product
    peak_gib: float | None
    host_reads: float  # times a step that the host waits for a number of the device
    modules: list[str] = field(default_factory=list)  # networks that ran


def cases() -> dict[str, Case]:
    from distill.methods import DMD2, SiD

    best = DMD2(guidance=8.0, share=True, walk=True)
    sid = SiD(kappa=(0.0, 0.0, 0.0, 1.0))  # Zero-CFG: nothing is called twice
    lora = Case(best)
    return {
        "DMD2 full": replace(lora, lora=False),
        "DMD2 LoRA": lora,
        "DMD2 LoRA, prompts alone": replace(lora, method=replace(best, gan=0.0, gan_fake=0.0)),
        "SiD full": Case(sid, lora=False),
        "SiD LoRA": Case(sid),
        "DMD2 LoRA, float32": replace(lora, half=False),
        "DMD2 LoRA, blocks kept": replace(lora, checkpointing=False),
        "DMD2 LoRA, two fake passes": replace(lora, method=replace(best, share=False)),
        "DMD2 LoRA, new samples each step": replace(lora, method=replace(best, walk=False)),
        "DMD2 LoRA, as published": replace(lora, method=replace(best, share=False, walk=False)),
    }


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    import torch

    return torch.cuda.get_device_name() if device() == "cuda" else f"CPU ({platform.machine()}), one thread"


def largest_product(tiny: bool) -> float:
    """TFLOP/s of the best of some products of bfloat16 matrices."""
    import torch

    n = 256 if tiny else 8192
    a, b = torch.randn(2, n, n, device=device(), dtype=torch.bfloat16)
    runs = [clock(lambda: a @ b) for _ in range(30)]
    return 2 * n**3 / min(runs[5:]) / 1e12


def roles(case: Case, cfg: Bench, place: str) -> tuple[Any, Any, dict[str, Any]]:
    """(teacher, roles, condition of one sample) of a case on a device; on "meta" they have shapes alone."""
    import torch

    from distill.networks.lora import LoRA
    from distill.training.build import build
    from distill.training.config import FakeConfig, StudentConfig
    from pipelines.planning.models import MODELS, Meta
    from pipelines.teacher import teacher_of

    model = MODELS["sdxl"]
    if cfg.tiny:
        model = replace(model, config=model.config | TINY)
    parts = Meta(model, device=place)
    teacher = teacher_of(parts)
    c = {name: torch.zeros(1, *shape, device=place) for name, shape in parts.condition().items()}
    lora = LoRA(cfg.rank, float(cfg.rank), parts.family.lora_targets) if case.lora else LoRA()
    with torch.device(place):
        student = StudentConfig(steps=case.steps, lora=lora)
        nets = build(case.method, teacher.denoiser, teacher.shape, c, student, FakeConfig(lora))
    if case.half:
        for p in teacher.denoiser.net.parameters():  # adapters share these
            p.data = p.data.to(torch.bfloat16)
    return teacher, nets, c


@contextmanager
def ran() -> Iterator[set[str]]:
    """The libraries' networks that run inside, by class."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    found: set[str] = set()

    def note(module: Any, args: Any) -> None:
        origin = type(module).__module__
        if origin.startswith("transformers.") or origin.startswith("diffusers.models.autoencoders."):
            raise AssertionError(f"a {type(module).__name__} runs in the loop: text and latents are to be cached")
        if origin.startswith("diffusers.models.") and type(module).__name__.endswith(("Model", "ConditionModel")):
            found.add(type(module).__name__)

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def host_reads(run: Any) -> int:
    """How often the host waits for the device in run(); on a CPU, how often a tensor becomes a number of Python's."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    if device() == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Reads() as reads:
        run()
    return reads.number


def measure(name: str, case: Case, cfg: Bench, peak: float) -> Result:
    """One case: its steps in train(), cycle after cycle."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from distill.training.config import TrainConfig
    from distill.training.loop import train
    from pipelines.planning.flop_counter import cost

    _, nets, c = roles(case, cfg, "meta")
    counted = cost(case.method, nets, c, cfg.batch, half=False, fused=False)
    teacher, nets, c = roles(case, cfg, device())
    many = {key: value.expand(cfg.batch, *value.shape[1:]) for key, value in c.items()}
    real = torch.randn(cfg.batch, *teacher.shape, device=device())

    def data(draw: Any) -> dict[str, Any]:
        return {"c": dict(many), "real": real, "real_c": dict(many)}

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16" if case.half else "no")
    settings = TrainConfig(
        max_train_steps=10**9,
        train_batch_size=cfg.batch,
        learning_rate=1e-7,
        max_grad_norm=10.0,
        gradient_checkpointing=case.checkpointing,
    )
    loop = train(case.method, nets, data, settings, accelerator)
    step = lambda: next(loop)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ran() as modules:
        for _ in range(counted.cycle):
            step()
    seconds = [[clock(step) for _ in range(counted.cycle)] for _ in range(cfg.cycles)]
    reads = [host_reads(step) for _ in range(counted.cycle)]
    loop.close()
    AcceleratorState._reset_state(True)  # the next one in this process may want another precision
    flops = counted.flops * counted.cycle
    rate = flops / statistics.mean(sum(cycle) for cycle in seconds) / 1e12
    return Result(
        name,
        statistics.median(cycle[0] for cycle in seconds),
        statistics.median(t for cycle in seconds for t in cycle[1:]) if counted.cycle > 1 else None,
        rate,
        rate / peak,
        torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else None,
        statistics.mean(reads),
        sorted(modules),
    )


def table(results: list[Result], failed: dict[str, str], cfg: Bench, peak: float) -> str:
    """The page."""
    import torch

    what = "a narrow network, to see that everything runs: no figure of SDXL" if cfg.tiny else "2,567,463,684 weights"
    lines = [
        f"# SDXL in the loop: {hardware()}",
        "",
        f"`make sdxl`: {what}; batch {cfg.batch}, random weights, torch {torch.__version__}, medians of "
        f"{cfg.cycles} cycles.",
        f"Largest product of bfloat16 matrices seen: {peak:.3g} TFLOP/s. Adapters have rank {cfg.rank}."
        + (f" Memory was capped at {cfg.cap:g} GiB." if cfg.cap else ""),
        "",
        "| case | student and fake step, s | fake step, s | TFLOP/s | of the peak | peak GiB | host reads a step |",
        "|---|---|---|---|---|---|---|",
    ]
    number = lambda value, form: "-" if value is None else format(value, form)
    for r in results:
        lines.append(
            f"| {r.name} | {r.student_step:.3g} | {number(r.fake_step, '.3g')} | {r.tflops:.3g} | {r.share:.1%} "
            f"| {number(r.peak_gib, '.1f')} | {r.host_reads:.1f} |"
        )
    lines += [f"| {name} | {why} | | | | | |" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def main(cfg: Bench) -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    chosen = {name: case for name, case in cases().items() if not cfg.only or name in cfg.only}
    if unknown := set(cfg.only) - chosen.keys():
        raise SystemExit(f"error: no case {sorted(unknown)}; there are {list(cases())}")
    if device() == "cpu" and not cfg.tiny:
        raise SystemExit("error: no GPU here; --tiny runs a narrow network on the CPU")
    if cfg.cap is not None and device() == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.cap / total))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    peak = largest_product(cfg.tiny)
    results = []
    failed = {}
    for name, case in tqdm(chosen.items(), desc="cases", unit="case"):
        try:
            results.append(measure(name, case, cfg, peak))
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
        gc.collect()
        torch.cuda.empty_cache()
    text = table(results, failed, cfg, peak)
    sys.stdout.write(text)
    if cfg.output is not None:
        cfg.output.mkdir(parents=True, exist_ok=True)
        (cfg.output / "sdxl.md").write_text(text)
        facts = {"hardware": hardware(), "torch": torch.__version__, "tiny": cfg.tiny, "batch": cfg.batch, "peak": peak}
        found = {**facts, "results": [asdict(r) for r in results], "failed": failed}
        (cfg.output / "sdxl.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True, description=__doc__))
