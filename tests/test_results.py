"""Tables are made of records: means and deviations by hand, the paper's numbers untouched, gaps where nothing ran."""

import json
from pathlib import Path

import pytest

from decur_core import results

SHARED = Path(__file__).resolve().parents[2] / "shared"


def record(method, seed, micro, *, fraction=0.01, protocol="linear", inputs="both"):
    hardware = {"processor": "some CPU", "cores": 2, "gpus": []}
    return {
        "method": method,
        "seed": seed,
        "micro": micro,
        "macro": micro - 10,
        "per_class": [micro, None],
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
    assert rows["decur"]["macro"] == pytest.approx(53) and rows["decur"]["seeds"] == 3
    assert rows["random"]["deviation"] is None


def test_markdown_says_seeds_and_spread():
    text = results.markdown(results.summary(RECORDS)).replace("\N{NO-BREAK SPACE}", " ")
    head, _, *lines = text.splitlines()
    assert head == "| Inputs | Labels | Protocol | Random initialisation | DeCUR |"
    assert lines == ["| SAR + optical | 1 % | linear | 40.0 / 30.0 | **63.0 ± 3.0** / 53.0 ± 3.0 |"]


def test_per_class_keeps_absent_classes_absent():
    found = results.per_class(RECORDS, protocol="linear", inputs="both", fraction=0.01)
    assert found == {"decur": [63.0, None], "random": [40.0, None]}


def test_table1_puts_ours_beside_the_paper_and_leaves_gaps():
    lines = results.table1(RECORDS).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    decur = next(line for line in lines if line.startswith("| DeCUR"))
    assert decur.split("|")[2:6] == [" **79.4** ", " **63.0 ± 3.0** ", " **81.7** ", "  "]
    vicreg = next(line for line in lines if line.startswith("| VICReg"))
    assert [c.strip() for c in vicreg.split("|")[3:-1:2]] == ["", "", "", ""]
    assert not any(cell.strip() for line in results.table1([]).splitlines()[2:] for cell in line.split("|")[3:-1:2])


def test_source_names_data_profile_commit_and_hardware():
    text = results.source(RECORDS)
    for part in ("miniature world (not real data)", "profile report", "3 seeds", "abc", "2 cores of some CPU"):
        assert part in text


def test_the_papers_numbers_are_the_papers():
    reference = SHARED / "paper" / "reference.json"
    if not reference.exists():
        pytest.skip(f"{reference} is not here")
    name = "table1_bigearthnet_map_micro"
    assert results.PAPER[name] == json.loads(reference.read_text())[name]
