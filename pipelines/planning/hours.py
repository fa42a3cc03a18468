"""The time of a run: its FLOPs over the rates of GPUs, at the shares of the peak that published runs reached."""

from __future__ import annotations

from typing import NamedTuple

TFLOP = 1e12


class Chip(NamedTuple):
    """A GPU. peak: dense bfloat16 matrix peak with float32 sums, TFLOP/s. memory: GB. source: of the peak."""

    peak: float
    memory: int
    source: str


CHIPS = {  # from the vendors' data sheets
    "A100": Chip(312.0, 80, "NVIDIA A100 data sheet"),
    "H100 SXM": Chip(989.4, 80, "NVIDIA H100 data sheet, half of the figure with sparsity"),
    "H200": Chip(989.5, 141, "NVIDIA H200 data sheet, half of the figure with sparsity"),
    "B200": Chip(2250.0, 180, "NVIDIA DGX B200 data sheet, an eighth of the system's, without sparsity"),
    "MI300X": Chip(1307.4, 192, "AMD Instinct MI300X data sheet"),
    "L40S": Chip(362.05, 48, "NVIDIA L40S data sheet"),
    "RTX 3090": Chip(71.0, 24, "NVIDIA GA102 white paper"),
    "RTX 4090": Chip(165.2, 24, "NVIDIA Ada white paper"),
    "RTX 5090": Chip(209.5, 32, "NVIDIA RTX Blackwell white paper"),
}


class PublishedRun(NamedTuple):
    """A run whose authors report its time. hours: of all `gpus` together, by the clock. steps, batch: of the run.

    recipe: the name of the recipe with its values. flags: what differs from it. variant: in words, what differs beside
    the launch. flops: of the run as its authors ran it, by `plan`.
    """

    recipe: str
    flags: str
    variant: str
    chip: str
    gpus: int
    hours: float
    steps: int
    batch: int
    flops: float
    source: str

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    @property
    def peak_share(self) -> float:
        """The share of the chip's peak that the run reached."""
        return self.flops / (self.gpu_hours * 3600 * CHIPS[self.chip].peak * TFLOP)


DMD2 = "experiments/{}/README.md of github.com/tianweiy/DMD2"
PLAIN = "--no_gradient_checkpointing"  # FSDP took its place
PUBLISHED = (
    PublishedRun("dmd2_imagenet64", PLAIN, "", "A100", 7, 53, 200_000, 280, 8.23086e19, DMD2.format("imagenet")),
    PublishedRun(
        "dmd2_imagenet64",
        f"{PLAIN} --method.gan 0 --method.gan_fake 0 --max_train_steps 410000",
        "without its GAN",
        "A100",
        7,
        70,
        410_000,
        280,
        1.21701e20,
        DMD2.format("imagenet"),
    ),
    PublishedRun("dmd2_sdxl", PLAIN, "", "A100", 64, 57, 19_000, 128, 1.54758e20, DMD2.format("sdxl")),
    PublishedRun(
        "dmd2_sdxl",
        f"{PLAIN} --student.steps 1 --max_train_steps 24000",
        "one step",
        "A100",
        64,
        57,
        24_000,
        128,
        1.64328e20,
        DMD2.format("sdxl"),
    ),
    PublishedRun("dmd2_sdxl_lora", PLAIN, "", "A100", 64, 63, 16_000, 128, 1.3118e20, DMD2.format("sdxl")),
    PublishedRun("dmd2_sd15", "", "", "A100", 64, 25, 39_000, 2048, 3.46265e20, DMD2.format("sdv1.5")),
)
SHARES = (min(run.peak_share for run in PUBLISHED), max(run.peak_share for run in PUBLISHED))


class Range(NamedTuple):
    """An estimate between two bounds."""

    low: float
    high: float

    def divide(self, n: float) -> Range:
        return Range(self.low / n, self.high / n)

    def __str__(self) -> str:
        low, high = map(format_hours, self)
        return low if low == high else f"{low} to {high}"


def format_hours(hours: float) -> str:
    """Hours with two significant digits, of less than an hour with one."""
    if hours < 1:
        return f"{hours:.1g}"
    digits = max(1 - len(f"{int(hours)}"), -9) + 1
    return f"{round(hours, digits):,g}" if digits > 0 else f"{int(round(hours, digits)):,}"


def gpu_hours(flops: float, chip: str, share: float | None = None) -> Range:
    """Hours of one GPU. share: of its peak; None: from the highest to the lowest of published runs."""
    low, high = (share, share) if share else SHARES
    peak = CHIPS[chip].peak * TFLOP * 3600
    return Range(flops / (peak * high), flops / (peak * low))


def find_published(recipe: str) -> list[PublishedRun]:
    """The published runs of a recipe."""
    return [run for run in PUBLISHED if run.recipe == recipe]
