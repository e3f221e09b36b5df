"""The report's page: self-contained, escaped, bounded in size, and whole whatever a run folder lacks."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from launch.report import write_report
from launch.report.contact_sheet import contact_sheet
from launch.report.data import load_run
from tests.launch.synthetic_run import SyntheticRun, make_run, textured_clip

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects tags and text, and checks that tags are balanced."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(tmp_path: Path, *runs: Path, clip_images: object = textured_clip) -> str:
    path = write_report(list(runs), tmp_path / "out" / "report.html", clip_images=clip_images)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("world_size", [1, 2, 16])
def test_page_is_well_formed_loads_nothing_and_describes_every_picture(tmp_path: Path, world_size: int) -> None:
    markup = report(tmp_path, make_run(tmp_path / "run", SyntheticRun(world_size=world_size, num_steps=60)))
    page = Page(markup)
    assert "http:" not in markup
    assert "https:" not in markup
    assert not re.search(r"url\(|@import", markup)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:image/jpeg;base64,") or tag != "img"
        assert not {"href", "srcset", "data", "action", "poster"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    for picture in page.named("img"):
        assert picture["alt"]
        assert (picture["src"] or "").startswith("data:image/jpeg;base64,")
    for picture in page.named("svg"):
        assert picture.get("aria-label") or picture.get("aria-hidden") == "true"
    assert all(attributes.get("aria-label") for attributes in page.named("table"))
    assert "default-src 'none'" in (page.named("meta")[1]["content"] or "")


def test_every_drawing_is_well_formed_xml(tmp_path: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", report(tmp_path, make_run(tmp_path / "run")), flags=re.DOTALL)
    assert len(drawings) >= 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.tag == "svg"
        assert "nan" not in drawing
        assert "inf" not in drawing.replace("info", "")


def test_page_shows_the_runs_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(accuracy=0.9, straggler=1, world_size=4))
    text = Page(report(tmp_path, run)).text
    for words in (
        "motion_tsm",
        "A straggler holds the run back:",
        "for rank 1",
        "test top-1 90.0%",
        "of 10 classes",
        "64 clips = 4 ranks × 16 clips",
        "tsm_resnet18, 11,181,642 parameters",
        "torch 2.13.0+cpu",
        "2026-09-21",
        "3f9c1e0b7a52",
        "rows add up on every rank",
        "frames decoded",
        "Read from shards",
        "sent by gradient exchange",
        "rank 3",
    ):
        assert words in text
    predictions = json.loads((run / "predictions.json").read_text())["samples"]
    num_right = sum(sample["label"] == sample["prediction"] for sample in predictions)
    assert f"{num_right} of 200 samples of the test split right" in text


def test_many_ranks_are_shown_as_slowest_median_and_fastest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(world_size=16, straggler=11, num_steps=30))
    text = Page(report(tmp_path, run)).text
    assert "rank 11, slowest" in text
    assert "slowest: rank 11" in text
    assert text.count(", median") >= 2


def test_several_runs_are_laid_over_each_other_with_a_legend(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a" / "demo", SyntheticRun(num_steps=40)),
        make_run(tmp_path / "b" / "demo", SyntheticRun(num_steps=40, accuracy=0.5, model="tsn_resnet18")),
    ]
    markup = report(tmp_path, *runs)
    text = Page(markup).text
    assert "2 runs compared" in text
    assert "a/demo" in text
    assert "b/demo" in text
    assert "tsn_resnet18" in text
    assert "A mean step of each run" in text
    charts = [chart for chart in re.findall(r"<svg.*?</svg>", markup, flags=re.DOTALL) if "training loss" in chart]
    assert len(charts) == 1
    assert all(f'class="line s{index}"' in charts[0] for index in range(2))


def test_markup_in_names_is_shown_as_text(tmp_path: Path) -> None:
    nasty = ("<script>alert('x')</script>", "a & b", "\"quoted\" 'class'", "<b>bold", "ü – 动作", "</svg></table>")
    settings = SyntheticRun(num_steps=20, classes=nasty, accuracy=0.4, experiment="<i>exp</i>", model="m&m")
    run = make_run(tmp_path / 'run <u> & "v"', settings)
    page = Page(report(tmp_path, run))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "u"})
    for name in (*nasty[:5], "<i>exp</i>", "m&m", 'run <u> & "v"'):
        assert " ".join(name.split()) in page.text
    alts = " ".join(picture["alt"] or "" for picture in page.named("img"))
    assert all(name in alts for name in nasty)


def test_unpaired_surrogates_in_names_do_not_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=20, classes=("\ud800x", "b")))
    assert "b" in report(tmp_path, run)


def test_file_stays_small_with_incompressible_clips_and_many_steps(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 160, 160, 3), dtype=np.uint8)
    settings = SyntheticRun(num_steps=1500, world_size=4, accuracy=0.3, evaluations=200)
    runs = [make_run(tmp_path / "run", settings), make_run(tmp_path / "other", SyntheticRun(accuracy=0.3))]
    for chosen in (runs[:1], runs):
        markup = report(tmp_path, *chosen, clip_images=lambda run_dir, sample_id: noise)
        assert 12 <= markup.count('src="data:image/jpeg') <= 24
        assert len(markup.encode()) < 3_000_000


def test_contact_sheet_keeps_to_its_budget_and_counts_what_it_shows(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", SyntheticRun(num_steps=20)))
    assert run.predictions is not None
    markup = contact_sheet(run, run.predictions, textured_clip, limit=24, max_bytes=60_000)
    images = re.findall(r"base64,([^\"]*)", markup)
    assert 1 <= len(images) < 24
    assert sum(len(base64.b64decode(image)) for image in images) <= 60_000
    assert f"{len(images)} clips of 200" in markup


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def damage_ledger(folder: Path) -> None:
    path = folder / "ledger" / "rank_00000.jsonl"
    lines = path.read_text().splitlines()
    lines[5] = lines[5][:40]
    path.write_text("\n".join(lines))


def append(name: str, text: str):
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


def remove_ledger(folder: Path) -> None:
    for path in (folder / "ledger").iterdir():
        path.unlink()


def empty(folder: Path) -> None:
    without(folder, "config.json", "metrics.jsonl", "predictions.json")
    remove_ledger(folder)


def out_of_range(folder: Path) -> None:
    sample = {"sample_id": 0, "key": "k", "label": 7, "prediction": 0, "probability": 1.0}
    (folder / "predictions.json").write_text(json.dumps({"split": "test", "classes": ["a"], "samples": [sample]}))


@pytest.mark.parametrize(
    ("settings", "change", "sentence"),
    [
        ({}, empty, "No training loss has been logged yet."),
        ({}, empty, "No ledger was found"),
        ({}, lambda folder: without(folder, "predictions.json"), "There are no predictions"),
        ({}, lambda folder: without(folder, "config.json"), "64 clips = 2 ranks × 32 clips"),
        ({}, lambda folder: without(folder, "metrics.jsonl"), "No evaluation has run yet."),
        ({"evaluations": 0, "killed": True}, None, "it was killed, or is still running"),
        ({"num_steps": 1, "evaluations": 0, "world_size": 1}, None, "1 step on 1 rank"),
        ({"num_steps": 0, "evaluations": 0}, None, "No training step was recorded"),
        ({"num_workers": 0}, None, "there are no loader workers"),
        ({"attempts": 3}, None, "Attempts of this run."),
        ({}, remove_ledger, "No ledger was found"),
        ({}, damage_ledger, "line 6: damaged"),
        (
            {"world_size": 3},
            lambda folder: without(folder, "ledger/rank_00001.jsonl"),
            "No ledger of rank 1 was found.",
        ),
        ({}, append("metrics.jsonl", '{"step": 61, "clips_seen": 3904, "loss": NaN}\n'), "Training diverged (run)"),
        ({}, append("metrics.jsonl", '{"step": 61, "cli'), "rows add up"),
        ({}, append("metrics.jsonl", "x\ny\n"), "2 lines of metrics.jsonl cannot be read"),
        ({}, append("config.json", "}"), "config.json cannot be read"),
        ({}, append("predictions.json", "]"), "predictions.json cannot be read"),
        ({}, out_of_range, "a class index is outside 0..0"),
        ({"num_samples": 0}, None, "The test split has no predicted sample."),
        ({"classes": tuple(f"c{index}" for index in range(101))}, None, "Most frequent confusions among the 101"),
    ],
)
def test_what_a_run_lacks_becomes_a_sentence(tmp_path: Path, settings: dict, change: object, sentence: str) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(**{"num_steps": 60, "accuracy": 0.8, **settings}))
    if change is not None:
        change(run)  # type: ignore[operator]
    markup = report(tmp_path, run)
    assert sentence in Page(markup).text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", markup).lower().replace("nano", "")
    # the same beside another run
    other = make_run(tmp_path / "other", SyntheticRun(num_steps=20))
    Page(report(tmp_path, run, other))


def test_clip_that_cannot_be_read_says_so_in_its_place(tmp_path: Path) -> None:
    def reader(run_dir: Path, sample_id: int) -> np.ndarray:
        if sample_id % 2:
            raise OSError("shard-000000.tar:<clip> is gone\nsecond line")
        return textured_clip(run_dir, sample_id)

    page = Page(report(tmp_path, make_run(tmp_path / "run", SyntheticRun(num_steps=20)), clip_images=reader))
    assert "No frames: shard-000000.tar:<clip> is gone" in page.text
    assert "second line" not in page.text
    assert page.named("img")


def test_without_a_reader_the_page_says_that_no_clips_are_shown(tmp_path: Path) -> None:
    page = Page(report(tmp_path, make_run(tmp_path / "run", SyntheticRun(num_steps=20)), clip_images=None))
    assert "written without access to the data" in page.text
    assert not page.named("img")


def test_right_and_wrong_clips_are_told_apart_in_words(tmp_path: Path) -> None:
    text = Page(report(tmp_path, make_run(tmp_path / "run", SyntheticRun(num_steps=20)))).text
    assert "✗ wrong: predicted" in text
    assert "✓ right:" in text


def test_missing_run_folder_is_one_clear_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run folder at .*nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="no run folder was given"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=20))
    output = run / "report.html"
    output.write_text("old")
    before = {path.name for path in run.iterdir()}
    assert write_report([run], output) == output
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in run.iterdir()} == before


def test_a_resumed_runs_later_record_of_a_step_wins(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "clips_seen": 320, "loss": 2.0, "attempt": 0},
        {"step": 20, "clips_seen": 640, "loss": 1.5, "attempt": 0},
        {"step": 20, "clips_seen": 640, "evaluation": {"split": "val", "top1": 0.5}, "attempt": 0},
        {"step": 20, "clips_seen": 640, "loss": 1.25, "attempt": 1},
        {"step": 20, "clips_seen": 640, "evaluation": {"split": "val", "top1": 0.75}, "attempt": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(tmp_path)
    assert run.curve.step.tolist() == [10, 20]
    assert run.curve.loss.tolist() == [2.0, 1.25]
    assert [evaluation.top1 for evaluation in run.evaluations] == [0.75]
    assert np.isnan(run.curve.learning_rate).all()


def test_final_evaluation_is_of_the_test_split_where_there_is_one(tmp_path: Path) -> None:
    lines = [
        {"step": step, "clips_seen": step, "evaluation": {"split": split, "top1": top1}}
        for step, split, top1 in ((1, "val", 0.1), (2, "test", 0.2), (3, "val", 0.3))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = load_run(tmp_path).final_evaluation
    assert final is not None
    assert (final.split, final.top1, final.top5) == ("test", 0.2, None)
