"""Pretrained backbones as safetensors files with everything one must know to use them, and a model card.

``python -m decur_core.export RUN_FOLDER TARGET`` exports the backbone of every trained modality of a finished run.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from decur_core import backbones
from decur_core.config import ConfigError
from decur_core.data.modality import Modality
from decur_core.data.raster import DataError, visible
from decur_core.losses import METHODS
from decur_core.model import backbone_state
from decur_core.running import checkpoints, profiles
from decur_core.running import folders as runs

RESULTS = ("dataset", "images", "protocol", "inputs", "seasons", "fraction", "metric")
RESULTS += ("micro", "macro", "flood", "miou", "accuracy")


def write(folder: Path | str, target: Path | str, modality: str) -> Path:
    """Export one backbone of a finished run (``pretrain.run``); returns ``<target>/<run>-<modality>.safetensors``.

    The file's header carries the metadata that ``load`` returns. ``<target>/README.md`` is written anew, for all
    exports in ``target``. Evaluations: those in the profile's ``records`` now, on test images. Raises DataError, and
    OSError for damaged weights. A README.md that this module did not write, or that was edited since, a file of that
    name that is not an export and the export of another run are not touched but refused, before anything is written.
    """
    folder, target = Path(folder).resolve(), Path(target)
    if missing := [name for name in ("final.pt", "run.json") if not (folder / name).is_file()]:
        raise DataError(f"{folder}: no {missing[0]}; this is not the folder of a finished pretraining")
    saved = checkpoints.load(folder / "final.pt", "remove it and pretrain again")
    if modality not in (names := list(saved["preprocessing"])):
        raise DataError(f"{folder.name}: modality {modality!r} is unknown; it has {' and '.join(names)}")
    about = json.loads((folder / "run.json").read_text())
    profiles.extend(about.get("settings", {}).get("extensions", ()))  # which may hold the backbone
    if modality not in (trained := about.get("trained") or names):  # of a run without training, the start is the result
        raise DataError(f"{folder.name}: has not trained {modality}, only {' and '.join(trained)}")
    every = (json.loads(f.read_text()) for f in sorted(visible(folder.parent.parent / "records", "*.json")))
    mine = [r for r in every if r.get("run") == folder.name and r.get("split", "test") == "test"]
    mine = [r for r in mine if {modality, "both"} & {*r.get("inputs", "both").split("+")}]
    rows = [x for r in mine for x in (r, *(r | f | {"images": part} for part, f in r.get("further", {}).items()))]
    metadata = {
        "run": folder.name,
        "modality": modality,
        "backbone": saved["settings"]["backbone"],
        "steps": saved["step"],
        "settings": saved["settings"],
        "data": saved.get("data") or {},
        "preprocessing": saved["preprocessing"][modality],
        "provenance": about["provenance"],
        "evaluations": [{k: r[k] for k in (*RESULTS, *r.get("numbers", ())) if k in r} for r in rows],
    }
    state = backbone_state(saved["model"], modality)
    _check(state, metadata, folder / "final.pt")
    file, card = target / f"{folder.name}-{modality}.safetensors", target / "README.md"
    _check_free(file, card, metadata)
    header = {"format": "pt", "decur": json.dumps(metadata)}
    with runs.replacing(file) as f:
        f.write(safetensors.torch.save({k: v.contiguous() for k, v in state.items()}, metadata=header))
    exports, others = found(target)
    text = "".join(["# Pretrained encoders\n", *map(_section, exports)])
    if others:
        text += f"\nNot described here, as this module did not write them: {', '.join(others)}.\n"
    runs.write_text(card, _mark(text) + text)
    return file


def found(target: Path | str) -> tuple[list[dict], list[str]]:
    """The metadata of every export in a folder, and the names of safetensors files there that are none."""
    exports, others = [], []
    for file in sorted(visible(target, "*.safetensors")):
        try:
            exports.append(_header(file))
        except DataError:
            others.append(file.name)
    return exports, others


def _mark(text: str) -> str:
    """The first line of a card, by which it is known as written here and not changed since."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<!-- by decur_core.export, which writes this file anew with every export: {digest} -->\n"


def _check_free(file: Path, card: Path, metadata: dict) -> None:
    """Refuse to write over what is not an earlier state of the same."""
    way = "choose another folder for the export, or move that file"
    if os.path.lexists(card):
        text = card.read_text(errors="replace") if card.is_file() else ""
        if text != _mark(rest := text.partition("\n")[2]) + rest:
            raise DataError(f"{card}: not written by this module, or changed since; {way}")
    if os.path.lexists(file):
        try:
            there = _header(file)
        except DataError as error:
            raise DataError(f"{error}; {way}") from None
        if there["settings"] != metadata["settings"]:
            raise DataError(f"{file}: holds another run of this name, of {there['provenance']['date']}; {way}")


