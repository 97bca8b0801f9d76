"""The prefix cache against a plain list of all sequences, on pages whose rows are hashes of their tokens."""

import hashlib
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import mutants
from tiny import tiny_config, tiny_tensors

from codegemma.checkpoints import Checkpoint
from codegemma.generate.cache import PrefixCache, common_prefix_length
from codegemma.generate.engine import Engine
from codegemma.generate.request import Request
from codegemma.native import PAGE, Native, Page

BYTES = PAGE * 8


def rows(ids):
    """The rows of a sequence's pages: for each token, a hash of it and all before it."""
    values, state = [], 0
    for token in ids:
        state = hash((state, token)) & 0xFFFFFFFF
        values.append(state)
    return np.array(values, np.int64)


def pages_of(ids):
    values = rows(ids)
    pages = []
    for start in range(0, len(ids), PAGE):
        data = np.full(PAGE, -1, np.int64)
        data[: len(values[start : start + PAGE])] = values[start : start + PAGE]
        pages.append(Page(data.view(np.uint8), len(values[start : start + PAGE])))
    return pages


def known_length(cache, ids):
    """The length of the cached prefix, after a check of its pages' rows."""
    pages, length = cache.find(ids)
    assert len(pages) == -(-length // PAGE)
    if length:
        values = np.concatenate([page.data.view(np.int64) for page in pages])
        assert (values[:length] == rows(ids)[:length]).all()
    return length


def cache_of(max_bytes=1 << 30, key="a model"):
    return PrefixCache(key, BYTES, max_bytes)


# Sequences that branch often: few different tokens in runs, with ends near the edges of pages.
SEQUENCES = st.lists(
    st.builds(
        lambda runs, length: [token for token, count in runs for _ in range(count)][:length],
        st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 31, 63, 64, 65])), min_size=1, max_size=5
        ),
        st.sampled_from([1, 5, 63, 64, 65, 128, 130, 200]),
    ),
    min_size=1,
    max_size=10,
)


@settings(deadline=None)
@given(SEQUENCES, SEQUENCES)
def test_find_gives_the_longest_known_prefix(stored, asked):
    cache = cache_of()
    for ids in stored:
        cache.put(ids, pages_of(ids))
    for ids in [*stored, *asked, []]:
        assert known_length(cache, ids) == max(
            (common_prefix_length(ids, other) for other in stored), default=0
        )
    needed = {tuple(ids[:end]) for ids in stored for end in range(PAGE, len(ids) + 1, PAGE)}
    tails = {tuple(ids) for ids in stored if len(ids) % PAGE}
    tails = {
        ids
        for ids in tails
        if not any(len(other) > len(ids) and other[: len(ids)] == ids for other in needed | tails)
    }
    assert (
        cache.nbytes == (len(needed) + len(tails)) * BYTES
    )  # each page once, and no tail that a longer sequence holds


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), SEQUENCES), max_size=12), st.integers(0, 6))
def test_the_byte_limit_holds_and_the_remaining_pages_are_right(work, max_pages):
    cache = cache_of(max_pages * BYTES)
    for stores, sequences in work:
        for ids in sequences:
            if stores:
                cache.put(ids, pages_of(ids))
            assert known_length(cache, ids) <= len(ids)
            assert cache.nbytes <= max_pages * BYTES


def test_the_least_recently_used_page_is_removed_first_and_children_before_parents():
    stem = [1] * PAGE
    branches = [stem + [token] * PAGE for token in (2, 3, 4)]
    cache = cache_of(4 * BYTES)
    for ids in branches:
        cache.put(ids, pages_of(ids))
    assert known_length(cache, branches[0]) == 2 * PAGE  # used again
    other = [9] * 10
    cache.put(other, pages_of(other))
    assert [known_length(cache, ids) for ids in (*branches, other)] == [2 * PAGE, PAGE, 2 * PAGE, 10]


def test_put_keeps_the_pages_already_cached():
    ids = [5] * 100
    cache, first = cache_of(), pages_of(ids)
    cache.put(ids, first)
    cache.put(ids, pages_of(ids))
    assert all(a is b for a, b in zip(cache.find(ids)[0], first, strict=True))
    cache.forget_all()
    assert cache.find(ids) == ([], 0) and cache.nbytes == 0


def test_threads_share_a_cache():
    cache, failures = cache_of(20 * BYTES), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                ids = rng.integers(0, 2, 3).repeat(rng.integers(1, 70, 3)).tolist()
                known_length(cache, ids)
                cache.put(ids, pages_of(ids))
        except Exception as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cache.nbytes <= 20 * BYTES


# ---------------------------------------------------------------------------------------- files
@settings(deadline=None, max_examples=30)
@given(SEQUENCES)
def test_a_saved_cache_finds_the_same(tmp_path_factory, stored):
    path = tmp_path_factory.mktemp("cache") / "saved"
    cache, loaded = cache_of(), cache_of()
    for ids in stored:
        cache.put(ids, pages_of(ids))
    cache.save(path)
    assert loaded.load(path) is True
    assert [known_length(loaded, ids) for ids in stored] == [len(ids) for ids in stored]
    assert loaded.nbytes == cache.nbytes


