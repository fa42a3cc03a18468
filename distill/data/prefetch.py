"""Batches as functions of a draw. A thread reads the next batch during a step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from distill.data.images import UnreadableImage
from distill.data.online import SIZES
from distill.data.shards import Table
from distill.diffusion.guidance import with_override
from distill.random import Draw
from distill.roles import Batch

Samples = tuple[int, ...]
Ask = tuple[int, int, str, Samples]  # seed, step, player and samples of a micro-batch
FIXED = 1000  # prompts whose text is kept for grids of samples


class PrefetchingBatches:
    """data(draw) -> batch with "c" [B, ...] and, where the method needs them, "real" [B, *shape] and "real_c".

    texts: the text of every row, for a method with a reward. Conditions then hold their rows as "prompt" [B].
    After `override`, a condition also holds the keys of its replacement, and "forget_c" are replaced prompts.

    A thread reads the next step's batch during this step. A batch is the same whether it was read ahead or not:
    encoders run without gradient and autocast in both cases.
    early: whether batches are read ahead. False for a table that calls a network of the training.
    """

    def __init__(
        self,
        text: Table,
        images: Table | None,
        prompts: int,
        names: list[str],
        p_empty: float = 0.0,
        early: bool = True,
    ) -> None:
        self.early = early
        self.text = text
        self.images = images
        self.prompts = prompts
        self.names = names
        self.p_empty = p_empty
        self.texts: list[str] = []
        self.rule: Tensor | None = None
        self._thread = ThreadPoolExecutor(1, "data")
        self._ahead: dict[tuple[str, Samples], tuple[Ask, Future[Batch]]] = {}
        self._step: dict[tuple[str, Samples], int] = {}
        self._seen: dict[tuple[int, int], tuple[Tensor, int, Samples]] = {}

    def override(self, rule: Tensor) -> None:
        """For SFD. rule [len(text)]: the row of the text that replaces each text; its own row if none does."""
        self.rule = rule
        self.forgotten = (rule != torch.arange(len(rule))).nonzero()[:, 0]

    def __call__(self, draw: Draw) -> Batch:
        samples = self._host(draw.samples)
        line = (draw.player, samples)
        ask = (draw.seed, draw.step, draw.player, samples)
        then, ahead = self._ahead.get(line, (None, None))
        if ahead is None or then != ask:
            ahead = self._thread.submit(self.read, ask)
        batch = ahead.result()
        stride = draw.step - self._step.get(line, draw.step - 1)  # a player may move at every fifth step only
        if stride > 0 and self.early:  # Update.walk looks back
            self._step[line] = draw.step
            then = (draw.seed, draw.step + stride, draw.player, samples)
            self._ahead[line] = then, self._thread.submit(self.read, then)
        return _map_tensors(batch, lambda t: _float(t.to(draw.device, non_blocking=True)))

    @torch.no_grad()
    def read(self, ask: Ask) -> Batch:
        """The batch of (seed, step, player, samples), with the stored types."""
        try:
            batch = self.rows(Draw(*ask[:3], torch.tensor(ask[3])))
        except UnreadableImage as error:
            raise error.in_training from None
        return _map_tensors(batch, _pin_memory) if torch.cuda.is_available() else batch

    def rows(self, draw: Draw) -> Batch:
        """The rows that a draw picks."""
        empty = draw.uniform("empty", (len(draw.samples), 2)) < self.p_empty
        prompts = self._texts(_integers(draw, "prompt", self.prompts), empty[:, 0])
        batch: Batch = {"c": prompts}
        if self.rule is not None:
            pick = self.forgotten[_integers(draw, "forget", len(self.forgotten))]
            batch["forget_c"] = self._texts(pick, torch.zeros_like(empty[:, 0]))
        if self.images is not None:
            rows = self.images.read(_integers(draw, "real", len(self.images)).tolist())
            c = self._texts(rows["caption"], empty[:, 1])
            batch |= {"real": rows["x"], "real_c": c | {key: rows[key] for key in (SIZES,) if key in c and key in rows}}
        return batch

    def _texts(self, rows: Tensor, empty: Tensor) -> dict[str, Tensor]:
        rows = torch.where(empty, len(self.text) - 1, rows)
        if self.rule is None:
            return self.text.read(rows.tolist()) | ({"prompt": rows} if self.texts else {})
        replaced = self.rule[rows]
        both, place = torch.cat([rows, replaced]).unique(return_inverse=True)
        read = self.text.read(both.tolist())
        c, other = ({key: value[at] for key, value in read.items()} for at in place.chunk(2))
        return with_override(c, other) | ({"prompt": replaced} if self.texts else {})  # a reward is of what is told

    def fixed(self, n: int) -> tuple[list[str], dict[str, Tensor]]:
        """(the first n prompts, repeated if there are fewer; their condition)."""
        rows = [i % min(self.prompts, len(self.names)) for i in range(n)]
        return [self.names[i] for i in rows], self._encoded(rows)

    def empty(self) -> dict[str, Tensor]:
        """The condition of the empty prompt, [1, ...]."""
        return self._encoded([len(self.text) - 1])

    def _encoded(self, rows: list[int]) -> dict[str, Tensor]:
        read = torch.no_grad()(self.text.read)
        return _map_tensors(self._thread.submit(read, rows).result(), _float)

    def _host(self, samples: Tensor) -> Samples:
        """The numbers of a tensor. They are copied from the device once, so a loop with the same tensor never waits."""
        key = samples.data_ptr(), len(samples)
        if key not in self._seen or self._seen[key][1] != samples._version:
            self._seen[key] = samples, samples._version, tuple(samples.tolist())  # holds the memory, so the key stays
        return self._seen[key][2]


def _integers(draw: Draw, name: str, n: int) -> Tensor:
    """Uniform integers below n, one per sample, from 40 bits: `draw.integers` has 24, too few for millions of rows."""
    return ((draw.integers(name, 1 << 20) << 20) + draw.integers(f"{name}, low", 1 << 20)) % n


def _pin_memory(x: Tensor) -> Tensor:
    return x.pin_memory() if x.device.type == "cpu" else x


def _float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _map_tensors(batch: Batch, f: Callable[[Tensor], Tensor]) -> Batch:
    return {key: _map_tensors(value, f) if isinstance(value, dict) else f(value) for key, value in batch.items()}
