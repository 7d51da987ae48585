"""Running statistics against torch's over all rows at once."""

from __future__ import annotations

import pytest
import torch

from torchrl_recall.model.normalization import RunningNormalizer

CHUNKS = (1, 7, 0, 64, 3)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def chunks(dtype, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for i, n in enumerate(CHUNKS):
        rows = torch.randn(n, size, generator=generator, dtype=torch.float64)
        yield (rows * (i + 1) * torch.tensor([1.0, 10.0, 0.1]) + i).to(dtype)


def masks():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(n, generator=generator) < 0.6 for n in CHUNKS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_statistics_of_all_rows(dtype, masked):
    normalizer = RunningNormalizer(3, dtype=dtype)
    kept = []
    for rows, mask in zip(chunks(dtype), masks(), strict=True):
        # What is masked must not matter, not even if it is no number.
        seen = torch.where(mask.unsqueeze(-1), rows, torch.nan) if masked else rows
        normalizer.update(seen, mask if masked else None)
        kept.append(rows[mask] if masked else rows)
    data = torch.cat(kept).double()
    assert normalizer.mean.dtype == normalizer.variance.dtype == dtype
    assert int(normalizer.count) == len(data)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(normalizer.mean.double(), data.mean(0), **tolerance)
    torch.testing.assert_close(
        normalizer.variance.double(), data.var(0, unbiased=False), **tolerance
    )
    torch.testing.assert_close(
        normalizer.normalize(data.to(dtype)).double(),
        (data - data.mean(0)) / data.std(0, unbiased=False),
        rtol=1e-4,
        atol=10 * TOLERANCE[dtype],
    )


def test_order_does_not_matter():
    there, back = (
        RunningNormalizer(3, dtype=torch.float64),
        RunningNormalizer(3, dtype=torch.float64),
    )
    rows = list(chunks(torch.float64))
    for chunk in rows:
        there.update(chunk)
    for chunk in rows[::-1]:
        back.update(chunk)
    torch.testing.assert_close(there.mean, back.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there.variance, back.variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [torch.zeros(0, 2), torch.full((4, 2), 9.0)])
def test_no_kept_row_changes_nothing(rows):
    normalizer = RunningNormalizer(2)
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    normalizer.update(rows, nothing)
    assert normalizer.mean.tolist() == [0, 0]
    assert normalizer.variance.tolist() == [1, 1]
    normalizer.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    normalizer.update(rows, nothing)
    assert normalizer.mean.tolist() == [2, 4]
    assert normalizer.variance.tolist() == [1, 4]
    assert int(normalizer.count) == 2


def test_a_constant_feature_has_the_floor_as_its_scale():
    normalizer = RunningNormalizer(1, floor=0.5)
    normalizer.update(torch.full((10, 1), 3.0))
    assert normalizer.std.tolist() == [0.5]
    assert normalizer.normalize(torch.tensor([[4.0]])).tolist() == [[2.0]]


def test_a_large_offset_does_not_cancel():
    rows = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) + 1e4
    normalizer = RunningNormalizer(1)
    for chunk in rows.split(10):
        normalizer.update(chunk)
    expected = rows.double().std(unbiased=False)
    assert float(normalizer.std) == pytest.approx(float(expected), rel=1e-2)


def test_denormalize_undoes_normalize():
    normalizer = RunningNormalizer(3, dtype=torch.float64)
    rows = torch.cat(list(chunks(torch.float64)))
    normalizer.update(rows)
    there_and_back = normalizer.denormalize(normalizer.normalize(rows))
    torch.testing.assert_close(there_and_back, rows, rtol=1e-12, atol=1e-12)


def test_statistics_are_saved_and_carry_no_gradient():
    normalizer = RunningNormalizer(3)
    normalizer.update(torch.randn(5, 3).requires_grad_())
    assert not normalizer.mean.requires_grad
    other = RunningNormalizer(3)
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other.mean, normalizer.mean)
    assert torch.equal(other.variance, normalizer.variance)
    assert int(other.count) == 5
    assert normalizer.to(torch.float64).count.dtype == torch.int64
