"""Checkpoints that survive a kill, a full disk and damage, and that refuse to pass for those of another run."""

import contextlib
import pickle
import pickletools
import re
import zipfile
from collections import deque
from pathlib import Path

import torch

from decur_core import config
from decur_core.running import folders as runs


def save(state: dict, file: Path) -> None:
    """Write under a temporary name and rename; OSError where that fails, with the file and the reason."""
    try:
        with runs.replacing(file) as f:
            torch.save(state, f)
    except RuntimeError as error:  # so torch reports what kept it from writing, without the reason
        raise OSError(f"{file} cannot be written: {error.__context__ or error}") from error


def save_or_say(state: dict, file: Path, what: str) -> bool:
    """``save``; where that fails, a full disk for instance, says so with the reason: work goes on without it.

    ``what``: where the work is, such as ``step 500``. Returns whether the checkpoint was written.
    """
    try:
        save(state, file)
    except OSError as error:
        print(f"{what}: checkpoint not written ({error}); the run goes on with the one before", flush=True)
        return False
    return True


class Damaged(OSError):
    """A file holds something else than what was written; another OSError says nothing about the file."""


def load(file: Path, way: str = "") -> dict:
    """What ``save`` wrote; Damaged for a torn file, and for bytes that changed since, which torch would not notice;
    ConfigError for a run of an earlier version.

    ``way``: the way out, for the error's text. What the machine lacks (permission, a file handle, memory, a disk that
    answers) comes as the OSError or MemoryError that it is: nobody shall remove a sound file for it.
    """
    try:
        _whole(file)
        state = _unpickled(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds
        raise Damaged(f"{file} cannot be read ({type(error).__name__}: {error}); {way}".rstrip("; ")) from error
    if old := next((k for k in state.get("model", ()) if k.startswith("backbone_")), ""):
        way = "give the run another `name`, or remove its folder; model.load_published still opens these weights"
        raise config.ConfigError(f"{file}: of an earlier version, whose networks had numbers for names ({old}); {way}")
    return state


def _whole(file: Path) -> list[str]:
    """The names in a zip archive, every byte of which has been read and is what was written; else BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        # Nothing lies before the first byte; of a file that is marked as a folder torch gives what is in memory.
        parts = [e for e in archive.infolist() if e.header_offset < 0 or e.external_attr & 16 and not e.is_dir()]
        if part := parts[0].filename if parts else archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {part}, its place or its kind is wrong")
        return archive.namelist()


def _pickles(file: Path) -> list[str]:
    """Nothing; ValueError where the pickles, four of them, at the start of an older checkpoint are cut short."""
    with file.open("rb") as opened:
        for _ in range(4):
            deque(pickletools.genops(opened), maxlen=0)
    return []


def _unpickled(file: Path):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(f"{file}: {error}") from error
        raise


# How files begin that get into the place of weights: what they are, and the way out.
_OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
    b"<": ("a web page (HTML or XML), not weights", "download the file itself, for which the page may ask to log in"),
    b"{": ("text (JSON), not weights", "read what it says, and download the file itself"),
    b"\x1f\x8b": ("compressed by gzip", "unpack it first"),
}
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how torch.save began before it wrote zip archives
_MORE = re.compile(r"GLOBAL|Can only (build|create)|must be imported")  # what torch says of things it will not make


def read_weights(path: Path | str) -> dict:
    """The dict in someone else's checkpoint, any file of ``torch.save`` or safetensors; no code in it is run.

    ValueError says what a file is that holds no weights or more than weights, and the way out. What keeps it from being
    opened (it is missing, a folder, not permitted) comes as the OSError that it is.
    """
    path, names, again = Path(path), [], "download it again"
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        raise ValueError(f"{path}: is empty; {again}")
    for sign, (kind, way) in _OTHERS.items():
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(sign):
            raise ValueError(f"{path}: is {kind}; {way}")
    legacy = _LEGACY.startswith(start[: len(_LEGACY)])
    try:
        names = _whole(path) if start.startswith(b"PK") else _pickles(path) if legacy else []
        content = _unpickled(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = re.sub(r"(?s).*WeightsUnpickler error: |\. Please use .*|\s*Check the documentation.*", "", str(error))
        reason = f"({type(error).__name__}: {text.strip()})"
        if isinstance(error, pickle.UnpicklingError) and _MORE.search(text):
            way = "if you trust it, open it with weights_only=False elsewhere and save its state dict ('model') alone"
            raise ValueError(f"{path}: holds more than tensors, and that can run code; {way} {reason}") from error
        if any("/code/" in name for name in names):
            way = "open it with torch.jit.load and save its state_dict() with torch.save"
            raise ValueError(f"{path}: is a TorchScript program, not weights; {way}") from error
        if names and not any(name.endswith("/data.pkl") for name in names):
            way = f"it holds {', '.join(names[:3])}; unpack it first"
            raise ValueError(f"{path}: is a zip archive that torch.save did not write; {way}") from error
        if not legacy and not start.startswith(b"PK"):
            found, way = f"it begins with {start[:20]!r}", f"{again}, or save its tensors with torch.save"
            raise ValueError(f"{path}: is no file of torch.save, {found}; {way}") from error
        raise ValueError(f"{path}: is cut short or damaged; {again} {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors, or one inside it")
    return content


def files(folder: Path) -> list[Path]:
    """The checkpoints of an unfinished run, oldest first; a copy that someone made under another name is none."""
    return sorted(f for f in folder.glob("checkpoint-*.pt") if f.stem.removeprefix("checkpoint-").isdecimal())


def remove(folder: Path, *, after: int = 0, keep: int = 0) -> None:
    """Remove checkpoints ``after`` a step but the last ``keep``, as far as the disk can be written."""
    for file in [f for f in files(folder) if f.name > f"checkpoint-{after:09d}.pt"][: -keep or None]:
        with contextlib.suppress(OSError):  # they do no harm where they are
            file.unlink()


def newest(folder: Path, identity: dict) -> dict | None:
    """The newest readable checkpoint's content; a damaged one is reported and the one before is used."""
    for file in reversed(files(folder)):
        try:
            state = load(file)
        except Damaged as error:
            print(f"{error}; trying the one before", flush=True)
            continue
        same_settings(state["settings"], identity, folder)
        return state
    if files(folder):
        print(f"{folder.name}: no checkpoint can be read; the run begins again", flush=True)
    return None


def same_settings(found: dict, wanted: dict, folder: Path) -> None:
    """Refuse to go on with another run, or on other data.

    A run from before a setting existed did what is its default now; what it never noted of its data goes unchecked.
    """
    there, now = config.defaults() | found, config.defaults() | wanted
    names = [k for k in found | wanted if k in there and there[k] != now.get(k)]
    if not names and [*there.get("blocks", ())] != [*now.get("blocks", ())]:  # equal, but in the order of the columns
        names = ["blocks"]
    if names:
        listed = "; ".join(f"{k}: {there[k]} there, {now.get(k)} now" for k in names)
        way = "Use those settings, give this run another `name`, or remove the folder."
        raise config.ConfigError(f"{folder} holds a run with other settings ({listed}). {way}")
