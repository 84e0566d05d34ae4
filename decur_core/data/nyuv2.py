"""NYU Depth v2, labelled part: 1,449 indoor images of 480 x 640 pixels with depth and masks (Silberman et al. 2012).

Either as the tree that segmentation methods share, `RGB/<i>.jpg`, `Depth/<i>.npy` (float32, metres, filled in) or
`Depth/<i>.png` (16 bits, millimetres), `Label/<i>.png` (palette image, 40 classes), and `train.txt`, `test.txt` with
`RGB/<i>.jpg<TAB>Label/<i>.png` or `<i>` per line, images being of any size; or as published,
`nyu_depth_v2_labeled.mat` (also in metres and filled in) with `splits.mat` and `classMapping40.mat` (894 classes to
40). i = 0 to 1448 counts the images of the .mat, whose own lists begin at 1; 795 are for training, 654 for
testing. `camera_rotations_NYU.txt`, a rotation per image, may be there too.

How to get it: the .mat (2.8 GB) from cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html, its companions and the rotations
from github.com/ankurhanda/nyuv2-meta-data. No licence is stated.
"""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import scipy.io

from decur_core.data.datasets import DataSet
from decur_core.data.modality import INDOORS
from decur_core.data.raster import MISSING, DataError, Reader, one_of, reading, repeated, visible
from decur_core.data.sunrgbd import CLASSES_37, AsHHA, checked, read_image
from decur_core.data.tasks import Masks, Presence

_NAMES = {"fridge": "refridgerator", "tv": "television"}  # the other 35 of the first 37 are those of SUN RGB-D
CLASSES_40: tuple[str, ...] = (  # values 1 to 40 of masks
    *(_NAMES.get(name, name.replace("_", " ")) for name in CLASSES_37),
    *("otherstructure", "otherfurniture", "otherprop"),
)
# fx, fy, cx, cy of the colour camera, which depth is projected into, for 480 x 640 pixels
CAMERA = (518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465)
_MAT = "nyu_depth_v2_labeled.mat"
_WANTED = "the .mat of cs.nyu.edu/~silberman, or else a tree with the folder RGB; download one of them"


def intrinsics(height: int, width: int) -> np.ndarray:
    """Those of whole images brought to any size: float64 (3, 3), where the first pixel has its centre at (1, 1)."""
    (fx, fy, cx, cy), sy, sx = CAMERA, height / 480, width / 640
    return np.array([[fx * sx, 0, (cx - 0.5) * sx + 0.5], [0, fy * sy, (cy - 0.5) * sy + 0.5], [0, 0, 1]])


def _metres(path: Path) -> np.ndarray:
    """Depth file: an array in metres, or 16 bits in millimetres; the sensor ends at 10 m, so more is another unit."""
    if path.suffix == ".npy":
        with reading(path, "an array of depth in metres"), open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    if (depth := read_image(path, "I;16")).max() > 10_000:
        raise DataError(f"{path}: depth up to {depth.max()}, expected millimetres, 0 (hole) to 10000; convert its unit")
    return depth / np.float32(1000)