def test_a_loaded_cache_keeps_its_byte_limit(tmp_path):
    cache, small = cache_of(), cache_of(3 * BYTES)
    for token in range(10):
        cache.put([token] * 70, pages_of([token] * 70))
    cache.save(tmp_path / "saved")
    assert small.load(tmp_path / "saved") and 0 < small.nbytes <= 3 * BYTES


def test_a_missing_file_loads_nothing(tmp_path):
    assert cache_of().load(tmp_path / "none") is False


@pytest.mark.parametrize("other", [cache_of(key="another model"), PrefixCache("a model", BYTES * 2, 1 << 30)])
def test_a_foreign_file_is_ignored_with_a_warning(tmp_path, other):
    cache = cache_of()
    cache.put([1, 2], pages_of([1, 2]))
    cache.save(tmp_path / "saved")
    with pytest.warns(
        UserWarning, match="saved prefix cache is ignored: it belongs to another model.*'a model'"
    ):
        assert other.load(tmp_path / "saved") is False
    assert other.nbytes == 0


@pytest.mark.parametrize("rehash", [False, True])
def test_damaged_files_are_ignored_with_a_warning(tmp_path, rehash):
    """Damage that the hash reveals and, with `rehash`, damage under a matching hash."""
    path, cache = tmp_path / "saved", cache_of()
    for ids in ([1] * 150, [1] * 64 + [2] * 30, [3]):
        cache.put(ids, pages_of(ids))
    cache.save(path)
    raw = path.read_bytes()
    head = raw.index(b"]]]") + 3  # everything before the pages
    ignored = 0
    for mutant in mutants(raw[:-32] if rehash else raw, head, 300):
        path.write_bytes(mutant + hashlib.sha256(mutant).digest() if rehash else mutant)
        loaded = cache_of()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            known = loaded.load(path)
        assert known or len(caught) == 1
        ignored += not known
        loaded.find([1] * 150)  # whatever it loaded, `find` works
    assert ignored == 300 or rehash and ignored > 200
    path.write_bytes(raw[:-32] + hashlib.sha256(raw[:-32]).digest())
    assert cache_of().load(path) is True
    (tmp_path / "empty").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged or no cache file"):
        assert cache_of().load(tmp_path / "empty") is False


@pytest.mark.parametrize(
    "tree",
    [
        "[[0, [1]]]",
        "[[-1, [1]]]",
        '[["", []]]',
        '[["", [1]], [0, [2]]]',
        "[1]",
        "{}",
        '[["", 7]]',
        "[[null, [1]]]",
        "[" * 100_000,
        f'[["", {[1] * 65}]]',
    ],
)
def test_invalid_trees_are_ignored(tmp_path, tree):
    key = b"a model"
    data = (
        b"codegemma prefix cache 2\n" + struct.pack("<QQQ", len(key), len(tree), BYTES) + key + tree.encode()
    )
    data += bytes(2 * BYTES)
    (tmp_path / "saved").write_bytes(data + hashlib.sha256(data).digest())
    if tree == "{}":
        assert cache_of().load(tmp_path / "saved")  # an empty cache
        return
    with pytest.warns(UserWarning, match="is ignored"):
        assert cache_of().load(tmp_path / "saved") is False


def test_adapters_do_not_see_each_others_pages(tmp_path):
    cache = cache_of()
    pages_of_adapter = {adapter: pages_of([1] * 100) for adapter in ("", "a", "b")}
    for adapter, pages in pages_of_adapter.items():
        cache.put([1] * 100, pages, adapter)
    cache.put([2] * 70, pages_of([2] * 70), "a")
    cache.save(tmp_path / "saved")
    again = cache_of()
    assert again.load(tmp_path / "saved") and again.nbytes == cache.nbytes == 8 * BYTES
    for adapter, pages in pages_of_adapter.items():
        assert all(
            page is other for page, other in zip(cache.find([1] * 100, adapter)[0], pages, strict=True)
        )
        assert [page.data.tobytes() for page in again.find([1] * 100, adapter)[0]] == [
            page.data.tobytes() for page in pages
        ]
    assert (
        cache.find([1] * 100, "c") == ([], 0)
        and cache.find([2] * 70) == ([], 0)
        and again.find([2] * 70, "a")[1] == 70
    )


def test_an_engine_continues_from_a_saved_cache_with_the_same_steps(tmp_path):
    config = tiny_config("gemma3")
    backend = Native(Checkpoint(Path("tiny"), config, tiny_tensors(config, "Q8_0"), {}, None), 1)
    first, second = Engine(backend, identity="x"), Engine(backend, identity="x")
    ids = np.random.default_rng(0).integers(3, 515, 150).tolist()
    steps = list(first.generate(Request(ids, 10)))
    first.cache.save(tmp_path / "saved")
    assert second.cache.load(tmp_path / "saved")
    assert second.start(Request(ids)).cached == 149
    assert list(second.generate(Request(ids, 10))) == steps
    with pytest.warns(UserWarning, match="another model"):
        assert not Engine(backend, identity="y").cache.load(tmp_path / "saved")
