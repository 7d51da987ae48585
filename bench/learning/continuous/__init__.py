"""Sparse continuous tasks: hosts, recall traces, controls and what they are run on."""
