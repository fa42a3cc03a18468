"""FLOPs and bytes of a method's updates. The real loss runs forward and backward on the meta device, without numbers.
Only what a GPU does beyond shapes is imitated: the precisions of autocast and fused attention.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper
from torch.utils.hooks import RemovableHandle

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.guidance import with_override
from distill.method import Requirement
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training.prepare import owners, start
from distill.training.step import set_trainable, steps_into_generation
from pipelines.protocols import Network

if TYPE_CHECKING:
    from distill.method import Method, Update

Arguments = tuple[Any, ...]  # positional arguments of an operator of torch
Options = dict[str, Any]  # its keyword arguments
CYCLE = 500  # number of steps that are counted one by one
HALF: tuple[Callable[..., Tensor], ...] = (
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

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Arguments = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self.half and (func in HALF or func in FULL):
            dtype = torch.bfloat16 if func in HALF else torch.float32
            args, kwargs = tree_map(partial(_cast, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(dtype: torch.dtype, value: object) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
    """The flash kernel; with a mask, the memory-efficient kernel."""
    scale = options.get("scale")
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)[0]


def gradients(grad: list[int], x: list[int], weight: list[int], *rest: Any, **out: object) -> int:
    """FLOPs of a convolution's gradients, from shapes: those to input and weight each cost as much as the forward pass.

    torch's own formula ignores groups: for the weight of a depthwise convolution it counts every pair of channels.
    """
    *_, transposed, _, _, mask = rest
    return sum(mask[:2]) * conv_flop_count(x, weight, grad, transposed)


# formulas that replace torch's
FLOPS: dict[OpOverloadPacket, Callable[..., int]] = {torch.ops.aten.convolution_backward: gradients}


class Meter(TorchDispatchMode):
    """Counts `flops` by torch's own formulas, except those in FLOPS, and bytes of tensors that are created inside and
    alive: `now`, and the maximum, `peak`. (FlopCounterMode follows modules with hooks, which keep recomputed blocks
    alive.)"""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.weights = {id(s): s for s in (t.untyped_storage() for t in distinct(*nets))}  # views need no memory
        self.alive: dict[int, weakref.finalize] = {}
        self.formulas = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in FLOPS.items()}}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Options | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.formulas:
            self.flops += self.formulas[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        size = storage.nbytes()
        if key not in self.alive and key not in self.weights:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.alive[key] = weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor, because it is a gradient."""
        storage = tensor.untyped_storage()
        if (end := self.alive.pop(id(storage), None)) is not None:
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
        self.handles: list[RemovableHandle] = []
        self.on_return: dict[nn.Module, Callable[[], None]] = {}  # the network's own backward pass
        for net in nets:
            blocks = units(net) or [net]
            inside = {id(p) for block in blocks for p in block.parameters()}
            rest = [p for p in net.parameters() if id(p) not in inside]
            for block in blocks:
                params = list(block.parameters())
                self.handles.append(block.register_forward_hook(partial(self.on_block_forward, net, params)))
            self.handles.append(net.register_forward_pre_hook(partial(self.on_forward_start, rest)))

    def on_forward_start(self, rest: list[nn.Parameter], net: nn.Module, args: object) -> None:
        """Count a pass of `net` before its first block. rest: its parameters outside blocks."""
        self.gather(rest)
        self.on_return[net] = call_once(lambda: self.on_backward(rest))

    def on_block_forward(
        self, net: nn.Module, params: list[nn.Parameter], block: nn.Module, args: object, out: object
    ) -> None:
        """Count a block's forward pass, and its backward pass where a gradient reaches its output."""
        if self.backward:
            return
        self.gather(params)
        on_gradient = call_once(lambda: self.on_backward(params), self.on_return[net])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: on_gradient())

    def gather(self, params: list[nn.Parameter]) -> None:
        if size := sum(p.numel() for p in params):
            self.traffic = self.traffic.plus(Traffic(size, 0, 1))

    def on_backward(self, params: list[nn.Parameter]) -> None:
        self.gather(params)
        if size := sum(p.numel() for p in params if p.requires_grad):
            self.traffic = self.traffic.plus(Traffic(0, size, 1))


