"""C++ kernels for bf16 on CPUs with AMX tiles, in training and inference, compiled on first use.

Nothing is compiled or loaded at import. The first forward that could use the kernels asks
`kernels()`, which compiles the sources of this folder with the C++ compiler of the machine (a few
seconds; no header of PyTorch is needed), keeps the library in the user's cache folder, and
registers its functions as PyTorch operators, FLOP formulas included. Where that is impossible it
logs why, once, and returns None: the PyTorch path runs. `MULTIMODAL_DLM_NATIVE=0` turns it off.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "MULTIMODAL_DLM_NATIVE"
MAX_THREADS = 256
MAX_SCRATCH = 64 << 20  # Bytes kept from call to call.
_FOLDER = Path(__file__).resolve().parent
_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma", "-mavx512f", "-mavx512bw",
    "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
)  # fmt: skip


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
            memory = torch.empty(size, dtype=torch.uint8)
            if size <= MAX_SCRATCH:
                self._scratch.memory = memory
        self(name, *arguments, memory)


def _c_value(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument)


@functools.cache
def kernels() -> Kernels | None:
    """The compiled kernels; None where they cannot run or are switched off, which is logged."""
    if os.environ.get(SWITCH, "1") == "0":
        logger.info("Native kernels are switched off by %s=0.", SWITCH)
        return None
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
        logger.info("Native kernels need a CPU with AMX tiles; PyTorch's kernels run instead.")
        return None
    try:
        library = Kernels(_compiled())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("Native kernels are left out, PyTorch's run instead: %s", detail)
        return None
    torch.cpu._init_amx()
    return library


def _compiled() -> Path:
    """The library in the cache folder, compiled if these sources and flags are new to it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError(
            "there is no C++ compiler. Install g++, or name another in the variable CXX"
        )
    sources = sorted(_FOLDER.glob("*.cpp"))
    flags = [*_FLAGS, *_openmp_library()]
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for path in [*sources, *sorted(_FOLDER.glob("*.h"))]:
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multimodal_dlm"
    path = cache / f"kernels_{digest.hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022:
        raise PermissionError(
            f"`{cache}` must belong to you and be writable by nobody else: a library is loaded from"
            " it. Change its owner and mode, or set XDG_CACHE_HOME"
        )
    if not path.exists():
        logger.info("Compiling the native kernels once, into %s.", path)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / "kernels.so"
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
