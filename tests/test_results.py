"""Tables are made of records: means and deviations by hand, the paper's numbers untouched, gaps where nothing ran."""

import json
from pathlib import Path

import pytest

from decur_core.report import figures, records, sentences
from decur_core.report import tables as results

NB = "\N{NO-BREAK SPACE}"
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


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
        "numbers": ["micro", "macro"],
        "data": {"title": "drawn world of radar and optical images"},
        "drawn": True,
        "steps": 12,
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
    rows = {r["method"]: r for r in records.summary(RECORDS)}
    assert rows["decur"]["mean"] == pytest.approx(63) and rows["decur"]["deviation"] == pytest.approx(3)
    assert rows["decur"]["second"] == pytest.approx(53) and rows["decur"]["seeds"] == 3
    assert rows["random"]["deviation"] is None


def test_summary_compares_with_decur_seed_by_seed():
    found = [record("decur", s, m) for s, m in ((0, 60.0), (1, 63.0), (5, 90.0))]
    found += [record("clip", s, m) for s, m in ((0, 59.0), (1, 60.0), (7, 10.0))]
    decur, clip = records.summary(found)
    assert decur["method"] == "decur" and decur["difference"] == (None, None)
    assert clip["difference"] == pytest.approx((-2, 2**0.5)) and clip["second_difference"] == pytest.approx(
        (-2, 2**0.5)
    )
    elsewhere = records.summary([*found, record("clip", 0, 50.0, fraction=1.0)])
    assert [r["difference"] for r in elsewhere if r["fraction"] == 1.0] == [(None, None)], "nothing to compare with"


def test_what_pretraining_is_worth_compares_within_a_protocol_and_leaves_gaps():
    found = [record("decur", s, m) for s, m in ((0, 60.0), (1, 63.0))]
    found += [record("random", s, m) for s, m in ((0, 50.0), (1, 55.0), (2, 0.0))]
    tuned = [record("decur", 0, 70.0, protocol="finetune"), record("supervised", 0, 70.5, protocol="finetune")]
    assert results.worth({"frozen alone": found, "all": found + tuned}).splitlines() == [
        "|  | frozen, less random initialisation | fine-tuned, less supervised |",
        "|---|---|---|",
        f"| frozen alone | 9.0{NB}±{NB}1.4 |  |",
        f"| all | 9.0{NB}±{NB}1.4 | -0.5 |",
    ]


def test_a_bar_in_a_name_does_not_end_its_cell():
    assert results.worth({"rooms | floors": []}).splitlines()[-1] == r"| rooms \| floors |  |  |"


def test_two_records_of_one_measurement_and_seed_are_refused():
    with pytest.raises(ValueError, match=r"two records of BigEarthNet-MM, method decur.*seed 1"):
        records.summary([*RECORDS, record("decur", 1, 50.0)])


def test_markdown_says_seeds_spread_difference_and_updates():
    text = results.markdown(records.summary(RECORDS)).replace("\N{NO-BREAK SPACE}", " ")
    world = "drawn world of radar and optical images, 2 classes"
    lines = ["| Method | 1 % linear |", "|---|---|", "| DeCUR | **63.0 ± 3.0** |"]
    first = "\n".join([*lines, "| Random initialisation | 40.0<br>Δ -20.0 |"])
    second = first.replace("63.0", "53.0").replace("40.0", "30.0")
    note = "Mean ± standard deviation over 1 to 3 seeds; Δ: difference to DeCUR over the seeds of both."
    assert text.split("\n\n") == [
        f"**mAP micro (%), both: {world}**",
        first,
        f"**mAP macro (%), both: {world}**",
        second,
        f"{note} Updates of the weights: 1 % linear 12.",
    ]
    alone = results.markdown(records.summary(RECORDS[:1]))
    assert alone.endswith("One seed. Updates of the weights: 1 % linear 12.") and "Δ" not in alone


