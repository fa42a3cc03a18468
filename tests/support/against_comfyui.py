"""Our names, LoRA files and workflows under the functions of a ComfyUI checkout; nothing of it is part of this project.

COMFYUI=path/to/ComfyUI python tests/support/against_comfyui.py         (its requirements einops and torchsde installed)
"""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "pipelines")]
sys.path.append(os.environ["COMFYUI"])
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import test_comfy
import torch
import unets
from safetensors.torch import load_file

from distill.random import Draw
from pipelines.export import comfyui as ours
from pipelines.export import kohya


def same(what, a, b):
    """A line of the report, or the end of it."""
    if a != b:
        raise SystemExit(f"{what}: {sorted(a ^ b)[:5] if isinstance(a, set) else (a, b)} differ")
    sys.stdout.write(f"{what}: {len(a) if isinstance(a, set) else a} equal\n")


def names_at_full_size(name):
    """UNETLoader's map of a diffusers file, and the LoRA keys of the model that it makes."""
    unet = unets.full(test_comfy.CONFIGS[name])
    state, names = unet.state_dict(), kohya.original_names(unet)
    config = comfy.model_detection.model_config_from_diffusers_unet(state)
    theirs = comfy.utils.unet_to_diffusers(config.unet_config)
    full = {key: f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in state}
    same(f"{name}, names of all tensors", {(k, theirs.get(k)) for k in state}, set(full.items()))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="meta")
    shapes = {k: v.shape for k, v in model.state_dict().items() if k.startswith("diffusion_model.")}
    same(f"{name}, shapes", set(shapes.items()), {(f"diffusion_model.{full[k]}", v.shape) for k, v in state.items()})
    keys = comfy.lora.model_lora_keys_unet(model, {})
    modules = [k.removesuffix(".weight") for k, v in state.items() if v.ndim > 1]
    ldm = name == "sdxl"
    mapped = {(m, keys.get("lora_unet_" + (names[m] if ldm else m).replace(".", "_"))) for m in modules}
    same(
        f"{name}, LoRA keys of all matrices and kernels",
        mapped,
        {(m, f"diffusion_model.{names[m]}.weight") for m in modules},
    )


