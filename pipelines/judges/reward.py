"""Rewards of samples, with gradient: agreement of an image with its prompt (CLIP), or with its class label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.diffusion.denoiser import Condition
from distill.random import Draw
from distill.roles import Batch
from pipelines.judges import perceptual

if TYPE_CHECKING:
    from distill.configuration import Config
    from pipelines.teacher import Teacher

Reward = Callable[[Tensor, Condition], Tensor]
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pixels
STD = (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
BATCHES = 32  # of real samples, to which a classifier of labels is fitted
SIZE = 64  # of a batch


class RewardMethod(Protocol):
    """A method with a reward. reward: "labels", or a CLIPModel. reward_decoder: as in `picture_decoder`."""

    reward: str
    reward_decoder: str | None


class Batches(Protocol):
    """The data of a run. texts: its prompts; () for data of class labels."""

    @property
    def texts(self) -> Sequence[str]: ...

    def __call__(self, draw: Draw) -> Batch: ...


def build_reward(config: Config[RewardMethod, object], teacher: Teacher, data: Batches) -> Reward:
    """The reward of a run. A smoke run downloads nothing: its CLIP is a random function of the decoded images."""
    method = config.method
    if method.reward == "labels":
        return label_reward(data)
    pictures = perceptual.picture_decoder(teacher, None if config.smoke else method.reward_decoder)
    if config.smoke:
        return random_reward(pictures)
    return clip_reward(method.reward, data.texts, pictures, config.train.gradient_checkpointing)


def clip_reward(weights: str, texts: Sequence[str], pictures: Callable[[Tensor], Tensor], each: bool = False) -> Reward:
    """R(x, c) -> [B]: cosine in [-1, 1] of CLIP's embeddings of the decoded x and of its prompt.

    weights: folder or Hub name of a CLIPModel of transformers, safetensors. c has "prompt" [B], rows of `texts`.
    pictures: samples [B, *shape] -> [B T, 3, H, W] in [-1, 1]; the reward of a video is the mean over frames. They are
    not clamped, because that would remove their gradient. each: process samples one by one, recomputed in the backward
    pass.
    """
    from transformers import AutoTokenizer, CLIPModel

    if not texts:
        raise ValueError("a CLIP reward needs the prompts, which this data has not: --method.reward labels, or Text")
    try:
        net = CLIPModel.from_pretrained(weights, use_safetensors=True).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(weights)
    except (OSError, ValueError) as error:
        raise ValueError(f"no CLIPModel with safetensors at {weights!r}, as a folder or on the Hub: {error}") from None
    size = net.config.vision_config.image_size
    length = net.config.text_config.max_position_embeddings

    def reward(x: Tensor, prompt: Tensor) -> Tensor:
        words = [texts[i] for i in prompt.tolist()]
        tokens = tokenizer(words, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.autocast(x.device.type, enabled=False):
            seen = F.interpolate(pictures(x), (size, size), mode="bicubic", antialias=True, align_corners=False)
            pixels = (seen / 2 + 0.5 - seen.new_tensor(MEAN)[:, None, None]) / seen.new_tensor(STD)[:, None, None]
            out = net.to(x.device)(**tokens.to(x.device), pixel_values=pixels)
        image = out.image_embeds.reshape(len(x), -1, out.text_embeds.shape[1])
        return (image * out.text_embeds[:, None]).sum(2).mean(1)

    def reward_of_batch(x: Tensor, c: Condition) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        if c is None or "prompt" not in c:
            raise ValueError('a CLIP reward needs the rows of the prompts, the condition "prompt", from the data')
        if not each:
            return reward(x, c["prompt"])
        pairs = zip(x.split(1), c["prompt"].split(1), strict=True)
        return torch.cat([checkpoint(reward, *pair, use_reentrant=False) for pair in pairs])

    return reward_of_batch


def label_reward(data: Callable[[Draw], Batch]) -> Reward:
    """R(x, c) -> [B]: log p(class | x), at most 0, for Gaussian classes with one covariance (linear discriminant).

    It is fitted to real samples of the data. It reads their labels c["class_labels"] [B].
    """
    batches = [data(Draw(0, i, "reward", torch.arange(SIZE))) for i in range(BATCHES)]
    if any("class_labels" not in batch.get("real_c", ()) for batch in batches):
        raise ValueError("a reward of labels needs real samples with class labels, which this data has not")
    x = torch.cat([batch["real"] for batch in batches]).flatten(1).double()
    y = torch.cat([batch["real_c"]["class_labels"] for batch in batches])
    one = F.one_hot(y).double()
    if not (one.sum(0) > 1).all():
        raise ValueError(f"a reward of labels is fitted to {len(x)} real samples, and some classes have none of them")
    mean = one.T @ x / one.sum(0)[:, None]
    share = one.mean(0)
    spread = x - mean[y]
    cov = spread.T @ spread / len(x)
    cov = 0.9 * cov + 0.1 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)  # some pixels are constant
    w = torch.linalg.solve(cov, mean.T)
    b = share.log() - (mean.T * w).sum(0) / 2

    def reward(x: Tensor, c: Condition) -> Tensor:
        assert c is not None
        logits = x.flatten(1) @ w.to(x) + b.to(x)
        return logits.log_softmax(1).gather(1, c["class_labels"][:, None])[:, 0]

    return reward


def random_reward(pictures: Callable[[Tensor], Tensor]) -> Reward:
    """Fixed random features of the images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 1, 1), nn.Tanh()).requires_grad_(False)

    def reward(x: Tensor, c: Condition) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return net.to(x.device)(pictures(x)).reshape(len(x), -1).mean(1)

    return reward
