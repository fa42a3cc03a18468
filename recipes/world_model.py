"""The pipeline of the captioned world: a small StableDiffusionPipeline of the ordinary parts, untrained.

The autoencoder is the identity, by construction: the world has no latents to learn. The tokenizer is a byte-pair
encoding whose merges make each word of the world one token. UNet and text encoder start at random.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 16  # tokens of a prompt, with the start and the end
WIDTH = 64  # of the text encoder
SCALE = 1.5  # the autoencoder's scaling factor: latents are pixels in [-1, 1] times this


def build_tokenizer(words: tuple[str, ...]) -> CLIPTokenizer:
    """A CLIP tokenizer that encodes each of the words as one token, and other words by their letters."""
    from transformers import CLIPTokenizer

    letters = sorted({letter for word in words for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            order = [merges.index(pair) if pair in merges else len(merges) for pair in pairs]
            at = order.index(min(order))
            if pairs[at] not in merges:
                merges.append(pairs[at])
                vocabulary.append("".join(pairs[at]))
            parts[at : at + 2] = ["".join(pairs[at])]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """One layer. Embeddings start wide, so that words differ from the first step on."""
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if "embedding" in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 if "token" in name else 0.25)
    return model


@torch.no_grad()
def build_autoencoder(side: int) -> AutoencoderKL:
    """An AutoencoderKL that is the identity to 1e-4, without training.

    Its channels hold x, -x and the constants K and -K, so that GroupNorm divides by nearly the same number everywhere.
    The weight of the norm undoes this, and silu(y) - silu(-y) = y.
    """
    from diffusers import AutoencoderKL

    K = 100.0
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=side,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for parameter in model.parameters():
        parameter.zero_()
    for part in (model.encoder, model.decoder):
        for i in range(3):
            part.conv_in.weight[i, i, 1, 1] = 1
            part.conv_in.weight[3 + i, i, 1, 1] = -1
            part.conv_out.weight[i, i, 1, 1] = 1
            part.conv_out.weight[i, 3 + i, 1, 1] = -1
        part.conv_in.bias[6] = K
        part.conv_in.bias[7] = -K
        part.conv_norm_out.weight.fill_((2 * K * K / 8 + 6 * 0.45 / 8) ** 0.5)  # .45: mean square of the pixels
    model.encoder.conv_out.bias[3:] = -30  # log variance of the latents
    return model


def build_unet(side: int, channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Cross-attention at the lowest resolution alone. The prompt's mean also scales and shifts every block."""
    from diffusers import UNet2DConditionModel

    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=tuple(max(1, width // 16) for width in channels),
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise, v-prediction, timesteps from the last one on."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class CaptionedUNet(nn.Module):
    """UNet and text encoder as one network, to be trained together: (x, timestep, token ids [B, LENGTH])."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, timestep: Tensor, input_ids: Tensor) -> Tensor:
        states = self.text_encoder(input_ids).last_hidden_state
        return self.unet(x, timestep, states, return_dict=False)[0]


def encode_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, LENGTH], as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def build_pipeline(net: CaptionedUNet, tokenizer: CLIPTokenizer, side: int) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=build_autoencoder(side),
        text_encoder=net.text_encoder,
        tokenizer=tokenizer,
        unet=net.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
