"""Recall traces for TorchRL."""
