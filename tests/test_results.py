"""Tables are made of records: means and deviations by hand, the paper's numbers untouched, gaps where nothing ran."""

import json
from pathlib import Path

import pytest

from decur_core.report import tables as results

SHARED = Path(__file__).resolve().parents[2] / "shared"


def record(method, seed, micro, *, fraction=0.01, protocol="linear", inputs="both"):
    hardware = {"processor": "some CPU", "cores": 2, "gpus": []}
    return {
        "method": method,
        "seed": seed,
        "micro": micro,
        "macro": micro - 10,
        "per_class": [micro, None],
        "dataset": "BigEarthNet-MM",
        "metric": "mAP (%)",
        "variant": "",
        "fraction": fraction,
        "protocol": protocol,
        "inputs": inputs,
        "profile": "report",
        "world": "world",
        "provenance": {"commit": "abc", "date": "2026-01-02T03:04:05+00:00", "hardware": hardware},
    }


RECORDS = [record("decur", s, m) for s, m in enumerate((60.0, 63.0, 66.0))] + [record("random", 0, 40.0)]


def test_summary_has_mean_and_sample_deviation():
    rows = {r["method"]: r for r in results.summary(RECORDS)}
    assert rows["decur"]["mean"] == pytest.approx(63) and rows["decur"]["deviation"] == pytest.approx(3)
    assert rows["decur"]["second"] == pytest.approx(53) and rows["decur"]["seeds"] == 3
    assert rows["random"]["deviation"] is None


def test_markdown_says_seeds_and_spread():
    text = results.markdown(results.summary(RECORDS)).replace("\N{NO-BREAK SPACE}", " ")
    head, _, *lines = text.splitlines()
    assert head == "| Inputs | Labels | Protocol | Random initialisation | DeCUR |"
    assert lines == ["| both | 1 % | linear | 40.0 / 30.0 | **63.0 ± 3.0** / 53.0 ± 3.0 |"]


def test_per_class_keeps_absent_classes_absent():
    found = results.per_class(RECORDS, protocol="linear", inputs="both", fraction=0.01)
    assert found == {"decur": [63.0, None], "random": [40.0, None]}


def rows_of(text):
    lines = text.replace("\N{NO-BREAK SPACE}", " ").splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}


def test_table_1_puts_ours_beside_the_paper_and_leaves_gaps():
    rows = rows_of(results.table(1, RECORDS, "sar+optical"))
    assert rows["DeCUR"][:4] == ["**79.4**", "**63.0 ± 3.0**", "**81.7**", ""]
    assert rows["VICReg"][1::2] == [""] * 4
    assert rows["Random initialisation"][:4] == ["58.7", "40.0", "58.7", "40.0"], "one score, as in the paper"
    assert not any(cell for row in rows_of(results.table(1, [], "sar")).values() for cell in row[1::2])
    elsewhere = [r | {"variant": "common-dim_common8"} for r in RECORDS] + [r | {"dataset": "GeoNRW"} for r in RECORDS]
    assert not any(cell for row in rows_of(results.table(1, elsewhere, "sar+optical")).values() for cell in row[1::2])


def test_the_best_is_chosen_among_rows_of_the_columns_own_protocol():
    found = [record("supervised", 0, 90.0, fraction=1.0, protocol="finetune"), record("random", 0, 70.0, fraction=1.0)]
    for protocol, score in (("linear", 60.0), ("finetune", 80.0)):
        found += [record(m, 0, score - k, fraction=1.0, protocol=protocol) for k, m in enumerate(("decur", "clip"))]
    rows = rows_of(results.table(1, found, "sar+optical"))
    linear, finetune = (
        {name: row[2 * list(results.COLUMNS).index(c) + 1] for name, row in rows.items() if any(row[1::2])}
        for c in ("100 % linear", "100 % finetune")
    )
    assert linear == {"Random initialisation": "**70.0**", "Supervised": "90.0", "CLIP": "59.0", "DeCUR": "60.0"}
    assert finetune == {"Random initialisation": "70.0", "Supervised": "**90.0**", "CLIP": "79.0", "DeCUR": "80.0"}
    paper = dict(zip(results.COLUMNS, rows["Supervised"][::2], strict=True))
    assert paper["100 % linear"] == "88.9", "above DeCUR's 85.4, but in another protocol"
    assert rows["DeCUR"][2 * list(results.COLUMNS).index("100 % linear")] == "**85.4**"


