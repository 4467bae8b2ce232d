"""C++ kernels for the CPU, compiled on first use.

`amx` trains and infers in bf16 on CPUs with AMX tiles; `avx2` and `avx512`, one source, infer in
float32. Nothing is compiled or loaded at import. The first forward that could use a set
asks `kernels(name)`, which compiles the sources of its folder with the C++ compiler of the machine
(a few seconds; no header of PyTorch is needed) and keeps the library in the user's cache folder.
Where that is impossible it logs why, once, and returns None: the PyTorch path runs.
`MULTIMODAL_DLM_NATIVE=0` turns all off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "MULTIMODAL_DLM_NATIVE"
MAX_THREADS = 256
MAX_SCRATCH = 64 << 20  # Bytes kept from call to call.
_FOLDER = Path(__file__).resolve().parent
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma")


class _Set(NamedTuple):
    """Kernels for one kind of CPU.

    Attributes:
        folder: Where their sources are.
        flags: What their sources are compiled with.
        needs: What the CPU must have, in words.
        is_supported: Whether this one has it.
    """

    folder: str
    flags: tuple[str, ...]
    needs: str
    is_supported: Callable[[], bool]


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()


SETS = {
    "amx": _Set(
        "amx",
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile",
         "-mamx-bf16"),
        "AMX tiles",
        _has_amx,
    ),
    "avx512": _Set(
        "simd", ("-mavx2", "-mavx512f"), "AVX-512", torch.cpu._is_avx512_supported
    ),
    "avx2": _Set("simd", ("-mavx2",), "AVX2", torch.cpu._is_avx2_supported),
}  # fmt: skip


class Kernels:
    """The functions of the compiled library, called with tensors, numbers and None.

    Args:
        path: The library.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._scratch = threading.local()

    def __call__(self, name: str, *arguments: Any) -> int:
        """Call a function; a float is passed as a C float, a tensor as its address."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return function(*(_c_value(argument) for argument in arguments))

    def with_workspace(self, name: str, *arguments: Any) -> None:
        """Call a function whose last argument is scratch memory; it is asked how much first.

        Each thread keeps its scratch memory: fresh pages cost as much as the work of a small call.
        """
        size = self(name, *arguments, None)
        memory = getattr(self._scratch, "memory", None)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            if size <= MAX_SCRATCH:
                self._scratch.memory = memory
        self(name, *arguments, memory)


def num_threads() -> int:
    """Threads that a kernel may use."""
    return min(torch.get_num_threads(), MAX_THREADS)


def _c_value(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument)


@functools.cache
def kernels(name: str) -> Kernels | None:
    """A set of `SETS`, compiled; None where it cannot run or is switched off, which is logged."""
    if os.environ.get(SWITCH, "1") == "0":
        logger.info("Native kernels are switched off by %s=0.", SWITCH)
        return None
    chosen = SETS[name]
    if not chosen.is_supported():
        logger.info(
            "The `%s` kernels need a CPU with %s; PyTorch's run instead.", name, chosen.needs
        )
        return None
    return load(name)


def load(name: str) -> Kernels | None:
    """A set of `SETS`, compiled, whatever PyTorch's own kernels can do; None where that fails."""
    try:
        library = Kernels(_compiled(name))
    except (AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("The `%s` kernels are left out, PyTorch's run instead: %s", name, detail)
        return None
    if name == "amx":
        torch.cpu._init_amx()
    return library


def _compiled(name: str) -> Path:
    """The library in the cache folder, compiled if its sources and flags are new to it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError(
            "there is no C++ compiler. Install g++, or name another in the variable CXX"
        )
    folder = _FOLDER / SETS[name].folder
    sources = sorted(folder.glob("*.cpp"))
    flags = [*_FLAGS, *SETS[name].flags, *_openmp_library()]
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for path in [*sources, *sorted(folder.glob("*.h"))]:
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multimodal_dlm"
    path = cache / f"{name}_{digest.hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022:
        raise PermissionError(
            f"`{cache}` must belong to you and be writable by nobody else: a library is loaded from"
            " it. Change its owner and mode, or set XDG_CACHE_HOME"
        )
    if not path.exists():
        logger.info("Compiling the `%s` kernels once, into %s.", name, path)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            fresh = Path(made) / "kernels.so"
            command = [compiler, *map(str, sources), *flags, "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(fresh, path)
    return path


def _openmp_library() -> list[str]:
    """PyTorch's own OpenMP library to link with: a second one would bring a second thread pool."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = [line.split(maxsplit=5)[-1] for line in lines]
    paths = {file for file in files if "libgomp" in file}
    return [min(paths)] if paths else []
