"""Read few-step students that others published as single files, for `export --from`.

layout     files                                                      keys
DMD2       dmd2_sdxl_{4,1}step_unet_fp16.bin, ..._lora_fp16           diffusers' UNet; kohya's with diffusers' names
Lightning  sdxl_lightning_{N}step_unet, _lora, all-in-one             diffusers' UNet; kohya's; original code's
LCM        pytorch_lora_weights (lcm-lora-sdxl, -sdv1-5)              kohya's with diffusers' names

All except DMD2's UNets are safetensors. A .bin is a pickle: it is read as plain tensors (weights_only) or refused.
From an all-in-one checkpoint only the network and the entries about its prediction type are read. Its text encoders and
VAE are not used; `PublishedWeights.notes` states this.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Kind
from distill.diffusion.transition import Renoise
from distill.modules import shallow_module_copy
from distill.training.checkpoint import open_safetensors
from pipelines.export.adapter_config import FILE, read_settings
from pipelines.export.kohya import original_names
from pipelines.export.single_files import Adapter, network_name

KEY = re.compile(
    r"(?:lora_unet_|unet\.|transformer\.|diffusion_model\.|base_model\.model\.)*(?P<module>.+?)"
    r"[._](?P<role>lora_A\.weight|lora_B\.weight|lora[._]down\.weight|lora[._]up\.weight|alpha)"
)
ROLES = {f"lora{_}{role}.weight": role for _ in "._" for role in ("down", "up")}
ROLES |= {"lora_A.weight": "down", "lora_B.weight": "up", "alpha": "alpha"}
OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr"}


PredictionType = Literal["eps", "v"]
NAMES: dict[str, PredictionType] = {"epsilon": "eps", "v": "v"}  # values of ModelSpec's prediction type
MARKS = ("v_pred", "ztsnr")  # keys of an all-in-one checkpoint that state the prediction type (ComfyUI)
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # entries of Playground v2.5 and CosXL
GROUPS = {  # first word of a key in an all-in-one checkpoint: the component
    "conditioner": "text encoders",
    "cond_stage_model": "text encoder",
    "text_encoders": "text encoders",
    "first_stage_model": "VAE",
    "vae": "VAE",
    "model_ema": "averaged network",
}


@dataclass(frozen=True)
class PublishedWeights:
    """Content of a published file. weights: a state dict, or a LoRA's adapters by module.

    kind, zero: prediction type and zero terminal SNR according to the file; None, False: the file has no such entry.
    levels: its table of sigma / alpha. notes: sentences about unused parts and assumptions.
    """

    weights: dict[str, Tensor] | dict[str, Adapter]
    kind: PredictionType | None = None
    zero: bool = False
    levels: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def lora(self) -> bool:
        return any(isinstance(value, Adapter) for value in self.weights.values())


@dataclass(frozen=True)
class Layout:
    """The sampling of a published student: indices of its calls in SD's table of 1000, other values as in Student."""

    indices: tuple[int, ...]
    scale: float | None  # scale of the unit noise; None: sigma at the first call
    renoise: Renoise
    kind: Kind = "eps"  # prediction type of the network


def trailing_indices(steps: int) -> tuple[int, ...]:
    """The indices of EulerDiscreteScheduler(timestep_spacing="trailing")."""
    return tuple(round(1000 - i * 1000 / steps) - 1 for i in range(steps))


