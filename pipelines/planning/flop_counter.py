"""FLOPs and bytes of a method's updates. The real loss runs forward and backward on the meta device, without numbers.
Only what a GPU does beyond shapes is imitated: the precisions of autocast and fused attention.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import overriding
from distill.method import Requirement
from distill.random import Draw
from distill.roles import Nets
from distill.training.prepare import owners, start
from distill.training.step import set_trainable, steps_into_generation

if TYPE_CHECKING:
    from distill.method import Method, Update

CYCLE = 500  # number of steps that are counted one by one
HALF: tuple[Any, ...] = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose2d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
)
HALF += (torch.Tensor.matmul, torch.Tensor.__matmul__, F.scaled_dot_product_attention)
FULL = (F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.softplus, F.mse_loss)


class GPU(TorchFunctionMode):
    """Imitates CUDA's autocast to bfloat16 (`half`) and fused attention for tensors on the meta device."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.half and (func in HALF or func in FULL):
            dtype = torch.bfloat16 if func in HALF else torch.float32
            args, kwargs = tree_map(partial(_cast, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """The flash kernel; with a mask, the memory-efficient kernel."""
    scale = options.get("scale")
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)[0]


def gradients(grad: Any, x: Any, weight: Any, *rest: Any, **out: Any) -> int:
    """FLOPs of a convolution's gradients, from shapes: those to input and weight each cost as much as the forward pass.

    torch's own formula ignores groups: for the weight of a depthwise convolution it counts every pair of channels.
    """
    *_, transposed, _, _, mask = rest
    return sum(mask[:2]) * conv_flop_count(x, weight, grad, transposed)


FLOPS: dict[Any, Any] = {torch.ops.aten.convolution_backward: gradients}  # replaces torch's formula


class Meter(TorchDispatchMode):
    """Counts `flops` by torch's own formulas, except those in FLOPS, and bytes of tensors that are created inside and
    alive: `now`, and the maximum, `peak`. (FlopCounterMode follows modules with hooks, which keep recomputed blocks
    alive.)"""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.weights = {id(s): s for s in (t.untyped_storage() for t in distinct(*nets))}  # views need no memory
        self.seen: dict[int, weakref.finalize] = {}
        self.formulas = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in FLOPS.items()}}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.formulas:
            self.flops += self.formulas[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        key = id(storage)
        size = storage.nbytes()
        if key not in self.seen and key not in self.weights:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.seen[key] = weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.now -= size
        del self.seen[key]

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor, because it is a gradient."""
        storage = tensor.untyped_storage()
        if (end := self.seen.pop(id(storage), None)) is not None:
            end.detach()
            self.now -= storage.nbytes()


class Traffic(NamedTuple):
    """Traffic of sharded networks: gathered parameters, reduced gradients (elements), and the number of collectives."""

    gathered: float = 0
    reduced: float = 0
    collectives: float = 0

    def plus(self, more: Traffic, times: float = 1) -> Traffic:
        return Traffic(*(a + times * b for a, b in zip(self, more, strict=True)))


class Shards:
    """Counts the traffic of networks whose units are sharded and freed after every pass (FSDP2).

    A unit is gathered for its forward pass, and again for its backward pass; then its gradient is reduced.
    Recomputation happens while it is gathered. Parameters outside units form one more unit, the network's own.
    """

    def __init__(self, *nets: nn.Module) -> None:
        self.traffic = Traffic()
        self.backward = False
        self.handles = []
        for net in nets:
            blocks = units(net) or [net]
            inside = {id(p) for block in blocks for p in block.parameters()}
            rest = [p for p in net.parameters() if id(p) not in inside]
            for block in blocks:
                params = list(block.parameters())
                self.handles.append(block.register_forward_hook(partial(self.passed, net, params)))
            self.handles.append(net.register_forward_pre_hook(partial(self.on_forward_start, rest)))
        self.returned: dict[nn.Module, Any] = {}

    def on_forward_start(self, rest: list[nn.Parameter], net: nn.Module, args: Any) -> None:
        """Called at the start of a pass."""
        self.gather(rest)
        self.returned[net] = self.once(lambda: self.back(rest))

    def passed(self, net: nn.Module, params: list[nn.Parameter], block: nn.Module, args: Any, out: Any) -> None:
        if self.backward:
            return
        self.gather(params)
        ended = self.returned[net]

        came = self.once(lambda: self.back(params), ended)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: came())

    @staticmethod
    def once(*acts: Callable[[], None]) -> Callable[[], None]:
        left = list(acts)

        def act() -> None:
            while left:
                left.pop()()

        return act

    def gather(self, params: list[nn.Parameter]) -> None:
        if whole := sum(p.numel() for p in params):
            self.traffic = self.traffic.plus(Traffic(whole, 0, 1))

    def back(self, params: list[nn.Parameter]) -> None:
        self.gather(params)
        if trained := sum(p.numel() for p in params if p.requires_grad):
            self.traffic = self.traffic.plus(Traffic(0, trained, 1))


def units(net: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one: transformer and ResNet blocks of a network."""
    return [m for m in net.modules() if re.search(r"(Transformer|Resnet)Block(2D)?$", type(m).__name__)]


@dataclass(frozen=True)
class Turn:
    """One update of one player on a micro-batch: FLOPs, and bytes of the tensors that live during it."""

    player: str
    generation: int  # FLOPs of the samples, with one student call if the number of calls is random
    loss: int  # FLOPs of the loss and of the backward pass
    activations: int  # bytes: the maximum of all tensors except weights and gradients
    gradients: int  # bytes
    traffic: tuple[Traffic, Traffic] = (Traffic(), Traffic())  # traffic of generation and loss, if networks are sharded


@dataclass(frozen=True)
class Cost:
    """Cost of a method on micro-batches of `micro` samples, averaged over its random numbers of calls."""

    turns: tuple[Turn, ...]  # one for each update
    flops: float  # per step and micro-batch, averaged over a cycle and over random numbers of calls
    cycle: int  # number of steps until the pattern of updates repeats
    micro: int
    traffic: Traffic  # per step and micro-batch, averaged in the same way, if networks are sharded

    @property
    def activations(self) -> int:
        return max(turn.activations for turn in self.turns)

    @property
    def gradients(self) -> int:
        return max(turn.gradients for turn in self.turns)


def players(nets: Nets) -> dict[str, list[nn.Parameter]]:
    """The parameters of each player as the trainer starts them, on the networks' device."""
    device = next(nets.teacher.net.parameters()).device
    start(nets, SimpleNamespace(device=device, mixed_precision="no", distributed_type=None))
    return owners(nets)


class Choice(Draw):
    """A draw whose choices of control flow are all `k`, or the largest possible choice."""

    def __init__(self, step: int, player: str, micro: int, k: int) -> None:
        super().__init__(0, step, player, torch.zeros(micro, dtype=torch.long, device="meta"))
        self.k = k

    def index(self, name: str, n: int) -> int:
        return min(self.k, n - 1)

    def _words(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        word = torch.empty(shape, dtype=torch.int32, device="meta")  # its values are never read
        return word, word


def cost(
    method: Method,
    nets: Nets,
    c: dict[str, Tensor],
    micro: int = 1,
    half: bool = True,
    checkpointing: bool = False,
    fused: bool = True,
) -> Cost:
    """The cost of `method` on networks on the meta device. Missing LPIPS and reward networks cost nothing.

    c: a condition [1, ...] on the meta device. half: bfloat16 autocast. checkpointing: recompute blocks. fused:
    attention that never stores its matrix; False counts only the products of attention, as papers do. One cycle is
    counted, after every player has started.
    """
    free = lambda x, *_: x.flatten(1).mean(1)
    nets = replace(nets, perceptual=nets.perceptual or free, reward=nets.reward or free)
    nets.control = nets.control or (lambda x: x)
    mode = GPU(half) if fused or half else None
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), mode or nullcontext()))
    roles: dict[str, Any] = nets.frozen() | nets.modules()
    for role, net in roles.items():
        if role not in ("disc", "target") and hasattr(net, "enable_gradient_checkpointing"):
            net.enable_gradient_checkpointing(again) if checkpointing else net.disable_gradient_checkpointing()
    owners = players(nets)
    if nets.teacher.null is not None:
        nets = _with_null(nets, {key: value.to("meta") for key, value in nets.teacher.null.items()})
    many = {key: value.expand(micro, *value.shape[1:]) for key, value in c.items()}
    real = torch.empty(micro, *nets.shape, device="meta")
    told = overriding(many, many) if Requirement.FORGOTTEN_PROMPTS in method.requirements else many
    also = {"forget_c": told} if told is not many else {}
    batch = lambda: {"c": dict(told), "real": real, "real_c": dict(many), "z": real, "y": real, **also}
    updates = method.updates()
    turns = []
    cycle = max(update.every for update in updates)
    if cycle > CYCLE:
        raise ValueError(f"a player moves every {cycle:,} steps only; counted are at most {CYCLE}: give a lower number")
    begun = max(max(update.start, update.alone) for update in updates)
    first = -(-begun // cycle) * cycle
    for update in updates:
        set_trainable(owners, update.player)
        with ExitStack() as stack:
            if not fused:
                stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            turns.append(_turn(method, nets, owners, update, first, batch(), micro, mode))
    set_trainable(owners, *owners)
    total = 0.0
    traffic = Traffic()
    for step in range(first, first + cycle):
        made = False
        for update, turn in zip(updates, turns, strict=True):
            if step % update.every:
                continue
            making, losing = turn.traffic
            total = total + turn.loss
            traffic = traffic.plus(losing)
            if not (update.reuse and made):
                calls = max(1.0, _calls(method, nets, update, step, batch, micro))
                turned = _calls(method, nets, replace(update, walk=False), first, batch, micro, 1)  # in the turn above
                calls /= max(1.0, turned)
                total = total + calls * turn.generation
                traffic = traffic.plus(making, calls)
            made = True
    return Cost(tuple(turns), total / cycle, cycle, micro, Traffic().plus(traffic, 1 / cycle))


def _turn(
    method: Method,
    nets: Nets,
    owners: dict[str, list[nn.Parameter]],
    update: Update,
    step: int,
    batch: dict[str, Any],
    micro: int,
    mode: TorchFunctionMode | None,
) -> Turn:
    """Run one update like the trainer."""
    draw = Choice(step, update.player, micro, 0)
    networks = [*nets.frozen().values(), *nets.modules().values()]
    meter = Meter(*networks)
    shards = Shards(*networks)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: meter.forget(p.grad)) for p in owners[update.player]]
    try:
        with meter, mode or nullcontext():
            with torch.set_grad_enabled(update.player == "student"):
                x = method.sample(nets, batch, draw)
            generation = meter.flops
            making = shards.traffic
            loss, _ = update.loss(x, nets, batch, draw)
            shards.backward = True
            loss.backward()
        gradients = sum(p.grad.nbytes for p in owners[update.player] if p.grad is not None)
    finally:
        for hook in (*hooks, *shards.handles):
            hook.remove()
        for p in owners[update.player]:
            p.grad = None
    losing = shards.traffic.plus(making, -1)
    return Turn(update.player, generation, meter.flops - generation, meter.peak, gradients, (making, losing))


