"""Builds the C library of ``torchrl_recall/native``; the rest is in ``pyproject.toml``.

The library is loaded with ctypes and knows nothing of Python, so that a wheel that holds it fits
every Python 3 of its platform. Without a C compiler the package is installed without the library,
and beside where it would be lies the reason. ``TORCHRL_RECALL_NO_NATIVE=1`` does so on purpose.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("torchrl_recall", "native")
# As `LIBRARY` in interface.py has it.
LIBRARY = PACKAGE / ("librecall.dll" if os.name == "nt" else "librecall.so")
REASON = LIBRARY.with_suffix(".txt")
SWITCH = "TORCHRL_RECALL_NO_NATIVE"
FLAGS = {
    "msvc": ["/O2", "/fp:precise"],
    # Contraction would round differently from machine to machine; without errno, sqrt is one
    # instruction.
    "unix": ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"],
}


class BuildLibrary(build_ext):
    """Compiles the library, or writes down why it could not."""

    def run(self) -> None:
        """Build, and never fail."""
        inplace = self.inplace
        places = [Path(self.build_lib), *([Path()] if inplace else [])]
        for place in places:
            # What an earlier build left would pass for this one's.
            (place / LIBRARY).unlink(missing_ok=True)
            (place / REASON).unlink(missing_ok=True)
        try:
            if os.environ.get(SWITCH, "0") not in ("", "0"):
                raise RuntimeError(f"{SWITCH} was set")
            super().run()
        except Exception as error:
            print(f"torchrl-recall is built without its C library, which is slower: {error}")
            for place in places:
                (place / PACKAGE).mkdir(parents=True, exist_ok=True)
                (place / REASON).write_text(f"{error}\n", encoding="utf-8")
        self.inplace = inplace

    def get_ext_filename(self, fullname: str) -> str:
        """Return a plain shared library's name, without a tag of Python's."""
        return str(Path(*fullname.split(".")).with_suffix(LIBRARY.suffix))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""
        compiler: Any = self.compiler
        flags = FLAGS.get(compiler.compiler_type, FLAGS["unix"])
        if compiler.compiler_type == "unix":
            find_compiler(compiler)

        def compile_one(source: str) -> list[str]:
            try:
                return compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
            except Exception as error:
                raise RuntimeError(why_it_failed(compiler, source, flags, error)) from error

        Path(self.build_temp, ext.sources[0]).parent.mkdir(parents=True, exist_ok=True)
        # Other compilers look for themselves at their first call, which threads would repeat.
        with ThreadPoolExecutor(os.cpu_count() if compiler.compiler_type == "unix" else 1) as pool:
            objects = [made for source in pool.map(compile_one, ext.sources) for made in source]
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        libraries = [] if compiler.compiler_type == "msvc" else ["m"]
        try:
            compiler.link_shared_object(
                objects, str(path), libraries=libraries, build_temp=self.build_temp
            )
        except Exception as error:
            raise RuntimeError("linking failed, `pip install -v` shows how") from error

    def get_output_mapping(self) -> dict[str, str]:
        """Return where the outputs lie in the source tree, for editable installs."""
        if not self.inplace:
            return {}
        return {built: str(Path(built).relative_to(self.build_lib)) for built in self.get_outputs()}

    def get_outputs(self) -> list[str]:
        """Return what was built: the library, or the reason."""
        paths = [Path(self.build_lib, path) for path in (LIBRARY, REASON)]
        return [str(path) for path in paths if path.exists()]


def why_it_failed(compiler: Any, source: str, flags: list[str], error: Exception) -> str:
    """Return a compiler's first words about a source that it did not compile."""
    command = getattr(compiler, "compiler_so", None)
    if command is None:
        return str(error)[:300]
    try:
        again = subprocess.run(
            [*command, *flags, "-c", source, "-o", os.devnull],
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError:
        return f"there is no C compiler {command[0]!r}"
    errors = [line.strip() for line in again.stderr.splitlines() if "error" in line.lower()]
    said = "; ".join(errors[:2]) or f"exit status {again.returncode}"
    return f"the C compiler {command[0]!r} failed: {said}"[:300]


def find_compiler(compiler: Any) -> None:
    """Use the machine's compiler where the one that built Python, perhaps elsewhere, is not."""
    if "CC" in os.environ or shutil.which(compiler.compiler_so[0]):
        return
    found = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    for command in (compiler.compiler_so, compiler.linker_so):
        command[0] = found or command[0]


class Wheel(bdist_wheel):
    """Tags a wheel by what is in it."""

    def run(self) -> None:
        """Build first: only then is it known what there is to tag."""
        self.run_command("build")
        self.skip_build = True
        build: Any = self.get_finalized_command("build")
        self.root_is_pure = not Path(build.build_lib, LIBRARY).exists()
        if self.root_is_pure:
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the library depends on the platform, but not on Python."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def paths(pattern: str) -> list[str]:
    """Return the sources that match."""
    return sorted(path.as_posix() for path in (PACKAGE / "src").glob(pattern))


setup(
    ext_modules=[Extension("torchrl_recall.native.librecall", paths("*.c"), depends=paths("*.h"))],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
