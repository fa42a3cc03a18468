"""Conventions of folders, tables and tars: each gives the right caption to the right image, or names what is wrong."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from distill.data import Text, patterns
from distill.data.sources import pictures, prompts
from distill.method import Requirement

BOM = "\ufeff"


def png(level=0, size=(4, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "png")
    return file.getvalue()


def fill(folder, files):
    """Write files; a number stands for a grey image of that level."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(content) if isinstance(content, int) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def found(source, **options):
    """Caption -> level of its image."""
    read = pictures(source, **options)
    return {caption: int(np.array(read[i])[0, 0, 0]) for i, caption in enumerate(read.captions)}


@pytest.mark.parametrize(
    "name, content",
    (
        ("p.txt", f"{BOM}a fox\r\n\r\n  \r\na, b\r\n"),
        ("P.TXT", "a fox\na, b"),
        ("p.csv", f'{BOM}id,prompt\r\n1,a fox\r\n2,\r\n3,"a, b"\r\n'),
        ("p.tsv", "prompt\tid\na fox\t1\na, b\t2\n"),
        ("p.jsonl", f'{BOM}{{"text": "a fox"}}\r\n{{"text": null}}\r\n"a, b"\r\n'),
        ("p.json", f'{BOM}["a fox", "a, b"]'),
        ("q.json", '[{"text": "a fox"}, {"text": ["a, b"]}]'),
        ("r.json", '{"prompt": ["a fox", "a, b"], "id": [1, 2]}'),
        ("s.json", '{"text": "a fox"}\n{"text": "a, b"}\n'),
    ),
)
def test_prompts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert prompts(f"{tmp_path / name}") == ["a fox", "a, b"]


@pytest.mark.parametrize(
    "files",
    (
        {"a.png": 1, "b.png": 2, "metadata.csv": f'{BOM}file_name,text\na.png,"one, 1"\nb.png,two\n'},
        {"a.png": 1, "b.png": 2, "metadata.json": '[{"file_name": "a.png", "text": "one, 1"}, '
         '{"file_name": "./b.png", "text": "two"}]'},
        {"x/a.png": 1, "x/metadata.csv": 'file_name,text\na.png,"one, 1"\n', "y/s/cafe\u0301.png": 2,
         "y/metadata.jsonl": '{"file_name": "s\\\\caf\\u00e9.png", "text": "two"}', 
         "metadata.csv": "file_name,text\nx/a.png,no"},
        {"a.png": 1, "a.TXT": f"{BOM}one, 1\r\n", "b.PNG": 2, "b.caption": "two\n", "b.heic": "?"},
        {"a.png": 1, "a.txt": "one, 1", "a.caption": "no", "b.png": 2, "b.txt": "two", "._b.png": "junk",
         ".ipynb_checkpoints/b-checkpoint.png": 3, "__MACOSX/b.png": 3},
    ),
    ids=("csv", "json", "nested", "beside", "hidden"),
)  # fmt: skip
def test_folders(tmp_path, files):
    assert found(fill(tmp_path, files)) == {"one, 1": 1, "two": 2}


def test_links_and_parquet(tmp_path):
    """A linked folder; metadata.parquet; a folder of parquet with {bytes, path}; one split of a saved DatasetDict."""
    datasets = pytest.importorskip("datasets")
    source = fill(tmp_path / "real", {"a.png": 1, "b.png": 2})
    rows = {"file_name": ["b.png", "a.png"], "text": ["two", "one"]}
    datasets.Dataset.from_dict(rows).to_parquet(f"{source}/metadata.parquet")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to("../real")
    assert found(f"{tmp_path / 'home'}") == {"one": 1, "two": 2}
    (tmp_path / "linked" / "z").mkdir(parents=True)
    (tmp_path / "linked" / "z" / "a.png").write_bytes(png(3))
    (tmp_path / "linked" / "b").symlink_to("z")
    (tmp_path / "linked" / "metadata.csv").write_text("file_name,text\nz/a.png,three")  # it is read as b/a.png
    assert found(f"{tmp_path / 'linked'}") == {"three": 3}
    rows = {"text": ["one", "two"], "image": [{"bytes": png(i), "path": None} for i in (1, 2)]}
    table = datasets.Dataset.from_dict(rows)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(f"{tmp_path}/parquet/train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    decoded = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": decoded, "test": decoded}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"val": decoded, "test": decoded}).save_to_disk(tmp_path / "others")
    for name in ("parquet", "saved", "splits"):
        assert found(f"{tmp_path / name}") == {"one": 1, "two": 2}
    with pytest.raises(ValueError, match=r"has the splits \['test', 'val'\], and none is called train"):
        pictures(f"{tmp_path / 'others'}")
    numbers = datasets.Dataset.from_dict({"text": ["a", "b"], "image": [{"bytes": None, "path": None}, None]})
    numbers.save_to_disk(tmp_path / "empty")
    read = pictures(f"{tmp_path / 'empty'}")
    for i in range(2):
        with pytest.raises(ValueError, match=rf"empty\[{i}\] cannot be read: its cell is empty"):
            read[i]


