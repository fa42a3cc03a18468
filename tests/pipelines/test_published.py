"""Synthetic files of the layouts that others published come back exactly."""

import json

import pytest
import torch
import unets
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from test_comfy import ALL, DESCRIBED_NARROW

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP
from pipelines.export import kohya, published, single_files

ORIGINAL = {ours: original for original, ours in DESCRIBED_NARROW[True].items()}  # matrices and kernels of narrow SDXL


@pytest.fixture(scope="module")
def nets():
    """(base, another network of its kind, the base with adapters)."""
    torch.manual_seed(0)
    base = unets.sdxl()
    return base, unets.sdxl(), unets.adapted(base, ALL)


def half(state):
    return {k: v.detach().half().contiguous() for k, v in state.items()}


def underscored(name):
    return "lora_unet_" + name.replace(".", "_")


def kohya_keys(adapters, rename, alpha=True):
    tensors = {}
    for name, a in adapters.items():
        key = underscored(rename(name))
        tensors |= {f"{key}.lora_down.weight": a.down, f"{key}.lora_up.weight": a.up}
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(a.alpha)
    return half(tensors)


def older_key(name, role):
    """diffusers' keys of 2023: attention processors hold the LoRA, to_out has no index."""
    if ".attn" not in name:
        return f"unet.{name}.lora.{role}.weight"
    block, _, leaf = name.rpartition(".to_")
    return f"unet.{block}.processor.to_{leaf.removesuffix('.0')}_lora.{role}.weight"


LORAS = {
    "DMD2 and LCM": lambda found: kohya_keys(found, lambda name: name),
    "Lightning": lambda found: kohya_keys(found, ORIGINAL.__getitem__),
    "diffusers, older": lambda found: half(
        {older_key(n, role): t for n, a in found.items() for role, t in (("down", a.down), ("up", a.up))}
    ),
    "PEFT": lambda found: half(
        {f"base_model.model.{n}.lora_{x}.weight": t for n, a in found.items() for x, t in (("A", a.down), ("B", a.up))}
    ),
}


@pytest.mark.parametrize("layout", LORAS)
def test_loras(nets, tmp_path, layout):
    """Tensors and alphas of each layout, installed on the base, give what the role gives."""
    base, _, role = nets
    found = {
        n: single_files.Adapter(a.down.half(), a.up.half(), a.alpha)
        for n, a in single_files.lora_adapters(role).items()
    }
    save_file(LORAS[layout](found), tmp_path / "x.safetensors")
    got = published.read_published(tmp_path / "x.safetensors", base).weights
    assert got.keys() == found.keys()
    told = layout in ("DMD2 and LCM", "Lightning")  # elsewhere nothing tells alpha: it is the rank
    for name, a in found.items():
        assert torch.equal(got[name].down, a.down) and torch.equal(got[name].up, a.up)
        assert got[name].alpha == (a.alpha if told else 3)
    installed = published.network_with_weights(base, got)
    gap = (unets.output(installed) - unets.output(role)).abs().max()
    assert gap < 2e-3 if told else gap > 1e-2


def test_our_own_files_come_back(nets, tmp_path):
    """With rank and alpha; also where ranks and alphas differ between modules."""
    base, _, role = nets
    ours = single_files.lora_adapters(role)
    names = list(ours)
    mixed = {n: single_files.Adapter(a.down[:2], a.up[:, :2], 7.0 if n == names[3] else 4.0) for n, a in ours.items()}
    mixed[names[5]] = ours[names[5]]
    uneven = published.network_with_weights(base, mixed)
    for net, write in (
        (role, single_files.write_lora_file),
        (uneven, single_files.write_lora_file),
        (uneven, kohya.write_lora_file),
    ):
        write(net, tmp_path / "x.safetensors", {}, torch.float32)
        again = published.network_with_weights(base, published.read_published(tmp_path / "x.safetensors", base).weights)
        assert torch.equal(unets.output(again), unets.output(net))
    assert (unets.output(uneven) - unets.output(role)).abs().max() > 1e-2


