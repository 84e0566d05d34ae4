"""Segmentation: the network of the paper, targets and scores, multi-scale prediction, and crops that stay aligned."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from decur_core import augment, backbones
from decur_core.data import batches, tasks
from decur_core.data.modality import DEM, GEOMETRY, RGB
from decur_core.data.raster import DataError
from decur_core.data.tasks import IGNORE, Masks
from decur_core.model import MultimodalModel
from decur_core.transfer import fcn as segmentation
from decur_core.transfer.fcn import FCN
from decur_core.transfer.networks import NETWORKS

TASK = Masks(tuple("abcde"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["small", "resnet18", "mit_b0"])
def model(request):
    torch.manual_seed(0)
    return MultimodalModel(request.param, {"first": 3, "second": 2}, (8,))


@pytest.mark.parametrize("names", [("first", "second"), ("first",), ("second",)])
def test_logits_are_those_of_the_paper(model, names):
    """Maps side by side, upsampled, then convolved with 1x1 weights and summed."""
    network = FCN({name: model.backbones[name] for name in names}, classes=5).eval()
    images = {"first": torch.rand(2, 3, 64, 96), "second": torch.rand(2, 2, 64, 96)}
    with torch.no_grad():
        logits = network(*(images[name] for name in names))
        pyramids = [backbones.feature_maps(model.backbones[name], images[name]) for name in names]
        expected = torch.zeros(2, 5, 64, 96)
        for k, head in zip((-3, -2, -1), network.heads, strict=True):
            maps = torch.cat([pyramid[k] for pyramid in pyramids], 1)
            rows = [torch.linspace(0, n - 1, size) for n, size in zip(maps.shape[2:], (64, 96), strict=True)]
            weights = [
                (1 - (r[:, None] - torch.arange(n)).abs()).clamp(min=0)
                for r, n in zip(rows, maps.shape[2:], strict=True)
            ]
            raised = weights[0] @ maps @ weights[1].T
            expected += torch.einsum("kc,nchw->nkhw", head.weight[:, :, 0, 0], raised) + head.bias[:, None, None]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_counts_beside_the_published():
    """The script has 128, 256 and 512 channels between, and 11 outputs; the docstring says so with both counts."""
    networks = {name: backbones.build("resnet50", 3)[0] for name in ("rgb", "dem")}
    network = FCN(networks, classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*torch.zeros(2, 1, 3, 224, 224))
    encoders = 2 * 23_508_032
    published = encoders + sum(c * m + m + 11 * m + 11 for c, m in ((1024, 128), (2048, 256), (4096, 512)))
    assert published == 49_779_361 and sum(p.numel() for p in network.parameters()) == 47_087_774
    assert counter.get_total_flops() == 16_376_643_584
    assert all(text in FCN.__doc__ for text in ("49,779,361", "17.95", "47,087,774", "16.38"))
    assert sum(p.numel() for p in FCN({"rgb": networks["rgb"]}, classes=10).parameters()) == encoders // 2 + 35_870


def test_frozen_encoders_keep_still(model):
    network = FCN(model.backbones, classes=3, frozen=True).train()
    before = {k: v.clone() for k, v in network.encoders.state_dict().items()}
    truth = torch.zeros(2, 64, 64, dtype=torch.int64)
    optimizer, losses = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4), []
    for _ in range(5):
        losses.append(TASK.loss(network(torch.ones(2, 3, 64, 64), torch.ones(2, 2, 64, 64)), truth))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in network.encoders.state_dict().items())
    assert {k.split(".")[0] for k, p in network.named_parameters() if p.grad is not None} == {"heads"}


def test_frozen_encoders_keep_still_before_any_call_of_train(model):
    network = FCN(model.backbones, classes=3, frozen=True)
    before = {k: v.clone() for k, v in network.encoders.state_dict().items()}
    network(torch.rand(2, 3, 64, 64), torch.rand(2, 2, 64, 64))
    assert network.training and not any(module.training for module in network.encoders.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.encoders.state_dict().items())


def test_fine_tuning_reaches_every_used_parameter(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    network = FCN(model.backbones, classes=3).train()
    truth = torch.randint(0, 3, (2, 64, 64), generator=seeded())
    TASK.loss(network(torch.rand(2, 3, 64, 64), torch.rand(2, 2, 64, 64)), truth).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_targets_and_loss():
    mask = torch.tensor([[[0, 1], [3, 0]]], dtype=torch.uint8)
    truth = TASK.target(mask)
    assert truth.dtype == torch.int64 and truth.tolist() == [[[IGNORE, 0], [2, IGNORE]]]
    logits = torch.randn(1, 3, 2, 2, generator=seeded()).requires_grad_()
    log_p = logits.log_softmax(1)
    torch.testing.assert_close(TASK.loss(logits, truth), -(log_p[0, 0, 0, 1] + log_p[0, 2, 1, 0]) / 2)
    nothing = TASK.loss(logits, torch.full_like(truth, IGNORE))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()
    with pytest.raises(DataError, match="torch.int64, expected torch.uint8"):
        TASK.target(truth)


def test_scores_of_a_whole_set():
    generator = seeded()
    truth = torch.randint(-1, 4, (6, 20, 20), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth.clamp(min=0), torch.tensor(1))
    confusion = multiclass_confusion_matrix(guess, truth, 6, ignore_index=IGNORE)
    found = tasks.mean_iou(confusion)
    iou, keep = [], truth != IGNORE
    for c in range(6):
        a, b = (guess == c) & keep, (truth == c) & keep
        iou.append(100 * float((a & b).sum() / (a | b).sum()) if (a | b).any() else None)
    assert iou[4] is iou[5] is None
    assert found["per_class"] == pytest.approx(iou, abs=1e-4)
    assert found["miou"] == pytest.approx(np.mean(iou[:4]))
    assert found["miou"] == pytest.approx(100 * float(multiclass_jaccard_index(guess, truth, 6, ignore_index=IGNORE)))
    assert found["accuracy"] == pytest.approx(100 * float((guess == truth)[keep].float().mean()))


def test_one_class_has_a_score():
    truth = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    task = Masks(("roof",))
    found = task.score([(torch.zeros(1, 2, 2, dtype=torch.int64), task.target(truth))])
    assert found == {"miou": 100.0, "accuracy": 100.0, "per_class": [100.0]}


def test_a_class_that_is_only_predicted_counts_as_zero():
    found = tasks.mean_iou(torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    assert found == {"miou": 37.5, "accuracy": 75.0, "per_class": [75.0, 0.0, None]}
    with pytest.raises(DataError, match="no labelled pixel"):
        tasks.mean_iou(torch.zeros(3, 3))


class Toy(nn.Module):
    """Two images to logits that depend on the neighbourhood and on where the border is."""

    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = (nn.Conv2d(c, classes, 5, padding=2, stride=2) for c in (3, 1))
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, one, two):
        return F.interpolate(self.norm(self.one(one) * self.two(two)) * 3, size=one.shape[2:], mode="bilinear")


def pair(n, height, width, seed=0):
    return [torch.randn(n, c, height, width, generator=seeded(seed + c)) for c in (3, 1)]


def by_hand(network, images, scales, flip, window):
    """The published protocol, written for one sample and with numpy's sums."""
    (height, width), total = images[0].shape[2:], 0
    for scale in scales:
        h, w = round(height * scale), round(width * scale)
        one, two = (F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False) for x in images)

        def seen(one, two):
            scores = network(one, two)[0]
            if flip:
                scores = scores + network(one.flip(-1), two.flip(-1))[0].flip(-1)
            return scores.double().exp().numpy()

        if h <= window[0] or w <= window[1]:
            high, wide = max(h, window[0]), max(w, window[1])
            top, left = (high - h) // 2, (wide - w) // 2
            padded = [torch.zeros(1, x.shape[1], high, wide) for x in (one, two)]
            for canvas, x in zip(padded, (one, two), strict=True):
                canvas[:, :, top : top + h, left : left + w] = x
            votes = seen(*padded)[:, top : top + h, left : left + w]
        else:
            votes = np.zeros((4, h, w))
            steps = [math.ceil(side * 2 / 3) for side in window]
            for y in range(0, h - window[0] + steps[0], steps[0]):
                for x in range(0, w - window[1] + steps[1], steps[1]):
                    y0, x0 = min(y, h - window[0]), min(x, w - window[1])
                    part = (slice(y0, y0 + window[0]), slice(x0, x0 + window[1]))
                    votes[:, *part] += seen(one[:, :, *part], two[:, :, *part])
        total = total + F.interpolate(torch.from_numpy(votes)[None], size=(height, width), mode="bilinear")[0]
    return total.argmax(0)


