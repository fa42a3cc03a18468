"""The stored numbers of the authors' code: load them, rebuild their tiny networks, replay their random draws."""

import importlib.util
import json
import os
from contextlib import contextmanager

import numpy as np
import torch
from processes import ROOT
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distill.diffusion.schedule import Prediction, expand
from distill.diffusion.times import Grid
from distill.random import Draw

FOLDERS = (ROOT / "tests" / "golden", os.environ.get("DISTILL_GOLDEN") or ROOT.parent / "shared" / "golden")


def cases(method, always, prefix=""):
    """Names of the stored cases of a method that begin so; `always`, which is skipped where it is not there."""
    files = (f for folder in FOLDERS for f in (ROOT / folder).glob(f"*/{method}/{prefix}*"))
    return sorted({f.stem for f in files if f.suffix in (".npz", ".safetensors")} | {always})


def load(path):
    """A stored .npz or .safetensors -> {name: tensor}; text is left as numpy has it."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return {name: a if a.dtype.kind == "U" else torch.from_numpy(a) for name, a in arrays.items()}


def under(stored, prefix):
    """What lies under `prefix`/, by the rest of the name: the weights of one network, the gradients of one step."""
    return {name[len(prefix) + 1 :]: a for name, a in stored.items() if name.startswith(prefix + "/")}


def module(path):
    """The python file that defines the stored networks."""
    spec = importlib.util.spec_from_file_location(f"stored_{path.parent.name}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def filled(net, weights):
    """`net` in the precision of `weights` and with them, in evaluation mode."""
    net = net.to(next(iter(weights.values())).dtype).eval()
    net.load_state_dict(weights)
    return net


def unet(folder, name):
    """A diffusers UNet from folder/unet_config.json and folder/<name>.safetensors."""
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet_config.json").read_text())
    return filled(UNet2DConditionModel.from_config(config), load_file(folder / f"{name}.safetensors"))


def preconditioned(net, x, sigma, c):
    """Call a network that applies EDM's preconditioning itself and gives D; back to its F by our own conversions."""
    clean = Prediction(net(x, sigma.to(x.dtype), **c), "x0", x, torch.ones(()), expand(sigma, x))
    return Prediction(x, "edm", x, torch.ones(()), expand(sigma, x)).target(clean.x0, clean.eps)


def whole(law: Grid, n):
    """The uniform number in the middle of those for which `law` gives the whole step n: stored steps go through it."""
    assert ((n >= law.low) & (n <= law.high)).all()
    return (n.flatten().double() - law.low + 0.5) / (law.high - law.low + 1)


class Replay(Draw):
    """A Draw that gives stored numbers, each once. Whatever else a loss asks for is a KeyError."""

    def __init__(self, normal=None, uniform=None, index=None, step=0, player="student", samples=None):
        super().__init__(0, step, player, torch.zeros(0) if samples is None else samples)
        self.left = {"normal": dict(normal or {}), "uniform": dict(uniform or {}), "index": dict(index or {})}

    def normal(self, name, shape):
        return self.left["normal"].pop(name).reshape(shape)

    def uniform(self, name, shape):
        return self.left["uniform"].pop(name).reshape(shape)

    def index(self, name, n):
        return self.left["index"].pop(name, 0) if n > 1 else 0

    @property
    def used_up(self):
        return not any(self.left.values())


def spy(monkeypatch, owner, name):
    """Watch owner.name: the list of (arguments, result) of its calls, filled as they happen."""
    seen, real = [], getattr(owner, name)

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append((args, result))
        return result

    monkeypatch.setattr(owner, name, call)
    return seen


def gradients(net):
    """{name: gradient} of a network; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@contextmanager
def pushed(nets):
    """{player: its gradients} as they are when its optimizer steps, inside train()."""
    found = {}

    def before(optimizer, args, kwargs):
        first = optimizer.param_groups[0]["params"][0]
        (role,) = (role for role, net in nets.modules().items() if any(first is p for p in net.parameters()))
        found[role] = gradients(nets.modules()[role])

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield found
    finally:
        handle.remove()
