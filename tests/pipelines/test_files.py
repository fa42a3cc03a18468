"""Single files load in plain diffusers and give what the student gives."""

import copy
import json

import pytest
import torch
import unets
from safetensors import safe_open
from unets import TARGETS, adapted, output, sd15, sdxl

from distill.networks.lora import merge_adapters
from pipelines.export import single_files


@pytest.fixture(scope="module", params=[sdxl, sd15], ids=["sdxl", "sd15"])
def role(request):
    torch.manual_seed(0)
    base = request.param()
    targets = TARGETS + (("add_embedding.linear_1",) if request.param is sdxl else ())
    return base, adapted(base, targets)


def pipeline(unet):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler(steps_offset=1)
    if unet.config.addition_embed_type:
        return StableDiffusionXLPipeline(None, None, None, None, None, unet, scheduler)
    return StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("dtype,loaded,weights", [(torch.float32, 0.0, 1e-6), (torch.float16, 2e-3, 1e-3)])
def test_lora_loads_on_the_base(role, tmp_path, dtype, loaded, weights):
    """Every layer comes back with its alpha: difference 0.0 in fp32. Fused weights are those of `merge_adapters`."""
    base, net = role
    path = single_files.write_lora_file(net, tmp_path / single_files.file_name("fox", 4, "lora"), {}, dtype)
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(path))
    assert len(single_files.lora_adapters(pipe.unet)) == len(single_files.lora_adapters(net)) > 60
    expected = output(net)
    assert (expected - output(base)).abs().max() > 0.1
    assert (output(pipe.unet) - expected).abs().max() <= loaded
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused, ours = pipe.unet.state_dict(), merge_adapters(net).state_dict()
    assert fused.keys() == ours.keys()
    assert max((fused[name] - ours[name]).abs().max() for name in ours) <= weights
    assert (output(pipe.unet) - expected).abs().max() <= max(loaded, 1e-5)


def test_lora_without_metadata_would_lose_alpha(role, tmp_path):
    """The metadata is what restores alpha: the same tensors alone load with alpha = rank."""
    from safetensors.torch import load_file, save_file

    base, net = role
    path = single_files.write_lora_file(net, tmp_path / "a.safetensors", {}, torch.float32)
    save_file(load_file(path), tmp_path / "b.safetensors")
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(tmp_path / "b.safetensors"))
    assert (output(pipe.unet) - output(net)).abs().max() > 1e-2


def test_unet_file_is_the_merged_network(role, tmp_path):
    base, net = role
    from safetensors.torch import load_file

    path = single_files.write_network_file(
        net, tmp_path / single_files.file_name("fox", 1, single_files.network_name(net)), {}
    )
    assert path.name == "fox_1step_unet.safetensors" and list(tmp_path.iterdir()) == [path]
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    again = copy.deepcopy(base)
    again.load_state_dict(tensors)
    assert (output(again) - output(net)).abs().max() < 5e-3
    assert (output(again) - output(base)).abs().max() > 0.1
    for name, value in merge_adapters(net).state_dict().items():
        assert torch.equal(tensors[name], value.half())


def test_metadata(role, tmp_path):
    _, net = role
    sdxl = net.config.addition_embed_type is not None
    name = "stable-diffusion-xl-v1-base" if sdxl else "stable-diffusion-v1"
    spec = single_files.modelspec(net, "eps", "Fox", (1024, 768), lora=True, author="us", license=None)
    path = single_files.write_lora_file(net, tmp_path / "a.safetensors", spec)
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert {k.removeprefix("modelspec."): v for k, v in found.items() if k.startswith("modelspec.")} == {
        "sai_model_spec": "1.0.1",
        "architecture": name + "/lora",
        "implementation": "diffusers",
        "title": "Fox",
        "resolution": "1024x768",
        "prediction_type": "epsilon",
        "author": "us",
    }
    config = json.loads(found["lora_adapter_metadata"])
    assert config.keys() == {"unet.r", "unet.lora_alpha", "unet.target_modules"}  # what any PEFT knows
    assert (config["unet.r"], config["unet.lora_alpha"]) == (3, 5.0)


def test_architectures():
    """Ids of the ModelSpec and of kohya's sd-scripts."""
    from diffusers import FluxTransformer2DModel, SanaTransformer2DModel

    v1, v2, xl = unets.full(unets.SD15), unets.full(unets.SD21), unets.full(unets.SDXL)
    with torch.device("meta"):
        flux, sana = FluxTransformer2DModel(num_layers=1, num_single_layers=1), SanaTransformer2DModel(num_layers=1)
    assert [
        single_files.architecture(net, kind) for net, kind in ((v1, "eps"), (v2, "eps"), (v2, "v"), (xl, "eps"))
    ] == [
        "stable-diffusion-v1",
        "stable-diffusion-v2-512",
        "stable-diffusion-v2-768-v",
        "stable-diffusion-xl-v1-base",
    ]
    assert [single_files.architecture(net, "flow") for net in (flux, sana)] == ["flux-1", "SanaTransformer2DModel"]
    assert single_files.file_name("fox", 4, single_files.network_name(flux)) == "fox_4step_transformer.safetensors"


def test_lora_of_a_transformer(tmp_path):
    """A flow family: the file loads into its pipeline with difference 0.0."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2}
    sizes |= {
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    }
    base = SD3Transformer2DModel(**sizes, in_channels=4).requires_grad_(False).eval()
    net = unets.adapted(base, ("to_q", "add_k_proj", "to_out.0", "ff.net.2", "norm1.linear", "proj_out", "proj"))
    path = single_files.write_lora_file(net, tmp_path / "a.safetensors", {}, torch.float32)
    pipe = StableDiffusion3Pipeline(
        copy.deepcopy(base), FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None, None
    )
    pipe.load_lora_weights(str(path))
    x, c, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
    run = lambda transformer: transformer(x, c, pooled, torch.tensor([3.0, 900.0])).sample
    assert torch.equal(run(pipe.transformer), run(net))
    assert (run(net) - run(base)).abs().max() > 0.1


def test_mistakes(role, tmp_path, monkeypatch):
    base, net = role
    with pytest.raises(ValueError, match="no LoRA layers"):
        single_files.write_lora_file(base, tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="letters, digits"):
        single_files.file_name("a/b", 1, "unet")
    with pytest.raises(ValueError, match="w does not fit into torch.float16"):
        single_files.write_tensors({"w": torch.tensor([1e6])}, tmp_path / "a.safetensors", {}, torch.float16)
    monkeypatch.setattr(single_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="free some space"):
        single_files.write_network_file(net, tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())
