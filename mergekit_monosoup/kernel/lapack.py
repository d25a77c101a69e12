"""The BLAS and LAPACK routines that the solvers need, called without the interpreter lock.

SciPy's wrappers of most of them (`scipy.linalg.lapack`, `scipy.linalg.blas`) hold the lock: two
threads take as long as one after the other. The same compiled routines are public as function
pointers, for Cython and Numba (`scipy.linalg.cython_lapack`, `scipy.linalg.cython_blas`), and
ctypes releases the lock around them. Arrays are column-major and changed in place, nothing is
checked or copied: for callers in this package only.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

# SciPy's Cython interface is that of a 32-bit LAPACK, whatever NumPy's integers are.
_INTEGER = np.int32


@cache
def _routine(name: str) -> Any:
    """Return the routine as a ctypes function of as many pointers as it has arguments."""
    module = cython_lapack if name in cython_lapack.__pyx_capi__ else cython_blas
    capsule = ctypes.py_object(module.__pyx_capi__[name])
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    text = signature(capsule)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (text.count(b",") + 1))(
        pointer(capsule, text)
    )


def call(
    name: str, *arguments: bytes | int | float | np.ndarray, real: type = ctypes.c_double
) -> None:
    """Call a routine that has no INFO.

    Letters are given as bytes, numbers by value, arrays by their memory; ``real`` is the type of
    the scalars.
    """
    held: list[Any] = []  # what the pointers point to
    for value in arguments:
        if isinstance(value, np.ndarray):
            held.append(value.ctypes)
        elif isinstance(value, bytes):
            held.append(ctypes.create_string_buffer(value))
        else:
            held.append(real(value) if isinstance(value, float) else ctypes.c_int(value))
    _routine(name)(*[x.data if hasattr(x, "data") else ctypes.addressof(x) for x in held])


def solve(name: str, *arguments: bytes | int | float | np.ndarray) -> int:
    """Call a routine whose last argument is INFO, and return that: 0 is success."""
    info = np.zeros(1, _INTEGER)
    call(name, *arguments, info)
    return int(info[0])


def integers(count: int, value: int = 0) -> np.ndarray:
    """Return ``count`` integers as LAPACK reads them."""
    return np.full(count, value, _INTEGER)


_POOL = threading.Lock()


@contextmanager
def one_thread_each() -> Iterator[bool]:
    """Make SciPy's BLAS use one thread a call inside the `with` block.

    Yields False where it cannot be told to, or another thread is inside already. OpenBLAS has one
    pool for the process: several callers with several threads each would wait for each other.
    """
    # Symbols of the libraries that it is linked to are reached through it.
    library = ctypes.CDLL(cython_lapack.__file__)
    names = [p for p in ("scipy_openblas", "openblas") if hasattr(library, f"{p}_set_num_threads")]
    if not names or not _POOL.acquire(blocking=False):
        yield False
        return
    try:
        before = getattr(library, f"{names[0]}_get_num_threads")()
        setter = getattr(library, f"{names[0]}_set_num_threads")
        setter(1)
        try:
            yield True
        finally:
            setter(before)
    finally:
        _POOL.release()
