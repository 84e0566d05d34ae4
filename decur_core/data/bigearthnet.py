"""BigEarthNet-MM (v1): 590,326 co-located Sentinel-1 and Sentinel-2 patches with several land-cover labels each.

Tree (Sumbul et al. 2019, 2021): `BigEarthNet-v1.0/<S2 patch>/<S2 patch>_{B01..B12,B8A}.tif` (uint16, reflectance x
10000, level 2A: no B10; 120, 60 and 20 pixels), `BigEarthNet-S1-v1.0/<S1 patch>/*_{VV,VH}.tif` (float32, dB, 120
pixels), in every patch a `*_labels_metadata.json`, and beside them `bigearthnet-{train,val,test}.csv` with
`<S2 patch>,<S1 patch>` per line (older lists: the S2 patch only). Names hold times such as 20170924T93020, so they are
never cut at fixed positions.
"""

import bz2
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decur_core.data.raster import OPTICAL_STEPS, DataError, read_bands
from decur_core.preprocess import OPTICAL, SAR

# The 19 classes of BigEarthNet-MM in index order, each with its CORINE level-3 names, the labels in the files.
_TABLE = """\
Urban fabric: Continuous urban fabric; Discontinuous urban fabric
Industrial or commercial units: Industrial or commercial units
Arable land: Non-irrigated arable land; Permanently irrigated land; Rice fields
Permanent crops: Vineyards; Fruit trees and berry plantations; Olive groves; \
Annual crops associated with permanent crops
Pastures: Pastures
Complex cultivation patterns: Complex cultivation patterns
Land principally occupied by agriculture, with significant areas of natural vegetation: \
Land principally occupied by agriculture, with significant areas of natural vegetation
Agro-forestry areas: Agro-forestry areas
Broad-leaved forest: Broad-leaved forest
Coniferous forest: Coniferous forest
Mixed forest: Mixed forest
Natural grassland and sparsely vegetated areas: Natural grassland; Sparsely vegetated areas
Moors, heathland and sclerophyllous vegetation: Moors and heathland; Sclerophyllous vegetation
Transitional woodland, shrub: Transitional woodland/shrub
Beaches, dunes, sands: Beaches, dunes, sands
Inland wetlands: Inland marshes; Peatbogs
Coastal wetlands: Salt marshes; Salines
Inland waters: Water courses; Water bodies
Marine waters: Coastal lagoons; Estuaries; Sea and ocean"""
_DROPPED = """\
Road and rail networks and associated land; Port areas; Airports; Mineral extraction sites; Dump sites; \
Construction sites; Green urban areas; Sport and leisure facilities; Bare rock; Burnt areas; Intertidal flats"""

_ROWS = [line.split(": ") for line in _TABLE.splitlines()]
CLASSES_19: tuple[str, ...] = tuple(name for name, _ in _ROWS)  # in the order of the label vector
# The 43 names in the files -> index in CLASSES_19, or None for the 11 names that the 19 classes leave out.
CLASS_OF: dict[str, int | None] = {old: k for k, (_, names) in enumerate(_ROWS) for old in names.split("; ")}
CLASS_OF |= dict.fromkeys(_DROPPED.split("; "))

_ROOTS = {"S2": ("BigEarthNet-v1.0", "BigEarthNet-S2-Example"), "S1": ("BigEarthNet-S1-v1.0", "BigEarthNet-S1-Example")}
# Bands as files call them, in the order of OPTICAL, with nothing for B10, which level 2A does not have.
BAND_FILES = [None if b == "B10" else b if b == "B8A" else f"B{int(b[1:]):02d}" for b in OPTICAL.bands]


def labels_19(names: Sequence[str], *, source: Path | str) -> np.ndarray:
    """Label names of a patch (of the 43) -> bool (19,); a DataError names `source` and a name that does not exist."""
    labels = np.zeros(len(CLASSES_19), dtype=bool)
    for name in names:
        if name not in CLASS_OF:
            raise DataError(f"{source}: unknown label {name!r}; expected one of the 43 names of BigEarthNet")
        if CLASS_OF[name] is not None:
            labels[CLASS_OF[name]] = True
    return labels


def read_list(path: Path | str) -> dict[str, str | None]:
    """S2 patch -> S1 patch (None where the list has one column) of a .csv or .csv.bz2 without header, in its order."""
    if not Path(path).is_file():
        raise DataError(f"{path}: missing; expected a list of S2 patches (.csv or .csv.bz2, one per line)")
    content = Path(path).read_bytes()
    text = (bz2.decompress(content) if Path(path).suffix == ".bz2" else content).decode()
    rows = [line.split(",") for line in text.split()]
    if wrong := [row for row in rows if len(row) > 2 or not row[0].startswith("S2")]:
        found = ",".join(wrong[0])
        raise DataError(f"{path}: expected '<S2 patch>' or '<S2 patch>,<S1 patch>' per line, found {found!r}")
    return {row[0]: row[1] if len(row) == 2 else None for row in rows}


