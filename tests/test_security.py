"""Malicious inputs: nothing of them is executed, nothing is written outside, and each ends in one message."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zlib

import pytest
import torch

from distill.configuration import fail
from distill.data.sources import UnreadableImage, pictures, prompts
from distill.files import read_yaml
from distill.training import checkpoint
from eval.images import images
from eval.leaderboard.page import build_html_page
from pipelines import load
from pipelines.components import locate_pipeline
from pipelines.export import hub
from pipelines.export.folder import check_replaceable
from pipelines.export.single_files import file_name
from pipelines.families import tiny
from pipelines.inference.experts import gather_students, read_routes
from recipes import train

ESCAPE = "\x1b]0;owned\x07\x9b31m\u202e"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def canary(tmp_path):
    """What a payload would make, were it executed."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (f"{self.canary}",)


def code(canary):
    return f"import os\nos.mkdir({str(canary)!r})\nclass Evil:\n    pass\n"


def test_the_payloads_work(tmp_path):
    """Else the rest would show nothing."""
    with pytest.raises(FileExistsError):
        for _ in range(2):
            pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    (tmp_path / "canary").rmdir()
    exec(code(tmp_path / "canary"))
    assert (tmp_path / "canary").is_dir()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "pipeline"
    tiny.save("sd", folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "teacher")


def edited(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "kind", ("named safetensors", "a .bin", "a .bin in an index", "a file elsewhere in an index", "huge header")
)
def test_weights_of_a_teacher(folder, canary, kind):
    """Also as what a student starts from."""
    evil = pickle.dumps({"weight": Payload(canary)})
    weights = folder / WEIGHTS
    if kind == "named safetensors":
        weights.write_bytes(evil)
    elif kind == "huge header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + b"{" * 1000)
    else:
        weights.unlink()
        name = "diffusion_pytorch_model.bin"
        torch.save({"weight": Payload(canary)}, folder / "unet" / name)
        if kind != "a .bin":
            names = (name, name) if kind == "a .bin in an index" else (f"../unet/{name}", f"{folder}/unet/{name}")
            index = {"metadata": {}, "weight_map": dict(zip(("conv_in.weight", "conv_in.bias"), names, strict=True))}
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unet .*cannot be read|in \.bin files only|student\.init|damaged"):
        load(folder)
    net = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"student\.init|damaged"):
        checkpoint.load_initial_weights(net, folder, "student", net)
    if kind == "named safetensors":
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load_initial_weights(net, weights, "student", net)


@pytest.mark.parametrize("name", ("student", "ema", "optimizer_student"))
def test_a_checkpoint(tmp_path, canary, name):
    """A pickle whose size and checksum are told rightly."""
    from accelerate import Accelerator
    from test_trainer import METHODS, config, nets_of, vectors

    from distill.training.loop import train

    (state,) = train(METHODS["sid"], nets_of(METHODS["sid"]), vectors, config(max_train_steps=1), Accelerator(cpu=True))
    saved = checkpoint.save(state, tmp_path)
    assert checkpoint.find_corruption(saved) is None
    file = saved / f"{name}.safetensors"
    assert file.is_file()
    file.write_bytes(pickle.dumps(Payload(canary)))
    facts = json.loads((saved / "state.json").read_text())
    facts["files"][file.name] = [file.stat().st_size, *[d for f, d in checkpoint.integrity.digests([file])]]
    (saved / "state.json").write_text(json.dumps(facts))
    assert checkpoint.find_corruption(saved) is None
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(state, saved)


