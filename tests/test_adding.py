"""Someone else's sensors: each thing is added in one place, from outside the library, with the lines the book shows."""

import re

import pytest

from decur_core import backbones, config, losses, pretrain, transfer
from decur_core.data import convert, datasets

SHOWN = re.findall(r"```python\n(# add .*?)```", (config.ROOT / "book" / "use.md").read_text(), re.S)


@pytest.fixture
def added():
    """All that the page adds, in one namespace, taken out again afterwards."""
    tables = (datasets._TABLE, losses.METHODS, backbones.BACKBONES)
    before = [dict(table) for table in tables]
    names: dict = {}
    for lines in SHOWN:
        exec(lines, names)
    yield names
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_each_thing_takes_at_most_ten_lines():
    assert [lines.splitlines()[0] for lines in SHOWN] == [
        f"# add {thing}" for thing in ("a modality", "a task", "a data set", "a method", "a backbone")
    ]
    assert all(sum(map(bool, lines.splitlines())) <= 11 for lines in SHOWN)  # with the heading


def test_pretraining_and_transfer_take_them_all(added, tmp_path):
    dataset = datasets.find("heat")
    images = dataset.read(tmp_path, None)
    stores = {}
    for split in ("train", "test"):
        mappings = {m.name: m for m in dataset.modalities}
        about = {"name": "heat", "title": dataset.title, "classes": list(dataset.task.classes), "drawn": True}
        convert.convert(images, tmp_path / split, preprocessing=mappings, workers=0, about=about)
        stores[split] = tmp_path / split
    settings = config.load(
        "start",
        {
            "pair": "heat", "method": "agree", "backbone": "patches", "projector": [16, 8], "dim_common": 4,
            "epochs": 2, "batch_size": 8, "crop_size": 16, "runs": str(tmp_path / "runs"), "sweep": {},
            "data.source": "published", "device": "cpu",
            "transfer": {"epochs": 2, "crop_size": 16, "inputs": ["both"], "batch_size": 8},
        },
    )  # fmt: skip
    folder = pretrain.run(settings, stores["train"])
    record = transfer.evaluate(settings, folder, stores, dataset="heat", protocol="linear")
    assert record["dataset"] == dataset.title and record["method"] == "agree"
    assert 0 <= record["micro"] <= 100
