"""
Compile the registry's kernel when a wheel or an editable installation is built, if that can be done.

The kernel (`hygiene/kernel/compiled.pyx`) makes reads and writes faster and changes nothing else, so whatever keeps it
from being compiled costs one line in the output and no more: the wheel is then a pure one, for any Python.

Two variables of the environment decide otherwise: ``HYGIENE_PURE=1`` asks for the pure wheel, and with
``HYGIENE_COMPILED=1`` a kernel that cannot be compiled is an error, for those who build wheels for others.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "hygiene.kernel.compiled"
SOURCE = Path("hygiene", "kernel", "compiled.pyx")
OLDEST, NEWEST = (3, 11), (3, 15)  # the kernel knows how a dict of these versions is laid out


class KernelHook(BuildHookInterface[Any]):
    """Adds the compiled kernel to what hatchling builds."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling what came of it; *version* is "standard" or "editable"."""
        root = Path(self.root)
        target = root / SOURCE.with_name("compiled" + sysconfig.get_config_var("EXT_SUFFIX"))
        # Until the wheel is written; finalize() is not called if something goes wrong before.
        self._work = tempfile.TemporaryDirectory(prefix="hygiene-kernel-", ignore_cleanup_errors=True)
        reason = failure = None
        try:
            reason = refusal()
            if reason is None:
                built = compiled(root, Path(self._work.name))
                if version == "editable":
                    move(built, target)
                else:
                    build_data["force_include"][str(built)] = (SOURCE.parent / target.name).as_posix()
                    build_data["pure_python"] = False
                    build_data["infer_tag"] = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the package does without the kernel
            reason, failure = f"it could not be compiled ({first_line(error)})", error
        if reason is None:
            self.app.display_info("hygiene: built with its compiled kernel")
            return
        if version == "editable":
            target.unlink(missing_ok=True)  # Python would import the one of an earlier build
        if asked_for("HYGIENE_COMPILED"):
            raise RuntimeError(f"HYGIENE_COMPILED=1 asks for the compiled kernel of hygiene, but {reason}") from failure
        self.app.display_warning(
            f"hygiene: built without its compiled kernel: {reason}; everything works, reads are slower"
        )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove what the compiler left."""
        self._work.cleanup()


def asked_for(name: str) -> bool:
    """Whether the variable *name* of the environment is set to something that means yes."""
    return os.environ.get(name, "") not in {"", "0"}


def refusal() -> str | None:
    """Why there is no point in starting a compiler; ``None`` if there is."""
    if asked_for("HYGIENE_PURE"):
        return "HYGIENE_PURE=1 asks for that"
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    return unsupported(sys.implementation.name, sys.version_info[:2], free_threaded=free_threaded) or missing()


def unsupported(implementation: str, version: tuple[int, int], *, free_threaded: bool) -> str | None:
    """Why the kernel does not fit a Python; ``None`` if it does."""
    if implementation != "cpython":
        return f"it is for CPython, and this is {implementation}"
    if not OLDEST <= version <= NEWEST:
        first, last, this = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST, version))
        return f"it is for Python {first} to {last}, and this is {this}"
    if free_threaded:
        return "it relies on the GIL, and this Python has none"
    return None


def missing() -> str | None:
    """What a compiler would need and the machine does not have; ``None`` if it has, or only the compiler can tell."""
    if os.name == "nt":
        return None  # setuptools looks for Visual C++ in many places, and says what it did not find
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if not shutil.which(command[0]):
        return f"no C compiler was found ({command[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python (Python.h) were not found; on Debian and Ubuntu they are in python3-dev"
    return None


def compiled(root: Path, work: Path) -> Path:
    """Compile the kernel of the project at *root* in the folder *work*, and return the library."""
    # Here, because a build without them is one without the kernel, and no failure.
    from Cython.Build import cythonize  # noqa: PLC0415
    from Cython.Compiler.Errors import CompileError as CythonError  # noqa: PLC0415
    from setuptools import Distribution, Extension  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415
    from setuptools.errors import CCompilerError  # noqa: PLC0415

    # Who says how far to optimize, knows why (a sanitizer, a debugger): what is given here would come after it.
    optimize = [] if os.name == "nt" or "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
    if sys.platform == "linux":
        optimize.append("-fno-plt")  # functions of CPython are called directly: a tenth of the time of a write
    # The path of the source ends up in the library: the same wherever it was compiled.
    with contextlib.chdir(root):
        extension = Extension(MODULE, [str(SOURCE)], extra_compile_args=optimize)
        try:
            modules = cythonize(  # type: ignore[no-untyped-call]  # Cython has hints for its types only
                [extension], build_dir=str(work / "c"), force=True, quiet=True
            )
        except CythonError as error:
            raise RuntimeError("Cython refused it, and says above why") from error
        command = build_ext(Distribution({"name": "hygiene", "ext_modules": modules}))
        command.build_lib, command.build_temp = str(work / "lib"), str(work / "objects")
        command.ensure_finalized()
        try:
            command.run()
        except CCompilerError as error:  # names a command of a thousand characters
            raise RuntimeError("the C compiler failed, and may say above why") from error
    return Path(command.get_ext_fullpath(MODULE))


def move(built: Path, target: Path) -> None:
    """Put a library where it is imported from, in one step."""
    # A process may have the old one mapped, and another build of the same tree may be about to do the same.
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=target.parent) as beside:
        copy = Path(beside, target.name)
        shutil.copy(built, copy)
        copy.replace(target)


def first_line(error: Exception) -> str:
    """The beginning of what *error* says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