class BigEarthNetMM:
    """SAR-optical patches with 19 labels.

    `root` holds the two patch folders (also under the names of the published example) and the split lists; `split`:
    "train", "val" or "test" (list in `root`), a path to a list, or None for every patch found; `exclude`: lists of
    patches to leave out (snow, clouds and shadow); `missing`: "error" refuses a list with patches that are not there,
    "skip" uses those that are.

    Items: {"id": S2 patch, "sar": float32 (2, H, W) in dB, "optical": float32 (13, H, W) in reflectance x 10000 with a
    zero row for B10, "labels": bool (19,)}. `.labels` is bool (n, 19); `.left_out` counts what was left out and why;
    patches without any of the 19 classes always are. S1 partners come from the list, else from the S1 patches' JSON.

    A DataError names the file or folder that is missing, damaged or of another form.
    """

    def __init__(
        self, root: Path | str, split: str | Path | None = None, *, exclude: Sequence[Path | str] = (), missing="error"
    ):
        if missing not in ("error", "skip"):
            raise ValueError(f"missing is {missing!r}; allowed are 'error' and 'skip'")
        self.root = Path(root)
        self.folders, here = {}, {}
        for sensor, names in _ROOTS.items():
            folder = next((self.root / name for name in names if (self.root / name).is_dir()), None)
            if folder is None:
                raise DataError(f"{self.root}: no folder {' or '.join(names)} ({sensor} patches)")
            self.folders[sensor], here[sensor] = folder, {p.name for p in folder.iterdir() if p.is_dir()}
        if split is None:
            partners = dict.fromkeys(sorted(here["S2"]))
        else:
            partners = read_list(self.root / f"bigearthnet-{split}.csv" if split in ("train", "val", "test") else split)
        listed = len(partners)
        unwanted = set().union(*(read_list(path) for path in exclude))
        partners = {s2: s1 for s2, s1 in partners.items() if s2 not in unwanted}
        left_out = {"excluded": listed - len(partners)}

        if None in partners.values():  # ask the JSON of every S1 patch
            asked = {self._metadata("S1", s1)[0].get("corresponding_s2_patch"): s1 for s1 in sorted(here["S1"])}
            partners = {s2: s1 or asked.get(s2) for s2, s1 in partners.items()}
        present = {s2: s1 for s2, s1 in partners.items() if s2 in here["S2"] and s1 in here["S1"]}
        left_out["absent"] = len(partners) - len(present)
        if left_out["absent"] and missing == "error":
            first = next(s2 for s2 in partners if s2 not in present)
            state = f"first {first} (no {'S1' if first in here['S2'] else 'S2'} patch)"
            raise DataError(
                f"{self.root}: {left_out['absent']} of {len(partners)} patches are not there, {state}; complete the "
                "folders, or use what is there with missing='skip'"
            )
        labels, self._broken = {}, {}  # one bad file of half a million is reported when its patch is asked for
        for s2 in present:
            try:
                labels[s2] = self._metadata("S2", s2)[1]
            except DataError as error:
                labels[s2], self._broken[s2] = np.zeros(len(CLASSES_19), dtype=bool), str(error)
        self.ids = [s2 for s2 in present if labels[s2].any() or s2 in self._broken]
        self.left_out = left_out | {"no 19-class label": len(present) - len(self.ids)}
        if not self.ids:
            raise DataError(f"{self.root}: no patch is left of {listed} in split {split}: {self.left_out}")
        self._partners = {s2: present[s2] for s2 in self.ids}
        self.labels = np.stack([labels[s2] for s2 in self.ids])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        s2 = self.ids[i]
        if s2 in self._broken:
            raise DataError(self._broken[s2])
        metadata, labels = self._metadata("S1", self._partners[s2])
        if (partner := metadata.get("corresponding_s2_patch")) != s2 or (labels != self.labels[i]).any():
            raise DataError(
                f"{self.folders['S1'] / self._partners[s2]}: its JSON says S2 patch {partner} and labels "
                f"{metadata['labels']}; expected S2 patch {s2} and the labels of that patch's JSON"
            )
        files = [b and f"{self.folders['S2'] / s2 / s2}_{b}.tif" for b in BAND_FILES]
        optical = read_bands(files, steps=OPTICAL_STEPS, kind="ui")
        files = [self._only("S1", self._partners[s2], f"*_{band}.tif") for band in SAR.bands]
        sar = read_bands(files, steps=(1, 1), kind="f", size=optical.shape[1:])
        return {"id": s2, "sar": sar, "optical": optical, "labels": labels}

    def _only(self, sensor: str, patch: str, pattern: str) -> Path:
        """The one file of a patch that fits a pattern (some patches have files with irregular names)."""
        hits = list((self.folders[sensor] / patch).glob(pattern))
        if len(hits) != 1:
            raise DataError(f"{self.folders[sensor] / patch}: {len(hits)} files fit {pattern}, expected 1")
        return hits[0]

    def _metadata(self, sensor: str, patch: str) -> tuple[dict, np.ndarray]:
        """JSON of a patch and its labels, bool (19,)."""
        path = self._only(sensor, patch, "*_labels_metadata.json")
        try:
            metadata = json.loads(path.read_text())
            names = metadata["labels"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: expected JSON with the key 'labels': {error!r}") from error
        return metadata, labels_19(names, source=path)