def test_no_table_is_wider_than_its_column_and_inputs_have_tables_of_their_own():
    found = [
        record("decur", 0, 50.0, fraction=f, protocol=p, inputs=i) | {"steps": int(1000 * f)}
        for f in (0.01, 0.1, 1.0)
        for p in ("finetune", "linear")
        for i in ("optical", "both", "sar")
    ]
    text = results.markdown(records.summary(found))
    heads = [line for line in text.splitlines() if line.startswith("| Method")]
    assert (
        heads
        == [
            "| Method | 1 % linear | 10 % linear | 100 % linear |",
            *[h.replace("linear", "finetune") for h in heads[:1]],
        ]
        * 6
    )
    assert [line.split(", ")[1].split(":")[0] for line in text.splitlines() if "micro" in line] == [
        "both",
        "SAR",
        "optical",
    ]
    assert "Updates of the weights: 1 % linear 10, 1 % finetune 10, 10 % linear 100," in text
    three = [record("decur", 0, 50.0, inputs=i) for i in ("sar", "both", "sar+dem")]
    names = [
        line.split(", ")[1].split(":")[0]
        for line in results.markdown(records.summary(three)).splitlines()
        if "micro" in line
    ]
    assert names == ["all sensors", "SAR + elevation", "SAR"]


def test_per_class_keeps_absent_classes_absent():
    found = records.per_class(RECORDS, protocol="linear", inputs="both", fraction=0.01)
    assert found == {"decur": [63.0, None], "random": [40.0, None]}


def rows_of(text, *, differences=False):
    """Cells by row, those of several tables one after the other; without what stands below a number."""
    rows = {}
    for line in text.replace("\N{NO-BREAK SPACE}", " ").splitlines():
        name, *cells = [c.strip() for c in line.split("|")[1:-1]] or [""]
        if name and not name.startswith("---"):
            rows[name] = rows.get(name, []) + (cells if differences else [c.partition("<br>")[0] for c in cells])
    return rows


def test_table_1_puts_ours_beside_the_paper_and_leaves_gaps():
    rows = rows_of(results.table(1, RECORDS, "sar+optical"))
    assert rows["DeCUR"][:4] == ["**79.4**", "**63.0 ± 3.0**", "**81.7**", ""]
    assert rows["VICReg"][1::2] == [""] * 4
    assert (
        rows_of(results.table(1, RECORDS, "sar+optical"), differences=True)["Random initialisation"][1]
        == "40.0<br>Δ -20.0"
    )
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
    base = record(method, seed, 0.0, fraction=1.0, protocol="finetune") | {"numbers": ["miou", "accuracy"]}
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
    assert text.splitlines()[0].endswith("(1% finetune), paper | drawn world (100 % finetune) |"), "each one's share"
    assert results.table(4, [], "sar+optical").splitlines()[0].endswith("paper | ours |")


def test_drawn_images_are_called_by_their_worlds_name_and_real_ones_by_their_data_sets():
    real = [r | {"drawn": False, "world": "published"} for r in RECORDS]
    for found, name, head in ((RECORDS, "drawn world of radar", "drawn world"), (real, "BigEarthNet-MM", "ours")):
        drawn = found is RECORDS
        texts = [
            results.markdown(records.summary(found)),
            records.source(found),
            results.table(1, found, "sar+optical"),
        ]
        assert all(name in text for text in texts[:2]) and f"1 % linear, paper | {head} |" in texts[2]
        assert all(("BigEarthNet" in text) != drawn for text in texts[:2])
        assert not any("ours" in text.lower() for text in texts) or not drawn
    mixed = results.table(1, [RECORDS[0], real[1]], "sar+optical")
    assert "| drawn world and ours |" in mixed.splitlines()[0]
    assert records.source([r | {"world": "samples"} for r in real]).startswith(
        "Real samples: a handful of real samples of"
    )
    points = records.by_projector([r | {"settings": {"pretraining": {"projector": [8]}}} for r in RECORDS[:1]])
    assert list(points) == ["drawn world of radar and optical images, 2 classes, linear"]
    bare = {"settings": {"pretraining": {"projector": [], "backbone": "small", "dim_common": 96}}}
    assert list(records.by_share([RECORDS[0] | bare])["128 dimensions"]) == [75]


def test_source_names_data_profile_commit_and_hardware():
    text = records.source(RECORDS)
    for part in ("miniature world (not real data)", "profile report", "3 seeds", "abc", "2 cores of some CPU"):
        assert part in text
    earlier = [
        {**r, "provenance": r["provenance"] | {"commit": c, "date": "2025"}}
        for c, r in zip("xyyy", RECORDS, strict=True)
    ]
    assert "commit abc and 2 earlier, " in records.source(RECORDS + earlier)
    on_gpu = RECORDS[0]["provenance"]["hardware"] | {"gpus": ["some GPU"]}
    both = [RECORDS[1], RECORDS[0] | {"provenance": RECORDS[0]["provenance"] | {"hardware": on_gpu}}]
    for found in (both, both[::-1]):  # machines with the same processor
        assert "some GPU" in records.source(found) and "2 cores of some CPU" in records.source(found)


