"""Run folders, provenance and records: what was computed, from what, by which code, on which machine."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import tqdm.auto

from decur_core import config

METHODS = config.METHODS
SENTINEL = "decur: notebook finished"


def finished() -> None:
    """The last line of every notebook: the headless driver accepts a run only when it finds this line."""
    print(SENTINEL)


def path(settings: config.Settings, *parts: str) -> Path:
    """A folder below ``<runs>/<profile>``; it is not made here."""
    return config.ROOT / settings.runs / settings.profile / Path(*parts)


def title(settings: config.Settings) -> str:
    """Name of a run's folder: pair, method, seed, then ``variant`` and ``name`` if there are any."""
    method = "_".join([settings.method, *_only(settings)])
    return "-".join(filter(None, (settings.pair, method, f"seed{settings.seed}", settings.variant, settings.name)))


def label(settings: config.Settings) -> str:
    """Name of a run for readers: method and seed, then ``variant`` and ``name`` if there are any."""
    parts = (METHODS[settings.method], *_only(settings), f"seed {settings.seed}", settings.variant, settings.name)
    return ", ".join(filter(None, parts))


def trained(settings: config.Settings) -> list[str]:
    """The modalities whose networks a run trains; the others keep their initial weights."""
    pair = config.MODALITIES[settings.pair]
    return _only(settings) or ([] if settings.method in ("random", "supervised") else list(pair))


def _only(settings: config.Settings) -> list[str]:
    """The modality of a method that looks at one."""
    pair = config.MODALITIES[settings.pair]
    return [pair[settings.single - 1]] if settings.method == "barlow_twins_single" else []


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
    finally:
        temporary.unlink(missing_ok=True)


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

    A second process that wants it gets a RuntimeError, or its turn with ``wait``. Where nothing can be written nothing
    is held: who reads a finished result of a read-only disk needs no lock. File systems without locks have a file
    instead that says who holds the folder, for as long as it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / name, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f"{folder} is in use by another process; wait for it or stop it first") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                stack.enter_context(_owned(folder / f"{name}-owner", wait=wait, reason=error.strerror))
            elif error.errno not in (errno.EROFS, errno.EACCES):
                raise
        yield


@contextlib.contextmanager
def _owned(file: Path, *, wait: bool, reason: str):
    """Hold a file that only one process can make, and that names it; as ``locked`` else."""
    here = platform.node()
    while True:
        try:
            with open(file, "x") as made:
                made.write(f"process {os.getpid()} on {here}")
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # just given back
                who = file.read_text()
                number, _, node = who.removeprefix("process ").partition(" on ")
                if node == here and not _runs(int(number)):  # killed
                    file.unlink(missing_ok=True)
                elif not wait:
                    state = f"{file.parent} is in use by {who}; wait for it or stop it first"
                    raise RuntimeError(f"{state}; if it has died, remove {file} ({reason}: no locks there)") from None
                else:
                    time.sleep(0.2)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_listening: list[list[int]] = []  # of every ``stop_signals`` that has been entered and not left


@contextlib.contextmanager
def stop_signals():
    """A list that fills with SIGTERM, SIGUSR1 and SIGINT, which would otherwise end the process where it stands.

    One inside another begins with what the outer one has received, and keeps no signal from it.
    """
    received = list(_listening[-1]) if _listening else []
    possible = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if possible else ()
    _listening.append(received)
    before = {n: signal.signal(n, lambda number, frame: [each.append(number) for each in _listening]) for n in numbers}
    try:
        yield received
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        _listening[:] = [each for each in _listening if each is not received]


def progress(steps: Iterable, *, disable: bool = False, **options):
    """A tqdm bar: a widget in JupyterLab, rare text lines in headless runs, where each refresh would be stored."""
    options["disable"] = disable or options.get("total") == 0  # an untrained network has no steps to show
    if os.environ.get("DECUR_HEADLESS"):  # a nested bar below the first would move the cursor
        return tqdm.tqdm(steps, mininterval=5, ascii=True, position=0, **options)
    # As wide as the page: otherwise a run's name breaks at its hyphens and, in a narrow window, no bar is left.
    return tqdm.auto.tqdm(steps, dynamic_ncols=True, **options)


def git(*command: str) -> str:
    """What a git command says about the repository; empty where it fails or there is none."""
    options = {"cwd": config.ROOT, "capture_output": True, "text": True, "timeout": 30, "check": True}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", *command], **options).stdout.strip()
    return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> tuple[str, bool]:
    """The repository's commit, and whether library or notebooks differ from it; results in the tree do not count."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "decur_core", "notebooks")
    return git("rev-parse", "--short=12", "HEAD") or "unknown", bool(changes)


def provenance() -> dict:
    """Commit, whether files differ from it, date (UTC), hardware and versions; JSON-able."""
    import torch  # here, so that the headless driver and the book's build need not load it
    import torchvision

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    made_by, modified = commit()
    return {
        "commit": made_by,
        "modified": modified,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpus": gpus},
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, torchvision)},
    }


def read_history(folder: Path) -> list[dict]:
    """Every step's loss terms and rates, in order, from ``history.jsonl``; a torn last line is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(folder / "history.jsonl") as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def write_record(settings: config.Settings, name: str, record: dict) -> dict:
    """Save an evaluation with its provenance under ``records/<name>.json`` of the profile; returns what was saved."""
    record = {**record, "profile": settings.profile, "world": settings.data.source, "provenance": provenance()}
    write_json(path(settings, "records", f"{name}.json"), record)
    return record


def publish_records(folder: Path, target: Path) -> None:
    """The records of ``folder`` as one file for the book: of the profile's own runs, not of renamed trials."""
    records = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
    kept = [{k: v for k, v in r.items() if k != "label_ids"} for r in records if not r["name"]]
    if kept:
        write_json(target, kept)
