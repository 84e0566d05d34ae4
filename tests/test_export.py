"""Exports: weights that load into plain networks, metadata that says how to use them, a model card whose code runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import decur_core.backbones
from decur_core import export, pretrain
from decur_core.data.modality import DEM, HHA, OPTICAL, RGB, SAR, Modality
from decur_core.data.raster import DataError
from decur_core.model import MultimodalModel

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"sar_optical": (SAR, OPTICAL), "rgb_dem": (RGB, DEM), "rgb_depth": (RGB, HHA)}


def make_run(folder, backbone, pair="sar_optical", source="published"):
    """The folder of a finished run, as the pretraining leaves it, with an evaluation on record."""
    torch.manual_seed(0)
    modalities = PAIRS[pair]
    model = MultimodalModel(backbone, {m.name: m.channels for m in modalities}, (8,)).to(
        memory_format=torch.channels_last
    )
    settings = {"pair": pair, "method": "decur", "backbone": backbone, "data.source": source, "learning_rate": 0.2}
    preprocessing = {m.name: m.mapping() for m in modalities}
    state = {"model": model.state_dict(), "step": 300, "settings": settings, "preprocessing": preprocessing}
    state["data"] = {"name": "ssl4eo", "title": "SSL4EO-S12", "drawn": source == "world", "source": source}
    run = folder / "runs" / "profile" / "pretrain" / f"{pair}-decur-seed0"
    run.mkdir(parents=True)
    torch.save(state, run / "final.pt")
    made = {"commit": "0123456789ab", "modified": True, "date": "2024-05-06T07:08:09+00:00"}
    (run / "run.json").write_text(json.dumps({"settings": {"pair": pair}, "provenance": made}))
    records = folder / "runs" / "profile" / "records"
    records.mkdir()
    result = {"dataset": "BigEarthNet-MM", "protocol": "linear", "metric": "mAP (%)", "micro": 71.25}
    result |= {"macro": 65.08599090576172, "settings": {}}
    for name in (run.name, "another"):
        (records / f"{name}.json").write_text(json.dumps({"run": name, **result}))
    chosen = {"run": run.name, **result, "split": "validation", "micro": 99.0}  # it helped to choose, and is no result
    (records / "validation.json").write_text(json.dumps(chosen))
    return run, model.eval()


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def resnets(tmp_path_factory):
    """A run with ResNet-50s, its model, and the folder of its exports."""
    folder = tmp_path_factory.mktemp("export")
    run, model = make_run(folder, "resnet50")
    export.main([str(run), str(folder / "out")])
    return run, model, folder / "out"


def test_files_load_into_plain_torchvision_and_timm(resnets, monkeypatch):
    _, model, target = resnets
    monkeypatch.chdir(target)
    assert sorted(f.name for f in target.iterdir()) == [
        "README.md",
        "sar_optical-decur-seed0-optical.safetensors",
        "sar_optical-decur-seed0-sar.safetensors",
    ]
    names = {"timm": timm, "torchvision": torchvision, "torch": torch, "safetensors": safetensors}
    for code, channels, backbone in zip(
        blocks((target / "README.md").read_text()),
        (13, 2),
        (model.backbones["optical"], model.backbones["sar"]),
        strict=True,
    ):
        images = torch.rand(2, channels, 64, 64)
        with torch.no_grad():
            expected = backbone(images)
            for part in (code.splitlines()[0], code.partition("\n")[2]):
                exec(part, names)
                torch.testing.assert_close(names["network"].eval()(images), expected)


def test_metadata_say_all_that_is_needed(resnets):
    run, model, target = resnets
    state, metadata = export.load(target / f"{run.name}-sar.safetensors")
    assert metadata["preprocessing"] == SAR.mapping()
    assert (metadata["run"], metadata["modality"], metadata["backbone"], metadata["steps"]) == (
        run.name,
        "sar",
        "resnet50",
        300,
    )
    assert metadata["settings"]["learning_rate"] == 0.2 and metadata["provenance"]["commit"] == "0123456789ab"
    expected = {"dataset": "BigEarthNet-MM", "protocol": "linear", "metric": "mAP (%)", "micro": 71.25}
    expected["macro"] = 65.08599090576172  # rounded on the card alone
    assert metadata["evaluations"] == [expected]
    assert state.keys() == model.backbones["sar"].state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.backbones["sar"].state_dict().items())


def test_the_card_names_data_method_input_code_and_result(resnets):
    card = (resnets[2] / "README.md").read_text()
    for text in (
        "DeCUR, sar_optical, 300 steps, no labels",
        "commit 0123456789ab, with changes",
        "SSL4EO-S12, as published",
        "VV, VH",
        "multiplied by 255 / 10000",
        "| BigEarthNet-MM | linear | mAP (%) | 71.25 | 65.09 |",
        "| learning_rate | 0.2 |",
    ):
        assert text in card
    assert "toy" not in card


@pytest.mark.parametrize(("pair", "backbone"), [("rgb_dem", "small"), ("rgb_depth", "mit_b0")])
def test_other_pairs_and_networks(tmp_path, monkeypatch, pair, backbone):
    run, model = make_run(tmp_path, backbone, pair, source="world")
    files = [export.write(run, tmp_path / "out", m.name) for m in PAIRS[pair]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("**This model is a toy**") == 2 and "as published" not in card
    assert ("repeated 3 times" in card) == (pair == "rgb_dem")
    monkeypatch.chdir(tmp_path / "out")
    names = {"decur_core": decur_core, "safetensors": safetensors}
    backbones = {f"{run.name}-{name}": backbone for name, backbone in model.backbones.items()}
    for file, code in zip(sorted(files), blocks(card), strict=True):
        exec(code, names)
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(names["network"](images), backbones[file.stem](images))


def test_every_preprocessing_has_words():
    for modality in (m for pair in PAIRS.values() for m in pair):
        words = export.in_words(modality)
        assert ", ".join(modality.bands) in words and modality.unit in words
        assert "None" not in words and words.startswith(modality.unit)
    thermal = {"name": "thermal", "bands": ("t",), "unit": "kelvin", "valid_range": (0, 400), "scheme": "range_8bit"}
    words = export.in_words(Modality.from_mapping(thermal | {"low": (250,), "high": (320,)}))
    assert "250 to 320 becomes 0 to 255" in words
    sar = export.in_words(SAR)
    assert "lowest and the highest 1 %" in sar and "-12.54847273" in sar


def test_a_real_run_is_exported(tiny, pair_store, tmp_path):
    run = pretrain.run(tiny(backbone="small", epochs=1), pair_store)
    state, metadata = export.load(export.write(run, tmp_path / "out", "optical"))
    final = torch.load(run / "final.pt", weights_only=True)
    assert torch.equal(state["0.weight"], final["model"]["backbones.optical.0.weight"])
    assert metadata["steps"] == final["step"] == 4 and metadata["settings"] == final["settings"]
    assert metadata["evaluations"] == [] and "Evaluations: none" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_profile_adds_is_known_to_the_command_line_and_to_nobody_else(tmp_path, monkeypatch):
    """The backbone and the method of a run are in a file of someone else, which the command has to read."""
    monkeypatch.setattr(decur_core.backbones, "BACKBONES", dict(decur_core.backbones.BACKBONES))
    run, _ = make_run(tmp_path, "resnet18")
    state, about = torch.load(run / "final.pt"), json.loads((run / "run.json").read_text())
    state["settings"] |= {"backbone": "added", "method": "agree"}
    torch.save(state, run / "final.pt")
    (tmp_path / "adds_for_export.py").write_text(
        "from decur_core.backbones import BACKBONES\nfrom decur_core.losses import METHODS, Method\n"
        "known = BACKBONES['resnet18']\n"
        "BACKBONES['added'] = known._replace(build=lambda _, channels: known.build('resnet18', channels))\n"
        "METHODS['agree'] = Method('Agreement')\n"
    )
    about["settings"]["extensions"] = [str(tmp_path / "adds_for_export.py")]
    (run / "run.json").write_text(json.dumps(about))
    command = [sys.executable, "-m", "decur_core.export", run, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # this process would know it from here on
    assert done.returncode == 0, done.stderr
    assert "- Network: added for 2 channels" in (card := (tmp_path / "out" / "README.md").read_text())
    assert "- Method: Agreement, " in card
    other, _ = make_run(tmp_path / "other", "resnet18", "rgb_dem")  # beside it, where the method is not known
    export.write(other, tmp_path / "out", "rgb")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Method: agree, " in card and "- Method: DeCUR, " in card
    (tmp_path / "adds_for_export.py").unlink()
    with pytest.raises(SystemExit, match="not exported: extensions: no file "):
        export.main([str(run), str(tmp_path / "out")])


def test_the_card_lists_what_its_encoder_took_part_in_and_further_images(tmp_path):
    run, _ = make_run(tmp_path, "small")
    for record in (run.parent.parent / "records").glob("*.json"):
        record.unlink()
    scored = {
        "run": run.name,
        "dataset": "floods",
        "protocol": "linear",
        "flood": 40.5,
        "further": {"later": {"flood": 30.25}},
    }
    for inputs in ("both", "sar", "optical"):
        text = json.dumps(scored | {"inputs": inputs})
        (run.parent.parent / "records" / f"{inputs}.json").write_text(text)
    _, metadata = export.load(export.write(run, tmp_path / "out", "sar"))
    found = [(r["inputs"], r.get("images", "test"), r["flood"]) for r in metadata["evaluations"]]
    assert found == [(i, w, f) for i in ("both", "sar") for w, f in (("test", 40.5), ("later", 30.25))]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| floods | later | linear | sar | 30.25 |" in card and "one seed" in card


def test_the_card_lists_the_numbers_of_a_task_from_outside(tmp_path):
    run, _ = make_run(tmp_path, "small")
    scored = {"run": run.name, "dataset": "roofs", "metric": "hits (%)", "numbers": ["top1", "top5"], "inputs": "both"}
    scored |= {"top1": 61.5, "top5": 80.25, "micro": 3.5}
    (run.parent.parent / "records" / f"{run.name}.json").write_text(json.dumps(scored))
    _, metadata = export.load(export.write(run, tmp_path / "out", "sar"))
    assert metadata["evaluations"][-1].items() >= {"micro": 3.5, "top1": 61.5, "top5": 80.25}.items()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| micro | top1 | top5 |" in card and "| 3.5 | 61.5 | 80.25 |" in card


def test_a_network_that_was_not_trained_is_not_exported(tmp_path):
    run, _ = make_run(tmp_path, "small")
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"trained": ["optical"]}))
    with pytest.raises(DataError, match="has not trained sar, only optical"):
        export.write(run, tmp_path / "out", "sar")
    export.main([str(run), str(tmp_path / "out")])
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors")] == [f"{run.name}-optical.safetensors"]


def test_what_cannot_be_exported_or_loaded(tmp_path):
    run, model = make_run(tmp_path, "small")
    with pytest.raises(DataError, match="modality 'dem' is unknown; it has sar and optical"):
        export.write(run, tmp_path / "out", "dem")
    with pytest.raises(DataError, match="no final.pt"):
        export.write(tmp_path, tmp_path / "out", "sar")
    with pytest.raises(SystemExit, match="not exported.*run.json"):
        export.main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

    file = export.write(run, tmp_path / "out", "sar")
    with safetensors.safe_open(file, "pt") as f:
        header = f.metadata()
    state, _ = export.load(file)
    bad = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(state | {"0.weight": torch.zeros(32, 13, 3, 3)}, bad, metadata=header)
    with pytest.raises(DataError, match=r"0.weight is \(32, 13, 3, 3\), expected \(32, 2, 3, 3\)"):
        export.load(bad)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "1.bias"}, bad, metadata=header)
    with pytest.raises(DataError, match="misses 1.bias"):
        export.load(bad)
    safetensors.torch.save_file(state, bad)
    with pytest.raises(DataError, match="says nothing about preprocessing"):
        export.load(bad)
    bad.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="bad.safetensors: not a readable"):
        export.load(bad)
    with pytest.raises(DataError, match="absent"):
        export.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "mine", "title": "Meadows", "drawn": False, "source": "own"}, "- Data: Meadows.\n"),
        ({"name": "mine", "drawn": False, "source": "own"}, "- Data: mine.\n"),
        (
            {"title": "SSL4EO-S12", "drawn": False, "source": "samples"},
            "- Data: SSL4EO-S12, a handful of sample files. **",
        ),
        (None, "- Data: not on record.\n"),
    ],
)
def test_the_card_says_of_the_data_what_the_run_says(tmp_path, data, said):
    run, _ = make_run(tmp_path, "small")
    state = torch.load(run / "final.pt", weights_only=True)
    torch.save(state | {"data": data}, run / "final.pt")
    export.write(run, tmp_path / "out", "sar")
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card and "as published" not in card


def test_files_of_others_are_neither_overwritten_nor_described(tmp_path, capsys):
    run, _ = make_run(tmp_path, "small")
    target = tmp_path / "out"
    target.mkdir()
    card, file = target / "README.md", target / f"{run.name}-sar.safetensors"
    for theirs in ("# My project\n", "# Pretrained encoders\n", ""):
        card.write_text(theirs)
        with pytest.raises(SystemExit, match=f"not exported: {card}: not written by this module, or changed since"):
            export.main([str(run), str(target)])
        assert card.read_text() == theirs and [f.name for f in target.iterdir()] == ["README.md"]
    card.unlink()
    card.symlink_to(target / "gone")  # what it leads to may come back
    with pytest.raises(DataError, match="README.md: not written by this module"):
        export.write(run, target, "sar")
    card.unlink()
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    before = file.read_bytes()
    with pytest.raises(DataError, match="not written by this module; choose another folder"):
        export.write(run, target, "sar")
    assert file.read_bytes() == before and not card.exists()

    file.rename(target / "theirs.safetensors")
    (target / "._x.safetensors").write_bytes(b"of another program")
    (target / "gone.safetensors").symlink_to(target / "absent.safetensors")
    (target / "torn.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"2 of \*.safetensors are left out, hidden or links to what is gone"):
        export.main([str(run), str(target)])
    left = "theirs.safetensors, torn.safetensors"
    assert f"2 other files in {target} are not described: {left}\n" in capsys.readouterr().out
    assert card.read_text().count("\n## ") == 2 and f"did not write them: {left}." in card.read_text()
    assert (target / "theirs.safetensors").read_bytes() == before

    (target / "gone.safetensors").unlink()
    (target / "._x.safetensors").unlink()
    assert export.write(run, target, "sar") == file  # over its own
    card.write_text(card.read_text() + "\nMy own notes.\n")
    with pytest.raises(DataError, match="or changed since"):
        export.write(run, target, "sar")
    assert "My own notes." in card.read_text()


def test_an_export_is_not_written_over_that_of_another_run_of_its_name(tmp_path):
    run, _ = make_run(tmp_path / "a", "small")
    other, _ = make_run(tmp_path / "b", "small", source="world")
    before = export.write(run, tmp_path / "out", "sar").read_bytes()
    with pytest.raises(DataError, match="holds another run of this name, of 2024-05-06.*choose another folder"):
        export.write(other, tmp_path / "out", "sar")
    assert (tmp_path / "out" / f"{run.name}-sar.safetensors").read_bytes() == before
