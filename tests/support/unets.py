"""UNets of Stable Diffusion's public configurations: narrow ones with weights, full ones on the meta device."""

import torch

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"cross_attention_dim": 768}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
NARROW = {"norm_num_groups": 4, "sample_size": 8, "attention_head_dim": 2, "cross_attention_dim": 16}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
TARGETS += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in", "conv_out")
TARGETS += ("time_embedding.linear_1", "time_embedding.linear_2")


def full(config):
    """The network at its public size, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def sdxl():
    """SDXL's blocks and layers with 4 to 8 channels and fewer transformer layers."""
    from diffusers import UNet2DConditionModel

    narrow = NARROW | {"block_out_channels": (4, 4, 8), "transformer_layers_per_block": (1, 1, 2)}
    narrow |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    return UNet2DConditionModel(**SDXL | narrow).requires_grad_(False).eval()


def sd15():
    """SD 1.5's blocks and layers with 4 to 8 channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SD15 | NARROW, block_out_channels=(4, 4, 8, 8)).requires_grad_(False).eval()


def adapted(unet, targets=TARGETS, rank=3, alpha=5.0):
    """A role with adapters that do something."""
    from distill.networks.lora import LoRA

    net = LoRA(rank, alpha, targets)(unet)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn_like(p)
    return net.eval()


@torch.no_grad()
def output(unet):
    """What the network gives for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    added = {"text_embeds": draw(2, 8), "time_ids": draw(2, 6)}
    return unet(draw(2, 4, 8, 8), torch.tensor([3, 900]), draw(2, 5, 16), added_cond_kwargs=added).sample
