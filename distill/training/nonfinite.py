"""A run that goes wrong says so: signs in the log; what is not finite, where and on which rank; a step that hangs.

The gradient is averaged before it is looked at, so a NaN of one process stops all of them at the same update. Then, and
only then, each computes its own micro-batches again, which are functions of the weights, the batch and (seed, step,
player, sample) alone, and looks at every tensor.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill import sharding
from distill.files import read_json
from distill.method import Method, Update
from distill.random import Draw
from distill.roles import Batch, Nets
from distill.training import checkpoint, precision
from distill.training.config import TrainConfig
from distill.training.prepare import begin
from distill.training.samples import MicroBatch
from distill.training.state import State
from distill.training.step import set_trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

FACTS = ("message", "step", "player", "seed", "processes", "mixed_precision", "ranks")  # of a replay folder
ADVICE = "Lower the learning rate, set max_grad_norm, or look at the data of this step"


@dataclass
class Finding:
    """What a micro-batch gave when it was computed again."""

    samples: list[int]  # in the global batch
    loss: str
    bad: str | None  # the first tensor that is not finite
    alone: bool = True  # not a mean over processes, as a sharded network's gradient is

    def __bool__(self) -> bool:
        return self.bad is not None

    def __str__(self) -> str:
        says = f"first bad tensor: {self.bad}" if self.bad else "nothing bad"
        return f"{says} (loss {self.loss}, samples {self.samples[0]} to {self.samples[-1]})"


def refuse(
    state: State, method: Method, update: Update, batches: list[MicroBatch], cfg: TrainConfig, accelerator: Accelerator
) -> None:
    """An update whose gradient is not finite: name what made it so, write a replay, and raise FloatingPointError.

    Nothing is raised for `cfg.skip_nonfinite` such updates of the player in a row: stderr and the log tell of them, and
    of a player's the first and the fatal one have replays. All processes call this together and decide the same.
    """
    from accelerate.utils import gather_object

    step, player, out = state.step, update.player, Path(cfg.output_dir)
    state.skipped[player] = row = state.skipped.get(player, 0) + 1
    fatal = row > cfg.skip_nonfinite
    found = examine(state, method, update, batches, accelerator)
    there = any(out.glob(f"replay-*-{player}"))
    everyone, known = zip(*gather_object([(found, there)]), strict=True)
    bad = {
        rank: min(filter(bool, ones), key=lambda one: not one.alone) for rank, ones in enumerate(everyone) if any(ones)
    }
    bad = {rank: one for rank, one in bad.items() if one.alone} or bad
    ranks = f"rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}" if bad else "no rank"
    what = next(iter(bad.values()), "computed again it is finite: a fault of a kernel or of the memory?")
    kind = "loss" if any("n" in one.loss for one in bad.values()) else "gradient"  # nan or inf
    message = f"non-finite {kind} at step {step}, player {player!r}, {ranks}: {what}. The update was not applied"
    if fatal or not any(known):
        folder = out / f"replay-{step}-{player}"
        facts = {"message": message, "step": step, "player": player, "seed": cfg.seed}
        facts |= {"processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
        kept = {rank: [asdict(one) for one in ones] for rank, ones in enumerate(everyone) if rank in bad or not bad}
        error = _write(folder, state, batches, facts | {"ranks": kept}, accelerator)
        errors = [f"{error}" for error in gather_object([error]) if error]  # all wait until it is written
        message += f"; no replay could be written ({errors[0]})" if errors else f"; see it again: --replay {folder}"
    if fatal:
        raise FloatingPointError(f"{message}. {ADVICE}")
    if accelerator.is_main_process:
        sys.stderr.write(f"{message}; left out, {row} in a row of {cfg.skip_nonfinite} allowed\n")
    device = state.logs[f"{player}/loss"].device
    state.logs = {key: value for key, value in state.logs.items() if not key.startswith(f"{player}/")}
    state.logs[f"{player}/skipped"] = torch.ones((), device=device)


def examine(
    state: State, method: Method, update: Update, batches: list[MicroBatch], accelerator: Accelerator
) -> list[Finding]:
    """Compute the loss of every micro-batch and its gradient again, without averaging, looking at every tensor.

    Sharded networks average what they compute: all processes call this together.
    """
    nets, found = state.nets, []
    trained = [p for optimizer in state.optimizers.values() for p in optimizer.param_groups[0]["params"]]
    for turn in batches:
        given = {"batch": turn.batch} | ({"samples of an earlier update": turn.x} if turn.source is None else {})
        seen = [name for name, tensor in _named(given) if not _finite(tensor)]
        for p in trained:
            p.grad = None
        with _watching(nets) as later:
            with precision.autocast(accelerator):
                x = turn.x
                if turn.source is not None:
                    with torch.set_grad_enabled(update.player == "student"):
                        x = method.sample(nets, turn.batch, turn.source)
                loss, _ = update.loss(x, nets, turn.batch, turn.numbers)
            seen += later if _finite(loss) else [*later, "the loss itself"]
            later.clear()
            (loss / len(batches)).backward()
        seen += later
        alone = bool(seen) or not sharding.asked(accelerator)
        named = [
            (f"{role}.{name}", p.grad) for role, net in nets.modules().items() for name, p in net.named_parameters()
        ]
        grads = [(name, grad) for name, grad in reversed(named) if grad is not None]  # about as backward comes to them
        seen += [f"gradient of the weight {name}" for name, grad in grads if not _finite(grad)]
        if not _finite(sharding.whole(torch.nn.utils.get_total_norm([grad for _, grad in grads]))):
            seen.append("the norm of all gradients")
        first = seen[0] if seen else None
        found.append(Finding(turn.numbers.samples.tolist(), f"{float(loss.detach()):.6g}", first, alone))
    for p in trained:
        p.grad = None
    return found


def replay(
    folder: Path,
    method: Method,
    nets: Nets,
    data: Callable[[Draw], Batch],
    cfg: TrainConfig,
    accelerator: Accelerator,
) -> dict[int, list[Finding]]:
    """Compute the micro-batches of a replay folder again, on its weights: the findings by the rank that met them."""
    facts = read(folder)
    step, player = facts["step"], facts["player"]
    state = begin(nets, data, cfg, accelerator, folder / f"checkpoint-{step}")
    set_trainable({name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}, player)
    update = next(update for update in method.updates() if update.player == player)

    def turn(tensors: dict[str, Any], samples: list[int]) -> MicroBatch:
        indices = torch.tensor(samples, device=accelerator.device)
        late = int(tensors["late"]) if "late" in tensors else None
        source = Draw(facts["seed"], step - (late or 0), player, indices)
        source.late, source.before = late, tensors.get("before")
        numbers, x = Draw(facts["seed"], step, player, indices), tensors.get("x")
        return MicroBatch(indices if x is None else x, tensors["batch"], numbers, source if x is None else None)

    found = {}
    for rank, ones in facts["ranks"].items():
        tensors = _nested(load_file(folder / f"rank{rank}.safetensors", device=f"{accelerator.device}"))
        batches = [turn(tensors[f"{i}"], one["samples"]) for i, one in enumerate(ones)]
        found[int(rank)] = examine(state, method, update, batches, accelerator)
    return found


def read(folder: Path) -> dict[str, Any]:
    """What a replay folder says of itself: message, step, player, seed, processes, mixed_precision, ranks."""
    try:
        facts = read_json(folder / "replay.json")
        if absent := [name for name in FACTS if not isinstance(facts, dict) or name not in facts]:
            raise ValueError(f"its replay.json has no {absent[0]}")
        return facts
    except ValueError as error:
        raise ValueError(
            f"replay is {str(folder)!r}, which is no replay-STEP-PLAYER folder of a run ({error})"
        ) from None


class Watchdog:
    """Reports a step that hangs: `with Watchdog(...) as watch`, and `watch(step)` whenever a step begins.

    One that takes longer than `seconds` (0: none is too long) is reported once, on stderr and in `out`/hang-rankN.txt,
    with its number and the stacks of all threads. The run goes on: a report ends nothing, and a step costs two
    assignments. faulthandler's own timer would also see native code that keeps Python's lock, which stops this thread
    too; but it reads the stacks without that lock, and a run that was only slow could die of it.
    """

    def __init__(self, seconds: float, out: Path, rank: int, step: int = 0) -> None:
        self.seconds, self.out, self.rank = seconds, out, rank
        self._now, self._over = (step, time.monotonic()), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, step: int) -> None:
        self._now = step, time.monotonic()

    def __enter__(self) -> Watchdog:
        self(self._now[0])
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        told: tuple[int, float] | None = None
        while not self._over.wait(self.seconds / 4):
            step, since = now = self._now
            if time.monotonic() - since > self.seconds and told != now:
                told = now
                self._report(f"rank {self.rank}: step {step} has taken more than {self.seconds:g} s (hang_seconds)")

    def _report(self, said: str) -> None:
        path = self.out / f"hang-rank{self.rank}.txt"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with path.open("a+") as file:
                start = file.tell()
                file.write(f"{said}; the stacks of its threads:\n")
                file.flush()
                faulthandler.dump_traceback(file)
                file.seek(start)
                sys.stderr.write(file.read())
        except OSError as error:
            sys.stderr.write(f"{said}; {path} cannot be written ({error})\n")


class Agreement:
    """The signal on which all processes stop. Each calls it after every step; all get the largest number, 0 for none.

    On CUDA the answer is that of the step before, which has arrived: the host waits for nothing. Alone, a process
    agrees with itself.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device, self.alone = accelerator.device, accelerator.num_processes == 1
        self.answer: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, number: int) -> int:
        if self.alone:
            return number
        greatest = torch.full((), number, device=self.device)  # filled there: a copy of a number would wait
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(greatest)
        before, event = self.answer, torch.cuda.Event()
        host = torch.empty((), dtype=greatest.dtype, pin_memory=True).copy_(greatest, non_blocking=True)
        event.record()
        self.answer = host, event
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


