"""A disk that is full or read-only, and outputs that cannot be written: one message, and nothing half-written."""

import errno
import json
import re
import resource
import sys
from contextlib import contextmanager
from functools import partial

import edm_reference
import pytest
import torch
from rows import row

from eval import files
from eval.cli import run
from eval.features.extraction import extract
from eval.features.extractors import load
from eval.images import images as folders
from eval.leaderboard.commands import build_page
from eval.sampling import image_set as generating
from eval.score import score_folders
from pipelines import run as training
from pipelines.cache import encodings
from pipelines.export import edm_convert
from pipelines.families import edm
from recipes.digits import TABLE


@contextmanager
def room(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, free[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dmd2" / "pipeline"
    torch.manual_seed(0)
    edm.pipeline(edm.unet((8, 16)), 0.5, 2.5, 2).save_pretrained(folder)
    (folder / "distill.json").write_text(json.dumps({"student": True, "steps": 2}))
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a stage with flags, in so much room -> (exit code, stderr); no hidden file is left."""
    monkeypatch.setenv("DISTILL_CACHE", f"{tmp_path / 'cache'}")
    load.cache_clear()

    def stage(what, *flags, size=None):
        monkeypatch.setattr(sys, "argv", ["stage", *map(str, flags)])
        code = 0
        try:
            with room(resource.RLIM_INFINITY if size is None else size):
                run(what)
        except SystemExit as ended:
            code = ended.code
        assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
        return code, capsys.readouterr().err

    return stage


def sampling(given: generating.Sampling) -> None:
    generating.generate_images(given)


def is_message(code, told):
    return code == 2 and "error: " in told and "the disk is full" in told and "free some space" in told


def test_generate(student, tmp_path, command):
    """Also in the middle of the images: what is there is whole, and the command goes on."""
    flags = ("--model", student, "--n", 12, "--classes", 10, "--out")
    whole = generating.generate(student, tmp_path / "whole", n=12, classes=10)
    for size in (20, 500):
        out = tmp_path / f"{size}"
        code, told = command(sampling, *flags, out, size=size)
        assert is_message(code, told) and not out.exists(), told
    real, out = folders.save_image, tmp_path / "out"

    def save(folder, i, level):
        with room(20 if i == 5 and "full" in marks else resource.RLIM_INFINITY):
            real(folder, i, level)

    marks = ["full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "save_image", save)
        assert is_message(*command(sampling, *flags, out))
        assert [file.name for file in sorted(out.glob("*"))] == [f"{i:06d}.png" for i in range(5)] + ["manifest.json"]
        marks.clear()
        assert command(sampling, *flags, out)[0] == 0
    assert folders.read_manifest(out)["hash"] == whole["hash"] and whole["model"] == "dmd2"


def test_features_scores_and_the_page(tmp_path, command):
    folders.write_folder(tmp_path / "a", torch.rand(20, 3, 8, 8) * 2 - 1)
    assert is_message(*command(extract, "--folder", tmp_path / "a", "--extractor", "random", size=1000))
    flags = ("--folder", tmp_path / "a", "--metrics", "vendi", "--extractor", "random", "--out", tmp_path / "rows.json")
    assert is_message(*command(score_folders, *flags, size=1000)) and not (tmp_path / "rows.json").exists()
    assert command(score_folders, *flags)[0] == 0
    before = (tmp_path / "rows.json").read_text()
    assert is_message(*command(score_folders, *flags, size=100))
    assert (tmp_path / "rows.json").read_text() == before, "the old rows stay"
    files.write_json(tmp_path / "many.json", [row(f"{i}", 1.0 + i) for i in range(9)])
    made = ("--out", tmp_path / "board")
    assert is_message(
        *command({"page": build_page, "other": score_folders}, "page", tmp_path / "many.json", *made, size=1000)
    )
    assert not list((tmp_path / "board").iterdir())


def test_edm_convert(tmp_path, capsys):
    """A full disk leaves no folder; one that cannot be written is refused before the file is read."""
    torch.manual_seed(0)
    file = edm_reference.dump(edm_reference.song(label_dim=0, blocks=1), tmp_path / "net.pkl")
    for folder, size, why in ((tmp_path / "out", 5000, "the disk is full"), (file / "out", None, "Not a directory")):
        with room(resource.RLIM_INFINITY if size is None else size), pytest.raises(SystemExit) as ended:
            edm_convert.main([f"{file}", f"{folder}"])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and why in told and "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["net.pkl"]


@pytest.mark.parametrize("number, why", [(errno.EROFS, "read-only"), (errno.ENOSPC, "full"), (errno.EACCES, "denied")])
def test_other_reasons(number, why, tmp_path, command, monkeypatch):
    def refuse(*_):
        raise OSError(number, "refused", f"{tmp_path / 'x'}")

    monkeypatch.setattr(files.os, "replace", refuse)
    (tmp_path / "rows.json").write_text(json.dumps([row("a", 1.0)]))
    code, told = command(
        {"page": build_page, "x": score_folders}, "page", tmp_path / "rows.json", "--out", tmp_path / "board"
    )
    assert code == 2 and why in told and "Traceback" not in told and "run the same command again" in told


def test_outputs_are_checked_before_the_work(student, tmp_path, command):
    """A folder where a file goes, a file where a folder goes, a file among the parents, a pipe."""
    folders.write_folder(tmp_path / "a", torch.zeros(3, 1, 8, 8))
    (tmp_path / "file").touch()
    score = ("--folder", tmp_path / "a", "--metrics", "vendi", "--extractor", "random", "--out")
    sample = ("--model", student, "--n", 2, "--out")
    for what, flags, out, match in (
        (score_folders, score, "a", "which is a folder; name a file"),
        (score_folders, score, "file/rows.json", "is a file; name a file inside a folder"),
        (sampling, sample, "file", "which is a file; name a folder"),
        (sampling, sample, "file/images", "is a file; name a folder inside a folder"),
        (sampling, (*sample, tmp_path / "new", "--cost"), "a", "cost is .*, which is a folder"),
    ):
        code, told = command(what, *flags, tmp_path / out)
        assert code == 2 and re.search(match, told), told
    assert {path.name for path in tmp_path.iterdir()} == {"a", "file"}


@pytest.mark.parametrize(
    "error",
    (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[...] can't allocate memory: 9 bytes"),
    ),
    ids=("Python", "a GPU", "the CPU"),
)
def test_a_lack_of_memory(error, student, tmp_path, command, monkeypatch, capsys):
    """One message in evaluation, training and encoding; no folder is left. Another RuntimeError keeps its traceback."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(generating.Sampling, "sampler", fails)
    code, told = command(sampling, "--model", student, "--n", 2, "--out", tmp_path / "out")
    assert code == 2 and "error: there is not enough memory" in told and not (tmp_path / "out").exists()
    monkeypatch.setattr(training, "validate_run", fails)
    monkeypatch.setattr(encodings, "run", fails)
    for main in (partial(training.main, TABLE["sid"].config), encodings.main):
        with pytest.raises(SystemExit) as end:
            main(["--output_dir", f"{tmp_path / 'run'}"])
        assert end.value.code == 2 and "error: there is not enough memory" in capsys.readouterr().err
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        encodings.main([])
