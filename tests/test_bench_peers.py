"""The benchmark is fair: TorchRL walks the same model as the library does."""

from __future__ import annotations

import pytest
import torch

from bench.peers import walker
from bench.test_traces import SIZES, build


@pytest.mark.parametrize("name", ["S", "four rooms"])
@torch.no_grad()
def test_peer_walks_the_same_model(name: str) -> None:
    model, start = build(name)
    peer, again = (walker(model, start, SIZES[name].num_steps)() for _ in range(2))
    assert not torch.equal(peer["action"], again["action"]), "the rollout must sample"
    after, before = peer["observation"], peer["next", "observation"]
    assert torch.equal(after[:, 0], start)
    assert torch.equal(after[:, 1:], before[:, :-1])
    expected = model.step_log_prob(before, peer["action"], after)
    torch.testing.assert_close(peer["action_log_prob"], expected["action"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        peer["next", "delta_log_prob"], expected["delta"], rtol=1e-3, atol=1e-3
    )