def _write(
    folder: Path, state: State, batches: list[MicroBatch], facts: dict[str, Any], accelerator: Accelerator
) -> Exception | None:
    """This process's part of a replay: its micro-batches, if it is among facts["ranks"]; the main one's also the facts
    and the weights, without Adam's moments."""
    try:
        if accelerator.is_main_process or sharding.asked(accelerator):  # sharded weights are saved by all together
            players = {name: optimizer.param_groups[0]["params"] for name, optimizer in state.optimizers.items()}
            bare: dict[str, torch.optim.Optimizer] = {name: torch.optim.SGD(ps, 0.0) for name, ps in players.items()}
            checkpoint.save(replace(state, optimizers=bare), folder)
        if accelerator.is_main_process:
            (folder / "replay.json").write_text(json.dumps(facts, indent=1))
            if (folder.parent / "config.yaml").is_file():
                shutil.copy(folder.parent / "config.yaml", folder)
        if accelerator.process_index in facts["ranks"]:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: t.detach().cpu().clone() for name, t in _named([_stored(turn) for turn in batches])}
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                folder / f"rank{accelerator.process_index}.safetensors",
            )
    except (OSError, SafetensorError) as error:  # a full disk must not hide what went wrong
        return error
    return None


def _stored(turn: MicroBatch) -> dict[str, Any]:
    """What a turn cannot be made again from the seed."""
    if turn.source is None:
        return {"batch": turn.batch, "x": turn.x}
    late = {} if turn.source.late is None else {"late": torch.tensor(turn.source.late), "before": turn.source.before}
    return {"batch": turn.batch, **late}


@contextmanager
def _watching(nets: Nets) -> Iterator[list[str]]:
    """A list that fills with what is not finite, as it comes: inputs of networks, outputs of modules, gradients."""
    seen: list[str] = []

    def look(what: str, value: Any) -> None:
        seen.extend(f"{what} {name}".strip() for name, tensor in _named(value) if not _finite(tensor))

    def entered(role: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        look(f"input of {role}:", {**dict(enumerate(args)), **kwargs})

    def left(name: str, module: nn.Module, args: Any, output: Any) -> None:
        look(f"output of {name}", output)
        for _, tensor in _named(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(look, f"gradient of the output of {name}"))

    handles = []
    for role, net in {**nets.frozen(), **nets.modules()}.items():
        handles.append(net.register_forward_pre_hook(partial(entered, role), with_kwargs=True))
        for name, module in net.named_modules():
            handles.append(module.register_forward_hook(partial(left, f"{role}.{name}".rstrip("."))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _named(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, lists and tuples, as "c/label"."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _named(value, f"{name}/{key}".lstrip("/"))


def _nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Dicts of dicts from `_named`."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split("/")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = tensor
    return tree


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(sharding.part(tensor)).all())
