"""Convert a checkpoint of Karras et al. 2022 (EDM, arXiv 2206.00364) to a pipeline folder that `pipelines.load` reads.

python -m pipelines.edm_convert edm-cifar10-32x32-cond-vp.pkl OUT_FOLDER

The file is a pickle of whole objects with their source code. Only its tensors and plain values are read: every class
that it names becomes a Substitute, and no code of the file runs. Facts about the format, from the public
repository (NVlabs/edm, CC BY-NC-SA 4.0, also the license of the weights), read for names and shapes and not copied:

- the file is a dict, "ema" an EDMPrecond around "model", a SongUNet (DDPM++) or a DhariwalUNet (ADM). An object of
  theirs is stored as a call of torch_utils.persistence._reconstruct_persistent_obj on a dict of its class_name and
  state, its __dict__. A tensor is stored as by torch.Tensor, its memory as one torch.save within the pickle.
- D(x, sigma, y) = c_skip x + c_out F(c_in x, ln(sigma) / 4, y), sigma_data .5; a missing label is the zero vector.
- The label input of DDPM++ is sqrt(classes) one-hot(y) through a linear layer, of ADM one-hot(y). Channels of "qkv" run
  over (head, channel, q k v); one head in DDPM++, 64 channels per head in ADM.

DDPM++ becomes pipelines.edm_nets.SongUNet, ADM a UNet2DModel of diffusers. No published file was available: the tests
create files of this layout around networks written from the same facts.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from pipelines.components import Network

if TYPE_CHECKING:
    from diffusers import UNet2DModel

C_NOISE = 0.25  # ADM's input is ln(sigma) / 4; that of our SongUNet is 250 ln(sigma), which it divides
SIGMA_MAX = 80.0
ENDS = {  # layers outside the blocks, whose names have no resolution
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "map_augment": "augment_embedding",
    "conv": "conv_in",
    "aux_norm": "conv_norm_out",
    "aux_conv": "conv_out",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
RESNET = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}


class Values(TypedDict):
    """The plain values of a checkpoint."""

    sigma_data: float
    img_resolution: int
    img_channels: int
    label_dropout: float
    dropout: float


class Substitute(dict[object, object]):
    """Stands for an object of the file. It keeps the arguments of the object and its state."""

    path = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: object, **_: object) -> Substitute:
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.state = state


def _storage(blob: bytes) -> torch.storage.TypedStorage:
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)


REBUILD: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage._load_from_bytes": _storage,
}


class Reader(pickle.Unpickler):
    """Reads tensors and plain values of a pickle. Everything else becomes a Substitute."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        path = f"{module}.{name}"
        return REBUILD.get(path) or type(name, (Substitute,), {"path": path})


def read(file: Path) -> tuple[Values, str, dict[str, Tensor]]:
    """(values of the objects, class of the network, its tensors by name). ValueError for any other file."""
    try:
        with file.open("rb") as f:
            ema = Reader(f).load()["ema"]
        outer = _object(ema)
        kind = ema.args[0]["class_name"]
        model = outer["_modules"]["model"]
        inner = model.args[0]["class_name"]
        values = Values(
            sigma_data=outer["sigma_data"],
            img_resolution=outer["img_resolution"],
            img_channels=outer["img_channels"],
            label_dropout=_object(model)["label_dropout"],
            dropout=_first_block(model)["dropout"],
        )
        tensors = dict(_tensors(model))
    except Exception as error:  # the unpickler may raise anything for an unknown file
        raise ValueError(f"{file} is not a checkpoint of EDM: {type(error).__name__}: {error}") from None
    if kind != "EDMPrecond" or inner not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"{file} holds a {inner} under {kind}; a SongUNet or a DhariwalUNet under EDMPrecond is read")
    return values, inner, tensors


def _object(thing: Substitute) -> dict[str, Any]:
    """The __dict__ of an EDM object, or of a module of torch."""
    found = thing.args[0]["state"] if thing.path.endswith("_reconstruct_persistent_obj") else thing.state
    return dict(found)


def _first_block(model: Substitute) -> dict[str, Any]:
    blocks = _object(_object(model)["_modules"]["enc"])["_modules"]
    return _object(next(block for name, block in blocks.items() if name.endswith("_block0")))


