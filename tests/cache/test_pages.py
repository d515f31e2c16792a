"""The page ledger."""

import random

import pytest
from kvfold.cache.pages import PagePool
from kvfold.core.faults import InjectedFault, arm


def make(n_pages: int) -> tuple[PagePool, list[int]]:
    evicted: list[int] = []
    return PagePool(n_pages, on_evict=evicted.append), evicted


def test_pages_come_lowest_first_and_never_the_scratch_page():
    pool, _ = make(6)
    assert pool.take(3) == [1, 2, 3]
    pool.give_back(2, keep=False)
    assert pool.take(2) == [2, 4]


def test_too_many_pages_change_nothing():
    pool, _ = make(4)
    assert pool.take(4) is None
    assert pool.n_available == 3
    pool.check([])


def test_idle_pages_are_evicted_least_recently_used_first():
    pool, evicted = make(4)
    pages = pool.take(3)
    for page in (2, 1, 3):
        pool.give_back(page, keep=True)
    pool.share(2)  # a hit makes it recent again
    pool.give_back(2, keep=True)
    assert pages is not None
    assert pool.n_available == 3
    assert pool.take(2) == [1, 3]
    assert evicted == [1, 3]


def test_a_shared_page_is_free_after_its_last_reader():
    pool, _ = make(3)
    pool.take(1)
    pool.share(1)
    pool.give_back(1, keep=False)
    assert pool.n_held == 1
    pool.give_back(1, keep=False)
    assert pool.n_held == 0
    with pytest.raises(AssertionError, match="page 1 is given back but nobody holds it"):
        pool.give_back(1, keep=False)


def test_a_wrong_ledger_is_told():
    pool, _ = make(4)
    pages = pool.take(2)
    pool.check([pages])
    with pytest.raises(AssertionError, match="page ledger"):
        pool.check([[1]])
    with pytest.raises(AssertionError, match="page ledger"):
        pool.check([pages, [3]])


def test_spare_pages_are_for_those_who_ask():
    pool = PagePool(5, on_evict=[].append, n_spare=1)
    assert pool.n_available == 3
    assert pool.take(4) is None
    pages = pool.take(3)
    assert pages is not None
    assert (pool.n_available, pool.n_held) == (0, 3)
    assert pool.take(1) is None
    spare = pool.take(1, spare=True)
    assert spare == [4]
    assert (pool.n_available, pool.n_held) == (0, 4)
    pool.give_back(pages.pop(), keep=False)
    # What comes back is kept as the next spare page.
    assert pool.take(1) is None
    pool.check([pages, spare])


def test_the_scratch_page_is_nobodys():
    pool, _ = make(4)
    pages = pool.take(1)
    assert pages is not None
    pool.share(0)
    pool.give_back(0, keep=True)
    pool.check([[0, *pages, 0]])


def test_a_failed_allocation_leaves_the_ledger_whole():
    pool, _ = make(4)
    with arm("kv.alloc", nth=2):
        pool.take(1)
        with pytest.raises(InjectedFault):
            pool.take(1)
    pool.check([[1]])


@pytest.mark.parametrize("seed", range(5))
def test_random_lives(seed: int):
    rng = random.Random(seed)
    pool, _ = make(24)
    held: list[list[int]] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.5:
            n = rng.randint(1, 5)
            pages = pool.take(n)
            assert (pages is None) == (n > 23 - len({p for ps in held for p in ps}))
            if pages is not None:
                held.append(pages)
        elif action < 0.6 and held:
            shared = list(rng.choice(held))
            for page in shared:
                pool.share(page)
            held.append(shared)
        elif held:
            for page in held.pop(rng.randrange(len(held))):
                pool.give_back(page, keep=rng.random() < 0.5)
        pool.check(held)