class NYUv2(Reader):
    """RGB-depth images with masks.

    `root` holds the tree, or else the .mat and its two companions; `split`: "train" or "test"; `missing` is about
    images of a list that are not in RGB/. No image may be in two lists, and where splits.mat is there, it and the lists
    must agree.

    Items: {"id": i, "rgb": uint8 (3, H, W), "depth": float32 (1, H, W) in metres, 0 = hole, "intrinsics": float64 (3,
    3) and "gravity": float64 (3,), or None without the rotations, as `depth_to_hha` takes them, "mask": uint8 (H, W), 0
    = void, 1 to 40 = CLASSES_40}. A side ratio other than 3:4 is refused: parts of images have other intrinsics.

    The rotations turn coordinates x right, y forward, z up until z is up, so their third row is up as the camera sees
    it: gravity is its negative, with the axes of the camera.
    """

    def __init__(self, root: Path | str, split: str | None = None, *, missing: str = "error"):
        one_of(("train", "test", None), split=split)
        one_of(MISSING, missing=missing)
        self.root, self._down, self._to_40 = Path(root), None, None
        if (self.root / "RGB").is_dir():
            here = {path.stem for path in visible(self.root / "RGB", "*.jpg")}
            self._depth = ".npy" if visible(self.root / "Depth", "*.npy") else ".png"
        else:
            with reading(path := self.root / _MAT, _WANTED), h5py.File(path, locking=False) as file:
                here = set(map(str, range(len(file["images"]))))
            self._to_40 = np.append(0, self._matlab("classMapping40.mat", "mapClass")).astype(np.uint8)
        wanted = self._list(split) if split else sorted(here, key=lambda i: (len(i), i))
        self.ids = [i for i in wanted if i in here]
        self.left_out = {"absent": len(wanted) - len(self.ids)}
        if len(self.ids) < len(wanted) and missing == "error" or not self.ids:
            state = f"{len(self.ids)} of the {len(wanted)} images of split {split}"
            raise DataError(f"{self.root}: has {state}; complete it, or use what is there with missing='skip'")
        if (path := self.root / "camera_rotations_NYU.txt").is_file():
            with reading(path, "3 x 3 numbers per image"):
                rotations = np.loadtxt(path).reshape(-1, 3, 3)
            if not np.allclose(rotations @ rotations.swapaxes(1, 2), np.eye(3), atol=1e-3):
                raise DataError(f"{path}: not all of its matrices are rotations; download it again")
            if wrong := [i for i in self.ids if not (i.isdecimal() and int(i) < len(rotations))]:
                raise DataError(f"{path}: {len(rotations)} rotations, none for {wrong[0]}; take both as published")
            self._down = rotations[:, 2, [0, 2, 1]] * [-1, 1, -1]

    def __getitem__(self, i: int) -> dict:
        item, files = {"id": (name := self.ids[i])}, dict.fromkeys(("rgb", "depth", "mask"), self.root / _MAT)
        if self._to_40 is None:
            files = {"rgb": self.root / f"RGB/{name}.jpg", "mask": self.root / f"Label/{name}.png"}
            files["depth"] = self.root / "Depth" / f"{name}{self._depth}"
            depth = _metres(files["depth"])
            item |= {"rgb": read_image(files["rgb"], "RGB"), "mask": read_image(files["mask"], "P", "L")}
        else:
            with reading(files["rgb"], _WANTED), h5py.File(files["rgb"], locking=False) as file:
                rgb, depth, labels = (file[k][int(name)].swapaxes(-1, -2) for k in ("images", "depths", "labels"))
                if labels.max() >= len(self._to_40):
                    raise ValueError(f"label {labels.max()} in image {name}")
            item |= {"rgb": np.ascontiguousarray(rgb), "mask": self._to_40[labels]}
        if depth.dtype.kind != "f" or depth.ndim != 2:
            raise DataError(f"{files['depth']}: {depth.dtype} {depth.shape}, expected (H, W) metres as floating point")
        item["depth"] = np.ascontiguousarray(depth[None], dtype=np.float32)
        height, width = item["rgb"].shape[1:]
        if 4 * height != 3 * width:
            raise DataError(f"{files['rgb']}: {height} x {width} pixels, expected the ratio 3:4 of a whole image")
        item["intrinsics"] = intrinsics(height, width)
        item["gravity"] = None if self._down is None else self._down[int(name)].copy()
        return checked(item, files, len(CLASSES_40))

    def _matlab(self, name: str, key: str) -> np.ndarray:
        with reading(path := self.root / name, f"a MATLAB file with {key}; download it"):
            return scipy.io.loadmat(path)[key].ravel()

    def _list(self, split: str) -> list[str]:
        """Images of a split, in the order of its list."""
        lists, official = {}, {}
        if self._to_40 is not None or (self.root / "splits.mat").is_file():
            for name in ("train", "test"):
                official[name] = [str(k - 1) for k in self._matlab("splits.mat", f"{name}Ndxs").astype(int)]
        if self._to_40 is not None:
            return official[split]
        for name in ("train", "test"):
            with reading(path := self.root / f"{name}.txt", "the files of one image, or its name, in every line"):
                stems = [{Path(column).stem for column in line.split()} for line in path.read_text().splitlines()]
                if wrong := [stem for stem in stems if len(stem) > 1]:
                    raise ValueError(sorted(wrong[0]))
            lists[name] = [min(stem) for stem in stems if stem]
            if official and {*lists[name]} != {*official[name]}:
                raise DataError(f"{path}: not the images of splits.mat, which has {len(official[name])}; remove one")
        if twice := repeated(lists["train"] + lists["test"]):
            raise DataError(f"{self.root}: train.txt and test.txt name {twice[0]} twice; take both as published")
        return lists[split]


NYUV2 = DataSet(
    name="nyuv2",
    title="NYU Depth v2",
    pair="rgb_depth",
    modalities=INDOORS,
    read=NYUv2,
    pretrain="train",
    task=Masks(CLASSES_40),
    stored=AsHHA,
    samples=lambda folder, split: NYUv2(folder / "nyu_rgbd_sample", split, missing="skip"),
    world="decur_core.worlds.rooms:NYUV2",
    cite="silberman2012nyuv2",
)
PRESENCE = replace(NYUV2, name="nyuv2_presence", task=Presence(CLASSES_40), pretrain="")
DATASETS = (NYUV2, PRESENCE)
