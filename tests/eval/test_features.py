"""Features: resizing and networks equal their peers', the cache, kill -9 and two processes, wrong folders."""

import io
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from distill.data import digits
from eval.features import extraction as module
from eval.features import weights
from eval.features.digits import classifier, shift_images
from eval.features.extraction import features, text_features
from eval.features.extractors import EXTRACTORS, load
from eval.features.weights import EXTRACTOR_NAMES, INCEPTION
from eval.images import images as folders
from eval.images.resize import parse, resize
from eval.metrics.frechet import frechet
from eval.protocol import Preparation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test; networks that were loaded from another one are forgotten."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    load.cache_clear()
    yield tmp_path / "cache"
    load.cache_clear()


def noise(folder, n, size=(20, 14), seed=0):
    """A folder of n random pictures of size (width, height), without a manifest."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:06d}.png")
    return folder


def test_resizing_equals_the_peers():
    from cleanfid.resize import build_resizer
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8))
    clean = build_resizer("clean")(np.asarray(picture)).transpose(2, 0, 1)
    assert np.array_equal(resize(picture, "clean:299"), clean) and clean.shape == (3, 299, 299)
    for size in (20, 21):
        theirs = T.Compose([T.Resize(size, InterpolationMode.BICUBIC), T.CenterCrop(size), T.PILToTensor()])(picture)
        assert np.array_equal(resize(picture, f"short-bicubic:{size} crop:{size}"), theirs.float().numpy())
    theirs = T.Compose([T.Resize((24, 24), InterpolationMode.LANCZOS), T.PILToTensor()])(picture)
    assert np.array_equal(resize(picture, "lanczos:24"), theirs.float().numpy())
    assert resize(picture, "gray").shape == (1, 50, 37)
    assert np.array_equal(resize(picture.crop((0, 0, 37, 37)), "clean:37"), resize(picture.crop((0, 0, 37, 37))))
    with pytest.raises(ValueError, match="'cubic:8' is no step"):
        parse("gray cubic:8")
    with pytest.raises(ValueError, match="37 x 50, this extractor takes 8 x 8"):
        resize(picture, "exact:8")


class Stand(nn.Module):
    """A network with the interface of the TorchScript Inception: layers, forward with its two switches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(16), nn.Flatten())
        self.output = nn.Linear(2048, 12)

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        x = nn.functional.interpolate(img.float(), size=[299, 299], mode="bilinear", align_corners=False)
        x = self.layers((x - 128) / 128)
        if return_features:
            return x
        y = nn.functional.linear(x, self.output.weight, None if no_output_bias else self.output.bias)
        return y.softmax(1)


@pytest.fixture
def stand(cache):
    """A random network at the place, and with the interface, of clean-fid's Inception."""
    cache.mkdir(parents=True)
    torch.jit.script(Stand().eval()).save(str(cache / INCEPTION))
    return cache


