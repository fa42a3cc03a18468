"""A family of teachers: everything that this project needs to know about a kind of diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Call, Condition, Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines.components import Parts
from pipelines.protocols import Config, Network, Pipeline, Scheduler

Task = Literal["text-to-image", "text-to-video", "unconditional-image-generation"]
EXAMPLES = ("a photo of a red fox in the snow", "an old man reading a newspaper under a lamp")
# The autoencoders of SD, SDXL, SD3, FLUX and PixArt: factor 8.
KL: dict[str, object] = {"block_out_channels": (128, 256, 512, 512)}
FLOW: tuple[str, dict[str, object]] = ("FlowMatchEulerDiscreteScheduler", {})


@dataclass(eq=False)
class Teacher:
    """A diffusers pipeline as a denoiser.

    encode   prompts (or class labels), a list of B -> c with B rows; loads the text encoders at its first call.
    decode   x [B, *shape] -> images [B, C, H, W], videos [B, C, T, H, W], in [-1, 1].
    latent   images in [-1, 1] and eps [B, *shape] -> x, a sample of the VAE's posterior; pixel models: the images.
    shape    shape of one sample, (C, H, W), or (C, T, H, W) for video.
    parts    components of the pipeline folder.
    encode_negative   `encode` for negative prompts, if the pipeline encodes them differently.
    """

    denoiser: Denoiser
    encode: Callable[..., Condition]
    decode: Callable[[Tensor], Tensor]
    latent: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    parts: Parts
    family: Family
    encode_negative: Callable[..., Condition] | None = None

    def __post_init__(self) -> None:
        self.encode = torch.no_grad()(self.encode)

    @torch.no_grad()
    def negative(self, prompts: Sequence[str]) -> Condition:
        """The condition of negative prompts."""
        return (self.encode_negative or self.encode)(prompts)

    def null(self) -> Condition:
        """The condition of "no prompt", stored in denoiser.null: if none is set yet, that of the empty prompt."""
        if self.denoiser.null is None:
            self.denoiser.null = self.negative([""])
        return self.denoiser.null

    @torch.no_grad()
    def sample(self, z: Tensor, c: Condition, steps: int, guidance: float = 1.0, null: Condition = None) -> Tensor:
        """x [B, *shape] of the teacher with its own scheduler, from unit noise z. null: a negative condition."""
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
        """Set the timesteps of `steps` calls as the family's pipeline does."""
        if self.family.set_timesteps is None:
            scheduler.set_timesteps(steps)
        else:
            self.family.set_timesteps(scheduler, steps, self)


@dataclass(frozen=True)
class Model:
    """A denoising network of a published pipeline, as configs: enough to build it without weights and files.

    config: fields of the repository's config.json (unet/ or transformer/) that differ from the class's defaults.
    """

    hub: str  # repository of these configs and of the weights
    pipeline: str  # _class_name of its model_index.json
    network: str  # class of its unet/ or transformer/
    config: dict[str, object] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, object]] = FLOW
    vae: dict[str, object] = field(default_factory=lambda: KL)


