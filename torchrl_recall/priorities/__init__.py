"""Values of stored transitions, and exact draws by them: plain tensors beneath the sampler.

`weights.py` says what each mode means, `levels.py` draws in torch operations (any device),
`native.py` by the C library; `arguments.py` reads what TorchRL passes as index and priority.
`trajectories.py` groups entries by trajectory; `returns.py` and `ages.py` serve `refresh.py`.
"""