def call_once(*functions: Callable[[], None]) -> Callable[[], None]:
    """A function whose first call calls all `functions`, the last one first. Later calls do nothing."""
    left = list(functions)

    def call() -> None:
        while left:
            left.pop()()

    return call


def units(net: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one: transformer and ResNet blocks of a network."""
    return [m for m in net.modules() if re.search(r"(Transformer|Resnet)Block(2D)?$", type(m).__name__)]


@dataclass(frozen=True)
class UpdateCost:
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

    updates: tuple[UpdateCost, ...]  # in the order of the method's updates
    flops: float  # per step and micro-batch, averaged over a cycle and over random numbers of calls
    cycle: int  # number of steps until the pattern of updates repeats
    micro: int
    traffic: Traffic  # per step and micro-batch, averaged in the same way, if networks are sharded

    @property
    def activations(self) -> int:
        return max(update.activations for update in self.updates)

    @property
    def gradients(self) -> int:
        return max(update.gradients for update in self.updates)


def players(nets: Nets) -> dict[str, list[nn.Parameter]]:
    """The parameters of each player as the trainer starts them, on the networks' device."""
    device = next(nets.teacher.net.parameters()).device
    start(nets, SimpleNamespace(device=device, mixed_precision="no", distributed_type=None))
    return owners(nets)


class FixedBranchDraw(Draw):
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
    mode = GPU(half) if fused or half else None
    nets = _with_judges(nets)
    set_recompute(nets, mode, checkpointing)
    owners = players(nets)
    nets = _with_meta_null(nets)
    counter = UpdateCounter(method, nets, owners, c, micro, mode)
    updates = method.updates()
    cycle = max(update.every for update in updates)
    if cycle > CYCLE:
        raise ValueError(f"a player moves every {cycle:,} steps only; counted are at most {CYCLE}: give a lower number")
    begin = max(max(update.start, update.alone) for update in updates)
    first = -(-begin // cycle) * cycle
    kernel: AbstractContextManager[None] = nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
    with kernel:
        costs = tuple(counter.count_update(update, first) for update in updates)
    set_trainable(owners, *owners)
    flops, traffic = counter.count_cycle(costs, first, cycle)
    return Cost(costs, flops / cycle, cycle, micro, Traffic().plus(traffic, 1 / cycle))


def set_recompute(nets: Nets, mode: TorchFunctionMode | None, on: bool) -> None:
    """Switch recomputation of blocks on or off for every network that has it. mode: active while they recompute."""
    recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), mode or nullcontext()))
    for role, module in (nets.frozen() | nets.modules()).items():
        if role in ("disc", "target") or not hasattr(module, "enable_gradient_checkpointing"):
            continue
        net = cast(Network, module)
        if on:
            net.enable_gradient_checkpointing(recompute)
        else:
            net.disable_gradient_checkpointing()


