"""Augmentation on one core: ours against the published way, `python -m benchmarks.augment [--repeats 15]`.

The published way is a sequence of OpenCV and numpy calls for each 8-bit sample (H, W, C), rebuilt here from what its
operations do, in 8 bits; "tuned" is the fastest form we found with OpenCV (look-up tables for all that acts on single
values). All take the same samples and parameters, one thread, in turns, and end with a float32 batch (N, C, S, S). The
median of the turns is kept. Needs opencv-python-headless, the extra `bench`.
"""

import argparse
from dataclasses import replace

import cv2
import numpy as np
import torch

from decur_core.augment import OPTICAL, SAR, Policy, augment, draw

from . import common

CASES = {  # name: samples, channels, image side, policy
    "optical 264 to 224": (64, 13, 264, OPTICAL),
    "SAR 264 to 224": (64, 2, 264, SAR),
    "optical 36 to 32": (256, 13, 36, replace(OPTICAL, size=32)),
    "SAR 36 to 32": (256, 2, 36, replace(SAR, size=32)),
}
STEPS = np.arange(256, dtype=np.float64)


def published_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = image.mean(axis=(0, 1))
    return ((image - mean) * factor + mean).astype(np.uint8)


def published_solarize(image: np.ndarray) -> np.ndarray:
    changed, full = image.copy(), np.full(image.shape, 255.0)
    changed[image >= 128] = full[image >= 128] - image[image >= 128]
    return changed


PUBLISHED = {
    "brightness": lambda image, factor: (image * factor).astype(np.uint8),
    "contrast": published_contrast,
    "gray": lambda image: np.repeat(image.mean(axis=2)[:, :, None], image.shape[2], axis=2).astype(np.uint8),
    "solarize": published_solarize,
}


def tuned_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.reduce(cv2.reduce(image, 0, cv2.REDUCE_AVG, dtype=cv2.CV_32F), 1, cv2.REDUCE_AVG)[0, 0]
    table = np.clip((STEPS[:, None] - mean) * factor + mean, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])


TUNED = {
    "brightness": lambda image, factor: cv2.LUT(image, np.clip(STEPS * factor, 0, 255).astype(np.uint8)),
    "contrast": tuned_contrast,
    "gray": lambda image: cv2.transform(image, np.full((image.shape[2],) * 2, 1 / image.shape[2], np.float32)),
    "solarize": lambda image: cv2.LUT(image, np.minimum(STEPS, 255 - STEPS).astype(np.uint8)),
}


def opencv(images: list[np.ndarray], drawn: dict[str, list], size: int, steps: dict) -> torch.Tensor:
    """Views (N, C, size, size) float32 of 8-bit images (H, W, C), one sample and one operation after another."""
    views = []
    for image, *values in zip(images, *drawn.values(), strict=True):
        p = dict(zip(drawn, values, strict=True))
        top, left = p["top"], p["left"]
        image = cv2.resize(image[top : top + p["height"], left : left + p["width"]], (size, size))
        if p["jitter"]:
            image = steps["contrast"](steps["brightness"](image, p["brightness"]), p["contrast"])
        if p["gray"]:
            image = steps["gray"](image)
        if p["blur"]:
            image = cv2.GaussianBlur(image, (0, 0), p["sigma"])
        if p["solarize"]:
            image = steps["solarize"](image)
        if p["hflip"]:
            image = cv2.flip(image, 1)
        if p["vflip"]:
            image = cv2.flip(image, 0)
        views.append(torch.from_numpy(image.transpose(2, 0, 1)).contiguous().float().div(255))
    return torch.stack(views)


def compare(samples: int, channels: int, side: int, policy: Policy, repeats: int) -> dict[str, float]:
    """Milliseconds for a sample, of each way."""
    noise = np.random.default_rng(0).integers(0, 256, (samples, side // 4, side // 4, channels), dtype=np.uint8)
    images = [cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in noise]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    drawn = draw(samples, side, side, policy, generator=torch.Generator().manual_seed(0))
    drawn = {name: values.tolist() for name, values in drawn.items()}
    ways = {
        "published": lambda: opencv(images, drawn, policy.size, PUBLISHED),
        "tuned": lambda: opencv(images, drawn, policy.size, TUNED),
        "ours": lambda: augment(batch, policy, generator=torch.Generator().manual_seed(0)).contiguous(),
    }
    return {name: 1e3 * value / samples for name, value in common.seconds(ways, repeats=repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="turns after one to warm up")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = []
    for case, settings in CASES.items():
        ms = compare(*settings, repeats)
        ratios = {"published/ours": ms["published"] / ms["ours"], "tuned/ours": ms["tuned"] / ms["ours"]}
        rows.append({"ms per view": case, **ms, **ratios})
    print(common.table(rows))
    sizes = {name: {"samples": n, "channels": c, "side": h, "size": p.size} for name, (n, c, h, p) in CASES.items()}
    print(common.save("augment", settings={"repeats": repeats, "opencv": cv2.__version__, "cases": sizes}, rows=rows))


if __name__ == "__main__":
    main()