def test_the_papers_numbers_are_the_papers():
    reference = SHARED / "paper" / "reference.json"
    if not reference.exists():
        pytest.skip(f"{reference} is not here")
    names = [k for k in results.PAPER if k.startswith("table")]
    assert len(names) == 4
    for name in names:
        assert results.PAPER[name] == json.loads(reference.read_text())[name]


def published(profile: str) -> list[dict]:
    return json.loads((ROOT / f"book/executed/{profile}/records.json").read_text())


@pytest.mark.parametrize("profile", ["report", "nyu", "ombria"])
def test_what_shows_that_a_published_run_was_trained_has_its_settings(profile):
    kept = published(profile)
    other = {"epochs", "data.sha256"}  # a world that is drawn on another machine differs in its last digits

    def about(r: dict) -> tuple:
        return r["pair"], r["method"], {k: v for k, v in r["settings"]["pretraining"].items() if k not in other}

    main = [about(r) for r in kept if not r["variant"] and r["split"] == "test"]
    shorter = [r for r in kept if r["variant"].startswith("steps")]
    assert shorter and [r["evaluation"] for r in shorter if about(r) not in main] == []


@pytest.mark.parametrize("profile", ["report", "nyu", "ombria"])
def test_published_runs_have_the_main_number_that_did_best_on_held_out_images(profile):
    kept = published(profile)
    main = dict.fromkeys(("decur", "barlow_twins"), "lambd") | {"vicreg": "vicreg_weights"}
    main |= {"simclr": "temperature", "clip": "learning_rate"}
    for method, name in main.items():
        own = [r for r in kept if r["method"] == method]
        grid = [r for r in own if r["split"] == "validation" and r["variant"].startswith("grid")]
        best = max(grid, key=lambda r: r[r["numbers"][0]])["settings"]["pretraining"][name]
        used = [r["settings"]["pretraining"][name] for r in own if not r["variant"] and r["split"] == "test"]
        assert len(grid) >= 3 and used == [best] * len(used), method


def test_a_sentence_names_a_winner_only_where_the_paired_difference_exceeds_its_deviation():
    found = [record("decur", s, m) for s, m in enumerate((60.0, 63.0, 66.0))]
    found += [record("clip", s, m - 2 - 0.1 * s) for s, m in enumerate((60.0, 63.0, 66.0))]  # deviates with the seeds
    found += [record("vicreg", s, m) for s, m in enumerate((64.0, 58.0, 66.0))]
    task = {"protocol": "linear", "inputs": "both", "fraction": 0.01}
    about = "mAP micro (%), linear, 1 % of the labels, both, drawn world of radar and optical images, 2 classes"
    assert sentences.of_records(found, **task) == (
        f"{about}: DeCUR, with 63.0 ± 3.0 (3 seeds), is ahead of CLIP (by 2.1 ± 0.1);"
        " it is not told from VICReg (by 0.3 ± 4.5)."
    )
    close = [r for r in found if r["method"] != "clip"]
    assert sentences.of_records(close, **task, number=1) == (
        f"{about.replace('micro', 'macro')}: nobody is ahead; the highest mean, DeCUR's 53.0 ± 3.0 (3 seeds),"
        " is not told from VICReg (by 0.3 ± 4.5)."
    )
    (other,) = [r for r in found if (r["method"], r["seed"]) == ("clip", 0)]
    one = sentences.of_records([found[0], other], **task)
    assert one.endswith("one seed, which tells nobody from anybody: DeCUR 60.0 and CLIP 58.0.")
    assert sentences.of_records(found[:1], **task) == f"{about}: DeCUR has 60.0 (1 seed)."
    with pytest.raises(ValueError, match="no record with finetune"):
        sentences.of_records(found, **task | {"protocol": "finetune"})


def test_a_higher_mean_of_other_seeds_is_not_called_a_lead():
    found = [record("clip", s, m) for s, m in enumerate((10.0, 10.0, 100.0))]
    found += [record("decur", s, m) for s, m in enumerate((20.0, 20.5))]
    task = {"protocol": "linear", "inputs": "both", "fraction": 0.01}
    text = sentences.of_records(found, **task)
    assert text.endswith(
        "the highest mean, CLIP's 40.0 ± 52.0 (3 seeds), is behind, over the seeds of both, DeCUR (by -10.2 ± 0.4)."
    )
    assert "ahead" not in text
    more = [*found, *(record("vicreg", s, m) for s, m in enumerate((9.0, 9.1, 9.2)))]
    more += [record("simclr", s, m) for s, m in enumerate((5.0, 5.0))]
    text = sentences.of_records(more, **task)
    assert "is ahead of SimCLR-cross (by 5.0 ± 0.0); it is not told from VICReg" in text
    assert text.endswith("; it is behind, over the seeds of both, DeCUR (by -10.2 ± 0.4).")


