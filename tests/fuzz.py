"""Spoilt calls of every public class: `python tests/fuzz.py --cases 10000`.

A case is named by its number alone. What may come of it: success with the contract kept, or a
ValueError, KeyError or TypeError that names an argument or a key, and then nothing was changed.
Everything else is a finding. The calls run in a process of their own, so that a crash or a hang is
a finding, too. That process works in a directory of its own, which must stay empty.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from queue import Empty, Queue

import torch
from fuzz_buffer_targets import BUFFER_TARGETS
from fuzz_targets import TARGETS
from mutations import digest, spoil

ALL_TARGETS = {**TARGETS, **BUFFER_TARGETS}
REFUSALS = (ValueError, KeyError, TypeError)
# Where the library calls TorchRL's own buffer, or functions that users give it.
OF_OTHERS = (".extend(", "self.refresh()", "self.weight(", "self.start(", "support(candidates)")
HANG = 60.0  # seconds that no case takes
START = 600.0  # nor the start of a process, on a busy machine


def make_case(number):
    """Return the name of the target, its case, and which arguments are spoilt."""
    rng = random.Random(number)
    name = sorted(ALL_TARGETS)[number % len(ALL_TARGETS)]
    torch.manual_seed(number)
    case = ALL_TARGETS[name](rng)
    spoilt = rng.sample(
        sorted(case.arguments), min(len(case.arguments), rng.choice([0, *[1] * 8, 2]))
    )
    given = {**case.arguments}
    for argument in spoilt:
        given[argument] = spoil(given[argument], rng)
    return name, case, given, spoilt


def run_case(number):
    """Run a case and say how it ended: ``outcome``, and what a finding needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name, case, given, spoilt = make_case(number)
        report = {"case": number, "target": name, "spoilt": spoilt}
        before = digest(case.guarded, given)
        try:
            result = case.run(given)
        except Exception as error:
            report |= {"outcome": "refused", **judge(error, case, given)}
            if not spoilt and not (case.refusals and str(error).startswith(case.refusals)):
                report |= {"outcome": "refused though valid"}
            elif digest(case.guarded, given) != before:
                report |= {"outcome": "changed"}
            return report
        try:
            case.check(given, result)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return report | {"outcome": "broken", "error": f"{where.line}: {error!r}"[:300]}
    return report | {"outcome": "success"}


def judge(error, case, given, inside="torchrl_recall"):
    """A refusal, unless its kind or its message is not what users can work with."""
    message, kind = str(error), type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if inside in f.filename] or frames
    where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
    found = {"error": f"{kind}: {message}"[:300], "where": where}
    if case.refusals and message.startswith(case.refusals):
        return found
    if any(f.name == "forward" and "generated" in f.filename for f in frames):
        return found  # out of the user's own network
    if any(call in (ours[-1].line or "") for call in OF_OTHERS):
        return found
    if not isinstance(error, REFUSALS) or isinstance(error, UnicodeError):
        return found | {"outcome": "wrong kind"}
    if ours is frames:
        return found  # TorchRL's own refusal
    names = (*given, *case.words)
    if not any(name.strip("'") in message for name in names):
        return found | {"outcome": "names nothing"}
    return found


def _worker(start, stop):
    torch.set_num_threads(1)
    for number in range(start, stop):
        print(json.dumps({"begins": number}), flush=True)
        report = run_case(number)
        written = sorted(path.name for path in pathlib.Path().iterdir())
        if written:
            report |= {"outcome": "wrote here", "error": f"{written}"}
            for path in pathlib.Path().iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(json.dumps(report), flush=True)


def run_all(start, stop):
    """Run cases in a process that is started again after a crash or a hang; yield reports."""
    script, folder = str(pathlib.Path(__file__).resolve()), tempfile.TemporaryDirectory()
    # The worker imports what this process imports, from wherever that was started.
    found = os.pathsep.join(path or os.getcwd() for path in sys.path)
    while start < stop:
        process = subprocess.Popen(
            [sys.executable, script, "--worker", str(start), str(stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder.name,
            env={**os.environ, "PYTHONPATH": found},
        )
        lines: Queue[str] = Queue()

        def read(process=process, lines=lines):
            for line in process.stdout:
                if line.startswith("{"):  # and no log of TorchRL's
                    lines.put(line)
            lines.put("")

        def drain(process=process):
            for _ in process.stderr:
                pass

        for task in (read, drain):
            threading.Thread(target=task, daemon=True).start()
        running, limit = start, START
        while True:
            try:
                line = lines.get(timeout=limit)
            except Empty:
                line, hangs = "", True
            else:
                hangs = False
            if not line:
                break
            report, limit = json.loads(line), HANG
            if "begins" in report:
                running = report["begins"]
                continue
            yield report
            start = report["case"] + 1
        process.kill()
        code = process.wait()
        if start < stop:
            outcome = "hang" if hangs else f"crash ({code})"
            yield {"case": running, "target": "?", "spoilt": [], "outcome": outcome, "error": ""}
            start = running + 1
    folder.cleanup()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int, help="run one case here, with its traceback")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _worker(*options.worker)
        return 0
    if options.case is not None:
        name, case, given, spoilt = make_case(options.case)
        print(name, "spoilt:", {argument: given[argument] for argument in spoilt})
        print(json.dumps(run_case(options.case)))
        case.check(given, case.run(given))
        return 0
    began, counts, findings = time.monotonic(), collections.Counter(), {}
    for report in run_all(options.first, options.first + options.cases):
        counts[report["target"], report["outcome"]] += 1
        if report["outcome"] not in ("success", "refused"):
            kind = (report["target"], report["outcome"], report.get("where"), report["error"][:60])
            findings.setdefault(kind, []).append(report)
    for (target, outcome), count in sorted(counts.items()):
        print(f"{target:32}{outcome:16}{count:7}")
    for reports in sorted(findings.values(), key=len, reverse=True):
        print(f"{len(reports)} times: {json.dumps(reports[0])}")
    print(
        f"{sum(counts.values())} cases, {len(findings)} findings, {time.monotonic() - began:.0f} s"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
