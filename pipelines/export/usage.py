"""How to use an export's single files in ComfyUI and A1111: the folder of each file, sampler, scheduler, steps, shift.

Facts read in their sources, nothing copied. Both make the levels of the scheduler "simple" from a table of 1000: call i
of N is at entry 999 - floor(1000 i / N). Entry n of a flow with the shift s is s t / (1 + (s - 1) t) at
t = (n + 1) / 1000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from distill.diffusion.schedule import VP, Flow
from distill.diffusion.student import Student
from pipelines.components import Network
from pipelines.export.comfyui import is_sd_table

SHIFT_NODES = {  # networks that ComfyUI reads in diffusers' names: the node that sets the shift; "": a table of betas
    "UNet2DConditionModel": "",
    "PixArtTransformer2DModel": "",
    "SD3Transformer2DModel": "ModelSamplingSD3",
    "FluxTransformer2DModel": "ModelSamplingFlux",
    "QwenImageTransformer2DModel": "ModelSamplingAuraFlow",
    "AuraFlowTransformer2DModel": "ModelSamplingAuraFlow",
}


class SamplerSettings(NamedTuple):
    """KSampler's settings beside the scheduler "simple" and CFG 1. shift: of a flow; None: any, or a table."""

    sampler: str
    steps: int
    shift: float | None = None


def sampler_settings(student: Student) -> SamplerSettings | None:
    """The settings with which a plain KSampler calls the network at the student's levels; None if there are none."""
    denoiser = student.denoiser
    steps = len(student.times)
    settings = SamplerSettings("lcm" if student.transition.adds_noise else "euler", steps)
    if not student.transition.ends_at_data or abs(student.input_scale - 1) > 0.01:
        return None
    native = denoiser.schedule.time(denoiser.path.ratio(torch.tensor(student.times, dtype=torch.float64)))
    entries = torch.tensor([999 - int(1000 * i / steps) for i in range(steps)], dtype=torch.float64)
    if isinstance(denoiser.schedule, VP):
        unet = type(denoiser.net).__name__ == "UNet2DConditionModel"
        near = (denoiser.schedule.native(native) - entries).abs().max() <= 1
        return settings if near and (is_sd_table(denoiser.schedule) or not unet) else None
    if not isinstance(denoiser.schedule, Flow):
        return None
    sigmas = denoiser.schedule.coefficients(native)[1]
    shift = find_shift(sigmas, (entries + 1) / 1000)
    if shift is None:
        return None
    return settings._replace(shift=shift if steps > 1 else None)


def find_shift(sigmas: Tensor, t: Tensor) -> float | None:
    """The shift s with sigmas = s t / (1 + (s - 1) t); 1 for a single call; None if there is none."""
    s = 1.0
    if len(sigmas) > 1:
        s = float(sigmas[1] * (1 - t[1]) / (t[1] * (1 - sigmas[1])))
    levels = s * t / (1 + (s - 1) * t)
    return s if math.isfinite(s) and s > 0 and (sigmas - levels).abs().max() < 2e-3 else None


def describe_usage(student: Student, net: nn.Module, base: str, size: tuple[int, int], files: Sequence[str]) -> str:
    """The card's sections about ComfyUI and A1111; "" if there are no single files. files: names in the export."""
    find = lambda end: next((name for name in files if name.endswith(end)), "")
    network = find("step_unet.safetensors") or find("step_transformer.safetensors")
    lora = find("_lora_comfy.safetensors") or find("_lora.safetensors")
    if not network and not lora:
        return ""
    kind = type(net).__name__
    if kind not in SHIFT_NODES:
        return (
            "## ComfyUI and A1111\n\n"
            f"Neither reads a {kind} in diffusers' names, so the files beside the pipeline are for diffusers alone.\n"
        )
    settings = sampler_settings(student)
    checkpoint = find("_checkpoint.safetensors")
    needed = network if checkpoint else ""
    steps = [_loading(net, base, network, lora, checkpoint)]
    steps += _sampling(net, find("_comfyui.json"), needed, settings)
    text = "## ComfyUI\n\n" + "".join(f"{i}. {step}\n" for i, step in enumerate(steps, 1))
    return f"{text}\n## A1111\n\n{_a1111(student, kind, base, size, checkpoint or lora, settings)}\n"


