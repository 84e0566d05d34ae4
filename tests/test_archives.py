"""Split archives: joined, checked and unpacked as GNU tar would, and nothing else."""

import filecmp
import gc
import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from decur_core.data import archives
from decur_core.data.archives import PUBLISHED, unpack
from decur_core.data.raster import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURES = SHARED / "torchgeo_fixtures"
ARCHIVES = {
    "ssl4eo_s12": ("s1_grd.tar.gz.part*", "s2_l1c.tar.gz.part*", "s2_l2a.tar.gz.part*"),
    "bigearthnet_v1": ("BigEarthNet-S1-v1.0.tar.gz", "BigEarthNet-S2-v1.0.tar.gz"),
    "bigearthnet_v2": ("BigEarthNet-S1.tar.gz*", "BigEarthNet-S2.tar.gz*", "Reference_Maps.tar.gz*"),
    "geonrw": ("nrw_dataset.tar.gz",),
}
needs_samples = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} with the sample archives is missing")


def files(root: Path) -> dict[str, str]:
    """Digests of all files below a folder."""
    found = (p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def tar(members: dict) -> bytes:
    """A .tar.gz of {name: bytes or TarInfo}."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as made:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            body = content if isinstance(content, bytes) else b""
            member.size = len(body)
            made.addfile(member, io.BytesIO(body))
    return raw.getvalue()


def split(folder: Path, data: bytes, *, count=3, form="a.tar.gz.part{}") -> list[Path]:
    """The archive in parts aa, ab, …"""
    folder.mkdir(exist_ok=True)
    step, made = -(-len(data) // count), []
    for i in range(count):
        made.append(folder / form.format("a" + "abcdefgh"[i]))
        made[-1].write_bytes(data[i * step : (i + 1) * step])
    return made


TREE = {f"s1/{i:03d}/{band}.tif": bytes([i]) * (5000 + i) for i in range(20) for band in ("VV", "VH")}


def run(parts, target, **settings):
    return unpack(parts, target, progress=False, **settings)


@needs_samples
@pytest.mark.parametrize("name", ARCHIVES)
def test_published_archives_unpack_to_the_published_trees(name, tmp_path):
    written = 0
    for pattern in ARCHIVES[name]:
        parts = list((FIXTURES / "_archives" / name).glob(pattern))
        written += run(parts[::-1], tmp_path)
    found, expected = files(tmp_path), files(FIXTURES / name)
    assert len(found) == written > 0
    assert found == {path: digest for path, digest in expected.items() if path in found}
    lists = set(expected) - set(found)  # what is not in an archive: lists of splits
    assert all(Path(path).suffix in (".csv", ".parquet") for path in lists)


def test_the_result_is_that_of_tar(tmp_path):
    parts = split(tmp_path / "in", tar(TREE))
    assert run(parts, tmp_path / "ours") == 40
    (tmp_path / "theirs").mkdir()
    subprocess.run(f"cat in/a.tar.gz.part* | tar xz -C {tmp_path / 'theirs'}", shell=True, cwd=tmp_path, check=True)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs") != {}
    assert not filecmp.dircmp(tmp_path / "ours", tmp_path / "theirs").diff_files


def test_an_interrupted_unpacking_goes_on(tmp_path):
    parts = split(tmp_path / "in", tar(TREE))
    run(parts, tmp_path / "whole")
    run(parts, tmp_path / "out")
    kept, cut, gone = (tmp_path / "out" / name for name in list(TREE)[:3])
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    kept.touch()
    touched = kept.stat().st_mtime_ns
    assert run(parts, tmp_path / "out") == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole") and before[1] == kept.stat().st_ino
    assert kept.stat().st_mtime_ns == touched
    assert run(parts, tmp_path / "out") == 0


def test_nothing_is_written_before_every_md5_agrees(tmp_path):
    parts = split(tmp_path / "in", tar(TREE))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in parts}
    assert run(parts, tmp_path / "good", md5=md5) == 40
    data = bytearray(parts[1].read_bytes())
    data[100] ^= 1
    parts[1].write_bytes(data)
    found = hashlib.md5(data).hexdigest()
    with pytest.raises(DataError, match=rf"a\.tar\.gz\.partab: md5 {found}, expected {md5['a.tar.gz.partab']}"):
        run(parts, tmp_path / "bad", md5=md5)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("form", ["a.tar.gz.part{}", "a.tar.gz{}"])
def test_missing_parts_are_named(tmp_path, form):
    parts = split(tmp_path / "in", tar(TREE), form=form)
    with pytest.raises(DataError, match=rf"{parts[1].name} missing; found {parts[0].name}, {parts[2].name}"):
        run([parts[0], parts[2]], tmp_path / "out")
    with pytest.raises(DataError, match=f"{parts[0].name} missing"):
        run(parts[1:], tmp_path / "out")
    with pytest.raises(DataError, match=f"{parts[2].name} missing"):
        run(parts[:2], tmp_path / "out", md5=dict.fromkeys([p.name for p in parts], ""))
    with pytest.raises(DataError, match=f"{form.format('ad')} missing"):
        run([*parts, parts[0].with_name(form.format("ad"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="damaged, or the last part is missing"):
        run(parts[:2], tmp_path / "out")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="data.zip: expected NAME.tar.gz"):
        run([tmp_path / "data.zip"], tmp_path)
    with pytest.raises(DataError, match="parts of one archive, found 2: a.tar.gz.part, b.tar.gz"):
        run([tmp_path / "a.tar.gz.partaa", tmp_path / "b.tar.gzaa"], tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="a.tar.gz: damaged"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")


def test_damage_behind_the_last_member_is_noticed(tmp_path):
    data = bytearray(tar({"a.txt": b"content"}))
    data[-6] ^= 1  # the checksum of the whole
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")


@pytest.mark.parametrize("cut", [1024, 1100, 2048])  # before and within the second header, and before the end mark
def test_an_archive_that_was_cut_before_it_was_packed_is_noticed(tmp_path, cut):
    whole = gzip.decompress(tar({"a.txt": b"content", "b.txt": b"content"}))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole[:cut]))
    with pytest.raises(DataError, match="a.tar.gz: damaged"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")


def test_a_damaged_header_is_not_the_end(tmp_path):
    whole = bytearray(gzip.decompress(tar({"a.txt": b"content", "b.txt": b"content"})))
    whole[1024:1030] = b"x" * 6
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="a.tar.gz: damaged.*checksum"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")


def test_archives_of_one_name_are_not_taken_for_parts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar.gz").write_bytes(tar({f"{name}.txt": b"content"}))
    with pytest.raises(DataError, match="x.tar.gz: 2 files, but 1 name"):
        run(tmp_path.glob("*/x.tar.gz"), tmp_path / "out")
    with pytest.raises(DataError, match="nothing.tar.gz missing"):
        run([tmp_path / "nothing.tar.gz"], tmp_path / "out")


def link(kind: bytes, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, to
    return member


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../out.txt", b"x"),
        ("s1/../../out.txt", b"x"),
        ("/tmp/absolute.txt", b"x"),
        ("s1/link", link(tarfile.SYMTYPE, "../../secret")),
        ("s1/link", link(tarfile.SYMTYPE, "/etc/passwd")),
        ("s1/link", link(tarfile.LNKTYPE, "../secret")),
        ("s1/pipe", link(tarfile.FIFOTYPE, "")),
    ],
)
def test_members_that_leave_the_target_are_refused(tmp_path, name, content):
    (tmp_path / "a.tar.gz").write_bytes(tar({"s1/good.txt": b"x", name: content, "s1/late.txt": b"x"}))
    with pytest.raises(DataError, match=f"^{name}: refused, it would leave .*/inner"):
        run([tmp_path / "a.tar.gz"], tmp_path / "inner")
    assert set(files(tmp_path)) == {"a.tar.gz", "inner/s1/good.txt"}


def test_links_within_the_target_are_kept(tmp_path):
    content = {
        "s1/a.txt": b"x",
        "s1/b.txt": link(tarfile.SYMTYPE, "a.txt"),
        "s1/c.txt": link(tarfile.LNKTYPE, "s1/a.txt"),
    }
    (tmp_path / "a.tar.gz").write_bytes(tar(content))
    for _ in range(2):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")
        assert (tmp_path / "out/s1/b.txt").read_bytes() == (tmp_path / "out/s1/c.txt").read_bytes() == b"x"


def test_memory_does_not_grow_with_the_number_of_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_BLOCK", 2**14)
    peaks = []
    for count in (200, 2200):
        path = tmp_path / f"{count}.tar.gz"
        path.write_bytes(tar({f"{i}.txt": b"" for i in range(count)}))
        gc.collect()  # what other tests left
        tracemalloc.start()
        run([path], tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2000 * 100  # remembered members take several hundred bytes each


def test_published_digests():
    assert PUBLISHED["s1_grd.tar.gz.partaa"] == "6df278053fc3e4c3fd7de2f77856e606" and "data.zip" not in PUBLISHED
    kinds = [
        ("s1_grd.tar.gz.part", 10),
        ("s2_l1c.tar.gz.part", 12),
        ("s2_l2a.tar.gz.part", 12),
        ("BigEarthNet-S1.tar.gz", 2),
    ]
    for archive, count in kinds:
        assert sum(name.startswith(archive) for name in PUBLISHED) == count
    assert all(len(d) == 32 and set(d) <= set("0123456789abcdef") for d in PUBLISHED.values())
    assert len(set(PUBLISHED.values())) == len(PUBLISHED) == 42


@pytest.mark.skipif(not (SHARED / "LAYOUTS.md").is_file(), reason="the list of published digests is missing")
def test_digests_are_those_of_the_list():
    text = (SHARED / "LAYOUTS.md").read_text()
    assert all(digest in text for digest in PUBLISHED.values())
    for name in (
        "BigEarthNet-S1-v1.0.tar.gz",
        "BigEarthNet-S2-v1.0.tar.gz",
        "nrw_dataset.tar.gz",
        "Reference_Maps.tar.gzaa",
    ):
        assert PUBLISHED[name] in text.split(name, 1)[1][:60]


def test_the_command_checks_published_names(tmp_path, capsys, monkeypatch):
    first = split(tmp_path / "in", tar({"s1/a.txt": b"x"}), count=2)
    split(tmp_path / "in", tar({"s2c/a.txt": b"y"}), count=1, form="b.tar.gz{}")
    monkeypatch.setattr(archives, "PUBLISHED", {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in first})
    inputs = [str(p) for p in (tmp_path / "in").iterdir()]
    archives.main([*inputs, "--to", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "a.tar.gz.part: md5 as published, 1 files" in said and "b.tar.gz: not checked, 1 files" in said
    assert set(files(tmp_path / "out")) == {"s1/a.txt", "s2c/a.txt"}
    shutil.copy(tmp_path / "in/b.tar.gzaa", tmp_path / "in/a.tar.gz.partab")
    for args, words in (
        (inputs, "partab: md5 .*; download it again"),
        ([str(tmp_path / "in" / "c.zip")], "c.zip: expected NAME.tar.gz"),
        ([str(tmp_path / "in" / "s1_grd.tar.gz.part*")], r"part\*: expected NAME.tar.gz"),  # no file fits
    ):
        with pytest.raises(SystemExit, match=words):
            archives.main([*args, "--to", str(tmp_path / "out")])


@pytest.mark.parametrize("way", ["beside", "through a link", "as a hard link", "in parts"])
def test_an_archive_that_holds_its_own_name_is_not_destroyed(tmp_path, way):
    name = "a.tar.gz.partab" if way == "in parts" else "a.tar.gz"
    data = tar({"first.txt": b"x", name: b"y" * 100})
    paths, target = [tmp_path / "a.tar.gz"], tmp_path
    paths[0].write_bytes(data)
    if way == "in parts":
        paths = split(tmp_path, data, count=2)
    if way == "through a link":
        target = tmp_path / "link"
        target.symlink_to(tmp_path)
    if way == "as a hard link":
        target = tmp_path / "out"
        target.mkdir()
        (target / "a.tar.gz").hardlink_to(paths[0])
    with pytest.raises(DataError, match=f"{name}: is the archive, or a part of it, .*unpack into another folder"):
        run(paths, target)
    assert b"".join(p.read_bytes() for p in paths) == data
    assert run(paths, tmp_path / "elsewhere") == 2
    assert (tmp_path / "elsewhere" / name).read_bytes() == b"y" * 100


@pytest.mark.parametrize("theirs", [b"other", b"content and more", b"conten", b"x"])
def test_content_decides_what_is_there(tmp_path, theirs):
    (tmp_path / "a.tar.gz").write_bytes(tar({"a/b.txt": b"conten", "a/empty": b""}))
    out = tmp_path / "out" / "a" / "b.txt"
    out.parent.mkdir(parents=True)
    out.write_bytes(theirs)
    if theirs == b"conten":
        out.chmod(0o400)  # there and whole: only read
        assert run([tmp_path / "a.tar.gz"], tmp_path / "out") == 1
        (tmp_path / "out/a/empty").write_bytes(b"not empty")
        out = tmp_path / "out/a/empty"
        theirs = b"not empty"
    with pytest.raises(DataError, match=f"{out}: has other content than in the archive; .*remove that file"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert out.read_bytes() == theirs


@pytest.mark.parametrize(("place", "mine"), [("s1/a.txt", None), ("s1", b"mine"), ("s1/b", b"mine")])
def test_a_file_in_the_place_of_a_folder_is_named_and_kept(tmp_path, place, mine):
    folder = tarfile.TarInfo()
    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
    (tmp_path / "a.tar.gz").write_bytes(tar({"s1/a.txt": b"x", "s1/b": folder, "s1/b/c.txt": b"y"}))
    there = tmp_path / "out" / place
    there.parent.mkdir(parents=True)
    there.mkdir() if mine is None else there.write_bytes(mine)
    with pytest.raises(DataError, match=f"{there}: of another kind than in the archive; unpack into"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert there.is_dir() if mine is None else there.read_bytes() == mine


def test_files_larger_than_a_block_are_compared_and_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_BLOCK", 1024)
    content = bytes(range(256)) * 20  # five blocks
    (tmp_path / "a.tar.gz").write_bytes(tar({"a": content}))
    file = tmp_path / "out" / "a"
    for length in (0, 1, 1023, 1024, 1025, 5119):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")
        assert file.read_bytes() == content
        file.write_bytes(content[:length])
        assert run([tmp_path / "a.tar.gz"], tmp_path / "out") == 1 and file.read_bytes() == content
        assert run([tmp_path / "a.tar.gz"], tmp_path / "out") == 0
    file.write_bytes(content[:-1] + b"x")  # of the same size, and other at its last byte
    with pytest.raises(DataError, match="has other content"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_of_the_archive_does_not_replace_a_file(tmp_path, kind):
    to = "a.txt" if kind == tarfile.SYMTYPE else "s1/a.txt"
    (tmp_path / "a.tar.gz").write_bytes(tar({"s1/a.txt": b"x", "s1/b.txt": link(kind, to)}))
    place = tmp_path / "out" / "s1" / "b.txt"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{place}: is not the link to {to} that the archive has there"):
        run([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert place.read_bytes() == b"mine"
    place.unlink()
    run([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert place.read_bytes() == b"x"
