"""The converter of EDM checkpoints: the numbers of the network in the file, and nothing of the file runs."""

import copy
import json
import os
import pickle
from functools import partial

import edm_reference
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel
from torch import nn

import pipelines
from distill.diffusion.student import Student
from distill.methods import SiD
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines.export import edm_convert
from pipelines.export.export import compare, sample_reference, write_pipeline
from pipelines.export.schedule import find_student_scheduler
from pipelines.families import edm

NETS = {
    "song": partial(edm_reference.song, augment_dim=9),
    "song unconditional": partial(edm_reference.song, label_dim=0, blocks=1),
    "adm": edm_reference.adm,
}


@pytest.fixture(scope="module", params=NETS)
def converted(request, tmp_path_factory):
    """(the network of the file, the pipeline folder)."""
    torch.manual_seed(0)
    net = NETS[request.param]()
    folder = tmp_path_factory.mktemp("edm")
    edm_convert.main([str(edm_reference.dump(net, folder / "net.pkl")), str(folder / "out")])
    return net, folder / "out"


@torch.no_grad()
def outputs(net, denoiser, sigma, labels):
    """F(c_in x, sigma, label) of both: x0 without its exact part c_skip x."""
    x = torch.randn(len(sigma), 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    total = (sigma**2 + net.sigma_data**2)[:, None, None, None]
    x = x * total.sqrt()
    onehot = torch.eye(8).double()[labels] if net.label_dim else None
    D = net.double()(x, sigma, onehot)
    net.float()
    double = denoiser.copy()
    double.net.double()
    pred = double(x, denoiser.schedule.time(sigma), {"class_labels": labels})
    scale = sigma[:, None, None, None] * net.sigma_data / total.sqrt()
    return (D - net.sigma_data**2 / total * x) / scale, pred.out


def test_same_numbers(converted):
    """From sigma .002 to 80, in float64 but for the angles of the noise level."""
    net, folder = converted
    teacher = pipelines.load(folder)
    assert teacher.shape == (3, 8, 8) and teacher.denoiser.sigma_d == 0.5 and teacher.denoiser.null is None
    sigma, labels = torch.tensor([0.002, 0.3, 2.5, 80.0]).double(), torch.tensor([0, 4, 2, 7])
    expected, ours = outputs(net, teacher.denoiser, sigma, labels)
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
    for moved in ((sigma * 1.5, labels), (sigma, labels.flip(0)))[: 2 if net.label_dim else 1]:
        other, _ = outputs(net, teacher.denoiser, *moved)
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max(), "an input that does not count"


@pytest.mark.parametrize(("steps", "sigma"), [(1, 2.5), (3, 80.0)])
def test_export(converted, tmp_path, steps, sigma):
    """ConsistencyModelPipeline samples what the student samples, whatever its network was told for sigma."""
    teacher = pipelines.load(converted[1])
    plan, times = find_student_scheduler(teacher, StudentConfig(steps=steps, sigma=sigma))
    student = Student(teacher.denoiser, times, sigma)
    net = teacher.denoiser.copy().net
    with torch.no_grad():
        for p in net.parameters():  # it has been trained
            p.mul_(1 + 0.1 * torch.randn(()))
    expected = sample_reference(student, teacher, net)

    def gap(written, name):
        write_pipeline(teacher, written, plan, tmp_path / name)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name, local_files_only=True)
        return compare(pipe, teacher, expected, steps).largest

    library = json.loads((converted[1] / "model_index.json").read_text())["unet"][0]
    assert library == ("diffusers" if isinstance(net, UNet2DModel) else "pipelines.edm_nets")
    assert bool(edm.limits(net)) == (library != "diffusers")
    before = net.time_embedding.linear_1.weight.clone()
    made = edm.export_network(net, student)
    assert gap(made, "out") < 1e-5
    assert torch.equal(net.time_embedding.linear_1.weight, before), "the student itself is not touched"
    if library == "diffusers":
        assert gap(net, "untold") > 1e-2
    t, c = torch.linspace(0, 1, 20), teacher.encode([3] * 20)
    x = torch.randn(20, 3, 8, 8)
    with torch.no_grad():
        still, was = (student.with_network(n).denoiser(x, t, c).out for n in (made, net))
    assert (still - was).abs().max() < 1e-5 * was.abs().max(), "told as in training, it can be trained further"


def test_it_can_be_taught(converted):
    """One step of SiD moves every weight of student and fake score, but those of an augmentation that is not there."""
    teacher = pipelines.load(converted[1])
    nets = build(SiD(), teacher.denoiser, teacher.shape, student=StudentConfig(sigma=2.5, scale=2.5))
    before = {player: copy.deepcopy(m.state_dict()) for player, m in nets.modules().items()}
    config = TrainConfig(max_train_steps=1, train_batch_size=2, learning_rate=1e-4)
    for state in train(SiD(), nets, lambda draw: {"c": teacher.encode([1, 6])}, config, Accelerator(cpu=True)):
        for player, m in state.nets.modules().items():
            still = {name for name, p in m.named_parameters() if torch.equal(p, before[player][name])}
            assert still <= {"augment_embedding.weight"}


