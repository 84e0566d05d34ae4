"""Files that others write and read at the same time: what is ours, whole files only, one writer at a time."""

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import re
import warnings
from pathlib import Path

from filelock import SoftFileLock, Timeout

TURNS = "DECUR_TURNS"  # set in the environment of chapters side by side, which wait for what another one makes
PATIENCE = 10.0  # seconds until one that waits for a file says so: some file systems cannot tell that its owner died
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
seen: list[dict] = []  # what the images are of every store that this process has opened


class InUse(RuntimeError):
    """Another process holds a folder."""


def visible(folder: Path | str, pattern: str) -> list[Path]:
    """Files, or folders for a pattern that ends with a slash, in any order: the one rule for what belongs to the data.

    Hidden ones, which are of other programs, and links to what is gone are left out; a warning counts and names them.
    """
    *above, last = pattern.rstrip("/").split("/")
    found, left = [os.fspath(folder)], []
    for depth, part in enumerate([*above, last]):
        only_folders, entries = depth < len(above) or pattern.endswith("/"), []
        for place in filter(os.path.isdir, found):
            with os.scandir(place) as there:  # knows files from folders without asking for each, of 250,000 ids
                entries += [entry for entry in there if fnmatch.fnmatchcase(entry.name, part)]
        found = []
        for entry in entries:
            gone = entry.is_symlink() and not os.path.exists(entry.path)
            if gone or entry.is_dir() or not only_folders:
                (left if gone or entry.name.startswith(".") else found).append(entry.path)
    if left:
        what = "are left out, hidden or links to what is gone"
        warnings.warn(f"{folder}: {len(left)} of {pattern} {what}, first {min(left)}", stacklevel=2)
    return [Path(path) for path in found]


@contextlib.contextmanager
def disk(path: Path | str):
    """An error of the disk says which file or store it concerns and how to go on."""
    try:
        yield
    except OSError as error:
        what = "make room" if error.errno in FULL else "mend that"
        way = f"{what} and run the same again: it goes on where it stopped"
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror or error}); {way}") from error


@contextlib.contextmanager
def replacing(file: Path):
    """Binary writing under a temporary name, flushed to disk, then renamed: a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as error:
        error.filename = error.filename or os.fspath(file)  # what a full disk says of a write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


# Names under which ``replacing`` writes the files of a pretraining; nothing else that is hidden there is ours.
_TORN = re.compile(r"\.(checkpoint-\d+\.pt|final\.pt|history\.jsonl|(run|split)\.json)\.\d+")


def remove_torn(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing; ``folder`` is held by this process."""
    for file in folder.iterdir():
        if _TORN.fullmatch(file.name):
            file.unlink()


def write_text(file: Path, text: str) -> None:
    """``text`` as UTF-8, written like any file that others read."""
    with replacing(file) as f:
        f.write(text.encode())


def write_json(file: Path, value) -> None:
    """``value`` as JSON, written like any text."""
    write_text(file, json.dumps(value, indent=1))


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False, name: str = ".lock"):
    """Hold ``folder``, or what ``name`` stands for in it, for this process.

    A second process that wants it gets an ``InUse``, or its turn: with ``wait``, and among chapters that are executed
    side by side. Where nothing can be written nothing is held: who reads a finished result of a read-only disk needs no
    lock. File systems without locks have a file instead that says who holds the folder, for as long as it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wait = wait or TURNS in os.environ
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / name, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InUse(f"{folder} is in use by another process; wait for it or stop it first") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                lock = SoftFileLock(owner := folder / f"{name}-owner")
                stack.callback(lock.release)
                try:
                    lock.acquire(timeout=PATIENCE if wait else 0)
                except Timeout as held:  # says by whom, if that is on another machine
                    way = f"wait for it or stop it first; if it has died, remove {owner} ({error.strerror}). {held}"
                    if not wait:
                        raise InUse(f"{folder} is in use by another process; {way}") from None
                    warnings.warn(f"{folder}: waiting for another process; {way}", stacklevel=3)
                    lock.acquire()
            elif error.errno not in (errno.EROFS, errno.EACCES):
                raise
        yield
