"""Runs and verification on GPUs, as far as a CPU can tell: what is drawn, rounded, moved and waited for."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.training.config import StudentConfig
from pipelines import load as load_teacher
from pipelines.export import export, verify
from pipelines.export.model_card import collect_card_info
from pipelines.families import flux, sd, tiny
from pipelines.launch import start_accelerator
from pipelines.run import cast_to_bfloat16, resolve_student_schedule


@pytest.mark.parametrize("family", (sd.FAMILY, flux.FAMILY))
def test_noise_is_drawn_on_the_device_of_the_pipeline(family):
    """The numbers of a GPU's generator are not those of the CPU's."""
    teacher = SimpleNamespace(family=family)
    for device in ("cpu", "meta"):
        assert verify.GlobalGeneratorDraw(teacher, device).normal("renoise0", (1, 4, 2, 2)).device.type == device


def test_products_are_float32_and_all_is_as_before():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    state, before = torch.get_rng_state(), (matmul.allow_tf32, cudnn.allow_tf32)
    with pytest.raises(KeyError), verify.exact_arithmetic(3, torch.device("cpu")):
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        drawn = torch.randn(2)
        raise KeyError
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, torch.randn(2, generator=torch.Generator().manual_seed(3)))


def test_text_encoders_network_and_decoder_take_turns(monkeypatch):
    events = []
    net = nn.Linear(1, 1)
    monkeypatch.setattr(net, "to", lambda device: events.append("network"))
    call = lambda net, x, t, c: x
    denoiser = Denoiser(net, Flow(), "flow", call)
    parts = SimpleNamespace(drop_text=lambda: events.append("drop"))
    decode = lambda x: events.append("decode") or x
    encode = lambda prompts: events.append("encode")
    teacher = SimpleNamespace(family=sd.FAMILY, parts=parts, shape=(1, 2, 2), encode=encode, decode=decode)
    verify.sample_reference(Student(denoiser), teacher, net)
    assert events == ["drop", "encode", "encode", "drop", "network", "network", "decode", "decode"]


def test_encoders_that_are_stored_in_half(tmp_path):
    """SD3, FLUX and Qwen-Image keep theirs in half precision; the student's network is float32."""
    folder = tmp_path / "teacher"
    tiny.save("sd3", folder, t5=False)
    pipe = load_teacher(folder).parts.pipe(text_encoder_3=None, tokenizer_3=None)
    pipe.text_encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    teacher = load_teacher(folder)
    scheduler, config = resolve_student_schedule(teacher, StudentConfig(steps=2))
    student = Student(teacher.denoiser, config.times, config.scale, config.renoise)
    card = collect_card_info("student", teacher, "base", "dmd2", "", None, None)
    gaps = export.export(student, teacher, teacher.denoiser.net, scheduler, tmp_path / "pipeline", card).gaps
    assert gaps["pipeline"].largest < 1e-4


def test_processes_wait_for_one_that_downloads_or_encodes():
    assert start_accelerator().init_handler.timeout == timedelta(days=1)


def test_half_precision_keeps_what_the_class_keeps():
    """Rotations of Wan's positions in bfloat16 are off by .004; its first parameter is float32."""
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=8,
    )
    cast_to_bfloat16(net)
    kinds = {name: tensor.dtype for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    assert kinds["rope.freqs_cos"] == kinds["scale_shift_table"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
