"""Checkpoints that survive a kill, a full disk and damage, and that refuse to pass for those of another run."""

import zipfile
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


def load(file: Path, way: str = "") -> dict:
    """What ``save`` wrote; OSError for a torn file, and for bytes that changed since, which torch would not notice.

    ``way``: the way out, for the error's text.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if part := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise OSError(f"{file} cannot be read ({type(error).__name__}: {error}); {way}".rstrip("; ")) from error


def files(folder: Path) -> list[Path]:
    """The checkpoints of an unfinished run, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def newest(folder: Path, identity: dict) -> dict | None:
    """The newest readable checkpoint's content; a damaged one is reported and the one before is used."""
    for file in reversed(files(folder)):
        try:
            state = load(file)
        except OSError as error:
            print(f"{error}; trying the one before")
            continue
        same_settings(state["settings"], identity, folder)
        return state
    return None


def same_settings(found: dict, wanted: dict, folder: Path) -> None:
    """Refuse to go on with another run, or on other data.

    A run from before a setting existed did what is its default now; what it never noted of its data goes unchecked.
    """
    there, now = config.defaults() | found, config.defaults() | wanted
    if names := [k for k in found | wanted if k in there and there[k] != now.get(k)]:
        listed = "; ".join(f"{k}: {there[k]} there, {now.get(k)} now" for k in names)
        raise config.ConfigError(
            f"{folder} holds a run with other settings ({listed}). Use those settings, give this run another `name`,"
            " or remove the folder."
        )