def test_inception_runs_as_clean_fid_runs_it(stand, tmp_path):
    """From files to features, through clean-fid's own resizing and its own wrapper around the same TorchScript file."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    folder = noise(tmp_path / "a", 12)
    theirs = InceptionV3W(str(stand), download=False)
    cpu = torch.device("cpu")
    expected = get_folder_features(
        str(folder), theirs, num_workers=0, batch_size=5, device=cpu, mode="clean", verbose=False
    )
    net = load("inception-clean")
    ours = features(folder, net, batch=5)
    torch.testing.assert_close(ours.rows(), torch.from_numpy(expected).double(), rtol=1e-6, atol=1e-7)
    assert net.hash == load("inception-legacy").hash and len(net.hash) == 12
    legacy = InceptionV3W(str(stand), download=False, resize_inside=True)
    expected = get_folder_features(
        str(folder), legacy, num_workers=0, batch_size=5, device=cpu, mode="legacy_tensorflow", verbose=False
    )
    found = features(folder, load("inception-legacy"), batch=5).rows()
    torch.testing.assert_close(found, torch.from_numpy(expected).double(), rtol=1e-6, atol=1e-7)
    logits = features(folder, load("inception-logits")).rows(key="logits")
    assert logits.exp().sum(1).allclose(torch.ones(12, dtype=torch.float64), atol=1e-6)


def test_absent_weights_say_where_to_put_them(cache):
    with pytest.raises(ValueError, match=f"no file .*{INCEPTION}, and HF_HUB_OFFLINE forbids downloads; download http"):
        load("inception-clean")
    assert set(EXTRACTORS) == set(EXTRACTOR_NAMES)
    with pytest.raises(ValueError, match="no Dinov2Model at 'nowhere/x'"):
        load("dinov2:nowhere/x")
    with pytest.raises(ValueError, match="no CLIPModel at 'nowhere/x'"):
        load("clip:nowhere/x")
    with pytest.raises(ValueError, match="hpsv2 needs the weights"):
        load("hpsv2")
    with pytest.raises(ValueError, match="open_clip could not load 'ViT-B-32/nothing'"):
        load("open_clip:ViT-B-32/nothing")
    with pytest.raises(ValueError, match="extractor 'vgg' is unknown; there are inception-clean"):
        load("vgg")
    (cache / "broken.pt").parent.mkdir(parents=True, exist_ok=True)
    (cache / "broken.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="not a TorchScript"):
        load(f"inception-clean:{cache / 'broken.pt'}")


def test_inception_is_downloaded_by_clean_fid(cache, monkeypatch):
    """A file that is complete is kept. A truncated one and a silent server give a message with both addresses."""
    from cleanfid import downloads_helper

    stand = io.BytesIO()
    with zipfile.ZipFile(stand, "w") as packed:
        packed.writestr("net", "x" * 100)
    content = stand.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent":
                time.sleep(2)
            self.send_response(200)
            self.send_header("Content-Length", f"{len(content)}")
            self.end_headers()
            self.wfile.write(content if self.path == "/whole" else content[:60])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "SECONDS", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name, reason in (("short", "not the complete file"), ("silent", "timed out")):
            address = f"http://127.0.0.1:{server.server_port}/{name}"
            monkeypatch.setattr(downloads_helper, "inception_url", address)
            with pytest.raises(ValueError, match=f"no file .*{INCEPTION}, .*{reason}.*; download {address} "):
                load("inception-clean")
            assert not list(cache.iterdir())
        monkeypatch.setattr(downloads_helper, "inception_url", f"http://127.0.0.1:{server.server_port}/whole")
        assert weights.fetch_inception() == cache / INCEPTION and [*cache.iterdir()] == [cache / INCEPTION]
        server.shutdown()
    assert weights.fetch_inception().read_bytes() == content, "fetched once"
    assert socket.getdefaulttimeout() is None


def test_dinov2_is_the_normalised_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    net = Dinov2Model(config).eval()
    net.save_pretrained(tmp_path / "dino")
    folder = noise(tmp_path / "a", 3)
    ours = features(folder, load(f"dinov2:{tmp_path / 'dino'}")).rows()
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    how = T.Compose([T.Resize((224, 224), InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(mean, std)])
    x = torch.stack([how(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    with torch.no_grad():
        torch.testing.assert_close(ours, net(x).pooler_output.double(), rtol=1e-4, atol=1e-5)


def test_open_clip_equals_its_own_pipeline(tmp_path):
    """A random model of a local folder: images and prompts by open_clip's own transform, tokenizer and encoders."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    about = {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic"}}
    where = tmp_path / "model"
    where.mkdir()
    (where / "open_clip_config.json").write_text(json.dumps(about))
    net = open_clip.CLIP(**{k: dict(v) if isinstance(v, dict) else v for k, v in config.items()})
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, where / "open_clip_model.safetensors")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{where}")
    folder = noise(tmp_path / "a", 3)
    x = torch.stack([transform(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    net = load(f"open_clip:local-dir:{where}")
    assert net.rule == "short-bicubic:32 crop:32"
    prompts = ["a cat", "two dogs and a cat"]
    with torch.no_grad():
        torch.testing.assert_close(
            features(folder, net).rows(), theirs.eval().encode_image(x).double(), rtol=1e-4, atol=1e-5
        )
        tokens = open_clip.get_tokenizer(f"local-dir:{where}")(prompts)
        torch.testing.assert_close(
            text_features(prompts, net), theirs.encode_text(tokens).double(), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="reads no text"):
        text_features(prompts, load("random"))


def test_the_cache_answers_and_tells_apart(tmp_path, monkeypatch):
    """The same request runs no network; another image, order, rule, extractor or number is another entry."""
    calls = []
    real = module._outputs
    monkeypatch.setattr(module, "_outputs", lambda *a: calls.append(1) or real(*a))
    folder = noise(tmp_path / "a", 5)
    first = features(folder, load("random"))
    assert len(calls) == 1 and first.n == 5 and first.rows().dtype == torch.float64
    again = features(noise(tmp_path / "moved", 5), load("random"))
    assert len(calls) == 1 and again.rows().equal(first.rows())
    assert again.rows(torch.tensor([3, 0])).equal(first.rows()[[3, 0]])
    other = {
        "seed": features(folder, load("random:1")),
        "rule": features(folder, load("random"), Preparation("square")),
        "fewer": features(folder, load("random"), first=4),
        "image": features(noise(tmp_path / "b", 5, seed=1), load("random")),
    }
    assert len(calls) == 5 and len({f.folder for f in (first, *other.values())}) == 5
    assert other["fewer"].rows().allclose(first.rows()[:4])
    with pytest.raises(ValueError, match="gives features, logits, no texts"):
        next(first.chunks("texts"))
    (chunk,) = first.folder.glob("*.safetensors")
    whole = chunk.read_bytes()
    for torn in (whole[:-8], whole[:40], b"", pickle.dumps([1])):
        chunk.write_bytes(torn)
        calls.clear()
        assert features(folder, load("random")).rows().equal(first.rows()) and len(calls) == 1, "made again"
    assert chunk.read_bytes() == whole


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tmp_path):
    """The corrupt image is in the second process's chunk."""
    folder = noise(tmp_path / "a", 11)
    (folder / "000005.png").write_bytes(b"")
    done = launch(folder, tmp_path / "two", processes=2)
    assert done.returncode and done.stderr.count("000005.png cannot be read") >= 2


RUN = """
import os, sys
from pathlib import Path
from eval.features import extraction as module
from eval.features.extractors import load
module.CHUNK = 4
killed = []
if sys.argv[2] == "kill":
    real = module._save_tensors
    def save(path, tensors):
        if killed:
            os.kill(os.getpid(), 9)
        killed.append(path)
        real(path, tensors)
    module._save_tensors = save
found = module.features(Path(sys.argv[1]), load("random"), batch=2)
"""


def launch(folder, cache, how="run", processes=1):
    env = os.environ | {"DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, "-c", RUN]
    if processes > 1:
        script = cache.with_suffix(".py")
        script.write_text(RUN)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), str(script)]
    return subprocess.run([*command, str(folder), how], cwd=ROOT, env=env, capture_output=True, text=True)


def stored(cache):
    return {file.name: load_file(file)["features"] for file in (cache / "features").rglob("*.safetensors")}


def test_kill_9_and_two_processes_lose_and_repeat_nothing(tmp_path, monkeypatch):
    """Killed at the second of three chunks and run again, or shared by two processes: bit for bit the same files."""
    folder = noise(tmp_path / "a", 11)
    monkeypatch.setattr(module, "CHUNK", 4)

    def here(cache):
        monkeypatch.setenv("DISTILL_CACHE", str(cache))
        assert features(folder, load("random"), batch=2).n == 11

    here(tmp_path / "whole")
    whole = stored(tmp_path / "whole")
    assert [len(whole[name]) for name in sorted(whole)] == [4, 4, 3]
    assert launch(folder, tmp_path / "killed", "kill").returncode == -9
    assert len(stored(tmp_path / "killed")) == 1
    first = next((tmp_path / "killed").rglob("*.safetensors"))
    made = first.stat().st_mtime_ns
    here(tmp_path / "killed")
    assert first.stat().st_mtime_ns == made
    two = launch(folder, tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr[-2000:]
    for other in (stored(tmp_path / "killed"), stored(tmp_path / "two")):
        assert other.keys() == whole.keys() and all(other[k].equal(whole[k]) for k in whole)


def test_memory_does_not_grow_with_n(tmp_path):
    """Mean, covariance, FID with its interval and Vendi over 600,000 x 64 features (300 MB) in less than 120 MB."""
    script = """
import re, torch
from eval.metrics.diversity import vendi
from eval.metrics.frechet import fid
class Many:
    def __init__(self, n, seed): self.n, self.seed = n, seed
    def chunks(self, key="features"):
        draw = torch.Generator().manual_seed(self.seed)
        yield from (torch.randn(1000, 64, generator=draw).double() for _ in range(self.n // 1000))
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(1)
real = torch.randn(2000, 64)
fid(Many(3000, 0), real), vendi(Many(3000, 0))
before = peak()
score = fid(Many(600_000, 0), real), vendi(Many(600_000, 0))
assert score[0].n == 600_000
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 120


def test_wrong_folders_are_one_clear_error(tmp_path, digits_network):
    net = load("random")

    def fails(folder, match, **how):
        with pytest.raises(ValueError, match=match) as told:
            features(folder, how.pop("net", net), **how)
        assert "\n" not in str(told.value)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no image")
    fails(tmp_path / "absent", "there is no folder")
    mixed = noise(tmp_path / "mixed", 3)
    Image.new("RGB", (9, 8)).save(mixed / "000001.png")
    fails(mixed, "000001.png comes out as .*000000.png as .*different sizes need")
    assert (
        features(mixed, net, Preparation("square", 8)).n == 3
    )  # of a reference, which the protocol brings to one size
    made = tmp_path / "made"
    folders.write_folder(made, torch.zeros(3, 1, 8, 8))
    Image.new("L", (9, 8)).save(made / "000001.png")
    fails(made, "000001.png is 9 x 8, others are 8 x 8; one size a folder", prepare=Preparation("square", 8))
    (made / "000001.png").unlink()
    fails(made, "holds 2 images, its manifest says 3")
    os.mkfifo(made / "000001.png")
    fails(made, "000001.png is not a regular file")
    corrupt = noise(tmp_path / "corrupt", 3)
    (corrupt / "000002.png").write_bytes((corrupt / "000002.png").read_bytes()[:60])
    fails(corrupt, "000002.png cannot be read: .*; remove or replace it")
    fails(
        noise(tmp_path / "big", 2), "000000.png: the image is 20 x 14, this extractor takes 8 x 8", net=load("digits")
    )
    bad = type(net)("bad", "0", "", lambda x: {"features": x.mean((1, 2, 3))[:, None] * math.nan})
    fails(noise(tmp_path / "nan", 2), "000000.png are NaN", net=bad)


def test_the_digits_extractor(tmp_path, monkeypatch, digits_network):
    """At least 97 % of the held-out digits; files and tensors give the same features; it is trained once."""
    net = digits_network
    images, labels = digits("heldout")
    found, logits = net(images)
    assert found.shape == (597, 64) and found.dtype == torch.float64 and found.min() < 0  # before the ReLU
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(net.accuracy) and net.accuracy >= 0.97
    folders.write_folder(tmp_path / "real", images[:20])
    seen = features(tmp_path / "real", load("digits"))
    rounded = net(folders.restore(folders.quantize(images[:20])))[0]
    assert seen.rows().allclose(rounded, atol=1e-4) and seen.extractor_hash == net.hash
    assert frechet(net(digits("train")[0])[0], found) > 1
    with pytest.raises(ValueError, match="image 3 holds NaN"):
        net(images.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\]"):
        net(torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr("eval.features.digits.train", lambda recipe: net.net)
    assert classifier.__wrapped__(tmp_path).hash == net.hash  # trained and stored
    (file,) = tmp_path.glob("digits-*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert classifier.__wrapped__(tmp_path).hash == net.hash  # torn: made again
    monkeypatch.setattr("eval.features.digits.train", lambda recipe: 1 / 0)
    assert classifier.__wrapped__(tmp_path).hash == net.hash  # read


def test_shift_moves_by_whole_pixels():
    x = torch.randn(2, 1, 4, 4)
    out = shift_images(x, torch.tensor([[1, 0], [0, -1]]))
    assert (out[0, 0, 0] == -1).all() and out[0, 0, 1:].equal(x[0, 0, :-1])
    assert (out[1, 0, :, -1] == -1).all() and out[1, 0, :, :-1].equal(x[1, 0, :, 1:])