def test_code_in_a_pipeline(folder, canary):
    """A module of the repository's own, a pipeline of its own, transformers' auto_map."""
    for name in ("evil.py", "pipeline.py", "text_encoder/evil.py", "unet/evil.py", "text_encoder/modeling_evil.py"):
        (folder / name).write_text(code(canary))
    auto = {"auto_map": {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}}
    edited(folder / "text_encoder" / "config.json", **auto)
    load(folder).encode(["a fox"])
    index = folder / "model_index.json"
    whole = json.loads(index.read_text())
    wrong = [{part: ["evil", "Evil"]} for part in ("text_encoder", "unet", "vae", "scheduler", "new")]
    wrong += [{"_class_name": ["evil", "EvilPipeline"]}, {"_class_name": "EvilPipeline"}]
    wrong += [{"unet": ["diffusers", "utils.os"]}, {"unet": ["os", "mkdir"]}, {"unet": [1, 2]}]
    for one in wrong:
        index.write_text(json.dumps(whole | one))
        with pytest.raises(ValueError):
            load(locate_pipeline(f"{folder}")).encode(["a fox"])


@pytest.mark.parametrize("name", ("../outside", "/tmp/outside", "a/b", "..", "", "a\\b", ESCAPE))
def test_names_that_climb(folder, tmp_path, name):
    """Of components, of files, of repositories: before anything is written."""
    if name != "..":
        with pytest.raises(ValueError):
            file_name(name, 1, "unet")
    if name != "a/b":
        with pytest.raises(ValueError):
            hub.create_repository(name)
    edited(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ValueError, match="model_index.json"):
        locate_pipeline(f"{folder}")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


