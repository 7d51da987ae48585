"""MuJoCo tasks: dense, delayed and sparse rewards, on- and off-policy."""

from bench.learning.mujoco.rows import entries, sections

__all__ = ["entries", "sections"]
