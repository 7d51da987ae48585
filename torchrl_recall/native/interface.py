"""The C library of ``native/src`` as ctypes sees it: structures, signatures, and where it is.

Mirrors ``src/recall.h``, line by line. The library is a plain C shared object without torch's
headers, so it neither breaks with torch's ABI nor takes long to build.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import Structure, c_double, c_float, c_int64, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path

from torchrl_recall.native.priorities import Priorities

VERSION = 4
MAX_LAYERS = 16
ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "softplus",
    "mish",
)
NORMAL, TANH_NORMAL, BOX, MIXTURE, CLASS, SUPPORT = range(6)
OK, STALE = 0, 2
# What `instruction_set` gives: the widest that the processor has.
INSTRUCTION_SETS = {0: "portable", 256: "AVX2", 512: "AVX-512", 513: "AVX-512 with bfloat16"}
_BUILT = Path(__file__).with_name("librecall.dll" if os.name == "nt" else "librecall.so")
# The variable is for tests of the library: another build of it.
LIBRARY = Path(os.environ.get("TORCHRL_RECALL_LIBRARY", _BUILT))
# Philox4x32-10 of one counter, computed in Python's integers (`tests/philox_stream.py`).
KNOWN_COUNTER, KNOWN_SEED = (0x243F6A88, 0x85A308D3, 0x13198A2E), 0x299F31D0A4093822
KNOWN_WORDS = (0xAE120E9D, 0xA08A4CAB, 0xD28EC6A2, 0x42D73C1F)


class Network(Structure):
    """A stack of Linear layers with one kind of activation between them."""

    _fields_ = [
        ("num_layers", c_int64),
        ("activation", c_int64),
        ("slope", c_float),
        ("width", c_int64 * (MAX_LAYERS + 1)),
        ("weight", c_void_p * MAX_LAYERS),
        ("bias", c_void_p * MAX_LAYERS),
    ]


class Head(Structure):
    """A head of the model."""

    _fields_ = [
        ("kind", c_int64),
        ("size", c_int64),
        ("components", c_int64),
        ("low", c_float),
        ("width", c_float),
        ("floor", c_float),
        ("mean", c_void_p),
        ("spread", c_void_p),
    ]


class Model(Structure):
    """A model by pointers to its live parameters."""

    _fields_ = [
        ("network", Network * 3),
        ("action", Head),
        ("delta", Head),
        ("state_size", c_int64),
        ("feature_size", c_int64),
        ("is_discrete", c_int64),
        ("has_joint_code", c_int64),
        ("cardinality", c_void_p),
        ("floor", c_float),
        ("mean", c_void_p),
        ("variance", c_void_p),
        ("support", c_void_p),
        ("lowest", c_void_p),
        ("highest", c_void_p),
        ("has_dead_ends", c_int64),
        ("is_bfloat16", c_int64),
    ]


# A call is an `array` of 64-bit words; pointers are among them. These are their places.
CALL_FIELDS = (
    "num_rows",
    "num_traces",
    "num_steps",
    "start",
    "seed",
    "noise_action",
    "noise_delta",
    "noise_stop",
    "state",
    "next_state",
    "action",
    "action_log_prob",
    "delta_log_prob",
    "mask",
    "last_visit",
    "instruction_set",
    "next_tile",
    "finite_rows",
    "bad_starts",
    "packed",
)
WORD = "q"
NEXT_TILE, FINITE_ROWS, BAD_STARTS = (
    CALL_FIELDS.index(name) for name in ("next_tile", "finite_rows", "bad_starts")
)


# A model goes by its address: a plain number is the quickest to pass.
_SIGNATURES = {
    "recall_version": [],
    "recall_instruction_set": [],
    "recall_words": [c_int64, c_uint32 * 3, c_uint64, c_uint32 * 4],
    "recall_packed_bytes": [c_void_p],
    "recall_pack": [c_void_p, c_void_p],
    "recall_is_current": [c_void_p, c_void_p],
    "recall_table_bytes": [c_void_p],
    "recall_tables": [c_void_p, c_void_p, c_void_p, c_int64],
    "recall_walk": [c_void_p, c_void_p, c_void_p],
    "recall_look_up": [c_void_p, c_void_p, c_void_p],
    # Of draws by value, whose structure is in `priorities.py`.
    "recall_priorities_bytes": [],
    "recall_num_nodes": [c_int64],
    "recall_expect": [c_void_p, c_int64],
    "recall_census": [c_void_p],
    "recall_prepare": [c_void_p],
    "recall_write": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_double],
    "recall_erase": [c_void_p, c_void_p, c_int64],
    "recall_refresh": [c_void_p, c_void_p, c_int64, c_int64, c_double],
    "recall_resize": [c_void_p, c_int64],
    "recall_draw": [c_void_p, c_void_p, c_int64, c_double, c_void_p, c_void_p],
    "recall_weights": [c_void_p, c_void_p],
}


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """Load the library, once.

    Returns:
        tuple: the library and None, or None and the reason why there is none.
    """
    if not LIBRARY.exists():
        reason = LIBRARY.with_suffix(".txt")
        why = reason.read_text(encoding="utf-8").strip() if reason.exists() else ""
        return None, (
            f"{LIBRARY.name} was not built when the package was installed"
            f"{': ' + why if why else ''}; with a C compiler, reinstall without pip's cache"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.recall_version()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if version != VERSION:
        return None, f"{LIBRARY.name} has version {version}, expected {VERSION}; reinstall"
    try:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int64
    except AttributeError as error:
        return None, f"{LIBRARY.name} is another library: {error}"
    if library.recall_priorities_bytes() != ctypes.sizeof(Priorities):
        return None, f"{LIBRARY.name} was built from other sources; reinstall"
    library.recall_pack.restype = None
    widest = library.recall_instruction_set()
    for instructions in (one for one in INSTRUCTION_SETS if one <= widest):
        # Compilers have got this wrong, and wrong random numbers go unnoticed.
        words = (c_uint32 * 4)()
        counter = (c_uint32 * 3)(*KNOWN_COUNTER)
        library.recall_words(instructions, counter, KNOWN_SEED, words)
        if tuple(words) != KNOWN_WORDS:
            return None, (
                f"{LIBRARY.name} draws wrong random numbers with {INSTRUCTION_SETS[instructions]}: "
                "its compiler made an error; build it with another"
            )
    return library, None
