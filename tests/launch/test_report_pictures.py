"""The report's parts: colors, numbers, axes, confusion, contact sheet, time per step."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_train.ledger.summary import read_ledger
from launch.report import timeline, units
from launch.report.confusion import confusion_counts
from launch.report.contact_sheet import choose_samples, filmstrip_jpeg
from launch.report.data import Predictions, Sample
from launch.report.palette import FAMILIES, ROW_STYLES, STACK
from launch.report.svg import Chart, data_range, nice_ticks, smooth, thin
from tests.launch.synthetic_run import SyntheticRun, make_run

# Machado, Oliveira and Fernandes 2009, table 1, severity 1; they act on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Bjorn Ottosson's OKLab
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def seen(color: str, vision: str) -> np.ndarray:
    """A color in OKLab as seen with this vision."""
    srgb = np.array([int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return TO_LAB @ np.cbrt(TO_LMS @ np.clip(np.array(VISION[vision]) @ linear, 0, 1))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rows_can_be_told_apart_by_the_color_blind(vision: str, scheme: str) -> None:
    colors = [seen(getattr(style, scheme), vision) for style in ROW_STYLES]
    distance = {
        pair: float(np.linalg.norm(colors[pair[0]] - colors[pair[1]])) for pair in itertools.combinations(range(15), 2)
    }
    assert min(distance.values()) > (0.05 if vision == "tritanopia" else 0.07)
    assert min(distance[index, index + 1] for index in range(14)) > 0.14  # neighbors in a stack


def test_families_are_stacked_together() -> None:
    order = [style.family for style in ROW_STYLES]
    assert [family for family, _ in itertools.groupby(order)] == list(FAMILIES)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000042, "0.042 ms"),
        (0.0384, "38 ms"),
        (0.9996, "1.00 s"),
        (2.414, "2.41 s"),
        (51.26, "51.3 s"),
        (99.96, "1 min 40 s"),
        (187.2, "3 min 07 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (-0.5, "−500 ms"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert units.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (312, "312 B"), (999.7, "1.00 kB"), (4_200_000, "4.20 MB"), (1.05e9, "1.05 GB"), (2.5e16, "25.0 PB")],
)
def test_sizes_read_well(size: float, text: str) -> None:
    assert units.bytes_text(size) == text


def test_shares_and_rates_read_well() -> None:
    assert [units.share_text(share) for share in (0.1234, 0.0, 0.0001, 1.0)] == ["12.3%", "0.0%", "<0.1%", "100.0%"]
    assert [units.rate_text(rate) for rate in (0.5321, 80.12, 1204.0)] == ["0.532", "80.1", "1,204"]
    assert [units.short_count(value) for value in (0, 0.25, 1500, 2e6)] == ["0", "0.25", "1.5k", "2M"]


@given(low=st.floats(-1e9, 1e9, allow_nan=False), span=st.floats(1e-6, 1e9, allow_nan=False), count=st.integers(1, 10))
def test_ticks_are_few_evenly_spaced_and_inside_the_range(low: float, span: float, count: int) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), 1.0):
        return
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert len(ticks) <= count + 2
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    gaps = np.diff(ticks)
    assert gaps.size == 0 or np.allclose(gaps, gaps[0], rtol=1e-3, atol=slack)


def test_axis_range_survives_no_values_equal_values_and_not_finite_ones() -> None:
    assert data_range([]) == (0.0, 1.0)
    assert data_range([np.array([np.nan, np.inf])]) == (0.0, 1.0)
    for value in (0.0, 3.0, -2.0):
        low, high = data_range([np.array([value, value])])
        assert low < value < high


def test_line_breaks_where_a_value_is_not_finite() -> None:
    chart = Chart(x=(0, 4), y=(0, 1), x_label="x", y_label="y")
    chart.line(np.arange(5.0), np.array([0, 1, np.nan, 1, 0]), "s0")
    commands = re.findall(r'd="([^"]*)"', chart.parts[0])[0]
    assert (commands.count("M"), commands.count("L")) == (2, 2)


def test_thinning_and_smoothing_keep_the_mean_and_leave_out_gaps() -> None:
    values = np.arange(1000.0)
    assert thin(values, 10).shape == (10,)
    assert thin(values, 10).mean() == pytest.approx(values.mean())
    values[500:600] = np.nan
    assert np.isfinite(thin(values, 7)).all()
    assert np.isnan(smooth(values, 9)[550])
    np.testing.assert_allclose(smooth(np.full(50, 2.0), 9), 2.0)


def predictions_of(pairs: list[tuple[int, int, float]], num_classes: int = 3) -> Predictions:
    samples = tuple(
        Sample(sample_id=index, key=f"k{index}", label=label, prediction=guess, probability=sure)
        for index, (label, guess, sure) in enumerate(pairs)
    )
    return Predictions(split="test", classes=tuple("abcdefgh"[:num_classes]), samples=samples)


def test_confusion_counts_true_classes_in_rows() -> None:
    counts = confusion_counts(predictions_of([(0, 0, 1), (0, 1, 1), (0, 1, 1), (2, 0, 1)]))
    assert counts.tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_contact_sheet_takes_surest_errors_first_then_each_class_in_turn() -> None:
    wrong = [(0, 1, 0.6), (0, 1, 0.9)]
    right = [(label, label, 0.5) for label in (0, 0, 0, 1, 2)]
    chosen = choose_samples(predictions_of(wrong + right), 6)
    assert [sample.sample_id for sample in chosen] == [1, 0, 2, 5, 6, 3]


@pytest.mark.parametrize(
    ("num_wrong", "num_right", "expected_wrong"), [(100, 100, 16), (100, 3, 21), (0, 100, 0), (30, 0, 24)]
)
def test_contact_sheet_is_bounded_and_leaves_room_for_right_ones(
    num_wrong: int, num_right: int, expected_wrong: int
) -> None:
    chosen = choose_samples(predictions_of([(0, 1, 0.5)] * num_wrong + [(1, 1, 0.5)] * num_right), 24)
    assert len(chosen) == 24
    assert len({sample.sample_id for sample in chosen}) == 24
    assert sum(not sample.right for sample in chosen) == expected_wrong


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8, 112, 112, 3), (4 * 114 - 2, 2 * 114 - 2)),
        ((64, 240, 320, 3), (4 * 114 - 2, 2 * 86 - 2)),
        ((1, 64, 64, 1), (112, 112)),
        ((3, 10, 400, 3), (3 * 114 - 2, 3)),
    ],
)
def test_filmstrip_shows_up_to_eight_frames_in_the_clips_shape(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    jpeg = filmstrip_jpeg(np.zeros(shape, dtype=np.uint8))
    assert Image.open(io.BytesIO(jpeg)).size == size


def test_filmstrip_keeps_the_order_of_frames() -> None:
    frames = np.zeros((8, 112, 112, 3), dtype=np.uint8)
    frames += (np.arange(8, dtype=np.uint8) * 30)[:, None, None, None]
    sheet = np.asarray(Image.open(io.BytesIO(filmstrip_jpeg(frames)))).astype(int)
    levels = [sheet[row * 114 + 56, column * 114 + 56, 0] for row in range(2) for column in range(4)]
    np.testing.assert_allclose(levels, np.arange(8) * 30, atol=4)


@pytest.mark.parametrize(
    "frames", [np.zeros((8, 3, 16, 16), np.uint8), np.zeros((8, 16, 16, 3)), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_frames_of_another_shape_or_type_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8 T,H,W,C"):
        filmstrip_jpeg(frames)


def drawn_seconds(markup: str, height: float, top: float) -> float:
    """Seconds times steps of all bars in a picture of steps: the area of its boxes."""
    area = 0.0
    for x0, y0, x1, y1 in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H", markup):
        area += (float(x1) - float(x0)) * (float(y0) - float(y1))
    return area


def test_stacked_bars_have_the_area_of_the_time_that_they_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=600, world_size=2, evaluations=0))
    attempt = read_ledger(run).last
    for rank, figure in zip(attempt.ranks, timeline.step_figures(attempt), strict=True):
        width, height = (float(value) for value in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure.markup)[0])
        ticks = re.findall(r'M44\.0 ([\d.]+)H[\d.]+"/><text[^>]*>([\d.]+)</text>', figure.markup)
        (y0, low), (y1, high) = ticks[0], ticks[-1]
        ms_per_unit = (float(high) - float(low)) / (float(y0) - float(y1))
        steps_per_unit = 600 / (width - 44 - 14)
        shown = drawn_seconds(figure.markup, height, 0) * ms_per_unit * steps_per_unit / 1e3
        # all but what the cold first step has above the cut
        cut = float(rank.steps.wall_seconds[:9].sum()) - 9 * float(np.median(rank.steps.wall_seconds))
        assert rank.span_seconds["step"] - cut - 0.5 < shown < rank.span_seconds["step"] * 1.01


def test_bytes_over_time_add_up_to_the_bytes_of_the_steps(tmp_path: Path) -> None:
    attempt = read_ledger(make_run(tmp_path / "run", SyntheticRun(num_steps=100, world_size=2))).last
    steps = attempt.ranks[0].steps
    edges = np.linspace(0.0, float(steps.end_seconds[-1]), 31)
    rate = timeline._rate(steps, steps.num_bytes[:, 0], edges)
    assert (rate * np.diff(edges)).sum() == pytest.approx(steps.num_bytes[:, 0].sum(), rel=1e-9)


def test_bars_of_wall_time_hold_every_row(tmp_path: Path) -> None:
    attempt = read_ledger(make_run(tmp_path / "run", SyntheticRun(num_steps=40, world_size=2))).last
    markup = timeline.wall_bars(attempt)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", markup)]
    assert sum(widths) == pytest.approx(200.0, abs=3.0)
    assert all(f'class="r-{row}"' in markup for row in STACK if attempt.ranks[0].seconds[row] > 0)