def _loading(net: nn.Module, base: str, network: str, lora: str, checkpoint: str) -> str:
    """Where the files go in ComfyUI."""
    unet = type(net).__name__ == "UNet2DConditionModel"
    if lora:
        loaded = "`models/checkpoints`" if unet else "`models/diffusion_models`"
        return f"Copy `{lora}` to `models/loras`, and the model file of {base} to {loaded}. {_strength(net, lora)}"
    if checkpoint:
        return f"Copy `{checkpoint}` to `models/checkpoints` (node *Load Checkpoint*). It is complete."
    text = f"Copy `{network}` to `models/diffusion_models` (node *Load Diffusion Model*)"
    if unet:
        return f"{text}, and a checkpoint of {base} to `models/checkpoints`: it gives text encoders and VAE."
    return f"{text}. Text encoders (`models/text_encoders`) and VAE (`models/vae`) are those of {base}."


def _sampling(net: nn.Module, workflow: str, network: str, settings: SamplerSettings | None) -> list[str]:
    """How to sample in ComfyUI: with the workflow of the export, and with a plain KSampler.

    network: a file that the workflow needs beside the checkpoint; "": none.
    """
    steps = []
    if workflow:
        also = f" It also needs `{network}` in `models/diffusion_models`." if network else ""
        steps += [
            f"Open `{workflow}` and replace `BASE.safetensors` by the name of your checkpoint. The workflow calls the "
            f"network at the student's own times.{also}"
        ]
    if settings is None:
        own = "use the workflow above" if workflow else "sample with diffusers"
        return [*steps, f"The scheduler `simple` of a KSampler has other times than this student: {own}."]
    line = f"In a workflow of your own: KSampler with {_settings(settings)}, CFG 1"
    if settings.shift is not None:
        line += f"; {_shift(type(net).__name__, settings.shift)}"
    if getattr(net, "config", {}).get("guidance_embeds"):
        line += "; node FluxGuidance with the guidance_scale of the program above, 3.5 where it names none"
    return [*steps, f"{line}. These settings follow from the student's times; no image of them was compared."]


def _strength(net: nn.Module, lora: str) -> str:
    """The sentence about the strength of a LoRA: ComfyUI reads alpha only from kohya's keys."""
    if lora.endswith("_lora_comfy.safetensors"):
        return "Its strength is 1."
    (config,) = cast(Network, net).peft_config.values()
    return f"ComfyUI does not read this LoRA's alpha: set its strength to {config.lora_alpha / config.r:g}."


def _settings(settings: SamplerSettings) -> str:
    return f"sampler `{settings.sampler}`, scheduler `simple`, {settings.steps} step{'s' * (settings.steps > 1)}"


def _shift(kind: str, shift: float) -> str:
    """The node that sets the shift of a flow."""
    node = SHIFT_NODES[kind]
    if node != "ModelSamplingFlux":
        return f"node {node} with shift {shift:.4g}"
    return f"node {node} with max_shift = base_shift = {math.log(shift):.4g}"  # its shift is e^mu


def _a1111(
    student: Student, kind: str, base: str, size: tuple[int, int], file: str, settings: SamplerSettings | None
) -> str:
    """The text about stable-diffusion-webui. file: a LoRA or a complete checkpoint."""
    if kind != "UNet2DConditionModel":
        return "A1111 does not read this network."
    if not file:
        return "A1111 reads no file of a network alone: use ComfyUI or diffusers."
    if settings is None or student.denoiser.kind not in ("eps", "v"):
        return "A1111 cannot call the network at this student's times: use ComfyUI or diffusers."
    method = {"lcm": "LCM", "euler": "Euler"}[settings.sampler]
    use = f"Copy `{file}` to `models/Lora`, choose a checkpoint of {base}, and write `<lora:{Path(file).stem}:1>`"
    use += " into the prompt."
    if file.endswith("_checkpoint.safetensors"):
        use = f"Copy `{file}` to `models/Stable-diffusion` and choose it (the same in Forge)."
    return (
        f"{use} Sampling method {method}, schedule type Simple, {settings.steps} step{'s' * (settings.steps > 1)}, CFG "
        f"scale 1, {size[0]} x {size[1]} pixels. These settings follow from the student's times; no image of A1111 was "
        "compared."
    )