def test_no_sentence_is_made_of_what_is_not_a_number_and_none_calls_a_tie_a_lead():
    nan, other = float("nan"), {"B": {0: 40.0, 1: 41.0}}
    one = "score: nobody is ahead; the highest mean, A's 60.0 (1 seed), is not told from B (by 19.0)."
    for seeds, text in (({0: nan, 1: nan}, "score: B has 40.5 ± 0.7 (2 seeds)."), ({0: nan, 1: 60.0}, one)):
        for values in ({"A": seeds} | other, other | {"A": seeds}):
            assert sentences.compare(values, "score") == text
    with pytest.raises(ValueError, match="no measurement of score"):
        sentences.compare({"A": {0: nan}}, "score")
    rounding = {"A": dict.fromkeys(range(3), 0.3), "B": dict.fromkeys(range(3), 0.1 + 0.2)}
    close = {"A": {0: 50.03, 1: 50.04}, "B": {0: 50.0, 1: 50.01}}
    for values in (rounding, close):
        text = sentences.compare(values, "score")
        assert "nobody is ahead" in text and "(by 0.0 ± 0.0)" in text
    assert "is ahead of B (by 0.03 ± 0.00)" in sentences.compare(close, "score", digits=2)


def test_everything_of_three_sensors_is_not_called_both():
    found = [record("decur", 0, 50.0), {**record("decur", 0, 40.0), "inputs": "sar+dem"}]
    task = {"protocol": "linear", "inputs": "both", "fraction": 0.01}
    assert "1 % of the labels, all sensors, " in sentences.of_records(found, **task)
    assert "1 % of the labels, both, " in sentences.of_records(found[:1], **task)
    assert [a.get_title("left") for a in figures.scores(records.summary(found)).axes] == [
        "all sensors",
        "SAR + elevation",
    ]


def test_a_sentence_of_masks_holds_methods_without_pretraining_to_their_own_protocol():
    found = [segmented("decur", s, 40.0 + s) | {"protocol": "linear"} for s in (0, 1)]
    found += [segmented("random", s, 30.0 + s) | {"protocol": "linear"} for s in (0, 1)]
    found += [segmented("supervised", s, 50.0 + 2 * s) for s in (0, 1)]
    text = sentences.of_records(found, protocol="linear", inputs="both", fraction=1.0)
    assert text.startswith("mIoU (%), linear, 100 % of the labels, both")
    assert (
        "DeCUR, with 40.5 ± 0.7 (2 seeds), is ahead of Random initialisation (by" in text and "Supervised" not in text
    )


def test_a_sentence_of_r2_matrices_pairs_runs_by_their_seeds():
    def table(own):
        values = {("sar", "sar+optical"): (0.9, 0.0), ("sar", "sar"): (0.0, own)}
        values |= {("optical", "sar+optical"): (0.9, 0.0), ("optical", "optical"): (0.0, 0.0)}
        return {"linear": {block: dict(zip("ca", row, strict=True)) for block, row in values.items()}}

    by_run = {f"DeCUR, seed {s}": table(own) for s, own in enumerate((0.6, 0.9))}
    by_run |= {f"Barlow Twins, seed {s}": table(own) for s, own in enumerate((0.0, 0.3))}
    text = sentences.of_matrices(by_run, {"c": "common", "a": "sar"})
    assert text == (
        "block score, linear probe: DeCUR, with 0.85 ± 0.07 (2 seeds), is ahead of Barlow Twins (by 0.20 ± 0.00)."
    )
    right = sentences.of_matrices(by_run, {"c": "common", "a": "sar"}, score="right")
    assert right.startswith("right block, linear probe: DeCUR")
    shares = {
        f"DeCUR, seed {s}, dim_common{k}": table(own) for s in (0, 1) for k, own in ((16, 0.6 + s / 10), (64, 0.1))
    }
    apart = sentences.of_matrices(shares, {"c": "common", "a": "sar"})
    assert "DeCUR, dim_common16, with" in apart and "is ahead of DeCUR, dim_common64 (by" in apart
