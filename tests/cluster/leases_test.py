"""Who scores what: an example left out, a lease done twice, a chunk that waits for a dead worker turn these red."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from issgd_jax.cluster.leases import LATE_SECONDS, SHARDS_PER_WORKER, Layout, Leases

SIZES = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, 9)))


@given(SIZES)
def test_a_sweep_scores_every_example_and_a_shard_is_what_was_loaded_for_it(sizes):
    num_examples, chunk_size, num_workers = sizes
    layout = Layout.create(num_examples, chunk_size=chunk_size, num_workers=num_workers)
    assert 1 <= layout.num_shards <= SHARDS_PER_WORKER * num_workers
    # Red if some workers have a shard more than others, who then wait for them.
    assert layout.num_shards % num_workers == 0 or num_examples // chunk_size < num_workers
    shards = [layout.shard(number) for number in range(layout.num_shards)]
    assert shards[0][0] == 0 and shards[-1][1] == num_examples
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shards))
    sizes = [stop - start for start, stop in shards]
    assert min(sizes) >= chunk_size and max(sizes) - min(sizes) <= 1
    for first in (0, 3):
        examples = [layout.examples(lease) for lease in range(first, first + layout.leases_per_sweep)]
        assert set(np.concatenate(examples)) == set(range(num_examples))
    for lease in range(layout.leases_per_sweep):
        shard, item = layout.locate(lease)
        start, stop = layout.shard(shard)
        assert start + item == layout.examples(lease)[0] and layout.examples(lease)[-1] < stop
        assert len(set(layout.examples(lease))) == chunk_size


@pytest.mark.parametrize("chunk_size", [0, 11])
def test_a_chunk_that_does_not_fit(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size must be between 1 and 10 \(all examples\)"):
        Layout.create(10, chunk_size=chunk_size, num_workers=2)


def make_leases(num_workers=2, issued=0):
    leases = Leases(Layout.create(240, chunk_size=10, num_workers=num_workers))
    for worker in range(num_workers):
        leases.add_worker(worker)
    for lease in range(issued):
        leases.issue(lease, 0.0)
    return leases


def test_each_worker_keeps_its_share_of_the_shards():
    """Red if every worker comes to load all the data."""
    leases, held = make_leases(num_workers=3), {}
    for lease in range(240):
        leases.issue(lease, float(lease))
    now = 0.0
    for _ in range(80):
        for worker in range(3):
            lease = leases.acquire(worker, now)
            held.setdefault(worker, set()).add(leases._layout.locate(lease)[0])
            assert leases.complete(lease, now + 1)
        now += 1
    assert all(len(shards) == SHARDS_PER_WORKER for shards in held.values())


def test_what_a_dead_worker_had_goes_to_the_others_first():
    leases = make_leases(issued=6)
    assert [leases.acquire(0, 0.0), leases.acquire(0, 0.0), leases.acquire(1, 0.0)] == [0, 1, 2]
    leases.remove_worker(0)
    assert [leases.acquire(1, 1.0), leases.acquire(1, 1.0), leases.acquire(1, 1.0)] == [0, 1, 3]
    assert leases.num_reissued == 2


def test_a_late_lease_is_done_by_another_and_counts_once():
    leases = make_leases(issued=8)
    assert leases.acquire(0, 0.0) == 0
    for _ in range(3):
        assert leases.complete(leases.acquire(1, 0.0), 0.1)
    late = LATE_SECONDS + 0.1
    assert leases.acquire(0, late) == 4  # not by who is late with it
    assert leases.acquire(1, late) == 0
    assert leases.complete(0, late + 2) and not leases.complete(0, late + 3)
    assert leases.num_reissued == 1


def test_a_late_result_counts_if_nobody_was_faster():
    leases = make_leases(issued=4)
    assert leases.acquire(0, 0.0) == 0
    assert leases.complete(leases.acquire(1, 0.0), 0.1)
    assert leases.acquire(0, LATE_SECONDS + 1) == 2  # it is late, and waits for another
    assert leases.num_reissued == 1 and leases.complete(0, LATE_SECONDS + 2)
    assert [leases.acquire(1, LATE_SECONDS + 9), leases.acquire(1, LATE_SECONDS + 9)] == [
        2,
        3,
    ]  # it is not offered again


def test_an_idle_worker_takes_over_shards_of_a_slow_one():
    leases = make_leases(issued=8)
    slow = [leases.acquire(0, 0.0) for _ in range(2)]
    for now in range(6):
        lease = leases.acquire(1, float(now))
        assert lease is not None and lease not in slow
        assert leases.complete(lease, now + 1.0)
    leases.issue(8, 6.0)  # of the shard that the slow one holds
    assert {leases.acquire(1, 6.5), leases.acquire(1, 6.5)} == set(slow)  # late by now
    assert leases.acquire(1, 6.5) == 8


def test_a_lease_is_left_for_a_while_to_who_holds_its_shard():
    leases = make_leases(issued=2)
    for worker in range(2):
        assert leases.complete(leases.acquire(worker, 0.0), 1.0)
    leases.issue(8, 1.0)  # of shard 0, as the first
    assert leases.acquire(1, 1.5) is None and leases.acquire(1, 4.0) == 8


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("issue")),
        st.tuples(st.sampled_from(["acquire", "finish", "release", "die"]), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.floats(0.01, 5)),
    ),
    max_size=120,
)


class Play:
    """Workers 0 to 2 and what they are doing; each event checks that it may happen."""

    def __init__(self):
        self.leases, self.now, self.issued, self.done = make_leases(num_workers=3), 0.0, 0, []
        self.doing = {worker: [] for worker in range(3)}

    def issue(self):
        self.leases.issue(self.issued, self.now)
        self.issued += 1

    def wait(self, seconds):
        self.now += seconds

    def acquire(self, worker):
        if (lease := self.leases.acquire(worker, self.now)) is not None:
            assert lease not in self.doing[worker] and lease not in self.done
            self.doing[worker].append(lease)

    def finish(self, worker):
        if self.doing[worker]:
            lease = self.doing[worker].pop(0)
            if self.leases.complete(lease, self.now):
                self.done.append(lease)

    def release(self, worker):
        if self.doing[worker]:
            self.leases.release(self.doing[worker].pop(0), worker)

    def die(self, worker):
        self.doing[worker] = []
        self.leases.remove_worker(worker)
        self.leases.add_worker(worker)


@given(EVENTS)
def test_whatever_happens_no_lease_is_lost_and_none_is_done_twice(events):
    play = Play()
    for name, *arguments in events:
        getattr(play, name)(*arguments)
        assert play.leases.num_waiting + play.leases.num_running >= play.issued - len(play.done)
        assert all(len(play.leases.shards_held_by(worker)) <= 8 for worker in range(3))
    for _ in range(3 * play.issued + 3):
        play.wait(100.0)
        for worker in range(3):
            play.acquire(worker)
            while play.doing[worker]:
                play.finish(worker)
    assert sorted(play.done) == list(range(play.issued))
    assert play.leases.num_waiting == play.leases.num_running == 0