@pytest.mark.parametrize("size", [(40, 60), (48, 64), (60, 100), (129, 90), (32, 200)])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.75, 1.0, 1.25), True)])
def test_prediction_follows_the_published_protocol(size, scales, flip):
    network, images = Toy().eval(), pair(2, *size)
    found = segmentation.predict(network, images, scales=scales, flip=flip, window=(48, 64))
    assert found.shape == (2, *size) and found.dtype == torch.int64
    with torch.no_grad():
        expected = torch.stack(
            [by_hand(network, [x[i : i + 1] for x in images], scales, flip, (48, 64)) for i in range(2)]
        )
    assert (found == expected).float().mean() > 0.9999


def test_prediction_is_plain_argmax_of_whole_images_and_independent_of_the_batch():
    network, images = Toy().train(), pair(3, 50, 70)
    statistics = network.norm.running_mean.clone()
    found = segmentation.predict(network, images)
    assert network.training and torch.equal(network.norm.running_mean, statistics)
    single = [
        segmentation.predict(network, [x[i : i + 1] for x in images], scales=(1.0, 1.5), flip=True) for i in range(3)
    ]
    assert torch.equal(torch.cat(single), segmentation.predict(network, images, scales=(1.0, 1.5), flip=True))
    with torch.no_grad():
        assert torch.equal(found, network.eval()(*images).argmax(1))


