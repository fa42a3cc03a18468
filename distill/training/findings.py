"""Find the source of a non-finite update: compute its micro-batches again and check every tensor.

A micro-batch depends only on the weights, the batch and (seed, step, player, sample).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill import sharding
from distill.method import Method, Update
from distill.roles import Nets
from distill.training import precision
from distill.training.samples import MicroBatch
from distill.training.state import State

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Recomputation:
    """The result of computing one micro-batch again."""

    samples: list[int]  # indices in the global batch
    loss: str
    bad: str | None  # name of the first tensor that is not finite
    alone: bool = True  # the value is not a mean over processes, as a sharded network's gradient is

    def __bool__(self) -> bool:
        return self.bad is not None

    def __str__(self) -> str:
        says = f"first bad tensor: {self.bad}" if self.bad else "nothing bad"
        return f"{says} (loss {self.loss}, samples {self.samples[0]} to {self.samples[-1]})"


def examine(
    state: State, method: Method, update: Update, batches: list[MicroBatch], accelerator: Accelerator
) -> list[Recomputation]:
    """Compute the loss of every micro-batch and its gradient again, without averaging, and check every tensor.

    Collective: all processes must call it, because sharded networks average their gradients.
    """
    parameters = [p for optimizer in state.optimizers.values() for p in optimizer.param_groups[0]["params"]]
    findings = []
    for batch in batches:
        for p in parameters:
            p.grad = None
        loss, bad = _recompute(state.nets, method, update, batch, len(batches), accelerator)
        alone = bool(bad) or not sharding.is_fsdp_launch(accelerator)
        bad += _bad_gradients(state.nets)
        first = bad[0] if bad else None
        findings.append(Recomputation(batch.numbers.samples.tolist(), f"{float(loss.detach()):.6g}", first, alone))
    for p in parameters:
        p.grad = None
    return findings


def _recompute(
    nets: Nets, method: Method, update: Update, batch: MicroBatch, rounds: int, accelerator: Accelerator
) -> tuple[Tensor, list[str]]:
    """(loss, names of non-finite tensors in order) of one micro-batch of `rounds`. It also computes gradients."""
    inputs: dict[str, object] = {"batch": batch.batch}
    if batch.source is None:
        inputs["samples of an earlier update"] = batch.x
    bad = [name for name, tensor in named_tensors(inputs) if not is_finite(tensor)]
    with _collect_nonfinite(nets) as met:
        with precision.autocast(accelerator):
            x = batch.x
            if batch.source is not None:
                with torch.set_grad_enabled(update.player == "student"):
                    x = method.sample(nets, batch.batch, batch.source)
            loss, _ = update.loss(x, nets, batch.batch, batch.numbers)
        bad += met
        if not is_finite(loss):
            bad.append("the loss itself")
        met.clear()
        (loss / rounds).backward()
    return loss, bad + met


def _bad_gradients(nets: Nets) -> list[str]:
    """Names of the non-finite gradients, approximately in the order of the backward pass."""
    named = [(f"{role}.{name}", p.grad) for role, net in nets.modules().items() for name, p in net.named_parameters()]
    grads = [(name, grad) for name, grad in reversed(named) if grad is not None]
    bad = [f"gradient of the weight {name}" for name, grad in grads if not is_finite(grad)]
    norm = sharding.gather_full_tensor(torch.nn.utils.get_total_norm([grad for _, grad in grads]))
    return bad if is_finite(norm) else [*bad, "the norm of all gradients"]


@contextmanager
def _collect_nonfinite(nets: Nets) -> Iterator[list[str]]:
    """A list that collects the names of non-finite tensors in order: inputs of networks, outputs of modules,
    gradients."""
    seen: list[str] = []

    def look(what: str, value: object) -> None:
        seen.extend(f"{what} {name}".strip() for name, tensor in named_tensors(value) if not is_finite(tensor))

    def examine_inputs(role: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        look(f"input of {role}:", {f"{i}": one for i, one in enumerate(args)} | kwargs)

    def examine_outputs(name: str, module: nn.Module, args: object, output: object) -> None:
        look(f"output of {name}", output)
        for _, tensor in named_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(look, f"gradient of the output of {name}"))

    handles = []
    for role, net in {**nets.frozen(), **nets.modules()}.items():
        handles.append(net.register_forward_pre_hook(partial(examine_inputs, role), with_kwargs=True))
        for name, module in net.named_modules():
            handles.append(module.register_forward_hook(partial(examine_outputs, f"{role}.{name}".rstrip("."))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def named_tensors(tree: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, lists and tuples, with names like "c/label"."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from named_tensors(value, f"{name}/{key}".lstrip("/"))


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(sharding.part(tensor)).all())
