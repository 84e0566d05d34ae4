"""SUN RGB-D: 10,335 indoor images with depth from four sensors and masks of 37 classes (Song et al. 2015).

Tree: `SUNRGBD/<sensor>/<source>/…/<frame>/` with `image/*.jpg`, `depth/*.png` (as measured, with holes), `depth_bfx/
*.png` (filled in), `intrinsics.txt` and `extrinsics/*.txt`; sizes differ (kv1 427 x 561 pixels, kv2 530 x 730). Beside
SUNRGBD/ are the lists of the official split, 5,285 frames for training and 5,050 for testing, and one file of masks.

How to get it: SUNRGBD.zip and SUNRGBDtoolbox.zip (masks, lists) from rgbd.cs.princeton.edu; the lists are also text
files in github.com/ankurhanda/sunrgbd-meta-data. No licence comes with the files. 1,449 frames are those of NYUv2.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from PIL import Image

from decur_core.data.datasets import DataSet
from decur_core.data.hha import depth_to_hha
from decur_core.data.modality import INDOORS
from decur_core.data.raster import MISSING, DataError, Reader, one_of, reading, repeated, resize, visible
from decur_core.data.tasks import Masks

_NAMES = """\
wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser \
pillow mirror floor_mat clothes ceiling books fridge tv paper towel shower_curtain box whiteboard person night_stand \
toilet sink lamp bathtub bag"""
CLASSES_37: tuple[str, ...] = tuple(_NAMES.split())  # values 1 to 37 of masks
_LISTS = {"test": "sunrgbd_testing_images.txt", "train": "sunrgbd_training_images.txt"}  # in the order of the masks
_ALLSPLIT, _MASKS = (f"SUNRGBDtoolbox/{name}.mat" for name in ("traintestSUNRGBD/allsplit", "Metadata/SUNRGBD2Dseg"))
_FRAME = re.compile(r"(?:.*/)?SUNRGBD/(.+?)(?:/image/[^/]+|/)?")
_WANTED = "the masks of SUNRGBDtoolbox.zip, rgbd.cs.princeton.edu; take it from there, or remove it"


def decode_depth(png_uint16: np.ndarray) -> np.ndarray:
    """Depth file, uint16: millimetres, bits rotated left by three -> float32 metres, 0 = hole, nothing cut off."""
    if png_uint16.dtype != np.uint16:
        raise DataError(f"depth of SUN RGB-D is uint16, found {png_uint16.dtype}; read the png with all its 16 bits")
    return (png_uint16 >> 3 | png_uint16 << 13) / np.float32(1000)


def read_image(path: Path, *modes: str) -> np.ndarray:
    """Pixels of a jpg or png in one of PIL's `modes`: "RGB" (3, H, W), "P" (indices, not colours) or others (H, W)."""
    with reading(path, f"an image of mode {' or '.join(modes)}; unpack it again"), Image.open(path) as image:
        if image.mode not in modes:
            raise ValueError(f"mode {image.mode}")
        pixels = np.array(image)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels


def checked(item: dict, files: dict[str, Path], classes: int) -> dict:
    """The item, if sizes and values of its images can be right; `files`: key -> file, with rgb and depth at least."""
    for key, file in files.items():
        if (size := item[key].shape[-2:]) != (other := item["rgb"].shape[-2:]):
            raise DataError(f"{file}: {size} pixels, but {files['rgb']} has {other}; one is not of this frame")
    depth, mask = item["depth"], item.get("mask")
    if not 0 <= depth.min() <= depth.max() <= 100:  # not-a-number is not either
        raise DataError(f"{files['depth']}: depth {depth.min()} to {depth.max()}, expected metres, 0 (hole) to 100")
    if not depth.any():
        raise DataError(f"{files['depth']}: nothing but holes; leave the frame out")
    if mask is not None:
        if not (known := np.isin(mask, np.arange(classes + 1))).all():
            found = f"label {mask[~known][0]} for {files['rgb']}, expected 0 to {classes}"
            raise DataError(f"{files['mask']}: {found}; take masks of the {classes} classes")
        item["mask"] = np.ascontiguousarray(mask, dtype=np.uint8)
    return item


