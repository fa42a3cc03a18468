"""Qwen-Image: a flow transformer on 2x2 packed latents of a video autoencoder; Qwen2.5-VL text in a template.

Its pipeline rescales a guided prediction to the norm of the conditional one, token by token. Teacher.sample does the
same (`TokenNormGuidance`). The guidance inside methods does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import Prediction
from pipelines.components import Parts
from pipelines.families import latents, student_schedulers
from pipelines.families.base import Family, Model, Teacher
from pipelines.families.flux import draw_noise, pack, sample, set_timesteps, shape, unpack
from pipelines.protocols import Config, Pipeline

LENGTH = 512  # tokens of a prompt in its template


@dataclass(frozen=True)
class Call(latents.TwoStreams):
    """c: "prompt_embeds" [B, 512, D] and their "mask" [B, 512], 1 for a token."""

    def __call__(self, net: nn.Module, x: Tensor, n: Tensor, c: Condition) -> Tensor:
        assert c is not None
        places = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
        text = c["prompt_embeds"].to(x.dtype)
        return unpack(net(pack(x), text, c["mask"], n / 1000, places, return_dict=False)[0], x.shape)


class TokenNormGuidance(CFG):
    """Guidance that rescales the prediction in each token to the norm of the conditional prediction."""

    def __call__(self, x: Tensor, t: Tensor, c: Condition = None) -> Prediction:
        pred = super().__call__(x, t, c)
        if isinstance(self.w, int | float) and self.w == 1:
            return pred
        out = pack(pred.out)
        cond = pack(self.base(x, t, c).out)
        length = cond.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True)
        return replace(pred, out=unpack(out * length, x.shape))


def load(parts: Parts, resolution: int | None, frames: int | None) -> Teacher:
    def encode(prompts: Sequence[str]) -> Condition:
        text, mask = parts.text.encode_prompt(list(prompts), parts.device, max_sequence_length=LENGTH)
        mask = text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask
        rest = LENGTH - text.shape[1]
        return {"prompt_embeds": pad(text, (0, 0, 0, rest)), "mask": pad(mask, (0, rest))}

    decode, latent = latents.kl3d(parts)
    denoiser = Denoiser(parts.net, *latents.flow(parts.scheduler()), call=Call())
    return Teacher(
        denoiser,
        encode,
        lambda x: decode(x[:, :, None])[:, :, 0],
        lambda images, eps: latent(images[:, :, None], eps[:, :, None])[:, :, 0],
        shape(parts, resolution),
        parts,
        FAMILY,
    )


def tiny() -> Pipeline:
    import diffusers

    from pipelines.families import tiny

    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075], latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    ).eval()  # fmt: skip
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=30,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    tiny.amplify(net, 3.0, "txt_in", "proj_out")
    tiny.amplify(vae, 3.0, "conv_out")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(flow, vae, tiny.qwen(), tiny.qwen_tokenizer(), net)


def condition(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the condition of one sample."""
    return {"prompt_embeds": (LENGTH, config.joint_attention_dim), "mask": (LENGTH,)}


FAMILY = Family(
    name="qwen",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    load=load,
    sample=sample,
    tiny=tiny,
    tiny_facts={"resolution": 16},  # no component of the pipeline stores its size
    condition=condition,
    guided=TokenNormGuidance,
    set_timesteps=set_timesteps,
    draw_noise=draw_noise,
    pads_to_longest=True,
    student_schedulers=student_schedulers.of_flow,
    no_guidance=1.0,
    call_options=lambda parts, steps: {"true_cfg_scale": 1},
    lora_targets=(  # attention and feed-forward of both streams
        *latents.TwoStreams.projections,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    taps=("transformer_blocks.29",),  # the middle of 60
    blocks=("QwenImageTransformerBlock",),
    models={"qwen": Model("Qwen/Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel")},
)
