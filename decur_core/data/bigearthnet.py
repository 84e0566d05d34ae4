"""BigEarthNet: co-located Sentinel-1 and Sentinel-2 patches of 1.2 km with several land-cover labels each.

BigEarthNet-MM (v1; Sumbul et al. 2019, 2021), 590,326 patches: `BigEarthNet-v1.0/<S2 patch>/<S2 patch>_{B01..B12,B8A}.
tif` (uint16, reflectance x 10000, level 2A: no B10; 120, 60 and 20 pixels), `BigEarthNet-S1-v1.0/<S1 patch>/*_{VV,VH}.
tif` (float32, dB, 120 pixels), in every patch a `*_labels_metadata.json`, and beside them `{train,val,test}.csv.gz`, or
`bigearthnet-{train,val,test}.csv`, with `<S2 patch>,<S1 patch>` per line (some lists: the S2 patch only).

BigEarthNet v2 (reBEN; Clasen et al. 2024), 549,488 patches: the same files in `BigEarthNet-S2/<scene>/<S2 patch>` and
`BigEarthNet-S1/<scene>/<S1 patch>`, with new labels and splits of all patches in `metadata.parquet` instead of JSON.

Names hold times such as 20170924T93020, so they are never cut at fixed positions.
"""

import bz2
import gzip
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from decur_core.data.datasets import DataSet
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.raster import MISSING, DataError, Part, Reader, one_of, read_place, reading, visible
from decur_core.data.tasks import Scene

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
# Mean and standard deviation over v1, as published with bigearthnet_common; 0 for B10, which is a row of zeros.
_SAR = (-12.619993741972035, -19.29044597721542), (5.115911777546365, 5.464428464912864)
_OPTICAL = (
    (340.76769064, 429.9430203, 614.21682446, 590.23569706, 950.68368468, 1792.46290469, 2075.46795189, 2218.94553375,
     2266.46036911, 2246.0605464, 0.0, 1594.42694882, 1009.32729131),
    (554.81258967, 572.41639287, 582.87945694, 675.88746967, 729.89827633, 1096.01480586, 1273.45393088, 1365.45589904,
     1356.13789355, 1302.3292881, 0.0, 1079.19066363, 818.86747235),
)  # fmt: skip


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
    """S2 patch -> S1 patch (None where there is one column) of a .csv, .csv.gz or .csv.bz2 without header, in order."""
    opened = {".bz2": bz2.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    with reading(path, "a list of S2 patches (.csv, .csv.gz or .csv.bz2)"), opened(path, "rt") as file:
        rows = [line.split(",") for line in file.read().split()]
    if wrong := [row for row in rows if len(row) > 2 or not row[0].startswith("S2")]:
        found = ",".join(wrong[0])
        raise DataError(f"{path}: expected '<S2 patch>' or '<S2 patch>,<S1 patch>' per line, found {found!r}")
    partners = {row[0]: row[1] if len(row) == 2 else None for row in rows}
    if len(partners) < len(rows):
        raise DataError(f"{path}: {len(rows) - len(partners)} of {len(rows)} lines name a patch for a second time")
    return partners


def _only(folder: Path | str, pattern: str) -> Path:
    """The one file of a folder that fits a pattern (some patches have files with irregular names)."""
    hits = visible(folder, pattern)
    if len(hits) != 1:
        raise DataError(f"{folder}: {len(hits)} files fit {pattern}, expected 1")
    return hits[0]


def _item(s2: str, optical: Path | str, sar: Path | str, labels: np.ndarray) -> dict:
    """The item of S2 patch `s2` from its folder and that of its partner, whose files must lie on one UTM grid."""
    files = [band and f"{optical}/{s2}_{band}.tif" for band in BAND_FILES]
    bands = read_place(files, [_only(sar, f"*_{band}.tif") for band in SAR.bands], utm=True)
    return {"id": s2, "sar": bands[len(files) :], "optical": bands[: len(files)], "labels": labels.copy()}


class _Patches(Reader):
    """What both releases have in common."""

    statistics = {"sar": _SAR, "optical": _OPTICAL}

    def _choose(self, partners: dict, unwanted: set, here: dict[str, set], labels, missing: str, split) -> None:
        """Set `ids` and what belongs to each of them; `partners`: S2 patch -> S1 patch as listed; `here`: names on
        disk of each sensor; `labels`: S2 patch -> bool (19,)."""
        one_of(MISSING, missing=missing)
        wanted = {s2: s1 for s2, s1 in partners.items() if s2 not in unwanted}
        present = {s2: s1 for s2, s1 in wanted.items() if s2 in here["S2"] and s1 in here["S1"]}
        if missing == "error" and (absent := [s2 for s2 in wanted if s2 not in present]):
            state = f"not there, first {absent[0]} (no {'S1' if absent[0] in here['S2'] else 'S2'} patch)"
            way = "complete the folders, or use what is there with missing='skip'"
            raise DataError(f"{self.root}: {len(absent)} of {len(wanted)} patches are {state}; {way}")
        held = {s2: labels(s2) for s2 in present}
        self.ids = [s2 for s2, own in held.items() if own is None or own.any()]
        self.left_out = {"excluded": len(partners) - len(wanted), "absent": len(wanted) - len(present)}
        self.left_out["no 19-class label"] = len(present) - len(self.ids)
        if not self.ids:
            raise DataError(f"{self.root}: no patch is left of {len(partners)} in split {split}: {self.left_out}")
        self._partners = {s2: present[s2] for s2 in self.ids}
        self.labels = np.array([np.zeros(19, bool) if held[s2] is None else held[s2] for s2 in self.ids])


class BigEarthNetMM(_Patches):
    """SAR-optical patches with 19 labels.

    `root` holds the two patch folders (also under the names of the published example) and the split lists; `split`:
    "train", "val" or "test" (list in `root`), or a path to a list; `exclude`: lists of patches to leave out (snow,
    clouds and shadow).

    Items: {"id": S2 patch, "sar": float32 (2, H, W) in dB, "optical": float32 (13, H, W) in reflectance x 10000 with a
    zero row for B10, "labels": bool (19,)}. `.labels` is bool (n, 19). Patches without any of the 19 classes are always
    left out. S1 partners come from the list, else from the S1 patches' JSON. `.statistics`: the published mean and
    standard deviation, modality -> (mean per band, std per band), 0 for B10.
    """

    def __init__(self, root: Path | str, split: str | Path | None = None, *, exclude=(), missing: str = "error"):
        self.root, self.folders, here = Path(root), {}, {}
        for sensor, names in _ROOTS.items():
            folder = next((self.root / name for name in names if (self.root / name).is_dir()), None)
            if folder is None:
                raise DataError(f"{self.root}: no folder {' or '.join(names)} ({sensor} patches)")
            self.folders[sensor], here[sensor] = folder, {patch.name for patch in visible(folder, "*/")}
        if split is None:
            partners = dict.fromkeys(sorted(here["S2"]))
        else:
            lists = [self.root / name for name in (f"bigearthnet-{split}.csv", f"{split}.csv.gz", f"{split}.csv")]
            official = next(filter(Path.exists, lists), lists[0]) if split in ("train", "val", "test") else split
            partners = read_list(official)
        if None in partners.values():  # ask the JSON of every S1 patch
            asked = {self._metadata("S1", s1)[0].get("corresponding_s2_patch"): s1 for s1 in sorted(here["S1"])}
            partners = {s2: s1 or asked.get(s2) for s2, s1 in partners.items()}
        unwanted = set().union(*(read_list(path) for path in exclude))
        self._choose(partners, unwanted, here, self._labels, missing, split)

    def __getitem__(self, i: int) -> dict:
        s2, s1 = self.ids[i], self._partners[self.ids[i]]
        optical, sar = self.folders["S2"] / s2, self.folders["S1"] / s1
        if not self.labels[i].any():  # its JSON could not be read
            self._metadata("S2", s2)
        metadata, labels = self._metadata("S1", s1)
        if (partner := metadata.get("corresponding_s2_patch")) != s2 or (labels != self.labels[i]).any():
            found = f"its JSON says S2 patch {partner} and labels {metadata['labels']}"
            raise DataError(f"{sar}: {found}; expected S2 patch {s2} and the labels of that patch's JSON")
        return _item(s2, optical, sar, self.labels[i])

    def _labels(self, s2: str) -> np.ndarray | None:
        """None for a bad file: one of half a million is reported when its patch is asked for."""
        with suppress(DataError):
            return self._metadata("S2", s2)[1]

    def _metadata(self, sensor: str, patch: str) -> tuple[dict, np.ndarray]:
        """JSON of a patch and its labels, bool (19,)."""
        path = _only(self.folders[sensor] / patch, "*_labels_metadata.json")
        with reading(path, "JSON with the key 'labels'"):
            metadata = json.loads(path.read_text())
            names, partner = metadata["labels"], metadata.get("corresponding_s2_patch")
            if not all(isinstance(value, str) for value in [*names, partner or ""]):
                raise ValueError(f"{names}, {partner}")
        return metadata, labels_19(names, source=path)


class BigEarthNetV2(_Patches):
    """SAR-optical patches of the second release, with 19 labels.

    `root` holds `BigEarthNet-S2`, `BigEarthNet-S1` and `metadata.parquet`, whose column `s1_name` alone pairs the
    patches: their numbers differ. `split`: "train", "val" (also "validation"), "test" or None for all; `exclude`: leave
    out patches with snow, clouds or shadow, which are those in the second table, as it is published, and those that the
    first one marks (one of them has to say so). Items and `.labels` are as with `BigEarthNetMM`.
    """

    def __init__(self, root: Path | str, split: str | None = None, *, exclude: bool = False, missing: str = "error"):
        self.root, here = Path(root), {}
        for sensor in ("S2", "S1"):
            if not (folder := self.root / f"BigEarthNet-{sensor}").is_dir():
                raise DataError(f"{folder}: missing; version 2 has it beside metadata.parquet")
            here[sensor] = {patch.name for patch in visible(folder, "*/*/")}
        wanted, path = {"val": "validation"}.get(split, split), self.root / "metadata.parquet"
        rows = [row for row in _columns(path, _SPLITS) if wanted in (None, row[2])]
        for s2, *_, names in rows:
            if not isinstance(names, list) or not all(name in CLASSES_19 for name in names):
                raise DataError(f"{path}: {s2} has the labels {names}, expected some of the 19 names of BigEarthNet")
        labels = {s2: np.array([name in names for name in CLASSES_19]) for s2, _, _, names in rows}
        if len(labels) < len(rows):
            raise DataError(f"{path}: {len(rows) - len(labels)} of {len(rows)} rows name a patch for a second time")
        unwanted = _unclear(self.root) if exclude else set()
        self._choose({s2: s1 for s2, s1, *_ in rows}, unwanted, here, labels.get, missing, split)

    def __getitem__(self, i: int) -> dict:
        s2, s1 = self.ids[i], self._partners[self.ids[i]]
        optical = self.root / "BigEarthNet-S2" / s2.rsplit("_", 2)[0] / s2
        return _item(s2, optical, self.root / "BigEarthNet-S1" / s1.rsplit("_", 3)[0] / s1, self.labels[i])


_SPLITS = ("patch_id", "s1_name", "split", "labels")  # columns of metadata.parquet
_UNCLEAR = ("contains_seasonal_snow", "contains_cloud_or_shadow")


def _columns(path: Path, columns: Sequence[str]) -> list[tuple]:
    """Rows of some columns of a Parquet file."""
    import pyarrow.parquet  # 0.3 s that only this release needs

    with reading(path, f"a Parquet file with {', '.join(columns)}"):
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


def _unclear(root: Path) -> set[str]:
    """S2 patches with seasonal snow, clouds or shadow by the two tables of a root, of which one has to tell."""
    first, second = root / "metadata.parquet", root / "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
    rows = _columns(second, ("patch_id", *_UNCLEAR)) if second.exists() else []
    try:
        rows += _columns(first, ("patch_id", *_UNCLEAR))
    except DataError as error:
        if not second.exists():
            wanted = f"nor has metadata.parquet the columns {' and '.join(_UNCLEAR)}"
            way = "put it there or set transfer: exclude to false"
            raise DataError(f"{second}: missing, {wanted}; {way}") from error
    return {s2 for s2, *flags in rows if any(flags)}


def _read(root: Path, split: str | None = None, *, missing: str = "error", exclude: bool = False) -> Reader:
    """Either release; ``exclude``: without the patches of the published lists of snow, clouds and shadow."""
    if (root / "metadata.parquet").exists():
        return BigEarthNetV2(root, split, exclude=exclude, missing=missing)
    lists = sorted(visible(root, "patches_with_*")) if exclude else []
    if exclude and not all(any(word in path.name for path in lists) for word in ("snow", "cloud")):
        wanted = "patches_with_seasonal_snow and patches_with_cloud_and_shadow are needed"
        raise DataError(f"{root}: {wanted}, .csv or .csv.gz; put them there or set transfer: exclude to false")
    return BigEarthNetMM(root, split, exclude=lists, missing=missing)


def _samples(folder: Path, split: str | None) -> Reader:
    """The real example patches under the official split lists: the train list's, and all others as test."""
    train = BigEarthNetMM(folder / "bigearthnet_real", folder / "bigearthnet_splits" / "train.csv.bz2", missing="skip")
    if split == "train":
        return train
    everything = BigEarthNetMM(folder / "bigearthnet_real")
    return Part(everything, [i for i, name in enumerate(everything.ids) if name not in train.ids])


BIGEARTHNET = DataSet(
    name="bigearthnet",
    title="BigEarthNet-MM",
    pair="sar_optical",
    modalities=(SAR, OPTICAL),
    read=_read,
    task=Scene(CLASSES_19),
    samples=_samples,
    world="decur_core.worlds.files:BIGEARTHNET",
    excludes=True,
    cite="sumbul2021bigearthnetmm",
)
DATASETS = (BIGEARTHNET,)