def refuse_guidance_embedding(net: Network, parts: Parts) -> Network:
    """`net` if it has a guidance embedding, like FLUX.1-dev and LCMs; else a ValueError."""
    if net.config.get("guidance_embeds") or net.config.get("time_cond_proj_dim"):
        return net
    raise ValueError(
        f"a range of guidance needs a guidance embedding, but the network of {parts.folder} has none: "
        "give --method.guidance one number"
    )


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of pipeline. The registry finds every module of pipelines/families/ that assigns one to FAMILY.

    c is a condition: a dict of tensors of fixed shape, batch first, whose rows do not depend on each other. z is unit
    noise [B, *shape].

    load gives a Teacher, whose denoiser calls the network: call(net, x, n, c) -> out [B, *shape].
        x    [B, *shape] in the network's precision.
        n    [B] in float32: the timestep as the schedule of the training counts it, 0 to 999 for a table and 0 to
             num_train_timesteps for a flow. The call makes of it what the pipeline gives its network: often n / 1000.
        out  the prediction of the kind that the denoiser has: eps, v or x0 for a table, noise minus data for a flow.
    call.feature(output) picks the image's tokens from the tuple of a tapped module; the default is its first element.
    sample is the pipeline's own call from given noise, with which everything is compared.
    tiny's keyword arguments are what VARIANTS of tests/pipelines/test_families.py changes.
    taps are names in the published network; every family here taps its middle.
    """

    name: str  # name of its module
    title: str  # title in the README's table
    pipelines: tuple[str, ...]  # pipeline classes of diffusers: _class_name of model_index.json

    # ---- the teacher ----
    load: Callable[[Parts, int | None, int | None], Teacher]  # (parts, resolution, frames)
    sample: Callable[..., Tensor]  # (pipe, prompts, z, steps, guidance, negative=None) -> images in [0, 1]
    tiny: Callable[..., Pipeline]  # creates a tiny random pipeline without files, of 16 pixels
    condition: Callable[[Config], dict[str, tuple[int, ...]]]  # config of the network -> shapes of c for one sample
    blocks: tuple[str, ...]  # classes of the modules that are sharded one by one
    taps: tuple[str, ...]  # modules whose outputs are the default features of a discriminator
    # Candidates for a student's scheduler, whose config carries it.
    student_schedulers: Callable[[Teacher, StudentConfig], Iterable[Scheduler]]
    no_guidance: float  # value of `guidance` in `sample` with which the pipeline makes one call per step
    lora_targets: tuple[str, ...] = ()  # modules with LoRA adapters; (): no single-file exports for this family
    single_files: bool = True  # a student with LoRA targets is also exported as single files
    schedulers: tuple[str, ...] = ()  # of pipelines that several families read: those of this one; (): all others
    task: Task = "text-to-image"
    schedule: Literal["flow", "table", "edm"] = "flow"  # kind of the network's schedule; a kind shares its recipes
    flow_shift: float = 3.0  # shift of a flow's times for methods that are written for a table (SD3, section 5.3.2)
    cross_attention_tokens: int = 0  # of a prompt; 0: prompts are read by other layers (NASA-T and SUN are refused)
    unet: bool = False  # the network is a UNet, so that it may have a ControlNet (NCT needs one)
    guidance_embedding: bool = False  # the network has, or can be given, an embedding of its guidance
    pads_to_longest: bool = False  # prompts are padded to the longest of a call, so that rows depend on each other
    guided: type[CFG] = CFG  # classifier-free guidance as in the pipeline
    set_timesteps: Callable[[Scheduler, int, Teacher], None] | None = None  # as the pipeline; None: with `steps` alone
    draw_noise: Callable[[Sequence[int]], Tensor] = torch.randn  # noise as the pipeline's scheduler draws it
    # (network, parts) -> the network
    with_guidance_embedding: Callable[[Network, Parts], Network] = refuse_guidance_embedding
    embedded_index: dict[str, object] = field(default_factory=dict)  # changes of model_index.json with that embedding
    tiny_facts: dict[str, object] = field(default_factory=dict)  # distill.json of the tiny pipeline: what no config has
    models: dict[str, Model] = field(default_factory=dict)  # published networks, for pipelines.plan

    # ---- the export ----
    # Times of the calls under a scheduler; None: its timesteps.
    call_times: Callable[[Scheduler, int], tuple[float, ...] | None] = lambda scheduler, steps: None
    # Arguments of the call in the model card.
    call_options: Callable[[Parts, int], dict[str, object]] = lambda parts, steps: {}
    render_call: Callable[[int, str | int], str] | None = None  # (steps, example) -> a call without prompt
    # Prompts or labels of the verification.
    examples: Callable[[Teacher], Sequence[str | int]] = lambda teacher: EXAMPLES
    verified_steps: Callable[[Parts], tuple[int, ...]] = lambda parts: ()  # further numbers of calls to verify
    export_network: Callable[[nn.Module, Student], nn.Module] = lambda net, student: net  # as the pipeline calls it
    export_call: Callable[[Call], Call] = lambda call: call  # a denoiser's call, equal to the pipeline's
    limits: Callable[[nn.Module], tuple[str, ...]] = lambda net: ()  # network -> limits for the model card

    @property
    def labels(self) -> bool:
        """Whether its conditions are class labels, not prompts."""
        return self.task == "unconditional-image-generation"
