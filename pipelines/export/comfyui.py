"""A student of SD 1.5, SD 2.1 or SDXL as a ComfyUI workflow. Facts read in ComfyUI's source, nothing copied.

UNETLoader reads diffusers' keys for SD 1.5, SD 2.1 and SDXL (of the public sizes), SD3/3.5, FLUX.1, PixArt and
Qwen-Image. It does not read them for Wan, of which it knows only the original keys, nor for SANA, which it does not
know.

With x = x0 + sigma eps the network's input is x / sqrt(1 + sigma^2), the x_t of VP, and the nearest index of SD's
table. The first x is sigma z, or sqrt(1 + sigma^2) z if sigma is the table's last. AddNoise makes it any multiple of z.
Sampler "lcm" continues with x0 + sigma' (fresh noise), "euler" with DDIM.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict

import torch

from distill.diffusion.schedule import VP
from distill.diffusion.student import Student

Inputs = dict[str, object]  # of a node: values, and [name of a node, number of its output]


class Node(TypedDict):
    """A node of a workflow."""

    class_type: str
    inputs: Inputs


SAMPLING = {"eps": "eps", "v": "v_prediction", "x0": "x0"}  # kind -> ModelSamplingDiscrete


def is_sd_table(schedule: VP) -> bool:
    """Whether the levels are Stable Diffusion's 1000 levels."""
    a, b = (torch.tensor(s.alphas_cumprod, dtype=torch.float64) for s in (schedule, VP.scaled_linear()))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4)


def sampler_levels(student: Student) -> tuple[list[float], float]:
    """ComfyUI's sigmas of the student's calls, and the factor of the unit noise at the first; or a ValueError."""
    denoiser = student.denoiser
    path = student.denoiser.path
    schedule = student.denoiser.schedule
    if not isinstance(schedule, VP) or not is_sd_table(schedule):
        raise ValueError(
            f"ComfyUI's samplers for UNets use Stable Diffusion's noise table, not this {type(schedule).__name__}"
        )
    if denoiser.kind not in SAMPLING:
        raise ValueError(f"ComfyUI reads UNets as {sorted(SAMPLING)}; this student predicts {denoiser.kind!r}")
    if getattr(getattr(denoiser.net, "config", None), "time_cond_proj_dim", None):
        raise ValueError("ComfyUI's UNet has no guidance embedding (time_cond_proj_dim), which this student needs")
    times = torch.tensor(student.times, dtype=torch.float64)
    native = schedule.time(path.ratio(times))
    indices = schedule.native(native)
    if (indices - indices.round()).abs().max() > 1e-3:
        rounded = [round(n, 3) for n in indices.tolist()]
        raise ValueError(f"ComfyUI calls the network at whole indices, not at {rounded}: choose whole times")
    alpha, sigma = schedule.coefficients(native)
    scale = torch.hypot(alpha, sigma) / torch.hypot(*path.coefficients(times)) / alpha  # path's x to ComfyUI's
    return (sigma / alpha).tolist(), student.input_scale * float(scale[0])


def build_workflow(
    student: Student,
    checkpoint: str,
    unet: str | None = None,
    lora: str | None = None,
    size: tuple[int, int] = (1024, 1024),
    prompt: str = "a photograph of an astronaut riding a horse",
) -> dict[str, Node]:
    """A workflow in ComfyUI's API format that samples like the student, with ComfyUI's noise.

    checkpoint: the base's single file, for text encoders and VAE. unet or lora: the student's file name in
    models/diffusion_models or models/loras. size: (width, height). A ValueError names what ComfyUI does not support.
    """
    if (unet is None) == (lora is None):
        raise ValueError(f"give the student's file either as unet or as lora; got unet={unet!r}, lora={lora!r}")
    if not student.transition.ends_at_data:
        raise ValueError("ComfyUI's samplers end at x0; this student ends at the level of timestep 0")
    if student.transition.keeps_noise and len(student.times) > 1:
        raise ValueError(
            "workflows have no ancestral sampler; use a student of one call, or of 'fresh' or 'ddim' noise"
        )
    sigmas, first = sampler_levels(student)
    last = float(VP.scaled_linear().ratio(torch.ones(1)))
    own = math.sqrt(1 + sigmas[0] ** 2) if sigmas[0] > last * (1 - 1e-5) else sigmas[0]  # ComfyUI's first factor
    add = abs(first / own - 1) > 1e-4
    sampler = "lcm" if student.transition.adds_noise else "euler"
    model: tuple[str, Inputs] = ("UNETLoader", {"unet_name": unet, "weight_dtype": "default"})
    if lora:
        model = ("LoraLoaderModelOnly", {"model": ["base", 0], "lora_name": lora, "strength_model": 1.0})
    sample: Inputs = {
        "model": ["kind", 0],
        "add_noise": not add,
        "noise_seed": 0,
        "cfg": 1.0,
        "positive": ["prompt", 0],
        "negative": ["nothing", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
        "latent_image": ["noised" if add else "latent", 0],
    }
    nodes: dict[str, tuple[str, Inputs]] = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "model": model,
        "kind": (
            "ModelSamplingDiscrete",
            {"model": ["model", 0], "sampling": SAMPLING[student.denoiser.kind], "zsnr": False},
        ),
        "prompt": ("CLIPTextEncode", {"clip": ["base", 1], "text": prompt}),
        "nothing": ("CLIPTextEncode", {"clip": ["base", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": size[0], "height": size[1], "batch_size": 1}),
        "sigmas": ("ManualSigmas", {"sigmas": _list([*sigmas, 0.0])}),
        "sampler": ("KSamplerSelect", {"sampler_name": sampler}),
        "sample": ("SamplerCustom", sample),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["base", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": Path(unet or lora or "").stem}),
    }
    if add:
        nodes |= _first_noise(first)
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def _first_noise(scale: float) -> dict[str, tuple[str, Inputs]]:
    """Nodes whose last makes the first input: unit noise times `scale`. SamplerCustom's seed is that of fresh noise."""
    wires: Inputs = {"model": ["kind", 0], "noise": ["noise", 0], "sigmas": ["first", 0], "latent_image": ["latent", 0]}
    return {
        "noise": ("RandomNoise", {"noise_seed": 1}),
        "first": ("ManualSigmas", {"sigmas": _list([scale, 0.0])}),
        "noised": ("AddNoise", wires),
    }


def _list(values: list[float]) -> str:
    """Numbers as text. The node reads no exponents."""
    return ", ".join(f"{value:.8f}" for value in values)