class SUNRGBD(Reader):
    """RGB-depth frames, with masks where they are there.

    `root` holds SUNRGBD/, or is it; `split`: "train", "test" (text lists beside SUNRGBD/, else the toolbox's
    allsplit.mat) or None for every frame found, sorted; `depth`: "depth_bfx" (filled in) or "depth"; `missing` is about
    frames. Masks are there if their file is in the toolbox.

    Items: {"id": path of the frame below SUNRGBD/, "rgb": uint8 (3, H, W), "depth": float32 (1, H, W) in metres, 0 =
    hole, "intrinsics": float64 (3, 3) and "gravity": float64 (3,) as `depth_to_hha` takes them, "mask": uint8 (H, W), 0
    = void, 1 to 37 = CLASSES_37}. As in the toolbox, the first image and depth of a frame count, and its last
    extrinsics. These turn camera coordinates until y points down, so their second row is down as the camera sees it.

    Masks: SUNRGBD2Dseg(k).seglabel is that of the k-th frame of the test list followed by the training list, as
    published; the text lists, allsplit.mat and SUNRGBDMeta are in one order.
    """

    def __init__(self, root: Path | str, split: str | None = None, *, depth="depth_bfx", missing="error"):
        one_of([*_LISTS, None], split=split)
        one_of(("depth_bfx", "depth"), depth=depth)
        one_of(MISSING, missing=missing)
        root = Path(root).absolute()
        self.root = root.parent if root.name == "SUNRGBD" and not (root / "SUNRGBD").is_dir() else root
        self._top, self._depth, self._rows = self.root / "SUNRGBD", depth, {}
        has_masks = (self.root / _MASKS).is_file()
        lists = {name: self._list(name) for name in _LISTS} if split or has_masks else {}
        frames = sum(lists.values(), [])
        if twice := repeated(frames):
            raise DataError(f"{self.root}: the split lists name {twice[0]} twice; take both as published")
        if has_masks:
            with reading(path := self.root / _MASKS, _WANTED), h5py.File(path, locking=False) as file:
                count = len(file["SUNRGBD2Dseg/seglabel"])
            if count != len(frames):
                raise DataError(f"{path}: {count} masks, but {len(frames)} frames in the lists; take both as published")
            self._rows = {frame: row for row, frame in enumerate(frames)}
        wanted = lists[split] if split else sorted(_frames(self._top))
        self.ids = [frame for frame in wanted if (self._top / frame / "image").is_dir()]
        self.left_out = {"absent": len(wanted) - len(self.ids)}
        if not self.ids or self.left_out["absent"] and missing == "error":
            state = f"{len(self.ids)} of {len(wanted)} frames, lacks {min({*wanted} - {*self.ids}, default='any')}"
            raise DataError(f"{self._top}: {state}; unpack SUNRGBD.zip, or use what is there with missing='skip'")

    def __getitem__(self, i: int) -> dict:
        frame = self._top / self.ids[i]
        files = {"rgb": _file(frame / "image", "*.jpg"), "depth": _file(frame / self._depth, "*.png")}
        item = {"id": self.ids[i], "rgb": read_image(files["rgb"], "RGB")}
        item["depth"] = decode_depth(read_image(files["depth"], "I;16"))[None]
        item["intrinsics"] = k = _matrix(file := frame / "intrinsics.txt", 3, 3)
        (fx, _, cx), (_, fy, cy), height, width = *k[:2], *item["rgb"].shape[1:]
        inside = 0 < min(fx, fy) <= max(fx, fy) < np.inf and 0 < cx < width and 0 < cy < height
        if not inside or (k != [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]).any():
            form = f"fx 0 cx 0 fy cy 0 0 1 for {width} x {height} pixels; unpack the frame again"
            raise DataError(f"{file}: {k.tolist()}, expected {form}")
        turn = _matrix(file := _file(frame / "extrinsics", "*.txt", last=True), 3, 4)[:, :3]
        if not (np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) and np.linalg.det(turn) > 0):
            raise DataError(f"{file}: {turn.tolist()}, expected a rotation; unpack the frame again")
        item["gravity"] = turn[1].copy()
        if self._rows:
            if (row := self._rows.get(self.ids[i])) is None:
                raise DataError(f"{frame}: in neither split list, so without a mask; leave it out")
            with reading(file := self.root / _MASKS, _WANTED), h5py.File(file, locking=False) as masks:
                item["mask"] = masks[masks["SUNRGBD2Dseg/seglabel"][row, 0]][()].T
            files["mask"] = file
        return checked(item, files, len(CLASSES_37))

    def _list(self, split: str) -> list[str]:
        """Frames of a split, in its order, as paths below SUNRGBD/."""
        path, other, frames = self.root / _LISTS[split], self.root / _ALLSPLIT, []
        path = other if other.exists() and not path.exists() else path
        with reading(path, f"SUNRGBD/…/<frame>/image/<name>.jpg in every line, or {_ALLSPLIT} in its place"):
            if path == other:
                lines = [cell.item() for cell in scipy.io.loadmat(path)[f"all{split}"].ravel()]
            else:
                lines = path.read_text().splitlines()
            for line in filter(None, map(str.strip, lines)):
                if not (match := _FRAME.fullmatch(re.sub("/+", "/", line))):
                    raise ValueError(line)
                frames.append(match[1])
        return frames


