"""The feature network of the digits: a small classifier, trained on the training split and cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data import digits
from distill.files import atomic_file
from eval.features.weights import cache_folder, weights_hash
from eval.files import write_json

WIDTH = 64  # features per image
REQUIRED = 0.97  # accuracy on the held-out split below which the network is not used


class DigitsNet(nn.Module):
    """Images [B, 1, 8, 8] in [-1, 1] -> features [B, 64] before the ReLU, and logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 4 * 4, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)  # [B, 64, 4, 4]
        feats = self.fc(F.relu(self.conv3(h)).flatten(1))
        return feats, self.head(F.relu(feats))


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; every field is part of the cache's key."""

    epochs: int = 60
    batch: int = 64
    lr: float = 1e-3  # Adam, cosine to zero
    shift: int = 1  # augmentation: a shift by up to this many pixels
    seed: int = 0


@dataclass(frozen=True)
class Classifier:
    """A trained feature network: `classifier(images) -> (features, logits)`."""

    net: DigitsNet
    accuracy: float  # on the held-out split
    hash: str  # of the weights: figures of different hashes must not be compared

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """Images [N, 1, 8, 8] in [-1, 1] -> features float64 [N, 64], logits float64 [N, 10]."""
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8) or not len(images):
            raise ValueError(
                f"the digits network got images of shape {list(images.shape)}; it takes [N, 1, 8, 8] with N >= 1"
            )
        if not torch.isfinite(images).all():
            bad = (~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0].item()
            raise ValueError(f"image {bad} holds NaN or infinite values; find the step that made them")
        parts = [self.net(chunk.float()) for chunk in images.split(batch)]
        return torch.cat([f for f, _ in parts]).double(), torch.cat([y for _, y in parts]).double()


def shift_images(images: Tensor, by: Tensor) -> Tensor:
    """Move images [B, 1, H, W] by whole pixels `by` [B, 2] (down, right) and fill with the background -1."""
    reach = int(by.abs().max())
    height, width = images.shape[-2:]
    padded = F.pad(images, [reach] * 4, value=-1.0)
    rows = (torch.arange(height) + reach)[None] - by[:, :1]  # [B, H]
    cols = (torch.arange(width) + reach)[None] - by[:, 1:]  # [B, W]
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], cols[:, None, :]][:, None]


def train(recipe: Recipe = Recipe()) -> DigitsNet:
    """Train the network on the 1,200 training digits: about 30 s on one thread, with the same weights every time."""
    images, labels = digits("train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, hence the weights, must not depend on the machine's load
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(recipe.seed)
            net = DigitsNet()
            rate = recipe.epochs * -(-len(images) // recipe.batch)
            optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rate)
            for _ in range(recipe.epochs):
                for pick in torch.randperm(len(images)).split(recipe.batch):
                    by = torch.randint(-recipe.shift, recipe.shift + 1, (len(pick), 2))
                    loss = F.cross_entropy(net(shift_images(images[pick], by))[1], labels[pick])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()
    finally:
        torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


@cache
def classifier(folder: Path | None = None, recipe: Recipe = Recipe()) -> Classifier:
    """The digits feature network from `folder`, by default `cache_folder()`. It is trained and stored if absent.

    ValueError if its accuracy on the 597 held-out digits is below 97 %.
    """
    from safetensors.torch import save_file

    settings = json.dumps(asdict(recipe) | {"net": str(DigitsNet())}, sort_keys=True)
    name = f"digits-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    path = (folder or cache_folder()) / f"{name}.safetensors"
    net = _read_network(path) or train(recipe)
    images, labels = digits("heldout")
    trained = Classifier(net, 0.0, weights_hash(net))
    accuracy = (trained(images)[1].argmax(1) == labels).double().mean().item()
    if accuracy < REQUIRED:
        raise ValueError(
            f"the digits network reaches {accuracy:.3f} on the held-out digits, below {REQUIRED}; "
            f"its features cannot be trusted. Delete {path.name} from the cache to train it again"
        )
    if _read_network(path) is None:
        write_json(path.with_suffix(".json"), {"accuracy": accuracy, "hash": trained.hash, "recipe": asdict(recipe)})
        with atomic_file(path) as part:  # several processes may arrive here at once
            save_file(net.state_dict(), part)
    return Classifier(net, accuracy, trained.hash)


def _read_network(path: Path) -> DigitsNet | None:
    """The network of a file; None if the file is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    net = DigitsNet().eval().requires_grad_(False)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):  # RuntimeError: tensors that are not the network's
        return None
    return net
