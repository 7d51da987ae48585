"""Values of stored transitions, and exact draws by them: plain tensors beneath the sampler.

`weights.py` says what each mode means. `native.py` draws by the C library, `levels.py` in torch
operations on any device; both have the same methods. `trajectories.py` and `trajectory_draws.py`
draw whole trajectories, `arguments.py` reads what TorchRL passes as index and priority, `ages.py`
and `returns.py` serve `refresh.py`.
"""