def _tensors(thing: Substitute, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module and its children. ValueError for structures that no network has, such as a cycle."""
    parts = _object(thing)
    seen = set() if seen is None else seen
    if id(thing) in seen:
        raise ValueError(f"its module {prefix or 'model'} is there twice")
    seen.add(id(thing))
    for name, tensor in {**parts["_parameters"], **parts["_buffers"]}.items():
        if isinstance(tensor, Tensor):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"its {prefix}{name} of shape {tuple(tensor.shape)} has more numbers than are stored")
            yield prefix + name, tensor
    for name, module in parts["_modules"].items():
        if module is not None:
            yield from _tensors(module, f"{prefix}{name}.", seen)


class NetworkOptions(TypedDict):
    """Arguments of both networks."""

    sample_size: int
    in_channels: int
    dropout: float
    num_class_embeds: int | None


def network(values: Values, kind: str, tensors: dict[str, Tensor]) -> Network:
    """The network with diffusers' names. ValueError for an unsupported variant (NCSN++)."""
    size = values["img_resolution"]
    sizes = [s for s in (size >> i for i in range(16)) if f"enc.{s}x{s}_block0.conv0.weight" in tensors]
    layers = sum(re.fullmatch(rf"enc\.{size}x{size}_block\d+\.conv0\.weight", key) is not None for key in tensors)
    widths = tuple(len(tensors[f"enc.{s}x{s}_block0.conv0.weight"]) for s in sizes)
    stem = len(tensors[f"enc.{size}x{size}_conv.weight"])
    attention = tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors)
    labels = _labels(tensors, kind, values["label_dropout"])
    common = NetworkOptions(
        sample_size=size,
        in_channels=values["img_channels"],
        dropout=float(values["dropout"]),
        num_class_embeds=None if labels is None else len(labels),
    )
    if kind == "SongUNet":
        from pipelines.edm_nets import SongUNet

        augment = tensors["map_augment.weight"].shape[1] if "map_augment.weight" in tensors else 0
        net = SongUNet(**common, stem=stem, widths=widths, layers=layers, attention=attention, augment_dim=augment)
        renamed = _rename(tensors, _song_names, lambda channels: 1)
    else:
        net = _adm(common, stem, widths, layers, [s in attention for s in sizes])
        renamed = _rename(tensors, lambda part: _adm_names(part, sizes), lambda channels: channels // 64)
        renamed.pop("augment_embedding.weight", None)  # zero without augmentation
    if labels is not None:
        renamed["class_embedding.weight"] = labels
    net.load_state_dict(renamed)
    return net.eval()


def _adm(common: NetworkOptions, stem: int, widths: tuple[int, ...], layers: int, attention: list[bool]) -> UNet2DModel:
    from diffusers import UNet2DModel

    if stem != widths[0] or min(widths) < 128:
        raise ValueError(f"a UNet2DModel has 32 groups and starts with its first width; this has {stem} and {widths}")
    down = {True: "AttnDownBlock2D", False: "ResnetDownsampleBlock2D"}
    up = {True: "AttnUpBlock2D", False: "ResnetUpsampleBlock2D"}
    return UNet2DModel(
        **common,
        out_channels=common["in_channels"],
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple(down[here] for here in attention),
        up_block_types=tuple(up[here] for here in reversed(attention)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=64,
        attn_norm_num_groups=32,
    )


def _labels(tensors: dict[str, Tensor], kind: str, dropped: float) -> Tensor | None:
    """A row per label [classes, C], and one for "no label" if training dropped labels."""
    if "map_label.weight" not in tensors:
        return None
    rows = tensors.pop("map_label.weight").T.float()
    rows = rows * len(rows) ** 0.5 if kind == "SongUNet" else rows
    if dropped:
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
    return rows + tensors.pop("map_label.bias", torch.zeros(()))


def _song_names(part: str) -> tuple[str, str]:
    """ "enc.8x8_in0" -> its residual block and its attention."""
    part = part.replace("enc.", "down.").replace("dec.", "up.")
    return f"{part}.resnet", f"{part}.attention"


def _adm_names(part: str, sizes: list[int]) -> tuple[str, str]:
    """ "dec.16x16_block0" -> its residual block and its attention in a UNet2DModel."""
    match = re.fullmatch(r"(enc|dec)\.(\d+)x\d+_(in|block|up|down)(\d*)", part)
    assert match is not None, part
    side, size, what, i = match.groups()
    level = sizes.index(int(size))
    if what == "in":
        return f"mid_block.resnets.{i}", "mid_block.attentions.0"
    if what == "down":
        return f"down_blocks.{level - 1}.downsamplers.0", ""
    if what == "up":
        return f"up_blocks.{len(sizes) - 2 - level}.upsamplers.0", ""
    block = f"down_blocks.{level}" if side == "enc" else f"up_blocks.{len(sizes) - 1 - level}"
    return f"{block}.resnets.{i}", f"{block}.attentions.{i}"


def _rename(
    tensors: dict[str, Tensor], names: Callable[[str], tuple[str, str]], heads: Callable[[int], int]
) -> dict[str, Tensor]:
    """The tensors by diffusers' names. names: part -> (residual block, attention). heads: channels -> heads."""
    out = {}
    for key, tensor in tensors.items():
        *path, layer, leaf = key.split(".")
        end = re.sub(r"^\d+x\d+_", "", layer)
        if leaf == "resample_filter":
            if tensor.shape[2:] != (2, 2) or not (tensor == 0.25).all():
                raise ValueError(f"{key} is not the mean of 2 x 2 pixels: NCSN++ (files named -ve) is not read")
        elif end in ENDS and len(path) < 2:
            out[f"{ENDS[end]}.{leaf}"] = tensor.float()
        elif len(path) != 2 or layer not in (*RESNET, "norm2", "qkv", "proj"):
            raise ValueError(f"{key} is no part of DDPM++ or ADM: NCSN++ (files named -ve) is not read")
        elif layer in RESNET:
            out[f"{names('.'.join(path))[0]}.{RESNET[layer]}.{leaf}"] = tensor.float()
        else:
            attention = names(".".join(path))[1]
            flat = tensor.float().flatten(1) if tensor.ndim > 1 else tensor.float()
            if layer == "qkv":
                split = flat.unflatten(0, (heads(len(flat) // 3), -1, 3))
                for j, name in enumerate(("to_q", "to_k", "to_v")):
                    out[f"{attention}.{name}.{leaf}"] = split[:, :, j].flatten(0, 1)
            else:
                out[f"{attention}.{'group_norm' if layer == 'norm2' else 'to_out.0'}.{leaf}"] = flat
    return out


def convert(file: Path, folder: Path) -> Network:
    """Write the pipeline folder and return its network. ValueError for an unreadable file, or if `folder` exists."""
    from pipelines.families import edm

    if not file.is_file():
        raise ValueError(f"no file {str(file)!r}: give a checkpoint of EDM, such as edm-cifar10-32x32-cond-vp.pkl")
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)  # fail early on a full or read-only disk
        values, kind, tensors = read(file)
        try:
            net = network(values, kind, tensors)
        except (KeyError, RuntimeError) as error:  # a layer is missing or has another shape
            raise ValueError(f"the {kind} of {file} is a variant that is not read: {error}") from None
        edm.pipeline(net, values["sigma_data"], SIGMA_MAX, 1).save_pretrained(partial, safe_serialization=True)
        null = net.config.num_class_embeds - 1 if values["label_dropout"] and net.config.num_class_embeds else None
        facts = {"null_class": null, "source": file.name} | ({} if kind == "SongUNet" else {"c_noise": C_NOISE})
        (partial / "distill.json").write_text(json.dumps(facts, indent=1))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return net


def main(argv: list[str] | None = None) -> None:
    from safetensors import SafetensorError

    from distill.configuration import fail
    from distill.files import folder_lock
    from distill.layout import program_name
    from distill.training.checkpoint import describe_disk_error

    parser = argparse.ArgumentParser(prog=program_name(), description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a checkpoint of EDM, such as edm-cifar10-32x32-cond-vp.pkl")
    parser.add_argument("folder", type=Path, help="to write; it must not exist. It is a recipe's --teacher then")
    args = parser.parse_args(argv)
    try:
        with folder_lock(args.folder, "folder", beside=True):
            net = convert(args.file, args.folder)
    except ValueError as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError) as error:
        fail(f"{describe_disk_error(error) or error}: nothing of {args.folder} is kept; give the same command again")
    size = sum(p.numel() for p in net.parameters())
    print(f"{args.folder}: a {type(net).__name__} of {size / 1e6:.1f} M weights, labels {net.config.num_class_embeds}")
