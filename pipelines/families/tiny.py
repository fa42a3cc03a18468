"""Tiny random parts of pipelines for smoke runs and tests, built without files and network access."""

from __future__ import annotations

import importlib
import json
import string
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        Gemma2Model,
        GemmaTokenizer,
        GlmModel,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
        T5Tokenizer,
    )

M = TypeVar("M", bound=nn.Module)

LETTERS = string.ascii_letters + string.digits + ".,:;!?-'\" "


def save(name: str, folder: str | Path, **config: object) -> None:
    """Save the tiny pipeline of a family to a folder. config: values that differ from its defaults."""
    family = importlib.import_module(f"{__package__}.{name}").FAMILY
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family.tiny(**config).save_pretrained(folder, safe_serialization=True)
    if family.tiny_facts:
        (Path(folder) / "distill.json").write_text(json.dumps(family.tiny_facts))


def byte_symbols() -> list[str]:
    """The 256 letters with which byte-level tokenizers write bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(kept))]  # substitutes for bytes that do not print
    return [chr(c) for c in kept + others]


def amplify(module: M, gain: float, *names: str) -> M:
    """Multiply parameters whose names contain one of `names`, so that every input changes the output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(part in name for part in names):
                p.mul_(gain)
    return module


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: every letter is a token, 514 tokens in all."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip(width: int = 32, projection: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder. With `projection` it also returns a pooled embedding of that width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(length: int = 77) -> T5Tokenizer:
    """A T5 tokenizer with single letters, padded to `length`."""
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -1.0), *((s, -2.0) for s in LETTERS[:-1])]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def t5(width: int = 32, kind: str = "T5") -> PreTrainedModel:
    """A T5 encoder ("T5" or "UMT5")."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's tokenizer without merges: every letter is a token, or else every byte."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *LETTERS[:-1]]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def gemma(width: int = 32) -> Gemma2Model:
    """A Gemma 2 model without its output head."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
    )
    return Gemma2Model(config).eval()


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token, or else every byte. Like GLM's it puts a token before prompts and pads on the left."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = gemma_tokenizer().backend_tokenizer
    letters.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", padding_side="left")


def glm(width: int = 32) -> GlmModel:
    """A GLM model without its output head."""
    from transformers import GlmConfig, GlmModel

    config = GlmConfig(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        pad_token_id=0,
    )
    return GlmModel(config).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level tokenizer without merges. The marks of a chat's turns are tokens."""
    from transformers import Qwen2Tokenizer

    tokens = [*byte_symbols(), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen(width: int = 32) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    common = {"hidden_size": width, "intermediate_size": 2 * width}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 264}
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": width, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=common | text | ids | rope, vision_config=common | vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(latent: int = 4, levels: int = 2, **config: object) -> AutoencoderKL:
    """An AutoencoderKL that halves the image levels - 1 times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        latent_channels=latent,
        norm_num_groups=4,
        sample_size=16,
        **config,
    ).eval()