def segmented(method, seed, miou, **more):
    base = record(method, seed, 0.0, fraction=1.0, protocol="finetune")
    return base | {"metric": "mIoU (%)", "miou": miou, "accuracy": miou + 30, "network": "FCN"} | more


def test_table_2_and_3_hold_miou_and_accuracy_of_the_right_network_and_inputs():
    found = [segmented("decur", s, 40.0 + s, dataset="GeoNRW", inputs="rgb") for s in (0, 2)]
    assert rows_of(results.table(2, found, "rgb"))["DeCUR"][7] == "**41.0 ± 1.4**"
    assert rows_of(results.table(2, found, "rgb+dem"))["DeCUR"][7] == ""
    found = [segmented("supervised", 0, 30.0, dataset="NYU Depth v2", inputs="rgb")]
    found += [segmented("decur", 0, 50.0, dataset="NYU Depth v2", network="CMX")]
    rows = rows_of(results.table(3, found, "nyuv2"))
    assert rows["FCN, RGB"] == ["29.2", "30.0", "60.0", "60.0"]
    assert rows["CMX-B5 (DeCUR)"] == ["**57.3**", "**50.0**", "**80.3**", "**80.0**"]
    for backbone, name in (("mit_b5", "CMX-B5 (DeCUR)"), ("mit_b0", "CMX-B5 (DeCUR), ours B0")):
        found[-1]["settings"] = {"pretraining": {"backbone": backbone}}
        assert rows_of(results.table(3, found, "nyuv2"))[name] == rows["CMX-B5 (DeCUR)"]
    assert rows["OMNIVORE (quoted)"] == ["54.0", "", "", ""] and "CMX-B2" not in rows
    assert list(rows_of(results.table(3, [], "sunrgbd")))[-1] == "CMX-B2 (DeCUR)"


def test_table_4_sorts_runs_by_the_terms_they_had():
    found = []
    for k, (intra, decoupling) in enumerate([(True, True), (False, False), (False, True), (True, False)]):
        about = {"pretraining": {"intra": intra, "decoupling": decoupling}}
        found.append(record("decur", 0, 50.0 + k, protocol="finetune") | {"variant": "terms-x", "settings": about})
        found[-1]["pair"] = "sar_optical"
    rows = rows_of(results.table(4, found, "sar+optical"))
    assert [row[1] for row in rows.values()] == ["50.0", "51.0", "52.0", "**53.0**"]
    assert [row[0] for row in rows.values()] == ["**81.7**", "80.3", "80.1", "81.1"]


def test_table_4_looks_at_its_own_runs_alone():
    about = {"variant": "terms-x", "pair": "sar_optical", "settings": {"pretraining": {}}}
    found = [record("decur", 0, 50.0, fraction=1.0, protocol="finetune") | about]
    found.append(record("decur", 0, 40.0, fraction=0.01, protocol="finetune") | about | {"variant": ""})
    text = results.table(4, found, "sar+optical")
    assert rows_of(text)["DeCUR"][1] == "**50.0**"
    assert text.splitlines()[0].endswith("(1% finetune), paper | ours (100 % finetune) |"), "each one's share"
    assert results.table(4, [], "sar+optical").splitlines()[0].endswith("paper | ours |")


def test_source_names_data_profile_commit_and_hardware():
    text = results.source(RECORDS)
    for part in ("miniature world (not real data)", "profile report", "3 seeds", "abc", "2 cores of some CPU"):
        assert part in text


def test_the_papers_numbers_are_the_papers():
    reference = SHARED / "paper" / "reference.json"
    if not reference.exists():
        pytest.skip(f"{reference} is not here")
    names = [k for k in results.PAPER if k.startswith("table")]
    assert len(names) == 4
    for name in names:
        assert results.PAPER[name] == json.loads(reference.read_text())[name]
