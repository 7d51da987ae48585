"""The structure of ``src/priorities.h`` as ctypes sees it, field by field."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int64, c_void_p

MODES = ("top", "soft", "rank", "per")
MAX_BAND = 4096
NOTHING_TO_DRAW = 2
# What `recall_write` answers to an index that is out of range, and to several values for one index.
OUT_OF_RANGE, ONE_INDEX = -1, -2


class Form(Structure):
    """What the weight of an entry depends on beside its own value."""

    _fields_ = [
        ("sums", c_int64),
        ("mode", c_int64),
        ("least", c_double),
        ("threshold", c_double),
        ("reference", c_double),
        ("rate", c_double),
        ("extra", c_double),
        ("shift", c_double),
        ("alpha", c_double),
    ]


class Priorities(Structure):
    """Values, sums over them, and what they depend on."""

    _fields_ = [
        ("capacity", c_int64),
        ("is_double", c_int64),
        ("instruction_set", c_int64),
        ("values", c_void_p),
        ("size", c_int64),
        ("mode", c_int64),
        ("has_min_value", c_int64),
        ("temperature", c_double),
        ("min_value", c_double),
        ("alpha", c_double),
        ("eps", c_double),
        ("uniform_share", c_double),
        ("num_best", c_int64),
        ("census_is_valid", c_int64),
        ("num_drawable", c_int64),
        ("num_valued", c_int64),
        ("num_enough", c_int64),
        ("num_largest", c_int64),
        ("largest", c_double),
        ("threshold_is_valid", c_int64),
        ("num_above", c_int64),
        ("num_tied", c_int64),
        ("threshold", c_double),
        ("band_is_valid", c_int64),
        ("num_over", c_int64),
        ("num_band", c_int64),
        ("band_low", c_double),
        ("band_high", c_double),
        ("band", c_void_p),
        ("nodes_are_valid", c_int64),
        ("eligible_is_valid", c_int64),
        ("order_is_valid", c_int64),
        ("least_is_valid", c_int64),
        ("form", Form),
        ("eligible_form", Form),
        ("nodes", c_void_p),
        ("eligible", c_void_p),
        ("order", c_void_p),
        ("spare", c_void_p),
        ("changed", c_void_p),
        ("num_ordered", c_int64),
        ("num_changed", c_int64),
        ("num_ranks", c_int64),
        ("least_weight", c_double),
        ("least_positive_weight", c_double),
    ]