def lcm_indices(steps: int) -> tuple[int, ...]:
    """The indices of LCMScheduler with its default of 50 original steps: 999, 759, 499, 259 for 4 steps."""
    return tuple(999 - 20 * (i * 50 // steps) for i in range(steps))


def dmd2_layout(steps: int) -> Layout:
    """README of tianweiy/DMD2: LCMScheduler, timesteps [999, 749, 499, 249], and [399] for one step; guidance 0."""
    return Layout((999, 749, 499, 249) if steps == 4 else (399,), 1.0, "fresh")


def lightning_layout(steps: int) -> Layout:
    """Card of ByteDance/SDXL-Lightning: Euler, trailing, guidance 0; the one-step UNet predicts "sample"."""
    return Layout(trailing_indices(steps), None, "ddim", "x0" if steps == 1 else "eps")


def lcm_layout(steps: int) -> Layout:
    """Card of latent-consistency/lcm-lora-sdxl: LCMScheduler, 2 to 8 steps."""
    return Layout(lcm_indices(steps), 1.0, "fresh")


STUDENTS: dict[str, tuple[tuple[int, ...], Callable[[int], Layout]]] = {  # layout -> (published steps, facts)
    "dmd2": ((4, 1), dmd2_layout),
    "lightning": ((4, 1, 2, 8), lightning_layout),
    "lcm": ((4, 1, 2, 3, 5, 6, 7, 8), lcm_layout),
}


def identify_layout(path: Path, layout: str | None = None, steps: int | None = None) -> Layout:
    """The student of a file, by layout ("dmd2", "lightning", "lcm") and steps, else by file and folder name."""
    name = f"{path.parent.name}/{path.name}".lower()
    layout = layout or next((key for key in STUDENTS if key in name), None)
    if layout not in STUDENTS:
        raise ValueError(f"{path} could be any student: say with --layout which it is, one of {sorted(STUDENTS)}")
    allowed, facts = STUDENTS[layout]
    found = re.search(r"(\d+)[_-]?step", name)
    steps = steps or (int(found[1]) if found else allowed[0])
    if steps not in allowed:
        raise ValueError(f"{layout} has students of {sorted(allowed)} steps, not {steps}")
    return facts(steps)


def read_published(path: Path, net: nn.Module) -> PublishedWeights:
    """Read a published file, or a folder with one, into the names of `net`, the base's network (meta tensors suffice).

    A complete network is returned as a state dict, a LoRA as adapters by module. A ValueError names what does not fit.
    """
    path = _one_file(path)
    tensors, metadata = _load(path)
    _refuse_unusable(tensors, path)
    marks = {key for key in MARKS if tensors.pop(key, None) is not None}
    said = metadata.get("modelspec.predict_key") or metadata.get("modelspec.prediction_type") or ""
    kind = "v" if "v_pred" in marks else NAMES.get(said)
    if any(re.search(r"[._]lora[._]|[._]hada_|[._]lokr_|dora_scale", key) for key in tensors):
        adapters, notes = _adapters(tensors, metadata, net, path)
        return PublishedWeights(adapters, kind, "ztsnr" in marks, notes=notes)
    inside = "model.diffusion_model."
    own = {k.removeprefix(inside): v for k, v in tensors.items() if k.startswith(inside)}
    rest = {k: v for k, v in tensors.items() if own and not k.startswith(inside)}
    weights = _weights(own or tensors, net, path)
    return PublishedWeights(weights, kind, "ztsnr" in marks, _levels(rest), _unused(rest, path))


def _one_file(path: Path) -> Path:
    """The file, or the only file of weights in a folder."""
    if not path.is_dir():
        return path
    files = [f for kind in ("*.safetensors", "*.bin") for f in sorted(path.glob(kind))]
    if len(files) != 1:
        raise ValueError(f"{path} holds {len(files)} files of weights {[f.name for f in files]}: name one of them")
    return files[0]


def _refuse_unusable(tensors: dict[str, Tensor], path: Path) -> None:
    """ValueError for numbers that are not finite, and for an EDM network."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path}: its tensor {key} holds NaN or infinite numbers: download it again")
    if edm := sorted(tensors.keys() & {*EDM}):
        raise ValueError(f"{path} holds {edm}, marks of an EDM network (Playground v2.5, CosXL), which is not read")


def check_agreement(found: PublishedWeights, known: Layout, base: Denoiser, zero: bool) -> Layout:
    """`known` with the prediction type of file and base. ValueError if these contradict each other.

    base: the base's denoiser. zero: whether its terminal SNR is zero.
    """
    kind = base.kind
    named = {"eps": "epsilon", "v": "v"}
    if found.kind and found.kind != kind:
        raise ValueError(
            f"the file says that its network predicts {named[found.kind]}, and the base predicts "
            f"{named.get(kind, kind)} (prediction_type of its scheduler): give the base that the file was made from"
        )
    if not found.lora and not found.kind and known.kind != "x0" and known.kind != kind:
        raise ValueError(
            f"published students of this layout predict {named[known.kind]}, and the base predicts {kind}: give the "
            "base that the file was made from"
        )
    if found.zero and not zero:
        raise ValueError(
            "the file is marked ztsnr (zero terminal SNR), and the base's scheduler has no rescale_betas_zero_snr: "
            "give the base that the file was made from"
        )
    table = base.schedule.ratio(torch.arange(1000, dtype=torch.float64) / 999)
    if found.levels is not None and not torch.allclose(found.levels[:-1], table[:-1], rtol=1e-2):
        raise ValueError(
            f"the file's table of noise ends at sigma {found.levels[-2]:.4g}, the base's at {table[-2]:.4g} (of 999 "
            "levels): give the base that the file was made from"
        )
    return known if known.kind == "x0" else replace(known, kind=kind)


def _levels(rest: dict[str, Tensor]) -> Tensor | None:
    """sigma / alpha of 1000 levels, if a checkpoint of the original code contains its table."""
    if (abar := rest.get("alphas_cumprod")) is not None and len(abar) == 1000:
        return ((1 - abar.double()) / abar.double()).sqrt()
    if (sigmas := rest.get("denoiser.sigmas")) is not None and len(sigmas) == 1000:
        return sigmas.double().sort().values
    return None


def _unused(rest: dict[str, Tensor], path: Path) -> tuple[str, ...]:
    """A sentence that lists the unused tensors of an all-in-one checkpoint."""
    counts: dict[str, int] = {}
    for key in rest:
        word = key.partition(".")[0]
        what = f"{GROUPS[word]} ({word}.*)" if word in GROUPS else "other names"
        counts[what] = counts.get(what, 0) + 1
    if not counts:
        return ()
    listed = ", ".join(f"{n} of its {what}" for what, n in sorted(counts.items()))
    return (f"Tensors of {path.name} that are not used: {listed}. The text encoders and the VAE are the base's.",)


def network_with_weights(net: nn.Module, weights: dict[str, Tensor] | dict[str, Adapter]) -> nn.Module:
    """The weights of `read_published` on the base `net`: a copy of it, or adapters that share its weights."""
    found = {n: a for n, a in weights.items() if isinstance(a, Adapter)}
    if not found:
        net = copy.deepcopy(net)
        net.load_state_dict(cast(dict[str, Tensor], weights))
        return net
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    ranks = {n: len(a.down) for n, a in found.items()}
    alphas = {n: a.alpha for n, a in found.items()}
    r = max(ranks.values())
    alpha = max(alphas.values())
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(found),
        rank_pattern={n: v for n, v in ranks.items() if v != r},
        alpha_pattern={n: v for n, v in alphas.items() if v != alpha},
    )
    net = inject_adapter_in_model(config, shallow_module_copy(net.requires_grad_(False)))
    for name, adapter in found.items():
        layer = cast(LoraLayer, net.get_submodule(name))
        layer.lora_A["default"].weight.data.copy_(adapter.down)
        layer.lora_B["default"].weight.data.copy_(adapter.up)
    return net


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    if path.suffix != ".bin":
        raise ValueError(f"{path} is not a file of weights: give a .safetensors, or a .bin of plain tensors")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle may raise anything
        raise ValueError(f"{path} holds more than plain tensors, or is damaged, and is not read") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path} is not a dictionary of plain tensors")
    return tensors, {}


def _weights(tensors: dict[str, Tensor], net: nn.Module, path: Path) -> dict[str, Tensor]:
    """A complete network in diffusers' keys or the original code's keys."""
    if "input_blocks.0.0.weight" in tensors:
        names = {original: name for name, original in original_names(net).items()}
        split = {key: key.rpartition(".") for key in tensors}
        tensors = {".".join((names.get(split[k][0], split[k][0]), split[k][2])): v for k, v in tensors.items()}
    base = net.state_dict()
    missing = sorted(base.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - base.keys())
    wrong = [k for k in base.keys() & tensors.keys() if base[k].shape != tensors[k].shape]
    if missing or foreign or wrong:
        raise ValueError(
            f"{path} is not a network like the base's: {len(missing)} tensors lack {missing[:3]}, {len(foreign)} "
            f"are not of the base {foreign[:3]}, {len(wrong)} have another shape {sorted(wrong)[:3]}"
        )
    return tensors


def _adapters(
    tensors: dict[str, Tensor], metadata: dict[str, str], net: nn.Module, path: Path
) -> tuple[dict[str, Adapter], tuple[str, ...]]:
    """(adapters, notes) of a LoRA in kohya's keys (names of diffusers or of the original code), diffusers' older ones
    or PEFT's.

    The note names the source of alpha.
    """
    settings = read_settings(path, metadata, network_name(net))
    for key in tensors:
        if other := re.search(r"dora_scale|lora_magnitude_vector|hada_w|lokr_w", key):
            raise ValueError(f"{path}: {key!r} is {OTHERS[other[0]]}, which is not read; merge it into its base")
    state = net.state_dict()
    shapes = {k.removesuffix(".weight"): v.shape for k, v in state.items() if k.endswith(".weight") and v.ndim > 1}
    out = {}
    sources = set()
    for name, pair in _lora_pairs(tensors, net, shapes, path).items():
        down, up = _lora_matrices(pair, name, shapes[name], path)
        r = len(down)
        alpha, source = _alpha(pair, settings.alpha(name, r) if settings else None, f"{settings}", name, r)
        sources.add(source)
        out[name] = Adapter(down, up, alpha)
    return out, (f"The LoRA's alpha is {', '.join(sorted(sources))}.",)


def _lora_pairs(
    tensors: dict[str, Tensor], net: nn.Module, shapes: dict[str, torch.Size], path: Path
) -> dict[str, dict[str, Tensor]]:
    """{module: its tensors "down", "up" and "alpha"}. shapes: of the weights that a LoRA can change."""
    prefix = network_name(net)
    original = original_names(net) if prefix == "unet" else {}
    modules = {other.replace(".", "_"): name for name in shapes for other in (name, original.get(name, name))}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        stem = match["module"].replace(".", "_").replace("processor_", "") if match else ""
        name = modules.get(stem) or modules.get(f"{stem}_0")  # diffusers' older keys use to_out for to_out.0
        if not match or not name:
            raise ValueError(f"{path}: {key!r} is not a LoRA of a module of the base's {prefix}")
        found.setdefault(name, {})[ROLES[match["role"]]] = tensor
    return found


def _lora_matrices(pair: dict[str, Tensor], name: str, shape: torch.Size, path: Path) -> tuple[Tensor, Tensor]:
    """(down, up) in the shapes of `Adapter`. ValueError if they do not fit the base's weight of this shape."""
    down = pair.get("down")
    rows, *rest = shape
    r = len(down) if down is not None and down.ndim else 0
    sizes = [pair[role].numel() for role in ("down", "up") if role in pair]
    if sizes != [r * math.prod(rest), rows * r]:
        raise ValueError(f"{path}: the LoRA of {name} does not fit the base's weight {tuple(shape)}")
    if not r:
        raise ValueError(f"{path}: the LoRA of {name} has rank 0")
    return pair["down"].reshape(r, *rest), pair["up"].reshape(rows, r, *[1] * (len(rest) - 1))


def _alpha(pair: dict[str, Tensor], told: float | None, source: str, name: str, r: int) -> tuple[float, str]:
    """(alpha of a module, its source); ValueError if two sources differ."""
    if "alpha" in pair and pair["alpha"].numel() != 1:
        raise ValueError(f"the key .alpha of {name} holds {pair['alpha'].numel()} numbers; it must hold one")
    own = float(pair["alpha"]) if "alpha" in pair else None
    if own is not None and told is not None and not math.isclose(own, told, rel_tol=1e-3):
        raise ValueError(f"the LoRA of {name} has the key .alpha {own:g}, but {source} gives {told:g}")
    if own is not None:
        return own, "that of its .alpha keys"
    if told is not None:
        return told, source
    return float(r), f"in no file (neither .alpha keys nor {FILE}), so it is assumed to equal the rank (scale 1)"
