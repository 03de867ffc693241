"""Work over threads: the same results in the same order, errors come through, BLAS gets its threads back."""

import threading

import numpy as np
import pytest
import threadpoolctl

from refimpl.core.parallel import over_threads, thread_count


def blas_threads():
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def names(arrays, threads=3):
    """The threads in which items run."""
    seen = set()
    over_threads(lambda i: seen.add(threading.current_thread().name), range(4), *arrays, threads=threads)
    return seen


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(threads):
    assert over_threads(lambda i: -i, (i for i in range(20)), threads=threads) == [-i for i in range(20)]
    assert over_threads(lambda i: -i, [], threads=threads) == []


def test_items_run_at_once():
    both = threading.Barrier(2)
    assert sorted(over_threads(lambda i: both.wait(timeout=20), range(2), threads=2)) == [0, 1]


def test_one_blas_thread_inside_and_as_many_as_before_after():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert over_threads(lambda i: max(blas_threads(), default=1), range(2), threads=2) == [1, 1]
        assert blas_threads() == before
        with pytest.raises(ZeroDivisionError):
            over_threads(lambda i: 1 / i, range(3), threads=2)
        assert blas_threads() == before


def test_small_and_object_arrays_and_inner_calls_stay_in_their_thread():
    here = {threading.current_thread().name}
    assert names([np.zeros(10)]) == here
    assert names([np.zeros(2**20, dtype=object)]) == here
    assert not names([np.zeros(2**20)]) & here
    inner = over_threads(lambda i: (threading.current_thread().name, names([np.zeros(2**20)])), range(2), threads=2)
    assert all(inside == {outside} for outside, inside in inner)


def test_the_callers_errstate_goes_along():
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        over_threads(lambda i: np.ones(2) / np.zeros(2), range(2), threads=2)


@pytest.mark.parametrize("asked", ["0", "-1", "two"])
def test_a_number_of_threads(asked, monkeypatch):
    monkeypatch.setenv("REFIMPL_NUM_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.setenv("REFIMPL_NUM_THREADS", asked)
    with pytest.raises(ValueError, match=f"REFIMPL_NUM_THREADS must be an integer of at least 1, got '{asked}'"):
        thread_count()
