"""Downloaded archives: parts are checked, joined as a stream and unpacked, without a joined copy on the disk.

python -m decur_core.data.archives s1_grd.tar.gz.part* s2_l1c.tar.gz.part* --to data/ssl4eo-s12
"""

import argparse
import contextlib
import filecmp
import gzip
import hashlib
import itertools
import json
import os
import re
import string
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from decur_core.data.raster import DataError
from decur_core.running import folders as runs

PUBLISHED: dict[str, str] = json.loads(Path(__file__).with_name("archives.json").read_text())  # file name -> md5
_NAME = re.compile(r"(.+\.tar\.gz(?:\.part(?=..))?)([a-z]{2})?")  # archive, part
_BLOCK = 2**20  # bytes
_ELSEWHERE = "unpack into another folder, or remove that file if it is a damaged copy"


def _archive(path: Path) -> str:
    """File name without the part."""
    if not (match := _NAME.fullmatch(path.name)):
        raise DataError(f"{path}: expected NAME.tar.gz, or parts named NAME.tar.gz.partaa, … or NAME.tar.gzaa, …")
    return match[1]


class _Joined:
    """Open files as one to read; `tick` hears of the bytes."""

    def __init__(self, files: Sequence[BinaryIO], tick: Callable[[int], object]):
        self._files, self._tick = list(files), tick

    def read(self, size: int) -> bytes:
        block = b""
        while self._files and not (block := self._files[0].read(size)):
            self._files.pop(0)
        self._tick(len(block))
        return block


def unpack(parts: Sequence, target: Path | str, *, md5: Mapping[str, str] | None = None, progress=True) -> int:
    """Unpack one `.tar.gz`, whole or in parts (in any order), into the folder `target`; returns the files written.

    `md5`, file name -> digest: parts of this archive that it names must be there and agree before anything is written.
    Run again after an interruption to go on: what is there is compared with the archive as that is read, and a file
    that ends too early is completed. DataError: a part is missing or differs from its md5, the archive is damaged, a
    member (absolute path, `..`, link to the outside, device) would leave `target`, or something else lies in its place,
    which is not touched, be it the archive itself.
    """
    md5, paths = md5 or {}, sorted(map(Path, parts))
    if len(archives := {_archive(path) for path in paths}) != 1:
        raise DataError(f"expected the parts of one archive, found {len(archives)}: {', '.join(sorted(archives))}")
    (archive,), names = archives, {path.name for path in paths}
    if len(names) < len(paths):
        raise DataError(f"{archive}: {len(paths)} files, but {len(names)} names; unpack them one by one")
    there = {path.name for path in paths if path.is_file()}
    pairs = itertools.islice(itertools.product(string.ascii_lowercase, repeat=2), len(paths))
    needed = {archive} if names == {archive} else {archive + "".join(pair) for pair in pairs}
    needed |= {name for name in md5 if re.fullmatch(re.escape(archive) + "([a-z]{2})?", name)}
    if absent := sorted(needed - there):
        raise DataError(f"{paths[0].parent}: {', '.join(absent)} missing; found {', '.join(sorted(there))}")
    size = sum(path.stat().st_size * (2 if path.name in md5 else 1) for path in paths)
    options = {"total": size, "unit": "B", "unit_scale": True, "desc": archive, "disable": not progress}
    with runs.progress(None, **options) as bar, contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for path, file in zip(paths, files, strict=True):
            if path.name not in md5:
                continue
            found, blocks = hashlib.md5(), _Joined([file], bar.update)
            while block := blocks.read(_BLOCK):
                found.update(block)
            file.seek(0)
            if found.hexdigest() != md5[path.name]:
                raise DataError(f"{path}: md5 {found.hexdigest()}, expected {md5[path.name]}; download it again")
        inputs = [os.fstat(file.fileno()) for file in files]
        stream = gzip.GzipFile(fileobj=_Joined(files, bar.update), mode="rb")
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK, tarinfo=_Member) as tar:
                written = sum(_extract(tar, member, Path(target), inputs) for member in iter(tar.next, None))
            while stream.read(_BLOCK):  # a checksum of everything stands at the end
                pass
        except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            raise DataError(f"{paths[0].with_name(archive)}: damaged, or the last part is missing ({error})") from error
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise DataError(f"{error.filename}: of another kind than in the archive; {_ELSEWHERE}") from error
    return written


class _Member(tarfile.TarInfo):
    """A member; where Python takes an archive to end at a damaged header, or without its end mark, an error."""

    @classmethod
    def frombuf(cls, *args) -> tarfile.TarInfo:
        try:
            return super().frombuf(*args)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, inputs: list[os.stat_result]) -> bool:
    """Write a member below `target`, as far as it is not there; says whether it was a file and anything was missing."""
    tar.members.clear()  # they would be remembered, and there are millions
    try:
        if member.name.startswith("/"):  # the filter would only cut the slash off
            raise tarfile.AbsolutePathError(member)
        safe = tarfile.data_filter(member, str(target))
    except tarfile.FilterError as error:
        raise DataError(f"{member.name}: refused, it would leave {target} ({error})") from error
    place = os.path.join(target, safe.name)  # a Path would intern every name
    there = os.stat(place) if os.path.exists(place) else None
    if there and any(os.path.samestat(there, one) for one in inputs):
        raise DataError(f"{place}: is the archive, or a part of it, and has a member of that name; {_ELSEWHERE}")
    if safe.isfile():
        return _write(tar.extractfile(safe), place, safe)
    if safe.isdir() or not os.path.lexists(place):
        tar.extract(safe, target, filter="fully_trusted")
        return False
    if safe.issym():
        same = os.path.islink(place) and os.readlink(place) == safe.linkname
    else:
        same = there and filecmp.cmp(place, os.path.join(target, safe.linkname), shallow=False)
    if not same:
        raise DataError(f"{place}: is not the link to {safe.linkname} that the archive has there; {_ELSEWHERE}")
    return False


def _write(source: BinaryIO, place: str, member: tarfile.TarInfo) -> bool:
    """Complete a file, which may end too early; says whether anything was missing."""
    block = source.read(_BLOCK)
    if os.path.lexists(place):
        with open(place, "rb") as there:
            # Where the member ends, a byte more shows that the file does not.
            while (found := there.read(len(block) or 1)) == block and block:
                block = source.read(_BLOCK)
        if not block.startswith(found):
            raise DataError(f"{place}: has other content than in the archive; {_ELSEWHERE}")
        if not block:
            return False
        block = block[len(found) :]
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "ab") as file:
        while block:
            file.write(block)
            block = source.read(_BLOCK)
    os.chmod(place, member.mode)
    os.utime(place, (member.mtime, member.mtime))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="archives (.tar.gz) or parts of them")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to unpack into")
    parser.add_argument("--unchecked", action="store_true", help="do not compare with the published md5")
    options = parser.parse_args(argv)
    try:
        for archive, files in itertools.groupby(sorted(options.files, key=_archive), _archive):
            count = unpack(files := list(files), options.to, md5={} if options.unchecked else PUBLISHED)
            how = "not checked" if options.unchecked or files[0].name not in PUBLISHED else "md5 as published"
            print(f"{archive}: {how}, {count} files written to {options.to}")
    except (DataError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
