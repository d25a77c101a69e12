"""How many threads BLAS and torch have within the kernel, and that they get theirs back."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import pytest
import torch
from scipy.linalg import cython_lapack

from mergekit_monosoup.kernel import eigen, spectrum
from mergekit_monosoup.kernel.monosoup import edit

LIBRARY = ctypes.CDLL(cython_lapack.__file__)
PREFIX = "scipy_openblas" if hasattr(LIBRARY, "scipy_openblas_set_num_threads") else "openblas"
pytestmark = pytest.mark.skipif(
    not hasattr(LIBRARY, f"{PREFIX}_set_num_threads"), reason="SciPy's BLAS is not OpenBLAS"
)


def blas_threads() -> int:
    return getattr(LIBRARY, f"{PREFIX}_get_num_threads")()


@contextmanager
def threads(count: int):
    """Give torch and BLAS so many threads, as OMP_NUM_THREADS would."""
    before = torch.get_num_threads(), blas_threads()
    setter = getattr(LIBRARY, f"{PREFIX}_set_num_threads")
    torch.set_num_threads(count)
    setter(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        setter(before[1])


@pytest.fixture
def seen(monkeypatch):
    """The threads of (torch, BLAS) at each Gram matrix, decomposition and set of vectors."""
    places: dict[str, tuple[int, int]] = {}

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            places[name] = torch.get_num_threads(), blas_threads()
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    watched(spectrum, "_add_gram")
    watched(eigen.Lapack, "__init__")
    watched(eigen.Lapack, "vectors")
    return places


def pair(rows: int, columns: int):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator)
    return base, base + 0.1 * torch.randn(rows, columns, generator=generator)


def test_a_small_matrix_takes_one_thread_of_blas_whatever_the_user_gives(seen):
    with threads(2):
        edit(*pair(48, 32), mode="variance", R=0.5)
        assert seen == {"_add_gram": (1, 1), "__init__": (2, 1), "vectors": (2, 1)}
        assert (torch.get_num_threads(), blas_threads()) == (2, 2)


def test_a_large_order_takes_the_threads_of_the_user(seen, monkeypatch):
    for module in (eigen, spectrum):
        monkeypatch.setattr(module, "THREADED_ORDER", 32)
    with threads(2):
        edit(*pair(48, 32), mode="variance", R=0.5)
        assert seen == {"_add_gram": (1, 2), "__init__": (2, 2), "vectors": (2, 2)}


def test_a_long_matrix_takes_them_for_its_gram_matrix_only(seen, monkeypatch):
    monkeypatch.setattr(spectrum, "THREADED_PRODUCTS", 48 * 32**2)
    with threads(2):
        edit(*pair(48, 32), mode="variance", R=0.5)
        assert seen == {"_add_gram": (1, 2), "__init__": (2, 1), "vectors": (2, 1)}


def test_threads_come_back_after_an_error(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(eigen.Lapack, "__init__", broken)
    with threads(2):
        with pytest.raises(ZeroDivisionError):
            edit(*pair(48, 32))
        assert (torch.get_num_threads(), blas_threads()) == (2, 2)


def test_two_threads_give_the_bits_of_one():
    base, tuned = (weight.bfloat16() for weight in pair(700, 500))
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(edit(base, tuned, mode="variance", R=0.8)[0])
    assert torch.equal(*results) and not torch.equal(results[0], tuned)