def test_prediction_with_mirrored_images_is_mirrored():
    network, images = Toy(), pair(1, 50, 70)
    found = segmentation.predict(network, images, flip=True)
    mirrored = segmentation.predict(network, [x.flip(3) for x in images], flip=True)
    assert torch.equal(found, mirrored.flip(2))
    assert not torch.equal(found, segmentation.predict(network, images))


def test_large_logits_do_not_overflow():
    class Loud(nn.Module):
        def forward(self, x):
            return torch.cat([x * 100, x * 200], 1)

    found = segmentation.predict(Loud(), [torch.ones(1, 1, 4, 4)], flip=True)
    assert (found == 1).all()


def scene(n, height, width, seed=0):
    """Blocks of classes 0 to 5; both modalities show the class as their value, in one and in two channels."""
    blocks = torch.randint(0, 6, (n, 1, 1 + height // 20, 1 + width // 20), generator=seeded(seed)).float()
    masks = F.interpolate(blocks, scale_factor=20, mode="nearest")[:, 0, :height, :width].to(torch.uint8)
    return [masks[:, None] * 40, torch.stack([masks * 50, 255 - masks], 1)], masks


def crop(images, masks, *, seed=0, **options):
    """Views of the images, and the same of the masks."""
    policy = augment.Policy(**{"size": 64, "p_vflip": 0.0, **GEOMETRY, **options})
    views = [augment.augment(x, policy, generator=seeded(seed)) for x in images]
    return *views, segmentation.crop(TASK.target(masks), policy, generator=seeded(seed))


def test_crops_of_images_and_mask_are_the_same():
    images, masks = scene(16, 80, 100)
    one, two, truth = crop(images, masks, seed=1)
    assert one.shape == (16, 1, 64, 64) and two.shape == (16, 2, 64, 64) and one.dtype == torch.float32
    shown = one[:, 0] * 255 / 40
    agrees = (shown - (truth + 1)).abs() < 0.05
    assert agrees.float().mean() > 0.85  # elsewhere the bilinear view lies between two blocks
    assert ((shown - (truth + 1)).abs() <= 5).all()
    torch.testing.assert_close(two[:, 0] * 255 / 50, shown, atol=1e-3, rtol=0)
    torch.testing.assert_close(255 - two[:, 1] * 255, shown, atol=1e-3, rtol=0)


def test_networks_are_given_crops_of_what_the_policy_draws_once_for_all():
    """Views as of any training, a channel copied where an encoder wants three, and the mask beside them."""
    images, masks = scene(4, 80, 100)
    images, t = [images[0].expand(-1, 3, -1, -1), images[0]], SimpleNamespace(crop_size=64, crop_scale=0.2)
    views, truth = NETWORKS["fcn"].train((RGB, DEM), images, TASK.target(masks), t, (3, "x"))
    policy = augment.Policy(size=64, p_jitter=0, p_gray=0, p_blur=0, p_solarize=0, p_vflip=0)
    for m, x, view in zip((RGB, DEM), images, views, strict=True):
        assert torch.equal(m.copied(augment.augment(x, policy, generator=batches.seeded(3, "x"))), view)
    assert torch.equal(segmentation.crop(TASK.target(masks), policy, generator=batches.seeded(3, "x")), truth)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mask_takes_the_nearest_pixel(axis):
    """Along one axis the linear view of two classes is on the side of the nearer one."""
    line = torch.randint(1, 3, (8, 60), generator=seeded(), dtype=torch.uint8)
    masks = (line[:, :, None] if axis == 1 else line[:, None]).expand(8, 60, 60).contiguous()
    view, truth = crop([masks[:, None] * 100], masks, seed=2, size=50)
    assert ((view[:, 0] * 2.55 - (truth + 1)).abs() < 0.501).all() and (view * 2.55 % 1 > 0.1).any()


def test_a_crop_of_everything_changes_nothing_and_flips_are_drawn():
    images, masks = scene(12, 64, 64)
    one, _, truth = crop(images, masks, crop_scale=(1, 1), p_hflip=0.0)
    whole = augment.Policy(size=64, crop_scale=(1, 1))
    drawn = augment.draw(12, 64, 64, whole, generator=seeded())
    full = (drawn["height"] == 64) & (drawn["width"] == 64)
    assert full.any()
    assert torch.equal(truth[full], TASK.target(masks)[full])
    torch.testing.assert_close(one[full], images[0][full] / 255)
    one, _, mirrored = crop(images, masks, crop_scale=(1, 1), p_hflip=1.0)
    assert torch.equal(mirrored[full], TASK.target(masks)[full].flip(2))
    torch.testing.assert_close(one[full], images[0][full].flip(3) / 255)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.75])
