"""Records reach the book: published beside the pages, turned into tables where a page asks for one."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from decur_core.running import folders as runs

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("records", ROOT / "book/_ext/records.py")
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)


def record(name="", micro=50.0, world="world"):
    hardware = {"processor": "some CPU", "cores": 2, "gpus": []}
    kinds = {"method": "decur", "protocol": "linear", "inputs": "both", "fraction": 1.0, "seed": 0}
    source = {
        "profile": "mini",
        "world": world,
        "drawn": world == "world",
        "data": {"title": "drawn world of radar and optical images"},
        "provenance": {"commit": "c", "date": "2026-01-01", "hardware": hardware},
    }
    return {
        "name": name,
        "micro": micro,
        "macro": 40.0,
        "numbers": ["micro", "macro"],
        "per_class": [60.0, 20.0],
        "dataset": "BigEarthNet-MM",
        "label_ids": ["x"] * 1000,
        **kinds,
        **source,
    }


@pytest.fixture
def app(tmp_path):
    config = types.SimpleNamespace(decur_profiles=["a100", "report", "mini"], decur_executed="executed")
    dependencies = {"book/results": set()}
    return types.SimpleNamespace(srcdir=tmp_path, config=config, env=types.SimpleNamespace(dependencies=dependencies))


def publish(tmp_path, profile, *found):
    folder = tmp_path / "runs" / profile
    for k, one in enumerate(found):
        runs.write_json(folder / f"{k}.json", one)
    runs.publish_records(folder, tmp_path / "executed" / profile / "records.json")


def test_renamed_trials_and_label_lists_stay_out_of_the_book(tmp_path):
    publish(tmp_path, "mini", record(), record(name="trial", micro=99.0))
    (kept,) = json.loads((tmp_path / "executed/mini/records.json").read_text())
    assert kept["micro"] == 50.0 and "label_ids" not in kept


def test_the_preferred_profile_with_that_kind_of_data_supplies_a_table(app, tmp_path):
    publish(tmp_path, "mini", record(micro=11.0))
    publish(tmp_path, "report", record(micro=22.0))
    publish(tmp_path, "a100", record(micro=33.0, world="published"))
    content = ["before\n\n<!-- decur: summary world BigEarthNet-MM -->\n\nafter <!-- decur: not at line start -->"]
    records.read_source(app, "book/results", content)
    assert "| DeCUR | **22.0** |" in content[0] and "| DeCUR | **40.0** |" in content[0]
    assert "drawn world of radar and optical images, 2 classes, a miniature world (not real data)" in content[0]
    assert "BigEarthNet" not in content[0], "the data set whose place drawn images take"
    assert "11.0" not in content[0] and "33.0" not in content[0] and content[0].endswith("not at line start -->")
    assert "33.0" in records.table(app, "1 sar+optical published") and "22.0" not in records.table(
        app, "1 sar+optical published"
    )
    assert len(app.env.dependencies["book/results"]) == 3


def test_the_extensions_load_without_torch():
    """So that a page without a table is built without waiting for it."""
    code = "import sys; sys.path.insert(0, 'book/_ext'); import executed, records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_without_records_a_page_says_so(app):
    content = ["<!-- decur: summary world BigEarthNet-MM -->"]
    records.read_source(app, "book/results", content)
    assert content == [records.NOT_RUN]


def test_what_was_found_on_real_images_is_told_and_nothing_else(app, tmp_path):
    publish(tmp_path, "mini", record(micro=11.0))
    assert records.findings(app, "") == records.worth(app, "") == records.NOTHING
    found = [record(micro=micro, world="published") | {"seed": seed} for seed, micro in enumerate((40.0, 41.0))]
    found += [r | {"method": "random", "micro": r["micro"] - 10} for r in found]
    publish(tmp_path, "a100", *({"network": "Classifier", **r} for r in found))
    text = records.findings(app, "")
    assert text.startswith("- **BigEarthNet-MM.** mAP micro (%), linear, 100 % of the labels, both: DeCUR, with 40.5")
    assert "is ahead of Random initialisation (by 10.0 ± 0.0)" in text and "11.0" not in text
    text = records.worth(app, "")
    assert "| BigEarthNet-MM: mAP micro (%) | 10.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.0 |  |" in text


def test_runs_with_one_sensor_or_few_labels_alone_leave_the_other_lines_out(app, tmp_path):
    few = [
        record(world="published") | {"fraction": 0.01, "method": m, "seed": s}
        for m in ("decur", "random")
        for s in (0, 1)
    ]
    publish(tmp_path, "report", *few)
    assert records.findings(app, "") == records.NOTHING, "with all labels nothing ran"
    assert "| BigEarthNet-MM: mAP micro (%) | 0.0\N{NO-BREAK SPACE}±" in records.worth(app, "")
    publish(tmp_path, "a100", *(r | {"inputs": "sar"} for r in few))
    assert records.findings(app, "") == records.NOTHING and records.worth(app, "").count("BigEarthNet-MM") == 1


def test_every_real_data_set_is_told_and_no_ablation_is_taken_for_it(app, tmp_path):
    """As a whole run leaves them: two data sets with one kind of score, and DeCUR with other settings."""
    of = {"BigEarthNet-MM": (60.0, 40.0), "Scenes elsewhere": (30.0, 20.0)}
    found = [
        record(world="published", micro=micro) | {"dataset": name, "method": method}
        for name, scores in of.items()
        for method, micro in zip(("decur", "random"), scores, strict=True)
    ]
    ablation = found[0] | {"variant": "terms", "micro": 99.0}
    other = [r | {"variant": "cmx", "micro": r["micro"] + 1} for r in found[:2]]
    publish(tmp_path, "a100", *found, ablation, ablation | {"micro": 98.0}, *other)
    text = records.worth(app, "")
    assert all(f"| BigEarthNet-MM{which}: mAP micro (%) | 20.0 |" in text for which in ("", ", cmx"))
    assert "| Scenes elsewhere: mAP micro (%) | 10.0 |" in text
    assert "Scenes elsewhere.** " in records.findings(app, "")
    text = records.real(app, "a100")
    assert "BigEarthNet-MM**" in text and "BigEarthNet-MM, cmx**" in text and "99" not in text


def test_a_score_of_ones_own_goes_by_its_name(app, tmp_path):
    run = {"settings": {"pretraining": {"epochs": 1, "data.pairs": 128, "batch_size": 128}}}
    own = record(world="published") | {"numbers": ["dice", "dice of towns"], "dice": 70.0, "dice of towns": 60.0} | run
    longer = own | {"variant": "steps", "settings": {"pretraining": run["settings"]["pretraining"] | {"epochs": 2}}}
    publish(tmp_path, "report", own, own | {"variant": "steps"}, longer)
    assert "| BigEarthNet-MM: dice |" in records.worth(app, "")
    assert "**dice: BigEarthNet-MM**" in records.steps(app, "")


@pytest.mark.parametrize("text", ["", '[{"name": "", "mic', "<<<<<<< HEAD\n[]"])
def test_damaged_records_are_named(app, tmp_path, text):
    for file in ("executed/report/records.json", f"executed/report/{records.TRUTH}", "benchmarks/records/loss.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    for make, argument, file in (
        (records.findings, "", "records.json"),
        (records.blocks, "", records.TRUTH),
        (records.benchmark, "loss", "loss.json"),
    ):
        with pytest.raises(ValueError, match=f"{file}: damaged"):
            make(app, argument)


def test_images_before_the_flood_are_not_taken_for_those_that_labels_are_about(app, tmp_path):
    found = [record(world="published") | {"dataset": "OMBRIA", "seasons": which} for which in ("", "0", "1", "0+1")]
    publish(tmp_path, "ombria", *found)
    text = records.real(app, "ombria")
    assert all(
        f"OMBRIA{when} the flood**" in text for when in (", before", ", images after", ", images before and after")
    )


def test_what_the_paper_says_is_judged_by_paired_differences_of_trained_runs(app, tmp_path):
    assert records.claims(app, "") == records.NOT_RUN
    by_method = {"decur": (60.0, 62.0, 61.0), "barlow_twins": (50.0, 51.0, 52.0), "random": (70.0, 71.5, 69.0)}
    found = [
        record(micro=micro) | {"method": method, "seed": seed}
        for method, several in by_method.items()
        for seed, micro in enumerate(several)
    ]
    publish(tmp_path, "mini", *found)
    assert records.claims(app, "") == records.NOT_RUN, "mini shows that pages run, and nothing else"
    noisy = [
        r | {"inputs": "sar", "micro": r["micro"] + 30 * (r["seed"] == 1) * (r["method"] == "decur")} for r in found
    ]
    publish(tmp_path, "report", *found, *noisy)
    text = records.claims(app, "")
    assert "| 1, sar+optical, 100 % linear | Barlow Twins | +2.2 | +10.0 ± 1.0 | agrees |" in text
    assert "| 1, sar+optical, 100 % linear | Random initialisation | +15.3 | -9.2 ± 1.0 | does not |" in text
    assert "| 1, sar, 100 % linear | Random initialisation | +24.1 | +0.8 ± 17.1 | cannot be told here |" in text
    assert "Of 4 differences: agrees 2, does not 1, cannot be told here 1." in text
    before, folded = text.split("::::{dropdown}")
    assert before.count("does not |") == 1 and "agrees |" not in before and folded.count("agrees |") == 2


def test_scores_over_steps_are_those_of_runs_of_several_lengths(app, tmp_path):
    assert records.steps(app, "") == records.NOT_RUN
    found = []
    for epochs, micro in ((40, 55.0), (20, 50.0), (80, 54.5)):
        run = {"epochs": epochs, "data.pairs": 2100, "batch_size": 128}
        found.append(record(micro=micro) | {"variant": "steps", "settings": {"pretraining": run}})
    alone = found[0] | {"method": "clip", "micro": 99.0}  # of one length
    publish(tmp_path, "report", *found, record(micro=99.0) | {"variant": ""}, alone)
    text = records.steps(app, "")
    assert "| Method | 320 steps | 640 steps | 1,280 steps | last difference |" in text
    assert "| DeCUR | 50.0 | 55.0 | 54.5 | -0.5 |" in text and "99" not in text
    publish(tmp_path, "report", *found, *(r | {"seed": 1, "micro": r["micro"] - 3} for r in found))
    assert "| DeCUR | 48.5 | 53.5 | 53.0 | -0.5 |" in records.steps(app, ""), "the mean over seeds"
    publish(tmp_path, "report", *found, *(r | {"inputs": "sar", "micro": r["micro"] - 3} for r in found))
    together, alone = records.steps(app, "").split(", SAR alone**")
    assert "| 50.0 | 55.0 | 54.5 |" in together and "| 47.0 | 52.0 | 51.5 |" in alone, "other inputs, another table"


def test_the_front_page_shows_blocks_of_runs_that_were_trained(app, tmp_path):
    kinds = [f"{f} factors, {b} block" for f in ("common", "own") for b in ("common", "unique")]
    of = {
        "DeCUR, seed 0": dict.fromkeys(kinds, 0.5),
        "Barlow Twins, seed 0": dict(zip(kinds, (0.8, 0.0) * 2, strict=True)),
    }
    outputs = [{"data": {"application/json": {"sar_optical": of}}}]
    for profile in ("mini", "report"):
        assert records.blocks(app, "") == ""
        (tmp_path / "executed" / profile).mkdir(parents=True)
        (tmp_path / "executed" / profile / records.TRUTH).write_text(json.dumps({"cells": [{"outputs": outputs}]}))
    text = records.blocks(app, "")
    assert "common factors in the common block: DeCUR 0.50, Barlow Twins 0.80" in text and "profile report" in text
    assert "own factors in the unique block: DeCUR 0.50, Barlow Twins has none" in text


def test_every_mark_in_the_book_has_its_table():
    for page in (ROOT / "book").glob("*.md"):
        for match in records.MARK.finditer(page.read_text()):
            assert match[1].split()[0] in records.TABLES, f"{page.name}: {match[0]}"


def test_settings_are_listed_with_default_and_meaning(app):
    table = records.settings(app, "")
    assert "| `learning_rate` | `0.2` |" in table and "| `world.layout` | `coregistered` |" in table
    assert "| `name` | (empty) |" in table and "``" not in table


def test_benchmarks_are_drawn_and_their_settings_rounded(app, tmp_path):
    about = {"hardware": {"gpus": [], "cores": 2, "processor": "some CPU"}, "versions": {"torch": "2"}}
    about |= {"commit": "c", "modified": False, "date": "2026-01-01"}
    settings = {"device": "cpu", "k": 8192, "TFLOP per step": 0.125879451648}
    rows = [{"processes": 1, "pairs/s": 600.0}, {"processes": 2, "pairs/s": 1100.0}]
    record = {"settings": settings, "rows": rows, "provenance": about}
    runs.write_json(tmp_path / "benchmarks" / "records" / "scaling.json", record)
    assert "Settings: device cpu, k 8192, TFLOP per step 0.1259." in records.benchmark(app, "scaling")
    assert "fig-bench-scaling" in records.figure(app, "scaling")
    assert "<!-- processes -->" in (tmp_path / "_build" / "figures" / "scaling.svg").read_text()