def test_several_captions(tmp_path):
    """One is drawn, always the same; over many images all are."""
    files = {f"{i}.png": i for i in range(40)}
    lines = [json.dumps({"file_name": f"{i}.png", "text": [f"{i} a", f"{i} b"]}) for i in range(20)]
    lines += [json.dumps({"file_name": f"{i}.png", "text": f"{i} {x}"}) for i in range(20, 40) for x in "ab"]
    source = fill(tmp_path / "x", files | {"metadata.jsonl": "\n".join(lines)})
    first = pictures(source).captions
    os.rename(source, tmp_path / "y")
    assert first == pictures(f"{tmp_path / 'y'}").captions
    drawn = [caption.split()[1] for caption in first]
    assert 10 < drawn.count("a") < 30 and {*drawn} == {"a", "b"}
    assert {
        (name.rsplit("/")[-1], c.split()[0] + ".png") for name, c in zip(pictures(f"{tmp_path}/y").names, first)
    } == {(f"{i}.png",) * 2 for i in range(40)}


def test_what_is_not_read_is_counted(tmp_path):
    files = {"a.png": 1, "b.heic": "?", "c.HEIC": "?", "d.mov": "?", "a.txt": "one", "x.txt": "beside nothing"}
    rows = "".join(f"{name},x\n" for name in ("a.png", "gone.png", "sub/gone.png"))
    source = fill(tmp_path, files | {"metadata.csv": f"file_name,text\n{rows}"})
    with pytest.raises(
        ValueError, match=r"line 3 names 'gone.png'; .*, line 4 names .*/gone.png': the folder holds no "
    ):
        pictures(source)
    gone, unread = pictures(source, skip=True).notes
    assert unread.endswith("3 files skipped, of types that are not read: .heic (2), .mov (1)")
    assert "2 rows of metadata skipped: " in gone
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"holds no images\. .*\.heic \(2\), \.mov \(1\)"):
        pictures(f"{tmp_path}", skip=True)