def test_rescaled_crops_are_aligned_and_padded(scale):
    images, masks = scene(8, 80, 100)
    images, truth = [x.float() for x in images], TASK.target(masks)
    options = {"size": (64, 96), "scales": (scale,), "generator": seeded()}
    (one, two), cut = segmentation.rescaled_crop(images, truth, **options)
    assert one.shape == (8, 1, 64, 96) and two.shape == (8, 2, 64, 96) and cut.shape == (8, 64, 96)
    inside = torch.zeros(64, 96, dtype=torch.bool)
    height, width = min(64, int(80 * scale)), min(96, int(100 * scale))
    top, left = (64 - height) // 2, (96 - width) // 2
    inside[top : top + height, left : left + width] = True
    assert (cut[:, ~inside] == IGNORE).all() and not one[:, :, ~inside].any() and not two[:, :, ~inside].any()
    agrees = (one[:, 0] / 40 - (cut + 1)).abs()[:, inside] < 0.05
    assert agrees.float().mean() > (0.85 if scale != 1 else 0.99999)
    torch.testing.assert_close(two[:, 0] / 50, one[:, 0] / 40, atol=1e-3, rtol=0)


def test_rescaled_crops_vary_over_scales_places_and_flips():
    ramp = torch.arange(200.0).expand(1, 1, 100, 200)
    truth, steps, starts = torch.zeros(1, 100, 200, dtype=torch.int64), [], []
    generator = seeded()
    for _ in range(200):
        (view,), _ = segmentation.rescaled_crop([ramp], truth, size=(32, 64), generator=generator)
        steps.append(float(view[0, 0, 16, 33] - view[0, 0, 16, 32]))
        starts.append(float(view[0, 0, 16, 0]))
    found = {round(1 / s, 2) for s in steps}
    assert found == {sign * scale for sign in (1, -1) for scale in segmentation.SCALES}
    assert 70 < sum(s > 0 for s in steps) < 130 and len(set(starts)) > 100
    (whole,), _ = segmentation.rescaled_crop(
        [ramp], truth, size=(100, 200), generator=generator, scales=(1.0,), flip=0.0
    )
    assert torch.equal(whole, ramp)
