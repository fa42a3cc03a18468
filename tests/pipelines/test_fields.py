"""A teacher's folder whose configs hold what their classes cannot use, or whose parts are of another kind."""

import json
import math
import shutil

import pytest
import torch

from pipelines import load
from pipelines.families import tiny
from pipelines.planning.models import Meta

SCHEDULER = "scheduler/scheduler_config"
HOSTILE = {  # what: (file, change, words of the message)
    "NaN betas": (SCHEDULER, {"trained_betas": [math.nan] * 9}, r"trained_betas is \[NaN, .*list of"),
    "text for a number": (SCHEDULER, {"beta_start": "x"}, 'beta_start is "x"; .*above 0 and below 1'),
    "no steps": (SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps is 0; .*from 1 to 100,000"),
    "too many steps": (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
    "no VAE": ("model_index", {"vae": [None, None]}, "its vae is null, and a teacher needs one"),
    "no side": ("unet/config", {"sample_size": None}, "sample_size is None; .*pass --resolution PIXELS"),
    "an oblong": ("unet/config", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; .*pass --resolution PIXELS"),
    "no size": ("unet/config", {"sample_size": 0}, "sample_size is 0; it must be null, or a whole number"),
    "no channels": ("unet/config", {"in_channels": "x"}, 'in_channels is "x"; it must be a whole number'),
    "a tower": ("unet/config", {"layers_per_block": 10**9}, "layers_per_block is 1000000000; .*at most 1,000 layers"),
    "no scale": ("vae/config", {"scaling_factor": None}, "scaling_factor is null; it must be given"),
    "a scale of NaN": (
        "vae/config",
        {"scaling_factor": math.nan},
        "scaling_factor is NaN; .* a number above 0",
    ),
    "half a mean": ("vae/config", {"latents_mean": [0.0]}, "latents_mean is .*; it must be a number for each channel"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "sd"
    tiny.save("sd", folder)
    return folder


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_config(what, plain, tmp_path):
    """One message with file, field and remedy, before weights are read."""
    name, change, message = HOSTILE[what]
    folder = shutil.copytree(plain, tmp_path / "sd")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{name}\.json: (its )?{message}"):
        load(folder)
    if not name.startswith("unet") or what == "a tower":  # what needs a resolution is seen when the network is there
        with pytest.raises(ValueError, match=message):
            Meta.from_folder(folder)


def test_sizes_and_encoders(plain, tmp_path):
    """A side in a list is that side; weights in .bin files alone and missing encoders are refused by name."""
    folder = shutil.copytree(plain, tmp_path / "sd")
    for size, resolution in ((None, 16), ([8, 8], None)):
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        assert load(folder, resolution).shape == (4, 8, 8)
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="text_encoder has its weights in .bin files only"):
        load(folder).encode(["a fox"])
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    with pytest.raises(ValueError, match="has no text_encoder .null., which encodes prompts"):
        load(folder).encode(["a fox"])


def test_a_tiny_autoencoder(plain, tmp_path):
    """It has no posterior: images are its latents' own, whatever eps."""
    from diffusers import AutoencoderTiny

    folder, two = shutil.copytree(plain, tmp_path / "sd"), {"latent_channels": 4}
    for part in ("encoder", "decoder"):
        two |= {f"{part}_block_out_channels": (8, 8), f"num_{part}_blocks": (1, 1)}
    shutil.rmtree(folder / "vae")
    vae = AutoencoderTiny(**two)
    vae.save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = [load(folder).latent(images, eps) for eps in (torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8))]
    with torch.no_grad():
        want = vae.encode(images).latents
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], want)
