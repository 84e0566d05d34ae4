import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from decur_core import augment as module
from decur_core.augment import OPTICAL, SAR, Policy, augment, draw

STILL = dict(p_jitter=0.0, p_gray=0.0, p_blur=0.0, p_solarize=0.0, p_hflip=0.0, p_vflip=0.0)
WHOLE = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
SIZES = [(30, 26, 24), (66, 72, 52)]  # height, width, view: by matrices, and one sample at a time


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scenes(count, channels, height, width):
    """Smooth images with dark and bright parts, so that clipping, solarize and grayscale all have something to do."""
    coarse = torch.rand(count, channels, 6, 5, generator=seeded(7)) * 1.6 - 0.3
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round().byte()


def reference(image, p, size):
    """The documented sequence for one image, in float64, flips last."""
    box = image[:, p["top"] : p["top"] + p["height"], p["left"] : p["left"] + p["width"]].double() / 255
    view = F.interpolate(box[None], (size, size), mode="bilinear", align_corners=False)[0]
    if p["jitter"]:
        view = (view * p["brightness"]).clamp(0, 1)
        mean = view.mean((1, 2), keepdim=True)
        view = ((view - mean) * p["contrast"] + mean).clamp(0, 1)
    if p["gray"]:
        view = view.mean(0, keepdim=True).repeat(len(view), 1, 1)
    if p["blur"]:
        width = round(p["sigma"] * 6 + 1)
        view = TF.gaussian_blur(view, width + (width % 2 == 0), p["sigma"])
    if p["solarize"]:
        view = torch.where(view >= 0.5, 1 - view, view)
    if p["hflip"]:
        view = TF.horizontal_flip(view)
    return TF.vertical_flip(view) if p["vflip"] else view


def agrees(images, policy, seed=0):
    drawn = draw(len(images), *images.shape[2:], policy, generator=seeded(seed))
    expected = []
    for i, image in enumerate(images):
        expected.append(reference(image, {name: values[i].item() for name, values in drawn.items()}, policy.size))
    views = augment(images, policy, generator=seeded(seed))
    torch.testing.assert_close(views.double(), torch.stack(expected), atol=3e-5, rtol=0)


@pytest.mark.parametrize("height, width, size", SIZES)
@pytest.mark.parametrize("name", [None, *STILL])
def test_each_operation_equals_the_reference(name, height, width, size):
    policy = Policy(size=size, **(STILL | ({name: 1.0} if name else {})))
    agrees(scenes(6, 3, height, width), policy)


@pytest.mark.parametrize("height, width, size", SIZES)
@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("policy", [OPTICAL, SAR], ids=["optical", "sar"])
def test_policies_equal_the_reference(policy, channels, height, width, size):
    agrees(scenes(12, channels, height, width), replace(policy, size=size), seed=3)


def test_full_size_equals_the_reference():
    agrees(scenes(2, 2, 264, 264), replace(OPTICAL, p_blur=1.0), seed=1)


def test_both_ways_of_rendering_agree(monkeypatch):
    images, policy, views = scenes(16, 4, 70, 70), replace(OPTICAL, size=56), []
    for small in (0, 1000):
        monkeypatch.setattr(module, "SMALL", small)
        views.append(augment(images, policy, generator=seeded()))
    assert torch.allclose(*views, atol=3e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_views_do_not_depend_on_how_many_are_rendered_at_once(monkeypatch, size):
    images, policy = scenes(9, 2, 80, 80), replace(OPTICAL, size=size)
    views = augment(images, policy, generator=seeded())
    monkeypatch.setattr(module, "CHUNK", dict.fromkeys(module.CHUNK, 4 * 2 * size**2))
    assert torch.allclose(views, augment(images, policy, generator=seeded()), atol=1e-6)


@pytest.mark.parametrize("size", [24, 52])
def test_a_single_row_of_pixels_equals_the_reference(size):
    agrees(scenes(8, 3, 1, 90), replace(OPTICAL, size=size))


def test_crop_and_blur_equal_opencv():
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is an extra of the benchmarks")
    images, policy = scenes(6, 2, 90, 80), Policy(size=64, **(STILL | {"p_blur": 1.0}))
    drawn = draw(6, 90, 80, policy, generator=seeded())
    p = {name: values.tolist() for name, values in drawn.items()}
    views = augment(images, policy, generator=seeded())
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        box = image[p["top"][i] : p["top"][i] + p["height"][i], p["left"][i] : p["left"][i] + p["width"][i]]
        side = round(6 * p["sigma"][i] + 1) | 1
        view = cv2.GaussianBlur(cv2.resize(box.astype("float32") / 255, (64, 64)), (side, side), p["sigma"][i])
        assert torch.allclose(views[i], torch.from_numpy(view).permute(2, 0, 1), atol=1e-4)
        # on 8 bits, as published, OpenCV chooses the same kernel size and rounds twice
        view = cv2.GaussianBlur(cv2.resize(box, (64, 64)), (0, 0), p["sigma"][i])
        assert (views[i] * 255 - torch.from_numpy(view).permute(2, 0, 1)).abs().max() < 2


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_nothing_switched_on_gives_the_image(size, channels):
    images = torch.randint(0, 256, (5, channels, size, size), dtype=torch.uint8, generator=seeded())
    views = augment(images, Policy(size=size, **STILL, **WHOLE), generator=seeded())
    assert torch.equal(views, images.float() / 255)


@pytest.mark.parametrize("size", [32, 64])
def test_seed_decides_and_samples_are_independent(size):
    images, policy = scenes(1, 3, 80, 80).expand(12, -1, -1, -1), replace(OPTICAL, size=size)
    views = augment(images, policy, generator=seeded(5))
    assert torch.equal(views, augment(images, policy, generator=seeded(5)))
    assert not torch.equal(views, augment(images, policy, generator=seeded(6)))
    assert all((views[i] - views[j]).abs().max() > 0.01 for i in range(12) for j in range(i))
    generator = seeded(5)  # the state moves on: two views of a batch differ
    assert not torch.equal(augment(images, policy, generator=generator), augment(images, policy, generator=generator))


@pytest.mark.parametrize("size", [32, 64])
def test_range_and_form(size):
    images = torch.randint(0, 2, (40, 3, 80, 70), dtype=torch.uint8, generator=seeded()) * 255  # the hardest contrasts
    views = augment(images.transpose(2, 3), Policy(size=size, brightness=1.0, contrast=1.0), generator=seeded())
    assert views.dtype == torch.float32 and views.shape == (40, 3, size, size)
    assert 0 <= views.min() < 0.01 and 0.99 < views.max() <= 1
    assert augment(images[:0], OPTICAL, generator=seeded()).shape == (0, 3, 224, 224)


def test_solarize_inverts_the_bright_half_only():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    views = augment(images, Policy(size=16, **(STILL | WHOLE | {"p_solarize": 1.0})), generator=seeded())
    expected = torch.tensor([v if v < 128 else 255 - v for v in range(256)]) / 255
    assert torch.allclose(views.flatten(), expected, atol=1e-6)


def test_parameters_have_the_published_distributions():
    count, side = 20_000, 264
    p = draw(count, side, side, OPTICAL, generator=seeded())
    for name, chance in dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2, hflip=0.5, vflip=0.5).items():
        assert abs(p[name].double().mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / count), name
    assert (p["top"] + p["height"]).max() <= side and (p["left"] + p["width"]).max() <= side
    assert min(p["top"].min(), p["left"].min()) >= 0
    for name in ("brightness", "contrast"):
        assert (p[name][~p["jitter"]] == 1).all()
        factors = p[name][p["jitter"]]
        assert 0.6 <= factors.min() < 0.601 and 1.399 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.01
    assert 0.1 <= p["sigma"].min() < 0.101 and 1.999 < p["sigma"].max() <= 2 and abs(p["sigma"].mean() - 1.05) < 0.02
    free = torch.stack([p[name].double() for name in p if name not in ("top", "left", "height", "width")])
    assert (torch.corrcoef(free) - torch.eye(len(free))).abs().max() < 0.04