def test_networks(nets, tmp_path):
    """DMD2's .bin, Lightning's UNet file, LCM's folder, and an all-in-one checkpoint in the original code's names."""
    base, other, _ = nets
    state = half(other.state_dict())
    names = kohya.original_names(base)
    inside = {
        f"model.diffusion_model.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()
    }
    torch.save(state, tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    save_file(state, tmp_path / "sdxl_lightning_4step_unet.safetensors")
    save_file(inside | {"first_stage_model.x": torch.zeros(1)}, tmp_path / "sdxl_lightning_4step.safetensors")
    (tmp_path / "unet").mkdir()
    save_file(state, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    paths = list(tmp_path.iterdir())
    assert len(paths) == 4
    for path in paths:
        got = published.read_published(path, base).weights
        assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)
    net = published.network_with_weights(base, got)
    assert (unets.output(net) - unets.output(other)).abs().max() < 5e-3
    assert (unets.output(net) - unets.output(base)).abs().max() > 0.1
    assert not (net.state_dict()["conv_in.weight"] == base.state_dict()["conv_in.weight"]).all()


PEFT = {  # adapter_config.json: alphas of conv_in and of another module, of rank 3, as alpha / r
    "lora_alpha": ({"r": 3, "lora_alpha": 16}, (16, 16)),
    "rslora": ({"r": 3, "lora_alpha": 16, "use_rslora": True}, (16 * 3**0.5, 16 * 3**0.5)),
    "patterns": ({"r": 8, "lora_alpha": 4, "rank_pattern": {".*": 3}, "alpha_pattern": {"conv_in": 6}}, (6, 4)),
    "nothing": (None, (3, 3)),
}
NOT_READ = {
    "use_dora": ({"use_dora": True}, "use_dora True: a DoRA"),
    "another kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA"),
    "another rank": ({"r": 8}, "has rank 8.*; its tensors have 3"),
    "an altered base": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4'.*plain LoRA"),
    "no number": ({"lora_alpha": "many"}, "lora_alpha 'many'; it must be a number"),
    "no alpha": ({"lora_alpha": None}, "has no lora_alpha"),
    "biases": ({"bias": "all"}, "bias 'all'"),
    "no pattern": ({"rank_pattern": {"conv_in(": 3}}, r"rank_pattern for 'conv_in\('; name modules"),
    "a pattern without end": ({"alpha_pattern": {"(.|.)*x": 3}}, "alpha_pattern for .*; name modules"),
    "no truth": ({"use_rslora": "false"}, "use_rslora 'false'; it must be true or false"),
    "no object": ([1], "not a JSON object"),
}


@pytest.mark.parametrize("place", ("beside", "inside"))
def test_alpha_of_peft(nets, tmp_path, place):
    """adapter_config.json beside the file and diffusers' metadata inside it; the weights are those that PEFT merges."""
    base, _, role = nets
    names = ("conv_in", "down_blocks.1.attentions.0.proj_in")
    found = {n: single_files.lora_adapters(role)[n] for n in names}
    tensors, path = LORAS["PEFT"](found), tmp_path / "adapter_model.safetensors"

    def saved(config):
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)
        metadata = None
        if place == "beside" and config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        elif config is not None:
            packed = {f"unet.{k}": v for k, v in config.items()} if isinstance(config, dict) else config
            metadata = {"lora_adapter_metadata": json.dumps(packed)}
        save_file(tensors, path, metadata)
        return published.read_published(path, base)

    for config, alphas in PEFT.values():
        got = saved(config)
        assert tuple(got.weights[n].alpha for n in names) == pytest.approx(alphas)
        assert ("assumed to equal the rank" in got.notes[0]) == (config is None)
        if config is not None:
            told = LoraConfig(**{"target_modules": list(names)} | config)
            layers = inject_adapter_in_model(told, unets.sdxl())
            assert layers.get_submodule("conv_in").scaling["default"] == pytest.approx(alphas[0] / 3)
    for config, words in NOT_READ.values():
        with pytest.raises(ValueError, match=words):
            saved({"r": 3, "lora_alpha": 16} | config if isinstance(config, dict) else config)
    tensors |= {f"base_model.model.{n}.alpha": torch.tensor(5.0) for n in names}
    with pytest.raises(ValueError, match=r"\.alpha 5, but lora_alpha 16 .* gives 16"):
        saved({"r": 3, "lora_alpha": 16})
    assert saved(None).weights["conv_in"].alpha == 5 and "that of its .alpha keys" in saved(None).notes[0]