def narrow_sdxl():
    """The original network, with our LoRA loaded by ComfyUI, gives what diffusers' gives with PEFT's."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
    }
    sizes |= {"cross_attention_dim": 16, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    base = UNet2DConditionModel(**unets.SDXL | sizes).eval()
    role = unets.adapted(base, test_comfy.ALL)
    config = comfy.model_detection.model_config_from_diffusers_unet(unets.full(unets.SDXL).state_dict())
    config.unet_config |= {"model_channels": 32, "channel_mult": [1, 1, 2], "transformer_depth": [0, 0, 1, 1, 2, 2]}
    config.unet_config |= {"transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2}
    config.unet_config |= {"context_dim": 16, "num_head_channels": 16, "adm_in_channels": 32}
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    names = kohya.original_names(base)
    state = {
        "diffusion_model." + ".".join((names[k.rpartition(".")[0]], k.rpartition(".")[2])): v
        for k, v in base.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = load_file(kohya.write_lora_file(role, Path(folder, "a.safetensors"), {}, torch.float32))
    patches = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model, {}))
    same("narrow SDXL, patched weights", len(patches), len(file) // 3)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x, t, c = draw(2, 4, 8, 8), torch.tensor([3, 900]), draw(2, 5, 16)
    added = {"text_embeds": draw(2, 8), "time_ids": draw(2, 6)}
    for merged in (False, True):
        weights = {k: v.clone() for k, v in state.items()}
        for key, patch in patches.items() if merged else ():
            weights[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weights[key], key)
        model.diffusion_model.load_state_dict({k.removeprefix("diffusion_model."): v for k, v in weights.items()})
        with torch.no_grad():
            expected = (role if merged else base)(x, t, c, added_cond_kwargs=added).sample
            ids = base.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
            got = model.diffusion_model(x, t, context=c, y=torch.cat([added["text_embeds"], ids], 1))
        gap, size = float((got - expected).abs().max()), float(expected.abs().max())
        sys.stdout.write(
            f"narrow SDXL, {'with the LoRA' if merged else 'base'}: outputs of size {size:.2f} differ by {gap:.1e}\n"
        )
        if not gap < 2e-5:
            raise SystemExit("they differ")


TRANSFORMERS = {  # diffusers' class, its public sizes -> whether UNETLoader takes its keys
    "SD3Transformer2DModel": ({"sample_size": 128, "num_layers": 24, "num_attention_heads": 24}, True),
    "FluxTransformer2DModel": ({"guidance_embeds": True}, True),
    "PixArtTransformer2DModel": ({"sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096}, True),
    "QwenImageTransformer2DModel": ({}, True),
    "WanTransformer3DModel": ({}, False),
    "SanaTransformer2DModel": ({}, False),
}
SD3 = {"caption_projection_dim": 1536, "pooled_projection_dim": 2048, "joint_attention_dim": 4096}


def transformers(name):
    """What UNETLoader makes of a diffusers file: the model that it detects gets all its tensors, in their shapes."""
    import diffusers

    sizes, taken = TRANSFORMERS[name]
    with torch.device("meta"):
        net = getattr(diffusers, name)(**sizes, **SD3 if name.startswith("SD3") else {})
    state, detect = dict(net.state_dict()), comfy.model_detection.model_config_from_unet
    config = detect(state, "")
    if config is None and (state := comfy.model_detection.convert_diffusers_mmdit(state, "")) is not None:
        config = detect(state, "")
    same(f"{name}, taken by UNETLoader", config is not None, taken)
    if config is not None:
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device="meta").diffusion_model.state_dict()
        unused = {"y_embedder.y_embedding"}  # PixArt's learned "no text", a tensor of training
        shapes = {(k, v.shape) for k, v in model.items() if k not in unused}
        same(f"{name}, shapes", {(k, v.shape) for k, v in state.items()}, shapes)


class Wrap:
    """What ComfyUI's samplers call: x0 at x = x0 + sigma eps."""

    def __init__(self, net, kind):
        bases = {
            "eps": comfy.model_sampling.EPS,
            "v_prediction": comfy.model_sampling.V_PREDICTION,
            "x0": comfy.model_sampling.X0,
        }
        self.net, self.model_sampling = (
            net,
            type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, bases[kind]), {})(),
        )
        self.inner_model = self

    def __call__(self, x, sigma, **options):
        s = self.model_sampling
        out = self.net(s.calculate_input(sigma, x), s.timestep(sigma).double())
        return s.calculate_denoised(sigma, out, x)


def samplers(title, case):
    """The latents of a workflow's sampler with ComfyUI's noise scaling are the student's."""
    student = test_comfy.student(*case)
    graph = ours.build_workflow(student, "base.safetensors", lora="a.safetensors")
    read = lambda name: torch.tensor([float(s) for s in graph[name]["inputs"]["sigmas"].split(",")])
    model = Wrap(student.denoiser.net, graph["kind"]["inputs"]["sampling"])
    z = torch.randn(2, 4, 3, 3).double()
    noise, latent = z, torch.zeros_like(z)
    if "noised" in graph:  # AddNoise, then SamplerCustom without noise
        latent = model.model_sampling.noise_scaling(read("first")[0] - read("first")[-1], z, latent)
        noise = torch.zeros_like(z)
    sampler = comfy.samplers.ksampler(graph["sampler"]["inputs"]["sampler_name"])
    options = {"model_options": {}, "seed": 5}
    got = sampler.sample(model, read("sigmas"), options, None, noise.clone(), latent, disable_pbar=True)
    generator = torch.Generator().manual_seed(5)
    stored = type(
        "Stored", (Draw,), {"normal": lambda self, name, shape: torch.randn(shape, generator=generator, dtype=z.dtype)}
    )
    expected = student.generate(z, None, stored(0, 0, "", torch.arange(2)))
    gap = float((got - expected).abs().max() / expected.abs().max())
    sys.stdout.write(f"sampler, {title}: relative difference {gap:.1e}\n")
    if not gap < 2e-5:
        raise SystemExit("they differ")


if __name__ == "__main__":
    with torch.no_grad():
        for name in test_comfy.CONFIGS:
            names_at_full_size(name)
        narrow_sdxl()
        for name in TRANSFORMERS:
            transformers(name)
        for title, case in test_comfy.CASES.items():
            samplers(title, case)