def load(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """The state dict and the metadata of an export; it fits, strictly, ``backbones.build`` of the same backbone.

    Raises DataError for other files, and names keys and shapes that do not belong to the backbone in the metadata.
    """
    metadata = _header(path)
    state = safetensors.torch.load_file(path)
    _check(state, metadata, path)
    return state, metadata


def _header(path: Path | str) -> dict:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from None
    if "decur" not in header:
        raise DataError(f"{path}: says nothing about preprocessing and backbone, so it was not written by this module")
    return json.loads(header["decur"])


def _check(state: dict[str, Tensor], metadata: dict, source: Path | str) -> None:
    channels = Modality.from_mapping(metadata["preprocessing"]).channels
    expected = backbones.build(metadata["backbone"], channels)[0].state_dict()
    if fault := backbones.misfit(expected, state):
        raise DataError(f"{source}: these are not the weights of a {metadata['backbone']}: {fault}")


def in_words(p: Modality) -> str:
    """What happens to the pixels of an image before a network sees them."""
    tail = f"per image and band, the lowest and the highest {50 * (p.outliers or 0):g} % of pixels are clipped"
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in zip(p.low or (), p.high or (), strict=True))
    steps = {
        "bytes": "the 8-bit values are taken as they are",
        "range_8bit": f"per band, {ranges} becomes 0 to 255, clipped, fractions cut off",
        "reflectance_8bit": f"multiplied by 255 / {p.scale or 1:g}, clipped to 0 to 255, fractions cut off",
        "outliers_range_8bit": f"{tail}, and what is left is stretched to 0 to 255, fractions cut off",
        "outliers_mean_std_8bit": f"{tail}; then, with mean {p.mean} and standard deviation {p.std} per band, mean - 2 "
        "std to mean + 2 std becomes 0 to 255, clipped, fractions cut off",
    }
    copies = f", all bands repeated {p.copies} times" if p.copies > 1 else ""
    return f"{p.unit}, bands in the order {', '.join(p.bands)}: {steps[p.scheme]}; then divided by 255{copies}."


def _data(data: dict) -> str:
    """What a run has seen, by what its store says of itself."""
    title = data.get("title") or data.get("name") or "not on record"
    if data.get("drawn"):
        return f"{title}, the miniature world that this project draws. **This model is a toy**: it knows no real image"
    if data.get("source") == "samples":
        return f"{title}, a handful of sample files. **This model is a toy**: it has seen too little to be of use"
    return f"{title}, as published" if data.get("source") == "published" else title


def _section(metadata: dict) -> str:
    """Of the model card, for one file."""
    settings, made, backbone = metadata["settings"], metadata["provenance"], metadata["backbone"]
    method = settings["method"]  # maybe one that is not known here
    sensor = Modality.from_mapping(metadata["preprocessing"])
    name, channels = f"{metadata['run']}-{metadata['modality']}.safetensors", sensor.channels
    code = [f'network, features = decur_core.backbones.build("{backbone}", {channels})']
    if backbone.startswith("resnet"):
        options = f'num_classes=0, in_chans={channels}, checkpoint_path="{name}"'
        code = [f'network = timm.create_model("{backbone}", {options})  # or:']
        code += [f"network = torchvision.models.{backbone}()", "network.fc = torch.nn.Identity()"]
        code += [f"network.conv1 = torch.nn.Conv2d({channels}, 64, 7, 2, 3, bias=False)"] * (channels != 3)
    code += [f'network.load_state_dict(safetensors.torch.load_file("{name}"))', "network.eval()"]
    labels = "" if method == "supervised" else ", no labels"
    scored = metadata["evaluations"]
    known = dict.fromkeys([*RESULTS, *(k for each in scored for k in each)])  # a task may have numbers of its own
    columns = [k for k in known if any(each.get(k, "") != "" for each in scored)]
    values = [[f"{v:.4g}" if isinstance(v := each.get(k, ""), float) else str(v) for k in columns] for each in scored]
    table = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *values)]
    about = "of this run alone, so of one seed, on test images or those named. `linear`: a head on the frozen encoder; "
    about += "`finetune`: both trained. `inputs`: modalities given, `both` for all; `fraction`: of the training labels."
    results = "\n".join([about, "", *table]) if scored else "none."
    return f"""
## {name}

- Network: {backbone} for {channels} channels, without a classifier.
- Method: {getattr(METHODS.get(method), "title", method)}, {settings["pair"]}, {metadata["steps"]} steps{labels}.
- Code: commit {made["commit"]}{", with changes" if made["modified"] else ""}; {made["date"]}.
- Data: {_data(metadata.get("data") or {})}.
- Input: {in_words(sensor)}
- Use: a start for models of such images, or frozen as a feature extractor; untested on other sensors, units or bands.
- Evaluations: {results}

```python
{chr(10).join(code)}
```

<details><summary>Settings of the run</summary>

| setting | value |
|---|---|
{chr(10).join(f"| {k} | {v} |" for k, v in settings.items())}

</details>
"""


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message for a folder that cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m decur_core.export", description="Export pretrained backbones.")
    parser.add_argument("run", type=Path, help="folder of a finished pretraining")
    parser.add_argument("target", type=Path, help="folder for the files and their model card")
    args = parser.parse_args(argv)
    try:
        about = json.loads((args.run / "run.json").read_text())
        for modality in about.get("trained") or checkpoints.load(args.run / "final.pt")["preprocessing"]:
            print(write(args.run, args.target, modality))
        if others := found(args.target)[1]:
            print(f"{len(others)} other files in {args.target} are not described: {', '.join(others)}")
    except (OSError, ConfigError, DataError) as error:
        sys.exit(f"not exported: {error}")


if __name__ == "__main__":
    main()
