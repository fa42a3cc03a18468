"""Feature networks by name: Inception, DINOv2, CLIP, the digits classifier, a seeded random one; local or on the Hub.

A spec is NAME or NAME:WEIGHTS, for example inception-clean:weights/inception-2015-12-05.pt, clip:some/folder,
dinov2:facebook/dinov2-large, open_clip:ViT-g-14/laion2b_s12b_b42k, open_clip:local-dir:some/folder, random:7.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eval.features.weights import CLIP, DINO, PICKSCORE, fetch_inception, require_hps, weights_hash
from eval.files import list_names

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of the channels
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

WIDEST = 1 << 16  # features of a random network

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    """A frozen network with the name, the weights and the resize rule that make its numbers comparable.

    net: images float32 [B, C, H, W] in 0..255, as `rule` leaves them -> {"features": [B, D]} and, where the network
    classifies, {"logits": [B, K]}. text: prompts -> [B, D], for CLIP. scale: exp of its logit scale. width: D, None
    where it is not known before an image is seen.
    """

    name: str
    hash: str  # first 12 hex digits of the SHA-256 of the weights
    rule: str  # `eval.images.resize`, after the protocol's own rule
    net: Callable[[Tensor], Outputs]
    text: Callable[[list[str]], Tensor] | None = None
    scale: float = 1.0
    width: int | None = None


def device() -> torch.device:
    """This process's accelerator, or the CPU; `accelerate launch --cpu` is obeyed."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@cache
def load(spec: str) -> Extractor:
    """The extractor of a spec, loaded once. ValueError for an unknown name, and for weights that are not there."""
    name, _, weights = spec.partition(":")
    if name not in EXTRACTORS:
        raise ValueError(f"extractor {name!r} is unknown; {list_names(name, EXTRACTORS)}")
    with torch.random.fork_rng(devices=[]):
        return EXTRACTORS[name](weights)


def random(weights: str = "") -> Extractor:
    """A convolutional network with weights drawn from a seed (random:SEED or random:SEED:WIDTH): any size of image."""
    seed, _, width = weights.partition(":")
    if not (seed or "0").isdecimal() or not (width or "64").isdecimal():
        raise ValueError(f"extractor random:{weights}: a seed and a width are needed, such as random:0:64")
    if int(seed or 0) >= 2**63 or not 1 <= int(width or 64) <= WIDEST:
        raise ValueError(f"extractor random:{weights}: the seed must be below 2^63, the width from 1 to {WIDEST:,}")
    torch.manual_seed(int(seed or 0))
    dim = int(width or 64)
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    net = nn.ModuleDict({"stem": stem, "body": nn.Linear(512, dim), "head": nn.Linear(dim, 10)})
    net = net.to(device()).eval().requires_grad_(False)

    def run(x: Tensor) -> Outputs:
        features = net["body"](net["stem"](x / 127.5 - 1)) * 10
        return {"features": features, "logits": net["head"](features)}

    return Extractor(f"random-{seed or 0}", weights_hash(net), "", run, width=dim)


def digits(weights: str = "") -> Extractor:
    """The classifier of `eval.features.digits` (trained once): [B, 1, 8, 8] -> 64 features and 10 logits."""
    from eval.features.digits import classifier

    if weights:
        raise ValueError(f"extractor digits takes no weights, {weights!r} was given; it is trained and cached")
    network = classifier()

    def run(x: Tensor) -> Outputs:
        features, logits = network((x.double() / 127.5 - 1).float().cpu())
        return {"features": features.float(), "logits": logits.float()}

    return Extractor("digits", network.hash, "gray exact:8", run, width=64)


def inception_clean(weights: str = "") -> Extractor:
    """Inception-v3 of Heusel et al. 2017 as clean-fid runs it: 2048 pooled features."""
    net, hash = _torchscript(weights)
    run = lambda x: {"features": net.layers((x - 128) / 128).flatten(1)}
    return Extractor("inception-clean", hash, "clean:299", run, width=2048)


def inception_legacy(weights: str = "") -> Extractor:
    """The same network, which resizes by itself as TensorFlow 1 did: the features of StyleGAN's and EDM's figures."""
    net, hash = _torchscript(weights)
    run = lambda x: {"features": net(x, return_features=True).flatten(1)}
    return Extractor("inception-legacy", hash, "", run, width=2048)


def inception_logits(weights: str = "") -> Extractor:
    """The log-probabilities of the same network without the bias of its last layer: for the Inception Score."""
    net, hash = _torchscript(weights)

    def run(x: Tensor) -> Outputs:
        logits = net(x, no_output_bias=True).log()
        return {"features": logits, "logits": logits}

    return Extractor("inception-logits", hash, "clean:299", run)


def _torchscript(weights: str) -> tuple[torch.jit.ScriptModule, str]:
    path = Path(weights) if weights else fetch_inception()
    if not path.is_file():
        raise ValueError(f"there is no file {path}; inception needs the TorchScript file that clean-fid fetches")
    return _load_torchscript(path.resolve())


