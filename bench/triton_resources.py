"""What the Triton walk takes of a GPU, without one: `python -m bench.triton_resources`.

Compiles it ahead of time for sm_90 (H100) at the sizes M and L and saves registers, spilled bytes
and shared memory in ``bench/results/triton-sm90.json``. Says nothing about time.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.machine import RESULTS, describe
from torchrl_recall import BacktrackModel
from torchrl_recall.traces import triton_pack, triton_walk

# An H100: its multiprocessors, and the bytes of shared memory a block of threads can have.
MULTIPROCESSORS, SHARED = 132, 232448
SIZES = {
    "M": {"rows": 1024, "num_steps": 16, "features": 17, "actions": 6, "width": 256},
    "L": {"rows": 8192, "num_steps": 32, "features": 111, "actions": 8, "width": 256},
}
FLOATS = ("action_low", "action_width", "action_floor", "delta_low", "delta_width")
INTEGERS = ("first_row", "num_rows", "num_steps")


def compile_walk(
    features: int,
    actions: int,
    num_cells: tuple[int, ...],
    precision: str,
    rows: int,
    **options: Any,
) -> tuple[Any, triton_walk.Tiles]:
    """Compile the walk of a model ahead of time for sm_90.

    Args:
        features (int): size of the observation.
        actions (int): size of the action.
        num_cells (tuple of int): hidden widths.
        precision (str): as for `triton_walk`.
        rows (int): number of traces.
        **options: of the model.

    Returns:
        tuple: Triton's compiled kernel, and the cut of the work.
    """
    from torchrl_recall.traces.triton_kernel import walk_kernel

    triton, compiler = import_module("triton"), import_module("triton.compiler")
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names: list[str] = walk_kernel.arg_names  # pyright: ignore
    model = BacktrackModel(features, actions, num_cells=num_cells, **options)
    sizes = triton_pack.Sizes.of(model, precision)
    tiles = triton_walk.choose_tiles(sizes, rows, MULTIPROCESSORS, SHARED)
    constants = triton_walk.constants(model, sizes, tiles, precision, draws=True)
    constants |= dict.fromkeys(("noise_action", "noise_delta", "noise_stop"))
    pointers = {"seed": "*i64", "out_mask": "*i8"}
    if precision == "float16":
        pointers |= {"weights": "*fp16", "scratch": "*fp16"}
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS or name in INTEGERS:
            signature[name] = "fp32" if name in FLOATS else "i32"
        else:
            signature[name] = pointers.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(walk_kernel, signature, constants, attributes)
    settings = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=settings), tiles


def resources(kernel: Any) -> dict[str, int]:
    """Return what a compiled kernel takes, by the assembler's own account.

    Args:
        kernel (CompiledKernel): from `compile_walk`.

    Returns:
        dict: registers of a thread, bytes that it spills, shared memory of a block.
    """
    assembler = import_module("triton.backends.nvidia.compiler").get_ptxas(90).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(kernel.asm["ptx"], encoding="utf-8")
        command = [assembler, "-v", "--gpu-name=sm_90a", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found is not None, log
        return int(found.group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
        "shared_bytes": kernel.metadata.shared,
    }


def main() -> None:
    """Compile all and save what they take."""
    kernels = []
    for size, sizes in SIZES.items():
        for precision in triton_walk.DOT_PRECISIONS:
            kernel, tiles = compile_walk(
                sizes["features"],
                sizes["actions"],
                (sizes["width"],) * 2,
                precision,
                sizes["rows"],
            )
            kernels.append(
                {"size": size, "precision": precision, **tiles._asdict(), **resources(kernel)}
            )
            print(kernels[-1], flush=True)
    machine = {**describe(), "device": "none (compiled for sm_90)", "triton": version("triton")}
    content = {"machine": machine, "sizes": SIZES, "kernels": kernels}
    path = RESULTS / "triton-sm90.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
