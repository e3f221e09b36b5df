"""What `benchmarks.order` says of a shuffle is right where the figures are known, and follows theory for blocks."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks.order import Shuffle, design_effect, gap_distance, lookup_rows, measure, picture, table

SMALL = {"num_samples": 24_000, "num_classes": 40, "samples_per_shard": 250, "batch": 64}


def test_the_distance_is_zero_for_a_full_shuffle_and_one_for_the_order_of_storage():
    n = 20_000
    assert gap_distance(np.arange(n)) == pytest.approx(1, abs=1e-3)
    assert gap_distance(np.random.default_rng(0).permutation(n)) < 0.02
    halves = np.random.default_rng(1).permutation(n)
    assert gap_distance(np.concatenate([halves[halves < n // 2], halves[halves >= n // 2]])) > 0.2


def test_the_law_of_the_gaps_is_that_of_all_pairs():
    n = 30
    pairs = [abs(i - j) for i in range(n) for j in range(n) if i != j]
    for gap in range(1, n):
        expected = 1 - (1 - gap / n) * (1 - gap / (n - 1))
        assert np.mean(np.array(pairs) <= gap) == pytest.approx(expected)


def test_the_design_effect_is_that_of_independent_draws_and_of_whole_clusters():
    labels = np.random.default_rng(0).integers(0, 10, (2000, 32))
    assert design_effect(labels, 10) == pytest.approx(1, abs=0.05)
    one_class_each = np.repeat(np.arange(2000) % 10, 32).reshape(2000, 32)
    assert design_effect(one_class_each, 10) == pytest.approx(32, rel=0.02)


@pytest.mark.parametrize(("window", "block"), [(1024, 1), (1024, 16), (1024, 64)])
def test_a_block_shuffle_has_the_figures_of_its_window(window, block):
    """A batch of B clips from a window of W blocks, each of one class: design effect 1 + (B - 1) / W (Kish)."""
    found = measure(window, block, **SMALL)
    num_blocks = window // block
    assert found.distance == pytest.approx(block / window, abs=0.012)
    assert found.design_effect_packed == pytest.approx(1, abs=0.1)
    if block > 1:
        assert found.design_effect == pytest.approx(1 + 63 / num_blocks, rel=0.2)
        assert found.reads == pytest.approx(1000 / block, rel=0.1)
        assert found.together == pytest.approx(64 / window, rel=0.2)


def test_a_full_shuffle_has_the_figures_of_independent_draws():
    found = measure(0, 0, **SMALL)
    assert found.distance < 0.012
    assert found.design_effect == pytest.approx(1, abs=0.1)
    assert found.together < 0.01
    assert found.shards_a_batch == pytest.approx(96 * (1 - (1 - 1 / 96) ** 64), rel=0.05)


def test_the_tables_and_the_picture_are_made():
    rows = lookup_rows(num_samples=10**6, table_samples=1000, repeats=2)
    assert len(rows) == 6
    assert all(int(row[5].replace(",", "")) < 100_000 for row in rows[:-1])
    assert table(("a", "b"), [("1", "22")], markdown=True) == "| a | b |\n|---|---:|\n| 1 | 22 |"
    assert table(("a", "b"), [("1", "22")], markdown=False) == "a   b\n1  22"
    found = [measure(0, 0, **SMALL), *(measure(256, block, **SMALL) for block in (1, 16))]
    assert isinstance(found[0], Shuffle)
    assert found[0].row()[:2] == ("all", "full shuffle")
    assert ET.fromstring(picture(found)).tag.endswith("svg")
