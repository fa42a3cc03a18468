"""The original code's names, kohya's LoRA file, ComfyUI's workflow, against descriptions that share no code with ours.

tests/support/against_comfyui.py makes the same comparisons with the functions of a ComfyUI checkout.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unets
from safetensors import safe_open
from safetensors.torch import load_file

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP, Flow, Trig
from distill.diffusion.student import Student
from distill.networks.lora import merge_adapters
from distill.random import Draw
from pipelines.export import comfyui, kohya

CONFIGS = {"sdxl": unets.SDXL, "sd15": unets.SD15, "sd21": unets.SD21}
ALL = (*unets.TARGETS, "add_embedding.linear_1", "add_embedding.linear_2")


def described(depths, mid, levels=None, layers=2, add=False):
    """{original module with a matrix or a kernel: diffusers' name} of the UNet with `depths` transformers a level.

    Written from the original code: input_blocks is conv_in, then per level its layers and, but for the last, one
    downsampler; output_blocks has one layer more a level, upsampled at the end of all but the last.
    """
    found = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    found |= {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}
    if add:
        found |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}

    def resnet(original, ours, shortcut):
        pairs = {"in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2"}
        if shortcut:
            pairs["skip_connection"] = "conv_shortcut"
        found.update({f"{original}.{a}": f"{ours}.{b}" for a, b in pairs.items()})

    def transformer(original, ours, depth):
        inner = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
        names = ["proj_in", "proj_out", *(f"transformer_blocks.{d}.{x}" for d in range(depth) for x in inner)]
        found.update({f"{original}.{name}": f"{ours}.{name}" for name in names})

    last, block = len(depths) - 1, 1
    for level, depth in enumerate(depths):
        for i in range(layers):
            widens = i == 0 and level > 0 and (levels is None or levels[level] != levels[level - 1])
            resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}", widens)
            if depth:
                transformer(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}", depth)
            block += 1
        if level < last:
            found[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    resnet("middle_block.0", "mid_block.resnets.0", False)
    transformer("middle_block.1", "mid_block.attentions.0", mid)
    resnet("middle_block.2", "mid_block.resnets.1", False)
    block = 0
    for up, depth in enumerate(reversed(depths)):
        for i in range(layers + 1):
            resnet(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{i}", True)
            if depth:
                transformer(f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{i}", depth)
            if up < last and i == layers:
                found[f"output_blocks.{block}.{2 if depth else 1}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            block += 1
    return found


DESCRIBED = {
    "sdxl": described((0, 2, 10), 10, (320, 640, 1280), add=True),
    "sd15": described((1, 1, 1, 0), 1, (320, 640, 1280, 1280)),
    "sd21": described((1, 1, 1, 0), 1, (320, 640, 1280, 1280)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_at_full_size(name):
    """Every matrix and kernel of the public network has the original code's name, all tensors have one."""
    unet = unets.full(CONFIGS[name])
    names = kohya.original_names(unet)
    matrices = {k.removesuffix(".weight") for k, v in unet.state_dict().items() if v.ndim > 1}
    assert {names[m]: m for m in matrices} == DESCRIBED[name]
    assert {k.rpartition(".")[0] for k in unet.state_dict()} == names.keys()
    assert len(set(names.values())) == len(names)
    if name == "sdxl":
        assert (len(matrices), len(unet.state_dict())) == (794, 1680)
    underscored = [n.replace(".", "_") for n in [*names, *names.values()]]
    assert len(set(underscored)) == len(set([*names, *names.values()]))  # "_" for "." makes no two modules equal


@pytest.fixture(scope="module", params=[unets.sdxl, unets.sd15], ids=["sdxl", "sd15"])
def role(request):
    torch.manual_seed(0)
    base = request.param()
    there = [t for t in ALL if any(name.endswith(t) for name, _ in base.named_modules())]
    return base, unets.adapted(base, there)


def test_lora_merges_as_peft(role, tmp_path):
    """Read as ComfyUI reads it (flattened, alpha / rank), the file gives PEFT's merged weights within 1e-6."""
    base, net = role
    sdxl = base.config.addition_embed_type is not None
    tensors = load_file(kohya.write_lora_file(net, tmp_path / "a.safetensors", {}, torch.float32))
    where = {("lora_unet_" + (a if sdxl else b)).replace(".", "_"): b for a, b in DESCRIBED_NARROW[sdxl].items()}
    assert {key.split(".")[0] for key in tensors} == where.keys()  # the LoRA is on every matrix and kernel
    weights, expected = dict(base.state_dict()), merge_adapters(net).state_dict()
    for key, module in where.items():
        down, up, alpha = (tensors[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha == 5.0 and len(down) == 3
        weight = weights[f"{module}.weight"]
        delta = alpha.item() / len(down) * up.flatten(1) @ down.flatten(1)
        weights[f"{module}.weight"] = weight + delta.reshape(weight.shape)
        assert down.ndim == up.ndim == weight.ndim
    assert max((weights[k] - expected[k]).abs().max() for k in expected) < 1e-6
    assert max((base.state_dict()[k] - expected[k]).abs().max() for k in expected) > 0.1


DESCRIBED_NARROW = {
    True: described((0, 1, 2), 2, (4, 4, 8), add=True),
    False: described((1, 1, 1, 0), 1, (4, 4, 8, 8)),
}


def test_lora_file_of_half_precision_keeps_alpha(role, tmp_path):
    base, net = role
    path = kohya.write_lora_file(net, tmp_path / "a.safetensors", {"modelspec.title": "Fox"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    sdxl = {"ss_base_model_version": "sdxl_base_v1-0"} if base.config.addition_embed_type else {}
    assert metadata == {"format": "pt", "modelspec.title": "Fox", **sdxl}
    tensors = load_file(path)
    assert {t.dtype for k, t in tensors.items() if k.endswith("alpha")} == {torch.float32}
    assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {torch.float16}
    with pytest.raises(ValueError, match="no LoRA layers"):
        kohya.write_lora_file(base, tmp_path / "b.safetensors", {})


def test_a_module_that_comfyui_has_not():
    from diffusers import UNet2DConditionModel

    guided = UNet2DConditionModel(**unets.SD15 | unets.NARROW, block_out_channels=(4, 4, 8, 8), time_cond_proj_dim=4)
    with pytest.raises(ValueError, match="time_embedding.cond_proj"):
        kohya.write_lora_file(unets.adapted(guided, ("cond_proj",)), Path("a"), {})
    with pytest.raises(ValueError, match="guidance embedding"):
        comfyui.sampler_levels(Student(Denoiser(guided, VP.scaled_linear(), "eps"), (1.0,)))


class Net(torch.nn.Module):
    """A smooth stand-in for a UNet, which remembers at which times it was called."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(4, 4).double()

    def forward(self, x, n):
        self.called = [*getattr(self, "called", []), float(n[0])]
        return torch.tanh(self.mix(x.movedim(1, -1)).movedim(-1, 1) + (n / 1000).reshape(-1, 1, 1, 1))


def student(indices, scale=None, renoise="fresh", kind="eps", frame=None):
    torch.manual_seed(0)
    denoiser = Denoiser(Net(), VP.scaled_linear(), kind)
    times = torch.tensor(indices).double() / 999
    if frame is not None:
        times, denoiser = frame.time(denoiser.schedule.ratio(times)), denoiser.on_schedule(frame)
    return Student(denoiser, tuple(times.tolist()), scale, renoise)


def nodes_run(graph, net, noises):
    """What ComfyUI's nodes do with a workflow, in the words of their documentation; noises: unit noise in order."""
    wire = lambda name, key: graph[graph[name]["inputs"][key][0]]
    read = lambda node: [float(s) for s in re.findall(r"[-+]?(?:\d*\.*\d+)", node["inputs"]["sigmas"])]
    sample = graph["sample"]["inputs"]
    assert sample["cfg"] == 1.0 and graph["kind"]["inputs"]["zsnr"] is False
    sigmas, kind = read(wire("sample", "sigmas")), graph["kind"]["inputs"]["sampling"]
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
    table = ((1 - abar) / abar).sqrt()
    noises, x = iter(noises), 0.0
    if not sample["add_noise"]:
        noised = wire("sample", "latent_image")
        assert noised["class_type"] == "AddNoise"
        first = read(graph[noised["inputs"]["sigmas"][0]])
        x = abs(first[0] - first[-1]) * next(noises)
    else:
        top = math.isclose(sigmas[0], table[-1], rel_tol=1e-5) or sigmas[0] > table[-1]
        x = next(noises) * (math.sqrt(1 + sigmas[0] ** 2) if top else sigmas[0])
    for sigma, then in zip(sigmas, sigmas[1:]):
        n = (math.log(sigma) - table.log()).abs().argmin()
        norm = math.sqrt(1 + sigma**2)
        out = net(x / norm, n.expand(len(x)))
        x0 = {"eps": x - sigma * out, "v_prediction": x / norm**2 - sigma / norm * out, "x0": out}[kind]
        if wire("sample", "sampler")["inputs"]["sampler_name"] == "euler":
            x = x + (x - x0) / sigma * (then - sigma)
        else:
            x = x0 + then * next(noises) if then > 0 else x0
    return x


CASES = {
    "dmd2": ((999, 749, 499, 249), 1.0, "fresh"),
    "dmd2, one step at 399": ((399,), 1.0, "fresh"),
    "sid at 625": ((625,), None, "fresh"),
    "lightning": ((999, 749, 499, 249), None, "ddim"),
    "v": ((999, 499), 1.0, "fresh", "v"),
    "one step that predicts the sample": ((999,), None, "ddim", "x0"),
    "on another schedule": ((999, 499), None, "fresh", "eps", Trig(1.0)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_workflow_samples_what_the_student_samples(case):
    s = student(*case)
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    draw = Draw(0, 0, "test", torch.arange(2))
    noises = [z, *(draw.normal(f"renoise{i}", tuple(z.shape)).to(z) for i in range(len(s.times) - 1))]
    graph = json.loads(
        json.dumps(comfyui.build_workflow(s, "sd_xl_base_1.0.safetensors", lora="fox_4step_lora.safetensors"))
    )
    expected = s.generate(z, None, draw)
    ours, s.denoiser.net.called = [round(n) for n in s.denoiser.net.called], []
    got = nodes_run(graph, s.denoiser.net, noises)
    assert s.denoiser.net.called == ours == list(case[0])
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()
    assert ("noised" in graph) == (not graph["sample"]["inputs"]["add_noise"])
    for node in graph.values():  # every wire ends at a node
        assert all(v[0] in graph for v in node["inputs"].values() if isinstance(v, list))


def test_usual_students_need_no_extra_node():
    for case in ("dmd2", "sid at 625"):
        assert "noised" not in comfyui.build_workflow(
            student(*CASES[case]), "base.safetensors", unet="fox_unet.safetensors"
        )
    graph = comfyui.build_workflow(
        student((999,)), "b", unet="fox_1step_unet.safetensors", size=(512, 768), prompt="a fox"
    )
    assert graph["model"] == {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "fox_1step_unet.safetensors", "weight_dtype": "default"},
    }
    assert graph["latent"]["inputs"] == {"width": 512, "height": 768, "batch_size": 1}
    assert graph["prompt"]["inputs"]["text"] == "a fox"


def test_what_comfyui_cannot_express():
    s = student((999, 749))
    with pytest.raises(ValueError, match="whole indices, not at .*499.5"):
        comfyui.sampler_levels(replace(s, times=(1.0, 0.5)))
    with pytest.raises(ValueError, match="noise table, not this Flow"):
        comfyui.sampler_levels(replace(s, denoiser=replace(s.denoiser, schedule=Flow(), kind="flow")))
    linear = VP(tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0).tolist()))  # PixArt's
    with pytest.raises(ValueError, match="noise table, not this VP"):
        comfyui.sampler_levels(replace(s, denoiser=replace(s.denoiser, schedule=linear)))
    with pytest.raises(ValueError, match="predicts 'flow'"):
        comfyui.sampler_levels(replace(s, denoiser=replace(s.denoiser, kind="flow")))
    with pytest.raises(ValueError, match="no ancestral sampler"):
        comfyui.build_workflow(replace(s, renoise="ancestral"), "base.safetensors", "fox_unet.safetensors")
    with pytest.raises(ValueError, match="either as unet or as lora"):
        comfyui.build_workflow(s, "base.safetensors")