def test_no_label(tmp_path):
    """A network that was trained without labels at times has a null class: the zero vector."""
    net = edm_reference.song(blocks=1, label_dropout=0.1)
    edm_convert.convert(edm_reference.dump(net, tmp_path / "net.pkl"), tmp_path / "out")
    teacher = pipelines.load(tmp_path / "out")
    assert teacher.denoiser.null["class_labels"].tolist() == [8]
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor([2.5])
    with torch.no_grad():
        ours = teacher.denoiser(x, teacher.denoiser.schedule.time(sigma), teacher.denoiser.null).x0
        torch.testing.assert_close(ours, net(x, sigma, torch.zeros(1, 8)), rtol=1e-4, atol=1e-5)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec], ids=lambda f: f.__name__)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_of_the_file_runs(tmp_path, function, protocol):
    """Neither beside a sound network nor instead of one."""
    trace = tmp_path / "trace"
    code = {os.system: f"touch {trace}", os.mkdir: str(trace)}.get(function, f"__import__('os').mkdir({str(trace)!r})")
    evil = pickle.dumps({"ema": Evil(function, code)}, protocol)
    pickle.loads(evil)
    assert trace.exists(), "this file does harm elsewhere"
    trace.rmdir() if trace.is_dir() else trace.unlink()
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(ValueError, match="not a checkpoint of EDM"):
        edm_convert.convert(tmp_path / "evil.pkl", tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_nothing_of_a_tensor_runs(tmp_path):
    """The memory of a tensor is a pickle within the pickle: it is read with weights only."""
    trace = tmp_path / "trace"
    with open(tmp_path / "blob", "wb") as f:
        torch.save(Evil(os.mkdir, str(trace)), f, _use_new_zipfile_serialization=False)
    blob = (tmp_path / "blob").read_bytes()
    evil = pickle.dumps({"ema": Evil(torch.storage._load_from_bytes, blob)})
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(ValueError, match="(?s)not a checkpoint of EDM.*mkdir"):
        edm_convert.convert(tmp_path / "evil.pkl", tmp_path / "out")
    assert not trace.exists()


def fourier(net):
    net.model.map_noise = nn.Module()
    net.model.map_noise.register_buffer("freqs", torch.zeros(8))


def residual(net):
    net.model.enc["4x4_aux_residual"] = edm_reference.Conv2d(3, 16, 3, down=True)


def filtered(net):
    net.model.enc["4x4_down"].conv0.resample_filter = torch.full((1, 1, 4, 4), 1 / 16)


def lost(net):
    del net.model.dec["8x8_block1"]


def wide(net):
    net.model.dec["8x8_block1"].affine = edm_reference.Linear(64, 99)


def twice(net):
    """2^60 paths lead to the last module."""
    module = nn.Identity()
    for _ in range(60):
        module = nn.Sequential(module, module)
    net.model.enc["more"] = module


def stretched(net):
    net.model.enc["4x4_down"].conv0.resample_filter = torch.ones(1).expand(10**6, 10**6)


def other(net):
    net.__class__ = type("VPPrecond", (edm_reference.EDMPrecond,), {})


REFUSED = {
    fourier: "map_noise.freqs is no part.*NCSN",
    residual: "aux_residual.*NCSN",
    filtered: "resample_filter is not the mean.*NCSN",
    lost: "(?s)variant that is not read: .*8x8_block1",
    wide: "(?s)variant that is not read: .*size mismatch",
    twice: "its module enc.more.* is there twice",
    stretched: "resample_filter of shape .* has more numbers than are stored",
    other: "SongUNet under VPPrecond",
}


@pytest.mark.parametrize("cut", REFUSED, ids=lambda f: f.__name__)
def test_another_network_is_refused(tmp_path, cut):
    net = edm_reference.song(blocks=1)
    cut(net)
    with pytest.raises(ValueError, match=REFUSED[cut]):
        edm_convert.convert(edm_reference.dump(net, tmp_path / "net.pkl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        edm_convert.main([str(tmp_path / "none.pkl"), str(tmp_path / "out")])
    assert "no file" in capsys.readouterr().err
    (tmp_path / "text.pkl").write_text("not a pickle")
    with pytest.raises(ValueError, match="text.pkl is not a checkpoint of EDM"):
        edm_convert.convert(tmp_path / "text.pkl", tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        edm_convert.convert(tmp_path / "text.pkl", tmp_path)
    with pytest.raises(ValueError, match="32 groups"):
        net = edm_reference.adm(stem=64)
        edm_convert.convert(edm_reference.dump(net, tmp_path / "thin.pkl"), tmp_path / "out")
