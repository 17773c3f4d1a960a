"""The streaming summary against sorting everything; memory that does not follow the images."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vision_plugin.report._statistics import (
    BINS_PER_OCTAVE,
    LOWEST_OCTAVE,
    N_BINS,
    LatentStatistics,
)


def summarise(latents, cuts, n_top=3, n_sample=2, numbers=None):
    statistics = LatentStatistics(latents.shape[1], n_top=n_top, n_sample=n_sample)
    numbers = torch.arange(len(latents)) if numbers is None else numbers
    edges = [0, *cuts, len(latents)]
    for start, stop in itertools.pairwise(edges):
        statistics.update(latents[start:stop], numbers[start:stop])
    return statistics.compute()


@st.composite
def matrices(draw):
    """Latents with many ties, zeros and negative values, and places to cut them."""
    n, k = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(-2, 5, (n, k), generator=generator).float()
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return latents, cuts


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_the_top_is_that_of_sorting_all_images(case):
    latents, cuts = case
    summary = summarise(latents, cuts)
    for k, values in enumerate(latents.T.tolist()):
        order = sorted((i for i, v in enumerate(values) if v > 0), key=lambda i: (-values[i], i))[
            :3
        ]
        free = 3 - len(order)
        assert summary.top.images[k].tolist() == order + [-1] * free
        assert summary.top.values[k].tolist() == [values[i] for i in order] + [0.0] * free
        assert int(summary.n_fired[k]) == sum(v > 0 for v in values)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_cuts_change_nothing(case):
    latents, cuts = case
    whole, parts = summarise(latents, []), summarise(latents, cuts)
    assert torch.equal(whole.sample.images, parts.sample.images)
    assert torch.equal(whole.histogram, parts.histogram)
    assert torch.equal(whole.top.images, parts.top.images)


def test_the_histogram_counts_half_octaves():
    values = torch.tensor([[1.0], [1.4], [1.5], [2.0], [0.3], [1e-9], [1e9], [-3.0], [0.0]])
    histogram = summarise(values, []).histogram[0]
    zero = -LOWEST_OCTAVE * BINS_PER_OCTAVE
    expected = np.zeros(N_BINS, dtype=int)
    for v in (1.0, 1.4, 1.5, 2.0, 0.3):
        expected[zero + int(np.floor(2 * np.log2(v)))] += 1
    expected[[0, -1]] += 1
    assert histogram.tolist() == expected.tolist()


def test_the_sample_is_even_over_the_images_on_which_it_fires():
    latents = torch.zeros(4000, 1)
    latents[1000:3000] = torch.rand(2000, 1) + 0.1
    sample = summarise(latents, list(range(100, 4000, 100)), n_sample=400).sample
    images = sample.images[0]
    assert bool(((images >= 1000) & (images < 3000)).all())
    assert len(images.unique()) == 400
    quarters = torch.histc(images.float(), 4, 1000, 3000)
    assert bool(((quarters - 100).abs() < 35).all()), quarters
    assert abs(float(sample.values.mean()) - float(latents[1000:3000].mean())) < 0.06
    assert bool((sample.values[0].diff() <= 0).all())


MEMORY = """
    import resource, sys
    import torch
    torch.set_num_threads(1)
    from vision_plugin.report._statistics import LatentStatistics

    d_sae, n = 4096, int(sys.argv[1])
    statistics = LatentStatistics(d_sae, n_top=16, n_sample=8)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n, 32):
        latents = torch.rand(32, d_sae, generator=generator)
        latents.mul_(latents > 0.98)
        statistics.update(latents, torch.arange(start, start + 32))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_images():
    used = {}
    for n in (320, 6400):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY), str(n)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        used[n] = int(done.stdout)
    # All latents of the longer run would take 100 MiB.
    assert used[6400] - used[320] < 25, used
