"""Run folders, provenance and records: what was computed, from what, by which code, on which machine."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import tqdm.auto

from decur_core import config
from decur_core.losses import METHODS
from decur_core.running.files import InUse, locked, remove_torn, replacing, seen, visible, write_json, write_text  # noqa: F401

IMAGES, SENTINEL = "decur: images ", "decur: notebook finished"


def finished() -> None:
    """Ends every notebook: says what images it has seen, and the line without which the driver accepts no run."""
    print(IMAGES + json.dumps([*{about["title"]: about for about in seen if about}.values()]))
    print(SENTINEL)


def path(settings: config.Settings, *parts: str) -> Path:
    """A folder below ``<runs>/<profile>``; it is not made here."""
    return Path(settings.runs, settings.profile, *parts)


def title(settings: config.Settings) -> str:
    """Name of a run's folder: pair, method, seed, then ``variant`` and ``name`` if there are any."""
    method = "_".join([settings.method, *_only(settings)])
    return "-".join(filter(None, (settings.pair, method, f"seed{settings.seed}", settings.variant, settings.name)))


def label(settings: config.Settings) -> str:
    """Name of a run for readers: method and seed, then ``variant`` and ``name`` if there are any."""
    seen = [m.title or m.name for m in config.modalities(settings) if m.name in _only(settings)]
    parts = (METHODS[settings.method].title, *seen, f"seed {settings.seed}", settings.variant, settings.name)
    return ", ".join(filter(None, parts))


def trained(settings: config.Settings) -> list[str]:
    """The modalities whose networks a run trains; the others keep their initial weights."""
    everything = [m.name for m in config.modalities(settings)] if METHODS[settings.method].loss else []
    return _only(settings) or everything


def _only(settings: config.Settings) -> list[str]:
    """The modality of a method that looks at one."""
    if not METHODS[settings.method].single:
        return []
    return [settings.single or config.modalities(settings)[0].name]


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
    """What a git command says about the tree that this library is in; empty where it fails or there is none.

    Variables such as GIT_DIR, which hooks set, speak of another tree; those of git's configuration stay.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}
    options = {"cwd": config.ROOT, "env": kept, "capture_output": True, "text": True, "timeout": 30, "check": True}
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
    """The commit of this tree, and whether library or notebooks differ from it; new files count, results do not.

    ("unknown", False) outside of git, and where the repository is another one that these files merely lie in.
    """
    found = git("rev-parse", "--show-toplevel", "HEAD", "HEAD:decur_core/config.py").splitlines()
    if len(found) != 3 or not os.path.samefile(found[0], config.ROOT):
        return "unknown", False
    changes = git("status", "--porcelain", "--untracked-files=all", "--", "decur_core", "notebooks")
    return found[1][:12], bool(changes)


def provenance() -> dict:
    """Commit, whether files differ from it, date (UTC), hardware and versions; JSON-able."""
    import torch  # here, so that the headless driver and the book's build need not load it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    made_by, modified = commit()
    return {
        "commit": made_by,
        "modified": modified,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpus": gpus},
        "versions": {"python": platform.python_version()} | {m: metadata.version(m) for m in ("torch", "torchvision")},
    }


def publish_records(folder: Path, target: Path) -> None:
    """Add the records of ``folder``, of the profile's own runs and not of renamed trials, to the file of the book."""
    before = json.loads(target.read_text()) if target.exists() else []
    found = {r["evaluation"]: r for r in before if "evaluation" in r}  # of chapters whose runs need not be here
    found |= {f.stem: json.loads(f.read_text()) for f in visible(folder, "*.json")}
    if kept := [{k: v for k, v in r.items() if k != "label_ids"} for _, r in sorted(found.items()) if not r["name"]]:
        write_json(target, kept)
