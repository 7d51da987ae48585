"""The main job: recall traces beside A2C on four rooms, with TorchRL's own parts."""

METHODS = ("a2c", "a2c_sil", "recall_found", "recall_known")
SOLVED = 0.9  # success probability that counts as solved