@cache
def _load_torchscript(path: Path) -> tuple[torch.jit.ScriptModule, str]:
    """The network, shared by three extractors, and its hash."""
    try:
        net = torch.jit.load(str(path), map_location=device()).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript network ({_first_line(error)})") from None
    with path.open("rb") as file:
        return net, hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def dinov2(weights: str = "") -> Extractor:
    """The normalised class token of DINOv2, by default ViT-L/14, at 224 (Stein et al. 2023, arXiv 2306.04675)."""
    from transformers import Dinov2Model

    net = _pretrained(Dinov2Model, weights or DINO)

    def run(x: Tensor) -> Outputs:
        return {"features": net(_normalise(x, *IMAGENET)).last_hidden_state[:, 0]}

    return Extractor("dinov2", weights_hash(net), "bicubic:224", run, width=net.config.hidden_size)


def clip(weights: str = "", name: str = "clip") -> Extractor:
    """A CLIP of transformers, by default OpenAI's ViT-L/14 at 336: projected embeddings of images and prompts."""
    from transformers import AutoTokenizer, CLIPModel

    where = weights or CLIP
    net = _pretrained(CLIPModel, where)
    tokenizer = _pretrained(AutoTokenizer, where)
    size = net.config.vision_config.image_size
    length = net.config.text_config.max_position_embeddings

    def run(x: Tensor) -> Outputs:
        pooled = net.vision_model(_normalise(x, *OPENAI)).pooler_output
        return {"features": net.visual_projection(pooled)}

    @torch.no_grad()
    def text(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pooled = net.text_model(**tokens.to(net.device)).pooler_output
        return net.text_projection(pooled).cpu()

    rule = f"short-bicubic:{size} crop:{size}"
    scale = net.logit_scale.exp().item()
    return Extractor(name, weights_hash(net), rule, run, text, scale, net.config.projection_dim)


def pickscore(weights: str = "") -> Extractor:
    """PickScore's CLIP (Kirstain et al. 2023, arXiv 2305.01569); the metric multiplies by its logit scale."""
    return clip(weights or PICKSCORE, "pickscore")


def open_clip(weights: str = "", name: str = "open_clip") -> Extractor:
    """A CLIP of open_clip as ARCHITECTURE/WEIGHTS (a tag or a .safetensors file) or local-dir:FOLDER.

    By default ViT-g-14/laion2b_s12b_b42k, the one of DMD2's and GigaGAN's CLIP score.
    """
    import importlib.util

    if importlib.util.find_spec("open_clip") is None:
        raise ValueError("extractor open_clip needs the package: pip install 'distill-one-step[eval]'")
    from open_clip import create_model_from_pretrained, get_tokenizer
    from open_clip.model import get_model_preprocess_cfg

    where = weights or "ViT-g-14/laion2b_s12b_b42k"
    folder = where.startswith("local-dir:")
    kind, _, tag = (where, "", "") if folder else where.partition("/")
    try:
        net = create_model_from_pretrained(kind, tag or None, return_transform=False)
        tokenizer = get_tokenizer(kind)
    except (OSError, RuntimeError, TypeError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"open_clip could not load {where!r}: {_first_line(error)}") from None
    net = net.to(device()).eval().requires_grad_(False)
    how = get_model_preprocess_cfg(net)
    size = how["size"][0] if isinstance(how["size"], tuple | list) else how["size"]
    rule = f"{how['interpolation']}:{size}"
    if how["resize_mode"] == "shortest":
        rule = f"short-{rule} crop:{size}"
    elif how["resize_mode"] != "squash":
        raise ValueError(f"{where} resizes by {how['resize_mode']!r}; only 'shortest' and 'squash' are known here")

    def run(x: Tensor) -> Outputs:
        return {"features": net.encode_image(_normalise(x, how["mean"], how["std"]))}

    @torch.no_grad()
    def text(prompts: list[str]) -> Tensor:
        return net.encode_text(tokenizer(prompts).to(device())).cpu()

    width = getattr(net.visual, "output_dim", None)
    return Extractor(name, weights_hash(net), rule, run, text, net.logit_scale.exp().item(), width)


def hpsv2(weights: str = "") -> Extractor:
    """HPS v2.1's CLIP, ViT-H-14 of open_clip with the authors' weights (Wu et al. 2023, arXiv 2306.09341)."""
    return open_clip(f"ViT-H-14/{require_hps(weights)}", "hpsv2")


def _pretrained(kind: Any, where: str) -> Any:
    """A model, on the device, or a tokenizer of transformers, from a folder or the Hub; safetensors alone."""
    network = hasattr(kind, "register_for_auto_class") and issubclass(kind, nn.Module)
    try:
        model = kind.from_pretrained(where, **({"use_safetensors": True, "dtype": torch.float32} if network else {}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no {kind.__name__} at {where!r}, as a folder or on the Hub: {_first_line(error)}") from None
    return model.to(device()).eval().requires_grad_(False) if network else model


def _normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (x / 255 - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    "inception-clean": inception_clean,
    "inception-legacy": inception_legacy,
    "inception-logits": inception_logits,
    "dinov2": dinov2,
    "clip": clip,
    "open_clip": open_clip,
    "hpsv2": hpsv2,
    "pickscore": pickscore,
    "digits": digits,
    "random": random,
}