@pytest.mark.parametrize("height, width", [(264, 264), (60, 200)])
def test_crops_are_distributed_as_those_of_torchvision(height, width):
    torch.manual_seed(0)
    image, count = torch.empty(1, height, width), 3000
    theirs = RandomResizedCrop(8, scale=(0.2, 1.0))
    boxes = [theirs.make_params([image]) for _ in range(count)]
    p = draw(count, height, width, OPTICAL, generator=seeded())
    for name in ("top", "left", "height", "width"):
        expected = torch.tensor([box[name] for box in boxes]).double()
        gap = (expected.sort().values - p[name].double().sort().values).abs().mean()  # Wasserstein distance, pixels
        assert gap < 0.05 * expected.std() + 0.5, name
    shares = p["height"] * p["width"] / (height * width)
    if height == width:  # below 3/4 every ratio fits, so that the area stays uniform there
        small = shares[shares < 0.75]
        assert 0.19 < small.min() < 0.21 and abs(small.mean() - 0.475) < 0.015 and abs(small.std() - 0.159) < 0.01


def test_no_fitting_crop_falls_back_to_the_central_one():
    p = draw(50, 20, 200, Policy(size=16, crop_scale=(0.9, 1.0)), generator=seeded())
    assert set(p["height"].tolist()) == {20} and set(p["width"].tolist()) == {27}
    assert set(p["top"].tolist()) == {0} and set(p["left"].tolist()) == {86}


def test_switching_one_operation_off_leaves_the_others():
    ours, theirs = (draw(30, 80, 80, policy, generator=seeded()) for policy in (OPTICAL, SAR))
    for name in ("top", "left", "height", "width", "hflip", "vflip", "gray", "blur", "sigma"):
        assert torch.equal(ours[name], theirs[name]), name
    assert not theirs["jitter"].any() and not theirs["solarize"].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_views_and_never_waits():
    images = scenes(20, 13, 80, 80)
    on_device = images.cuda()
    augment(on_device, OPTICAL, generator=seeded())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = augment(on_device, OPTICAL, generator=seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(views.cpu(), augment(images, OPTICAL, generator=seeded()), atol=1e-4)


def test_autocast_leaves_the_precision():
    images, policy = scenes(8, 3, 36, 36), replace(OPTICAL, size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = augment(images, policy, generator=seeded())
    assert torch.equal(views, augment(images, policy, generator=seeded()))


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(2, 3, 40, 40), "uint8.*float32.*encode"),
        (torch.zeros(3, 40, 40, dtype=torch.uint8), r"\(N, C, H, W\).*\(3, 40, 40\)"),
        (torch.zeros(2, 0, 40, 40, dtype=torch.uint8), r"\(2, 0, 40, 40\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "4 x 4 px.*1.5 px.*larger images"),
    ],
)
def test_wrong_images_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        augment(images, OPTICAL, generator=seeded())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"p_gray": 1.2}, r"p_gray is 1.2.*\[0, 1\]"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale is \(0.5, 1.5\)"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio is \(2.0, 1.0\)"),
        ({"size": 6}, "size is 6, a blur reaches 6 px"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Policy(**settings)