def test_alpha_in_metadata_of_kohya(nets, tmp_path):
    base, _, role = nets
    found = {"conv_in": single_files.lora_adapters(role)["conv_in"]}
    tensors = kohya_keys(found, lambda name: name, alpha=False)
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_alpha": "1.5"})
    assert published.read_published(tmp_path / "x.safetensors", base).weights["conv_in"].alpha == 1.5
    save_file(tensors | {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="LoHa, which is not read"):
        published.read_published(tmp_path / "x.safetensors", base)


def test_the_rest_of_an_all_in_one_checkpoint(nets, tmp_path):
    """What is not used is listed; the marks of its prediction and of its table must be the base's."""
    base, other, _ = nets
    names, state = kohya.original_names(base), half(other.state_dict())
    inside = {
        f"model.diffusion_model.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()
    }
    rest = {"first_stage_model.a": torch.zeros(1), "conditioner.b.c": torch.zeros(1), "conditioner.d": torch.zeros(1)}
    table, marked = VP.scaled_linear(), {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}

    def read(more, metadata=None):
        save_file(inside | more, tmp_path / "x.safetensors", metadata)
        return published.read_published(tmp_path / "x.safetensors", base)

    got = read(rest)
    assert got.notes == (
        "Tensors of x.safetensors that are not used: 1 of its VAE (first_stage_model.*), 2 of its text encoders "
        "(conditioner.*). The text encoders and the VAE are the base's.",
    )
    assert got.weights.keys() == state.keys() and (got.kind, got.zero) == (None, False)
    got, four = read(marked), published.Layout((999, 749, 499, 249), 1.0, "fresh")
    assert (got.kind, got.zero, got.notes) == ("v", True, ())
    base_of = lambda kind: Denoiser(base, table, kind)
    assert published.check_agreement(got, four, base_of("v"), True).kind == "v"
    for kind, zero, words in (("eps", True, "predicts v, .* epsilon"), ("v", False, "marked ztsnr")):
        with pytest.raises(ValueError, match=words):
            published.check_agreement(got, four, base_of(kind), zero)
    assert read(rest, {"modelspec.prediction_type": "epsilon"}).kind == "eps"
    with pytest.raises(ValueError, match="this layout predict epsilon, and the base predicts v"):
        published.check_agreement(read(rest), four, base_of("v"), False)
    abar = torch.tensor(table.alphas_cumprod)
    assert published.check_agreement(read({"alphas_cumprod": abar}), four, base_of("eps"), False).kind == "eps"
    sigmas = ((1 - abar) / abar).sqrt().flip(0)
    assert published.check_agreement(read({"denoiser.sigmas": sigmas}), four, base_of("eps"), False).kind == "eps"
    with pytest.raises(ValueError, match="table of noise ends at"):
        published.check_agreement(read({"alphas_cumprod": abar**2}), four, base_of("eps"), False)
    with pytest.raises(ValueError, match=r"\['edm_mean'\], marks of an EDM network"):
        read({"edm_mean": torch.zeros(4)})


def test_the_base_may_be_on_meta(nets, tmp_path):
    _, other, _ = nets
    save_file(half(other.state_dict()), tmp_path / "x.safetensors")
    with torch.device("meta"):
        base = type(other).from_config(other.config)
    assert published.read_published(tmp_path / "x.safetensors", base).weights.keys() == other.state_dict().keys()


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_mistakes(nets, tmp_path, capsys):
    base, other, role = nets
    state = half(other.state_dict())

    def refused(tensors, message, name="x.safetensors", save=save_file):
        save(tensors, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            published.read_published(tmp_path / name, base)

    refused({k: v for k, v in state.items() if k != "conv_in.bias"}, r"1 tensors lack \['conv_in.bias'\]")
    refused(
        state | {"time_embedding.cond_proj.weight": torch.zeros(2, 2)}, "not of the base .*cond_proj"
    )  # LCM's UNets
    refused(state | {"conv_in.bias": torch.zeros(7)}, r"another shape \['conv_in.bias'\]")
    lora = kohya_keys(single_files.lora_adapters(role), lambda name: name)
    refused(lora | {"lora_te_text_model_encoder.alpha": torch.ones(())}, "lora_te_text.* is not a LoRA of a module")
    refused(lora | {"lora_unet_conv_in.dora_scale": torch.ones(3)}, "dora_scale' is DoRA, which is not read")
    refused({k: v for k, v in lora.items() if k != "lora_unet_conv_in.lora_up.weight"}, "LoRA of conv_in does not fit")
    refused(lora | {"lora_unet_conv_in.lora_down.weight": torch.ones(3, 5, 3, 3)}, "LoRA of conv_in does not fit")
    refused(lora | {"lora_unet_conv_in.lora_up.weight": torch.ones(5, 3, 1, 1)}, "LoRA of conv_in does not fit")
    refused(lora | {"lora_unet_conv_in.alpha": torch.ones(2)}, "alpha of conv_in holds 2 numbers")
    refused(lora | {"lora_unet_conv_in.lora_down.weight": torch.tensor(1.0)}, "LoRA of conv_in does not fit")
    refused(state | {"conv_in.bias": state["conv_in.bias"] * float("nan")}, "tensor conv_in.bias holds NaN")
    refused({"a": Evil()}, "more than plain tensors", "x.bin", torch.save)
    refused({"a": 1}, "dictionary of plain tensors", "x.bin", torch.save)
    refused({}, "give a .safetensors", "x.pkl", torch.save)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 files"):
        published.read_published(tmp_path / "empty", base)


def test_known_students(tmp_path):
    known = lambda name, *rest: published.identify_layout(tmp_path / name, *rest)
    four = published.Layout((999, 749, 499, 249), 1.0, "fresh")
    assert known("dmd2_sdxl_4step_unet_fp16.bin") == known("dmd2_sdxl_4step_lora_fp16.safetensors") == four
    assert known("dmd2_sdxl_1step_unet_fp16.bin") == published.Layout((399,), 1.0, "fresh")
    eight = (999, 874, 749, 624, 499, 374, 249, 124)
    assert known("sdxl_lightning_8step_lora.safetensors") == published.Layout(eight, None, "ddim")
    assert known("sdxl_lightning_1step_unet_x0.safetensors") == published.Layout((999,), None, "ddim", "x0")
    lcm = published.Layout((999, 759, 499, 259), 1.0, "fresh")
    assert known("lcm-lora-sdxl/pytorch_lora_weights.safetensors") == known("x.safetensors", "lcm") == lcm
    with pytest.raises(ValueError, match=r"one of \['dmd2', 'lcm', 'lightning'\]"):
        known("pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"lightning has students of \[1, 2, 4, 8\] steps, not 3"):
        known("x.safetensors", "lightning", 3)


@pytest.mark.parametrize("steps", range(1, 9))
def test_times_are_the_schedulers(steps):
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    euler = EulerDiscreteScheduler(timestep_spacing="trailing")
    for scheduler, indices in (
        (euler, published.trailing_indices(steps)),
        (LCMScheduler(), published.lcm_indices(steps)),
    ):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == indices
    assert LCMScheduler().init_noise_sigma == 1.0  # scale 1
