import math

import pytest
import torch
from scipy import stats

from groktrace.sampling.noise import NormalNoise, _quantiles


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(shape, *seeds, dtype=torch.float32, times=1):
    noise, chosen = NormalNoise(shape, dtype, torch.device("cpu")), generators(*seeds)
    out = torch.full((times, *shape), torch.nan, dtype=dtype)
    for each in out:
        noise.fill(each, chosen)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_standard_normal_and_independent(dtype):
    out = drawn((2, 250_000), 1, 2, dtype=dtype, times=2).double()
    n = out.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        # Five standard errors of the mean of a normal number's power.
        assert float(out.pow(power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(spread / n))
    assert stats.kstest(out.flatten()[:100_000].numpy(), "norm").pvalue > 1e-3
    # Of neighbours within a word and beyond, of rows, and of one call and the next; of the numbers and their squares.
    for power in (1, 2):
        values = out.pow(power) - out.pow(power).mean()
        scale = 5 * float(values.square().mean()) / math.sqrt(n / 2)
        for lag in (1, 2, 3, 4, 5):
            assert abs(float((values[..., lag:] * values[..., :-lag]).mean())) < scale
        assert abs(float((values[:, 0] * values[:, 1]).mean())) < scale
        assert abs(float((values[0] * values[1]).mean())) < scale


def test_the_table_has_a_normal_number_s_moments():
    values = _quantiles().double()
    assert len(values.unique()) == 2**16
    torch.testing.assert_close(values, -values.flip(0))
    assert float(values.square().mean()) == pytest.approx(1, rel=1e-6)
    assert float(values.pow(4).mean()) == pytest.approx(3, rel=1e-3)
    assert float(values.pow(6).mean()) == pytest.approx(15, rel=1e-3)
    assert 4.3 < float(values.max()) < 4.4


@pytest.mark.parametrize("size", [1, 3, 4, 7, 64])
def test_a_row_is_its_generator_s_whatever_it_is_stacked_with(size):
    together = drawn((3, size), 5, 6, 7, times=3)
    alone = drawn((1, size), 6, times=3)
    assert torch.isfinite(together).all()
    assert torch.equal(together[:, 1:2], alone)
    assert not torch.equal(together[:, 0], together[:, 1])
    assert not torch.equal(together[0], together[1])


def test_fewer_columns_are_what_a_smaller_one_would_draw():
    noise, out = NormalNoise((1, 64), torch.float32, torch.device("cpu")), torch.empty(1, 37)
    noise.fill(out, generators(4))
    assert torch.equal(out, drawn((1, 37), 4)[0])


def test_every_row_needs_a_generator():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        drawn((2, 4), 1)
