"""Ages of blocks against one number per row, over a ring that goes round."""

from __future__ import annotations

import torch

from torchrl_recall.priorities.ages import BlockAges


def test_ages_against_one_number_per_row():
    generator = torch.Generator().manual_seed(0)
    capacity, block = 50, 4
    ages, exact = BlockAges(block, capacity, first=0), {}
    written = 0
    for call in range(1, 200):
        new = int(torch.randint(0, 9, (), generator=generator))
        written += new
        oldest = max(0, written - capacity)
        low = max(oldest, ages.aligned(max(oldest, written - new)))
        row = int(torch.randint(oldest, written + 1, (), generator=generator))
        older, end = max(oldest, ages.aligned(row)), min(written, ages.aligned(row) + 2 * block)
        for begin, stop in [(low, written), (older, end)]:
            ages.mark(begin, stop, call)
            exact |= dict.fromkeys(range(begin, stop), call)
        later = written + int(torch.randint(0, 20, (), generator=generator))
        first = max(0, later - capacity)
        expected = [call - exact[row] if row in exact else -1 for row in range(first, later)]
        assert ages.of_rows(first, later, call).tolist() == expected
        known = [age for age in expected if age >= 0]
        assert ages.summary(first, later, call) == (len(known), sum(known), max(known, default=0))


def test_ages_take_at_most_a_sixteenth_byte_per_row():
    ages = BlockAges(256, 10**6, first=0)
    ages.mark(0, 10**6, call=1)
    state = ages.state_dict()
    memory = sum(x.numel() * x.element_size() for x in (state["call"], state["until"]))
    assert memory < 10**6 / 16
