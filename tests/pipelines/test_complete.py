"""A complete checkpoint in the original names: diffusers' own reader gives the same tensors and the same images."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipelines import load
from pipelines.export import published
from pipelines.export.complete import write_complete_file
from pipelines.families import sd, sdxl, tiny


def small(name):
    """A tiny pipeline. SDXL's text encoders have two widths, by which the reader tells them apart."""
    if name == "sd":
        return sd.tiny()
    pipe = sdxl.tiny()
    blocks = {"transformer_layers_per_block": (1, 2), "use_linear_projection": True, "cross_attention_dim": 80}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipe.unet = sd.unet(**blocks, **added, projection_class_embeddings_input_dim=32 + 6 * 8)
    pipe.text_encoder_2 = tiny.clip(width=48, projection=32)
    return pipe


@torch.no_grad()
def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 0, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a red fox", generator=torch.Generator().manual_seed(1), **options).images


@pytest.mark.parametrize("name", ("sd", "sdxl"))
def test_diffusers_reads_it(name, tmp_path):
    pipe = small(name)
    pipe.save_pretrained(tmp_path / "folder")
    teacher, file = load(tmp_path / "folder"), tmp_path / "x_checkpoint.safetensors"
    write_complete_file(teacher.denoiser.net, teacher.parts, file, {}, torch.float32)
    config = {"config": f"{tmp_path / 'folder'}", "local_files_only": True}
    again = type(pipe).from_single_file(f"{file}", **config, torch_dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")[: 3 if name == "sd" else 4]:
        ours, theirs = (getattr(which, part).state_dict() for which in (pipe, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part
    made = image(again)
    assert np.abs(made - image(pipe)).max() < 1e-5 and made.std() > 0.05
    with safe_open(file, "pt") as stored:
        groups = {key.split(".")[0] for key in stored.keys()}
    texts = {"cond_stage_model"} if name == "sd" else {"conditioner"}
    assert groups == {"model", "first_stage_model"} | texts
    found = published.read_published(file, teacher.denoiser.net)  # our own reader of such files
    assert all(torch.equal(found.weights[key], value) for key, value in pipe.unet.state_dict().items())


def test_encoders_that_no_reader_can_tell_apart(tmp_path):
    tiny.save("sdxl", tmp_path / "folder")
    teacher = load(tmp_path / "folder")
    with pytest.raises(ValueError, match="both text encoders have one width"):
        write_complete_file(teacher.denoiser.net, teacher.parts, tmp_path / "x.safetensors", {})