@dataclass(eq=False)
class UpdateCounter:
    """Counts updates of a method on networks on the meta device.

    owners: trained parameters by player. c: a condition [1, ...]. mode: active during a pass, or None.
    """

    method: Method
    nets: Nets
    owners: dict[str, list[nn.Parameter]]
    c: dict[str, Tensor]
    micro: int
    mode: TorchFunctionMode | None

    def batch(self) -> Batch:
        """A micro-batch with every key that a method may read."""
        c = {key: value.expand(self.micro, *value.shape[1:]) for key, value in self.c.items()}
        x = torch.empty(self.micro, *self.nets.shape, device="meta")
        if Requirement.FORGOTTEN_PROMPTS not in self.method.requirements:
            return {"c": c, "real": x, "real_c": dict(c), "z": x, "y": x}
        override = with_override(c, c)
        return {"c": dict(override), "real": x, "real_c": c, "z": x, "y": x, "forget_c": override}

    def count_update(self, update: Update, step: int) -> UpdateCost:
        """Run one update like the trainer."""
        set_trainable(self.owners, update.player)
        params = self.owners[update.player]
        batch = self.batch()
        draw = FixedBranchDraw(step, update.player, self.micro, 0)
        networks = [*self.nets.frozen().values(), *self.nets.modules().values()]
        meter = Meter(*networks)
        shards = Shards(*networks)
        hooks = [p.register_post_accumulate_grad_hook(lambda p: meter.forget(p.grad)) for p in params]
        try:
            with meter, self.mode or nullcontext():
                with torch.set_grad_enabled(update.player == "student"):
                    x = self.method.sample(self.nets, batch, draw)
                generation = meter.flops
                generation_traffic = shards.traffic
                loss, _ = update.loss(x, self.nets, batch, draw)
                shards.backward = True
                loss.backward()
            gradients = sum(p.grad.nbytes for p in params if p.grad is not None)
        finally:
            for hook in (*hooks, *shards.handles):
                hook.remove()
            for p in params:
                p.grad = None
        loss_flops = meter.flops - generation
        traffic = (generation_traffic, shards.traffic.plus(generation_traffic, -1))
        return UpdateCost(update.player, generation, loss_flops, meter.peak, gradients, traffic)

    def count_cycle(self, costs: Sequence[UpdateCost], first: int, cycle: int) -> tuple[float, Traffic]:
        """(FLOPs, traffic) of `cycle` steps from step `first` on. costs: those of the method's updates."""
        flops = 0.0
        traffic = Traffic()
        for step in range(first, first + cycle):
            has_samples = False
            for update, cost in zip(self.method.updates(), costs, strict=True):
                if step % update.every:
                    continue
                generation, loss = cost.traffic
                flops = flops + cost.loss
                traffic = traffic.plus(loss)
                if not (update.reuse and has_samples):
                    calls = max(1.0, self.count_calls(update, step))
                    # of these, the generation of `cost` has those of the first branch
                    calls /= max(1.0, self.count_calls(replace(update, walk=False), first, 1))
                    flops = flops + calls * cost.generation
                    traffic = traffic.plus(generation, calls)
                has_samples = True
        return flops, traffic

    def count_calls(self, update: Update, step: int, branches: int | None = None) -> float:
        """The student's calls for the samples of a step, averaged over the first `branches` of the method, or all."""
        calls = 0

        def call(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.empty_like(x)

        student = replace(self.nets.student, denoiser=replace(self.nets.student.denoiser, call=call))
        nets = replace(self.nets, student=student)
        branches = branches or len(student.times)
        with torch.no_grad():
            for k in range(branches):
                draw = FixedBranchDraw(step, update.player, self.micro, k)
                if update.walk:
                    draw.late = steps_into_generation(self.method, self.nets, step)
                    draw.before = torch.empty(self.micro, *self.nets.shape, device="meta") if draw.late else None
                self.method.sample(nets, self.batch(), draw)
        return calls / branches


def _with_judges(nets: Nets) -> Nets:
    """`nets` with judges that cost nothing where some are missing."""
    free = lambda x, *_: x.flatten(1).mean(1)
    return replace(
        nets,
        perceptual=nets.perceptual or free,
        reward=nets.reward or free,
        control=nets.control or (lambda x: x),
    )


def _with_meta_null(nets: Nets) -> Nets:
    """`nets` whose denoisers have the teacher's null condition on the meta device, if it has one."""
    if nets.teacher.null is None:
        return nets
    null = {key: value.to("meta") for key, value in nets.teacher.null.items()}
    on = lambda denoiser: replace(denoiser, null=null)
    return replace(
        nets,
        teacher=on(nets.teacher),
        student=replace(nets.student, denoiser=on(nets.student.denoiser)),
        fake=nets.fake and on(nets.fake),
        target=nets.target and on(nets.target),
    )


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