HOSTILE = {  # text of a state.json: words of the message
    '{"step": "../../x", "files": {}}': "its step is '../../x'",
    '{"step": -1}': "its step is -1",
    '{"step": true}': "its step is True",
    '{"step": 1.5}': "its step is 1.5",
    '{"step": 99999999999}': "its step is 99999999999",
    '{"step": 3, "skipped": {"student": "x"}}': "its skipped is {'student': 'x'}",
    '{"step": 3, "files": ["student.safetensors"]}': "its files are ['student.safetensors']",
    '{"step": 3, "files": {"/dev/zero": [0, "0"]}}': "it lists the file '/dev/zero'",
    '{"step": 3, "files": {"../a.safetensors": [0, "0"]}}': "it lists the file '../a.safetensors'",
    '{"step": 3, "files": {"a/../../b.safetensors": [0, "0"]}}': "it lists the file 'a/../../b.safetensors'",
    '{"step": 3, "files": {"ema.safetensors": ["0", "0"]}}': "it lists the file 'ema.safetensors'",
    '{"step": 3, "files": {"zero.safetensors": [0, "0"]}}': "zero.safetensors is not a regular file",
    '{"step": 3, "files": {"pipe.safetensors": [0, "0"]}}': "pipe.safetensors is not a regular file",
    '{"step": 3}': "pipe.safetensors is not a regular file",  # as of before there were checksums
    "[" * 100_000: "is not JSON",
    '{"step": ' + "9" * 5000 + "}": "is not JSON",
    "[3]": "it is not a JSON object",
    "": "is not JSON",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_state_that_leads_elsewhere(text, tmp_path, capsys):
    """A device, a pipe, a path that climbs, nesting without end: the checkpoint is skipped at once and named."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "state.json").write_text(text)
    assert HOSTILE[text] in checkpoint.find_corruption(folder)
    assert checkpoint.list_intact_checkpoints(tmp_path) == [] and f"{folder} is skipped: " in capsys.readouterr().err


def test_a_state_that_is_no_file(tmp_path):
    for name, target in (("checkpoint-1", "/dev/zero"), ("checkpoint-2", None)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "state.json"
        path.symlink_to(target) if target else os.mkfifo(path)
        assert "state.json is not a regular file" in checkpoint.find_corruption(tmp_path / name)


def test_an_index_of_shards_that_is_none(tmp_path):
    """What a student starts from: no table, no names, names that are no texts."""
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for text in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "{", "[" * 9999):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            checkpoint.weight_files(tmp_path, "student")


def png(width, height):
    """A picture that is small on disk only."""
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b"")


def test_a_tar(tmp_path, canary):
    """Names that climb, links, devices and pipes: only regular files are read, in place; nothing is extracted."""
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("../../outside", f"{canary}", "good"):
            for suffix, data in ((".png", png(4, 4)), (".txt", b"a fox")):
                entry = tarfile.TarInfo(name + suffix)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            entry = tarfile.TarInfo(f"odd{i}.png")
            entry.type, entry.linkname = kind, f"{tmp_path}/secret.txt"
            tar.addfile(entry)
            entry.name = "good.txt" if kind == tarfile.SYMTYPE else f"odd{i}.txt"
            tar.addfile(entry)
    before = sorted(path.name for path in tmp_path.iterdir())
    found = pictures(f"{tmp_path / 'shard.tar'}")
    assert len(found) == 3 and set(found.captions) == {"a fox"}
    assert [found[i].size for i in range(3)] == [(4, 4)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (tmp_path.parent.parent / "outside.png").exists()


def test_a_bomb_among_images(tmp_path):
    """A gigapixel of 100 bytes is one message, wherever images are read."""
    (tmp_path / "000000.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "000000.txt").write_text("a fox")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        pictures(f"{tmp_path}")[0]
    with pytest.raises(ValueError, match="decompression bomb"):
        images.read_levels(tmp_path / "000000.png")


def test_prompts(tmp_path, capsys):
    """Control characters stay data; in a message they cannot steer the terminal. A megabyte is no prompt."""
    (tmp_path / "prompts.txt").write_text(f"{ESCAPE}\n{SCRIPT}\n", newline="\n")
    assert prompts(f"{tmp_path / 'prompts.txt'}") == [ESCAPE, SCRIPT]
    (tmp_path / "long.txt").write_text("a\n" + "fox " * 250_000)
    with pytest.raises(ValueError, match="long.txt, line 2: a text of 999,999 characters; at most 20,000 are read"):
        prompts(f"{tmp_path / 'long.txt'}")
    with pytest.raises(SystemExit):
        fail(f"prompt {ESCAPE} is wrong\nsecond line")
    told = capsys.readouterr().err
    assert "owned" in told and told.endswith(" is wrong\nsecond line\n")
    assert not [c for c in told if not (c.isprintable() or c == "\n")]


def test_a_page(tmp_path):
    """Every text of a row reaches the page escaped, one board or several."""

    def row(protocol):
        texts = ("model", "kind", "scheduler", "protocol_hash", "extractor", "extractor_hash", "device", "weights")
        metric = {"value": 1.0, "low": 0.5, "high": 2.0, "n": 10}
        facts = {"steps": 1, "nfe": 1, "n": 10, "guidance": 1.0, "seed": 0, "settings": {SCRIPT: SCRIPT}}
        return (
            {key: SCRIPT for key in texts} | facts | {"protocol": protocol, "metrics": {SCRIPT: metric, "fid": metric}}
        )

    rows = [row(SCRIPT), row(f"{SCRIPT}2")]
    for some in (rows[:1], rows):
        made = build_html_page(some, title=SCRIPT, lead=SCRIPT, failed={SCRIPT: SCRIPT})
        assert SCRIPT not in made and "&lt;script&gt;" in made
        assert len(re.findall("<script", made)) == 1


def unfolding(item, join):
    """Ten aliases of ten aliases of ...: 10^10 characters in a kilobyte."""
    rows = [f"a: &a {item}"]
    rows += [
        f"{name}: &{name} {join(','.join([f'*{before}'] * 10))}" for before, name in zip("abcdefghij", "bcdefghijk")
    ]
    return "\n".join(rows)


YAMLS = {  # text: words of the message
    "seed: !!python/object/apply:os.mkdir [CANARY]": "is not YAML: could not determine a constructor",
    "seed: !!python/object/new:os.mkdir [CANARY]": "is not YAML: could not determine a constructor",
    unfolding("[x, x]", "[{}]".format): "its aliases stand for more than 1,048,576 characters",
    unfolding("{x: 1}", "{{<<: [{}]}}".format): "its aliases stand for more than 1,048,576 characters",
    "a: &a [*a]": "an alias holds itself, line 1",
    "seed: &a {b: *a}": "an alias holds itself, line 1",
    "[" * 20_000: "is not YAML: maximum recursion depth exceeded",
    "seed: 0x" + "f" * 5000: "digits",
    "#" * 300_000: "has more than 262,144 bytes",
    "help: true": "there is no --help",
    "tyro-write-completion: [bash, CANARY]": "there is no --tyro-write-completion",
    '"": 5': "there is no --;",
    "sed: 5": "there is no --sed; --seed is the nearest",
    "seed: {}": "seed is {}; it must be one value",
    "method: {phases: 4}": "no --method.phases any more: the phases of PCM are the student's calls, --student.steps or",
}


@pytest.mark.parametrize("text", YAMLS, ids=range(len(YAMLS)))
def test_yaml(text, tmp_path, canary, capsys):
    """In --config: no tag of Python's, no aliases without end, no flag that is not the recipe's."""
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("CANARY", f"{canary}") + "\n")
    with pytest.raises(SystemExit) as end:
        train.main(
            ["--method", "dmd2", "--teacher", "digits", "--config", f"{file}", "--output_dir", f"{tmp_path / 'out'}"]
        )
    assert end.value.code == 2 and YAMLS[text] in capsys.readouterr().err


def test_aliases_that_end(tmp_path):
    """They are values as any others."""
    (tmp_path / "board.yaml").write_text("a: &a [1, 2]\nb: *a\nc: &c {x: *a}\nd: {<<: *c, y: 3}\n")
    found = read_yaml(tmp_path / "board.yaml")
    assert found == {"a": [1, 2], "b": [1, 2], "c": {"x": [1, 2]}, "d": {"x": [1, 2], "y": 3}}


@pytest.mark.parametrize(
    "text, match",
    (
        ("[]", "holds no object"),
        ("{", "is damaged"),
        ('{"null_class": "x"}', 'null_class is "x"; it must be a label'),
        ('{"null_class": 11}', "null_class is 11, and the network knows the labels 0 .. 10"),
        ('{"c_noise": NaN}', "c_noise is NaN; it must be a number above 0"),
        ('{"student": true}', "says no steps of its student"),
    ),
)
def test_what_lies_beside_a_pipeline(text, match, tmp_path):
    """Of a teacher a message; where an export is to be written, it is no earlier one."""
    tiny.save("edm", tmp_path / "edm")
    (tmp_path / "edm" / "distill.json").write_text(text)
    with pytest.raises(ValueError, match=rf"distill\.json.*{match}"):
        load(tmp_path / "edm")
    if "student" not in text:
        with pytest.raises(ValueError, match="is not an earlier export"):
            check_replaceable(tmp_path / "edm")


def test_routes_of_experts(tmp_path):
    for text in ("[]", "{", '{"by": "timestep"}', '{"by": "timestep", "bounds": [1, 2]}',
                 '{"by": "class_labels", "classes": [[1], ["x"]]}'):  # fmt: skip
        (tmp_path / "experts.json").write_text(text)
        with pytest.raises(ValueError, match="experts.json is damaged"):
            read_routes(tmp_path / "experts.json")
    (tmp_path / "experts.json").write_text('{"by": "timestep", "bounds": [2, 1]}')
    assert read_routes(tmp_path / "experts.json")["bounds"] == [2, 1]


def test_students_of_damaged_configurations(tmp_path):
    """Nothing is written."""
    tiny.save("edm", tmp_path / "a")
    for config in ("a: [1", "data: {classes: 3}", "data: {classes: [a]}", "[1]"):
        (tmp_path / "a" / "distill.json").write_text(json.dumps({"student": True, "steps": 1, "config": config}))
        with pytest.raises(ValueError, match="a/distill.json holds"):
            gather_students([tmp_path / "a", tmp_path / "a"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
