"""What a scoring lacks is said at once: before a network, torch or the images are touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from eval.images import images as folders


def test_a_lack_is_named_before_torch_is_imported(tmp_path):
    """Exit code 2 with one line, in one process for all cases."""
    images = torch.zeros(3, 1, 8, 8)
    folders.write_folder(tmp_path / "a", images)
    (tmp_path / "photos").mkdir()
    folders.write_folder(tmp_path / "large", torch.zeros(1, 3, 16, 16))
    folders.write_folder(tmp_path / "moved", images, protocol="gone/own.yaml")
    (tmp_path / "own.yaml").write_text("size: 8\nlabels: 10\nmetrics: [kid]\n")
    (tmp_path / "wrong.yaml").write_text("size: 8\nlabels: 10\nmetric: [kid]\n")
    cases = {
        "--folder none": "there is no folder none",
        "--folder large": "large was made for no protocol: choose a protocol by --protocol NAME or FILE.yaml, or",
        "--folder moved": "moved was made for the protocol gone/own.yaml, which is not there",
        "--folder a --protocol digit": "there is no protocol 'digit'; the nearest is digits; there are coco30k",
        "--folder a --protocol own.yaml": "protocol own.yaml has no reference, which kid needs: name a folder by --ref",
        "--folder a --protocol wrong.yaml": "'metric' is no key; the nearest is metrics",
        "--folder a --protocol mjhq30k": "protocol mjhq30k lacks data; put",
        "--folder a --metrics fdi": "there is no metric 'fdi'; the nearest is fid; there are",
        "--folder a --metrics kid": "metric kid compares with real images: name their folder by --reference",
        "--folder a --metrics kid --reference b": "there is no b; name a folder of real images",
        "--folder a --metrics vendi --extractor dino": "extractor 'dino' is unknown; the nearest is dinov2; there are",
        "--folder a --metrics vendi": "needs 'facebook/dinov2-large', which is no folder here, and HF_HUB_OFFLINE",
        "--folder a --metrics kid --reference a": "and HF_HUB_OFFLINE forbids downloads; download https://",
        "--folder a --metrics vendi --extractor inception-clean:x.pt": "there is no file x.pt",
        "--folder a --metrics vendi --use dinov2=inception-clean:y.pt": "there is no file y.pt",
        "--folder a --metrics vendi --use dinov2": "--use dinov2: write EXTRACTOR=EXTRACTOR, such as",
        "--folder photos": "photos was made for no protocol: choose a protocol by",
        "--folder a --metrics vendi --extractor open_clip:ViT/x": "open_clip needs the package open_clip: pip install",
        "--folder a --metrics vendi --extractor open_clip:local-dir:x": "there is no folder x",
        "--folder a --metrics hpsv2 accuracy": "a has no prompts (metadata.jsonl), which hpsv2 needs; accuracy: a has",
        "--folder a --metrics vendi --extractor hpsv2": "hpsv2 needs the weights of xswu/HPSv2 as safetensors",
    }
    code = """
import contextlib, importlib.util, io, json, sys
from eval import score
find = importlib.util.find_spec
for flags in json.loads(sys.argv[1]):
    missing = "open_clip" if "ViT/x" in flags else None
    importlib.util.find_spec = lambda name: None if name == missing else find(name)
    sys.argv, error = ["eval.score", *flags.split()], io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            score.main()
        except SystemExit as end:
            print(json.dumps([end.code, error.getvalue()]))
assert "torch" not in sys.modules
"""
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}", "DISTILL_CACHE": "cache", "HF_HOME": "hub"}
    command = [sys.executable, "-c", code, json.dumps([*cases])]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
    ends = map(json.loads, done.stdout.splitlines())
    for (flags, message), (status, error) in zip(cases.items(), ends, strict=True):
        assert status == 2 and message in error and error.count("\n") <= 3, (flags, error)