@pytest.mark.parametrize(
    "files, message",
    (
        ({"metadata.jsonl": '["a.png", "x"]'}, r"metadata.jsonl, line 1: \['a.png', 'x'\] is not a row"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": 7}'}, "metadata.jsonl, line 1: 7 is not text"),
        ({"metadata.jsonl": '\n{"file_name": "a.png", "text": ["x", 7]}'}, "line 2"),
        ({"metadata.jsonl": '{"text": "x"}'}, r"line 1 has no file_name.*\['text'\]"),
        ({"metadata.jsonl": '{"file_name": "a.png"'}, "metadata.jsonl, line 1, is not JSON"),
        ({"metadata.csv": "file_name,words\na.png,x"}, "metadata.csv, line 2 has no column called text"),
        (
            {"metadata.csv": "file_name,text\nb.png,x"},
            "metadata.csv, line 2 names 'b.png': the folder holds no such visible",
        ),
        ({"metadata.csv": "file_name,text\na.png,"}, "image .*a.png has no caption: put .* or pass --skip_incomplete"),
        (
            {"metadata.csv": "file_name,text\na.png,x", "metadata.json": "[]"},
            "csv and .*metadata.json are in one folder",
        ),
        ({"a.txt": " \n"}, r"a.png \(its text is empty\) has no caption"),
        ({f"{i}.png": 1 for i in range(4)}, r"images .*/0.png, .*/1.png, .*/2.png and 2 more have no caption"),
        ({"metadata.parquet": "PAR1"}, "metadata.parquet cannot be read as a Parquet file"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "\\ud83d x"}'}, "line 1: .* holds half of a character"),
        ({"metadata.csv": "file_name,text\na.png,x".encode("utf-16")}, "metadata.csv is not text .* save it in UTF-8"),
        ({"metadata.json": '{"file_name": ["a.png"], "text": []}'}, "metadata.json has columns of several lengths"),
        ({"a.txt": "x" * 20_001}, "a.txt: a text of 20,001 characters; at most 20,000"),
    ),
)
def test_mistakes_of_folders(tmp_path, files, message):
    files = {name: text for name, text in files.items()}
    if "7]" in str(files):
        files["metadata.jsonl"] = files["metadata.jsonl"].replace('["x", 7]', "[7, 7]")
    with pytest.raises(ValueError, match=message):
        pictures(fill(tmp_path, {"a.png": 1} | files))


def test_tables_that_are_damaged_inside(tmp_path):
    """A column of strings that are no UTF-8; a file of more bytes than a table has."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends = pa.py_buffer(np.array([0, 2], dtype=np.int32).tobytes())
    words = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xff\xfe")])
    parquet.write_table(pa.table({"text": words}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet cannot be read as a Parquet file"):
        prompts(f"{tmp_path / 'p.parquet'}")
    for name in ("p.txt", "p.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**11)
        with pytest.raises(ValueError, match=f"{name} has 100,000,000,000 bytes; at most"):
            prompts(f"{tmp_path / name}")


def test_a_caption_that_is_a_pipe(tmp_path):
    source = fill(tmp_path, {"a.png": 1})
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is not a regular file"):
        pictures(source)
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="no prompts at"):
        prompts(f"{tmp_path / 'p.txt'}")


def tar(path, members, **options):
    with tarfile.open(path, "w", **options) as file:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def test_tars(tmp_path):
    """Suffixes in any case, a byte order mark, hidden members, a list of captions."""
    members = [("a/0.PNG", png(1)), ("a/0.TXT", f"{BOM}one".encode()), ("1.png", png(2))]
    members += [("1.json", f'{BOM}{{"caption": ["two"]}}'.encode()), ("._1.png", b"?"), ("2.heic", b"?")]
    source = tar(tmp_path / "S.TAR", members)
    assert found(source) == {"one": 1, "two": 2}
    with pytest.raises(ValueError, match="holds images: pass it as --images"):
        prompts(source)
    unread = f"{source}: 1 file skipped, of types that are not read: .heic (1)"
    assert pictures(source).notes == (unread,)
    link = tarfile.TarInfo("3.png")
    link.type, link.linkname = tarfile.SYMTYPE, "1.png"
    tar(source, [*members, ("3.png", link)])
    assert pictures(source).notes == (unread, f"{source}: 1 file skipped, links to others: 3.png")


def test_mistakes_of_tars(tmp_path):
    def fails(content, message):
        path = tmp_path / "s.tar"
        path.write_bytes(content) if isinstance(content, bytes) else tar(path, content)
        with pytest.raises(ValueError, match=message):
            pictures(f"{path}")

    good = [(f"{i}.png", png(i)) for i in range(3)] + [(f"{i}.txt", b"x") for i in range(3)]
    fails([*good, ("0.json", b"{bad")][0:1] + [("0.json", b"{bad")], "s.tar:0.png, its .json, is not JSON")
    fails([good[0], ("0.json", b"[1]")], "s.tar:0.png: its .json holds no object")
    fails([good[0], ("0.json", b'{"text": 7}')], "s.tar:0.png: 7 is not text")
    fails([good[0], ("0.txt", b"\xff")], "its member 0.txt is not text in UTF-8")
    fails([good[0], ("0.txt", bytes(2**20 + 1))], "0.txt has 1,048,577 bytes, too many for a caption")
    whole = open(tar(tmp_path / "whole.tar", good), "rb").read()
    fails(whole[:700], "not a complete, uncompressed tar")
    fails(whole[: 2 * 1024 - 100], "not a complete, uncompressed tar")
    fails(whole[:1024] + b"?" * 512 + whole[1536:], "no file begins at byte 1,024")
    sparse = tarfile.TarInfo("0.txt")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1",
                          "GNU.sparse.size": f"{2**40}", "GNU.sparse.realsize": f"{2**40}"}  # fmt: skip
    tar(tmp_path / "sparse.tar", [good[0], ("0.txt", sparse)], format=tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match="0.txt is sparse: write it with plain `tar`"):
        pictures(f"{tmp_path / 'sparse.tar'}")


def test_patterns(tmp_path):
    names = [path.name for path in patterns.expand("a/{0..1}-{08..10}.tar")]
    assert names == [f"{i}-{j:02}.tar" for i in (0, 1) for j in (8, 9, 10)]
    for name, n in (("a/{0..999999999}.tar", "1,000,000,000"), ("a/{0..999}{0..999}.tar", "1,000,000")):
        with pytest.raises(ValueError, match=f"stands for {n} files; at most 100,000"):
            patterns.expand(name)
    with pytest.raises(ValueError, match="no tar at"):
        pictures(f"{tmp_path}/{{5..1}}.tar")


def test_patterns_of_tables_tars_and_folders(tmp_path):
    """Lists, ranges and wildcards, in the order of the pattern; a name that exists is no pattern."""
    files = {"p1.txt": "a\nb", "p2.txt": "c", ".p3.txt": "no", "x[1]/a.png": 4, "x[1]/a.txt": "four"}
    files |= {f"{name}/a.png": i for i, name in enumerate(("cats", "dogs", "eels"))}
    files |= {f"{name}/a.txt": name for name in ("cats", "dogs", "eels")}
    root = fill(tmp_path, files)
    assert prompts(f"{root}/p?.txt") == ["a", "b", "c"] and prompts(f"{root}/p{{2,1}}.txt") == ["c", "a", "b"]
    assert pictures(f"{root}/{{dogs,cats}}").captions == ["dogs", "cats"]
    assert found(f"{root}/[c-e]*s") == {"cats": 0, "dogs": 1, "eels": 2}
    assert found(f"{root}/x[1]") == {"four": 4}
    tar(tmp_path / "s1.tar", [("0.png", png(1)), ("0.txt", b"one")])
    tar(tmp_path / "s2.TAR", [("0.png", png(2)), ("0.txt", b"two")])
    assert found(f"{root}/{{s2.TAR,s1.tar}}") == found(f"{root}/s?.[tT]*") == {"one": 1, "two": 2}
    for name, message in (("q?.txt", "no prompts at"), ("nothing*", "fits no file and no folder"),
                          ("cats/*.png", "fits images, such as .*a.png: give their folder"),
                          ("{s1.tar,p1.txt}", "fits 2 files, such as .*s1.tar: a pattern .* of one kind")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pictures(f"{root}/{name}")


def test_incomplete_images_are_left_out(tmp_path, capsys):
    """The order of the others stays, stderr counts what is left out; a limit counts what is kept."""
    files = {f"{i}.png": i for i in range(6)} | {f"{i}.txt": f"t{i}" for i in (0, 2, 4, 5)} | {"3.txt": ""}
    source = fill(tmp_path, files | {"metadata.jsonl": '{"file_name": "9.png", "text": "x"}'})
    assert found(source, skip=True) == {f"t{i}": i for i in (0, 2, 4, 5)}
    assert pictures(source, skip=True, limit=2).captions == ["t0", "t2"]
    data = Text("online", images=source, skip_incomplete=True)
    data.validate((Requirement.REAL,))
    assert len(data.sources[1]) == 4
    error = capsys.readouterr().err
    assert "1 row of metadata skipped: " in error and "2 images without a caption skipped: " in error
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "5.png").unlink()
    (tmp_path / "5.png").symlink_to("gone.png")
    with pytest.raises(
        ValueError, match=r"4.png cannot be read: the file is empty; image .*5.png .*no such file: .*--skip_broken"
    ):
        Text("online", images=source, skip_incomplete=True).validate((Requirement.REAL,))


def test_imagefolder_of_datasets_reads_the_same(tmp_path):
    """Metadata in two subfolders, ./ in a name, a suffix in capitals, a hidden file and a hidden folder."""
    datasets = pytest.importorskip("datasets")
    files = {"x/a.PNG": 1, "x/metadata.csv": 'file_name,text\na.PNG,"one, 1"\n', "y/s/b.png": 2, ".d.png": 4}
    files |= {"y/metadata.csv": "file_name,text\n./s/b.png,two\n", "y/.hidden/c.png": 3}
    source = fill(tmp_path / "images", files)
    theirs = datasets.load_dataset("imagefolder", data_dir=source, split="train", cache_dir=f"{tmp_path / 'cache'}")
    assert found(source) == {row["text"]: int(np.array(row["image"])[0, 0, 0]) for row in theirs}