def _calls(
    method: Method, nets: Nets, update: Update, step: int, batch: Any, micro: int, choices: int | None = None
) -> float:
    """The student's calls for the samples of this step, averaged over the first `choices` of the method, or all."""
    asked = 0

    def call(net: nn.Module, x: Tensor, t: Tensor, c: Any) -> Tensor:
        nonlocal asked
        asked += 1
        return torch.empty_like(x)

    student = replace(nets.student, denoiser=replace(nets.student.denoiser, call=call))
    choices = choices or len(nets.student.times)
    with torch.no_grad():
        for k in range(choices):
            draw = Choice(step, update.player, micro, k)
            if update.walk:
                draw.late = steps_into_generation(method, nets, step)
                draw.before = torch.empty(micro, *nets.shape, device="meta") if draw.late else None
            method.sample(replace(nets, student=student), batch(), draw)
    return asked / choices


def _with_null(nets: Nets, null: dict[str, Tensor]) -> Nets:
    on: Any = lambda d: d if d is None else replace(d, null=null)
    student = replace(nets.student, denoiser=on(nets.student.denoiser))
    return replace(nets, teacher=on(nets.teacher), student=student, fake=on(nets.fake), target=on(nets.target))


def distinct(*nets: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of networks, each tensor once: a shared backbone counts once."""
    seen: set[int] = set()
    for tensor in itertools.chain.from_iterable((*net.parameters(), *net.buffers()) for net in nets):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def forward(denoiser: Denoiser, shape: tuple[int, ...], c: dict[str, Tensor]) -> int:
    """FLOPs of one forward pass of one sample."""
    x = torch.empty(1, *shape, device="meta")
    t = torch.full((1,), 0.5, dtype=torch.float64, device="meta")
    with Meter() as meter, torch.no_grad():
        denoiser(x, t, c)
    return meter.flops


def passes(method: Method, nets: Nets, c: dict[str, Tensor]) -> float:
    """Forward passes of one network per iteration and sample, averaged over a cycle.

    A forward pass counts 1, a backward pass 2, a backward pass to the input only 1, an encoder its fraction of the
    network. Arguments as in `cost`.
    """
    pair = cost(method, nets, c, 2, half=False, fused=False)  # SUN takes the condition of another sample
    return pair.flops / pair.micro / forward(nets.teacher, nets.shape, c)
