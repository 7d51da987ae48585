"""Sparse continuous tasks: hosts, recall traces, controls and what they are run on."""

from bench.learning.continuous.variants import entries, sections

__all__ = ["entries", "sections"]
