"""A family of teachers: all that this project must know of a kind of diffusers pipeline, and a teacher of that kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import Guided
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines.components import Network, Parts, Scheduler

Task = Literal["text-to-image", "text-to-video", "unconditional-image-generation"]
EXAMPLES = ("a photo of a red fox in the snow", "an old man reading a newspaper under a lamp")
KL = {"block_out_channels": (128, 256, 512, 512)}  # the autoencoders of SD, SDXL, SD3, FLUX and PixArt: factor 8
FLOW: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})


@dataclass(eq=False)
class Teacher:
    """A diffusers pipeline as a denoiser.

    encode   prompts (or class labels), a list of B -> c with B rows; loads the text encoders at its first call.
    decode   x [B, *shape] -> images [B, C, H, W], videos [B, C, T, H, W], in [-1, 1].
    latent   images in [-1, 1] and eps [B, *shape] -> x, a sample of the VAE's posterior; pixel models: the images.
    shape    of one sample, (C, H, W), video (C, T, H, W).
    parts    the folder it comes from.
    encode_negative   the same as `encode` for negative prompts, where the pipeline encodes these differently.
    """

    denoiser: Denoiser
    encode: Callable[[Sequence[Any]], Condition]
    decode: Callable[[Tensor], Tensor]
    latent: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    parts: Parts
    family: Family
    encode_negative: Callable[[Sequence[Any]], Condition] | None = None

    def __post_init__(self) -> None:
        self.encode = torch.no_grad()(self.encode)

    @torch.no_grad()
    def negative(self, prompts: Sequence[Any]) -> Condition:
        """The condition of negative prompts."""
        return (self.encode_negative or self.encode)(prompts)

    def null(self) -> Condition:
        """The condition of "no prompt", kept in denoiser.null: that of the empty prompt where none is given yet."""
        if self.denoiser.null is None:
            self.denoiser.null = self.negative([""])
        return self.denoiser.null

    @torch.no_grad()
    def sample(self, z: Tensor, c: Condition, steps: int, guidance: float = 1.0, null: Condition = None) -> Tensor:
        """x [B, *shape] of the teacher under its own scheduler, from unit noise z; null: of a negative prompt."""
        base = replace(self.denoiser, null=null or (self.null() if guidance != 1 else None))
        guided = self.family.guided(base, guidance)
        scheduler = self.parts.scheduler()
        self.set_timesteps(scheduler, steps)
        last = float(base.schedule.native(torch.ones(1, dtype=torch.float64)))
        x = z * getattr(scheduler, "init_noise_sigma", 1.0)
        for n in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, n) if hasattr(scheduler, "scale_model_input") else x
            t = (n.double() / last).expand(len(x)).to(x.device)
            x = scheduler.step(guided(scaled, t, c).out, n, x, return_dict=False)[0]
        return x

    def set_timesteps(self, scheduler: Scheduler, steps: int) -> None:
        """Set the timesteps of `steps` calls as the family's pipeline sets them."""
        if self.family.set_timesteps is None:
            scheduler.set_timesteps(steps)
        else:
            self.family.set_timesteps(scheduler, steps, self)


@dataclass(frozen=True)
class Model:
    """A denoising network of a published pipeline, as configs: enough to build it without weights and files.

    config: the fields of the repository's config.json (unet/ or transformer/) that differ from the class's defaults.
    """

    hub: str  # the repository whose configs these are, and whose weights they describe
    pipeline: str  # _class_name of its model_index.json
    network: str  # class of its unet/ or transformer/
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] = FLOW
    vae: dict[str, Any] = field(default_factory=lambda: KL)


def refuse_guidance_embedding(net: Network, parts: Parts) -> Any:
    """`net` if it has a guidance embedding, as FLUX.1-dev and LCMs have; else a ValueError."""
    if net.config.get("guidance_embeds") or net.config.get("time_cond_proj_dim"):
        return net
    raise ValueError(
        f"a range of guidance needs a guidance embedding, but the network of {parts.folder} has none: "
        "give --method.guidance one number"
    )


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of pipeline. Every module of pipelines/families/ that assigns one to FAMILY is found by the registry.

    c is a condition: a dict of tensors of fixed shape, batch first. z is unit noise [B, *shape].
    """

    name: str  # of its module
    title: str  # in the README's table
    pipelines: tuple[str, ...]  # classes of diffusers: _class_name of model_index.json

    # ---- the teacher ----
    load: Callable[[Parts, int | None, int | None], Teacher]  # (parts, resolution, frames)
    sample: Callable[..., Tensor]  # (pipe, prompts, z, steps, guidance, negative=None) -> images of the pipeline itself
    tiny: Callable[..., Any]  # a tiny random pipeline, built without files
    condition: Callable[[Any], dict[str, tuple[int, ...]]]  # config of the network -> the shapes of c for one sample
    blocks: tuple[str, ...]  # classes of the modules that are sharded one by one
    taps: tuple[str, ...]  # modules whose outputs are a discriminator's features, where a method names none
    student_schedulers: Callable[[Teacher, StudentConfig], Iterable[Any]]  # candidates whose configs carry the student
    no_guidance: float  # `guidance` of `sample` with which the pipeline makes one call a step
    lora_targets: tuple[str, ...] = ()  # modules of a LoRA; (): exports of this family have no single files
    task: Task = "text-to-image"
    cross_attention: bool = True  # the network reads prompts by cross-attention (NASA-T and SUN need it)
    pads_to_longest: bool = False  # prompts, to the longest of a call: rows depend on their neighbours
    guided: type[Guided] = Guided  # classifier-free guidance as the pipeline does it
    set_timesteps: Callable[[Any, int, Teacher], None] | None = None  # None: scheduler.set_timesteps(steps)
    draw_noise: Callable[[Sequence[int]], Tensor] = torch.randn  # as the pipeline's scheduler draws it
    with_guidance_embedding: Callable[[Any, Parts], Any] = refuse_guidance_embedding  # of the network
    embedded_index: dict[str, Any] = field(default_factory=dict)  # what it changes in model_index.json
    tiny_facts: dict[str, Any] = field(default_factory=dict)  # distill.json of the tiny pipeline
    models: dict[str, Model] = field(default_factory=dict)  # published networks, for pipelines.plan

    # ---- the export ----
    call_times: Callable[[Any, int], tuple[float, ...] | None] = lambda scheduler, steps: None  # None: the scheduler's
    call_options: Callable[[Parts, int], dict[str, Any]] = lambda parts, steps: {}  # of the call that a card shows
    render_call: Callable[[int, Any], str] | None = None  # (steps, example) -> that call, where it is none of a prompt
    examples: Callable[[Teacher], tuple[Any, ...]] = lambda teacher: EXAMPLES  # prompts or labels of the verification
    verified_steps: Callable[[Parts], tuple[int, ...]] = lambda parts: ()  # numbers of calls beside the student's own
    export_network: Callable[[Any, Student], Any] = lambda net, student: net  # as the pipeline calls it
    export_call: Callable[[Any], Any] = lambda call: call  # of a denoiser: equal to the pipeline's
    limits: Callable[[Any], tuple[str, ...]] = lambda net: ()  # of a network: what a card says does not work
