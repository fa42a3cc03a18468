"""Random numbers of losses, each with a name.

A number depends only on (seed, step, player, name, index of the sample in the global batch). It does not depend on the
number of processes, micro-batches or restarts. There is no generator state to save.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Words = TypeVar("Words", Tensor, np.ndarray)  # int32
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[int, int], a: Words, b: Words) -> tuple[Words, Words]:
    """The counter-based generator Threefry-2x32 with 20 rounds (Salmon et al. 2011): two int32 words per counter."""
    k = [_to_int32(key[0]), _to_int32(key[1]), _to_int32(key[0] ^ key[1] ^ 0x1BD11BDA)]
    a = a + k[0]
    b = b + k[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a += b
            low = b >> (32 - r)
            low &= (1 << r) - 1  # int32: the mask makes the right shift logical
            b <<= r
            b |= low
            b ^= a
        a += k[(i + 1) % 3]
        b += _to_int32(k[(i + 2) % 3] + i + 1)
    return a, b


def _to_int32(n: int) -> int:
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n


def _hash(*key: object) -> tuple[int, int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


class Draw:
    """The random numbers of one update of a player.

    seed, step, player: the key. samples [B]: indices of this micro-batch in the global batch of the step. late, before:
    for a generation that continues from earlier steps (Update.walk), the number of steps since it began and x0 of its
    previous call, if available.
    """

    late: int | None = None
    before: Tensor | None = None

    def __init__(self, seed: int, step: int, player: str, samples: Tensor) -> None:
        self.seed = seed
        self.step = step
        self.player = player
        self.samples = samples
        self.device = samples.device

    def _words(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if shape[0] != len(self.samples):
            raise ValueError(f"draw {name!r} of shape {shape} in a micro-batch of {len(self.samples)} samples")
        n = math.prod(shape[1:])
        element = torch.arange(n, dtype=torch.int32, device=self.device).expand(shape[0], n)
        sample = self.samples.to(torch.int32)[:, None].expand(-1, n)
        key = _hash(self.seed, self.step, self.player, name)
        if self.device.type != "cpu":
            a, b = threefry(key, sample, element)
        else:  # NumPy takes a quarter of the time
            a, b = map(torch.from_numpy, threefry(key, sample.numpy(), element.numpy()))
        return a.reshape(shape), b.reshape(shape)

    @staticmethod
    def _unit(word: Tensor) -> Tensor:
        return ((word >> 8) & 0xFFFFFF).float() * 2.0**-24  # 24 bits: [0, 1)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1), float32; shape is [B, ...]."""
        return self._unit(self._words(name, tuple(shape))[0])

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, float32; shape is [B, ...] (Box & Muller 1958)."""
        a, b = self._words(name, tuple(shape))
        return (-2 * (self._unit(a) + 2.0**-25).log()).sqrt() * (2 * math.pi * self._unit(b)).cos()

    def integers(self, name: str, n: int) -> Tensor:
        """Uniform integers 0 .. n - 1, one per sample [B]."""
        return (self.uniform(name, (len(self.samples),)).double() * n).long().clamp(max=n - 1)

    def independent_stream(self, name: str) -> Draw:
        """An independent source for a second batch of the same update."""
        other = copy.copy(self)
        other.seed = _hash(self.seed, name)[0]
        other.late = None
        other.before = None
        return other

    def index(self, name: str, n: int) -> int:
        """One integer in 0 .. n - 1 for a choice of control flow: equal for both players, all samples and all
        processes."""
        return _hash(self.seed, self.step, name)[0] % n
