"""A few hundred spoilt calls; `fuzz.py` makes as many as one likes."""

from __future__ import annotations

import pytest
import torch
from fuzz import ALL_TARGETS, judge, make_case, run_case
from fuzz_targets import Case
from mutations import digest
from tensordict import TensorDict

pytestmark = pytest.mark.filterwarnings("ignore:ValuePrioritizedSampler got:UserWarning")
CASES = 30  # of each target


@pytest.mark.parametrize("target", sorted(ALL_TARGETS))
def test_no_call_breaks_anything(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = sorted(ALL_TARGETS).index(target)
    numbers = range(first, first + CASES * len(ALL_TARGETS), len(ALL_TARGETS))
    reports = [run_case(number) for number in numbers]
    assert {report["target"] for report in reports} == {target}
    bad = [report for report in reports if report["outcome"] not in ("success", "refused")]
    assert not bad, bad[0]
    # Both kinds of case are there, or nothing was tried.
    assert {report["outcome"] for report in reports} == {"success", "refused"}
    assert not list(tmp_path.iterdir()), "a call wrote into the working directory"


def test_a_number_names_a_case():
    for number in range(3 * len(ALL_TARGETS)):
        name, _, given, spoilt = make_case(number)
        again, _, other, same = make_case(number)
        assert (name, spoilt) == (again, same)
        assert str(given.keys()) == str(other.keys())
        data = [x.get("data") for x in (given, other)]
        if isinstance(data[0], TensorDict) and "cpu" in str(data[0].device or "cpu"):
            assert digest(data[0]) == digest(data[1])


def _case(run, words=()):
    return Case({"size": 3}, run, lambda *_: None, words=words)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("size must be positive"), "wrong kind"),
        (AssertionError("size"), "wrong kind"),
        (IndexError("size"), "wrong kind"),
        (ValueError("this must be positive"), "names nothing"),
        (ValueError("size must be positive"), None),
        (KeyError("size"), None),
    ],
)
def test_what_counts_as_a_finding(error, outcome):
    try:
        torch.utils._pytree.tree_map(_raiser(error), {"size": 3})
    except Exception as raised:
        # Raised from within the library, as far as the judge can see.
        found = judge(raised, _case(None), {"size": 3}, inside="test_fuzz")
    assert found.get("outcome") == outcome


def _raiser(error):
    def run(_):
        raise error

    return run


def test_digest_sees_every_number():
    data = TensorDict({"a": torch.zeros(3, 2), "b": {"c": torch.ones(3)}}, [3])
    before = digest(data)
    assert digest(data.clone()) == before
    for key in ("a", ("b", "c")):
        changed = data.clone()
        changed[key].view(-1)[-1] = torch.nan
        assert digest(changed) != before
        assert digest(changed) == digest(changed.clone())
    assert digest(data.double()) != before
    assert digest(data[:2]) != before