def _frames(top: Path) -> Iterator[str]:
    """Folders with an image below the top, also behind links, none twice."""
    seen = set()
    for at, folders, _ in os.walk(top, followlinks=True):
        if os.path.realpath(at) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "image" in folders:
            yield Path(at).relative_to(top).as_posix()


def _file(folder: Path, pattern: str, *, last: bool = False) -> Path:
    """First or last file of a folder that fits a pattern."""
    if not (found := sorted(visible(folder, pattern))):
        raise DataError(f"{folder}: no file {pattern}; unpack the frame again")
    return found[-last]


def _matrix(path: Path, height: int, width: int) -> np.ndarray:
    """Numbers of a text file row by row, however they are spread over lines: float64 (height, width)."""
    with reading(path, f"{height} x {width} numbers; unpack the frame again"):
        return np.array(path.read_text().split(), float).reshape(height, width)


class AsHHA(Reader):
    """RGB-depth items as they are stored: depth as HHA, image, HHA and mask of one size.

    ``reader`` gives ``rgb, depth, intrinsics, gravity`` and maybe ``mask`` (``SUNRGBD``, ``NYUv2``, ``RoomWorld``);
    HHA comes before the change of size, so that the camera's intrinsics hold. Items: ``rgb`` and ``hha`` uint8
    (3, *size), bilinear; ``mask`` uint8 size, nearest.
    """

    def __init__(self, reader: Reader, size: tuple[int, int]):
        self.reader, self.size, self.ids = reader, size, reader.ids

    def __getitem__(self, i: int) -> dict:
        item = self.reader[i]
        hha = depth_to_hha(item["depth"][0], item["intrinsics"], item["gravity"]).transpose(2, 0, 1)
        made = {"id": item["id"]}
        for name, image in (("rgb", item["rgb"]), ("hha", hha)):
            made[name] = np.rint(resize(image, self.size)).clip(0, 255).astype(np.uint8)
        if "mask" in item:
            mask, sides = item["mask"], zip(self.size, item["mask"].shape, strict=True)
            rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in sides)
            made["mask"] = mask[rows[:, None], columns]
        return made


SUN_RGBD = DataSet(
    name="sunrgbd",
    title="SUN RGB-D",
    pair="rgb_depth",
    modalities=INDOORS,
    read=SUNRGBD,
    pretrain="all",
    task=Masks(CLASSES_37),
    stored=AsHHA,
    samples=lambda folder, split: SUNRGBD(folder / "sunrgbd_native_sample"),
    world="decur_core.worlds.rooms:SUNRGBD",
    cite="song2015sunrgbd",
)
DATASETS = (SUN_RGBD,)
