"""Speed against peers: `pytest bench/`, then `python -m bench.report`."""
