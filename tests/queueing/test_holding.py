"""What a window holds: lines of ordering keys, in memory and in the state, keep their order."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict

import pytest

from services.queueing.backends.rabbit.held import Held
from services.queueing.backends.rabbit.holding import Holding
from services.queueing.backends.rabbit.wire import Carried
from services.queueing.domain import Stored
from services.queueing.resources import Subscription

WORK = Subscription("work", "jobs", ordered=True, ack_deadline_s=600)


class World:
    """A queue, and a state with its lines, around a holding; each step is one of a window's."""

    def __init__(self, seed: int, *, room: int) -> None:
        self.choice = random.Random(seed)
        self.room = room
        self.working = True
        self.queue: list[Carried] = []
        self.out: dict[int, Carried] = {}
        self.rows: dict[str, list[tuple[int, Carried]]] = defaultdict(list)
        self.numbers = itertools.count()
        self.holding = Holding(ordered=True)
        self.leased: list[str] = []
        self.done: dict[str, list[int]] = defaultdict(list)

    def publish(self, key: str, number: int) -> None:
        stored = Stored(f"{key}-{number}", "jobs", b"%d" % number, {}, 1.0, ordering_key=key)
        self.queue.append(Carried(stored))

    def arrive(self) -> None:
        while self.queue and len(self.out) < self.room:
            carried, number = self.queue.pop(0), next(self.numbers)
            self.out[number] = carried
            self.holding.admit(Held(carried, number, 0, tag=number + 1), time.time())

    def lease(self) -> None:
        now = time.time()
        for delivery in self.holding.lease(WORK, self.choice.randint(1, 20), 10**9, now):
            self.leased.append(delivery.ack_id)
            assert delivery.message.message_id.endswith(f"-{delivery.data.decode()}")

    def acknowledge(self) -> None:
        self.choice.shuffle(self.leased)
        for _ in range(self.choice.randint(0, len(self.leased))):
            held = self.holding.take(self.leased.pop(), time.time())
            assert held is not None
            key, now = held.carried.stored.ordering_key, time.time()
            self.rows[key] = [row for row in self.rows[key] if row[0] != held.position]
            self.tell(held)
            self.holding.release(held, now)
            self.done[key].append(int(held.carried.stored.message_id.rpartition("-")[2]))

    def tell(self, held: Held) -> None:
        self.out.pop(held.tag - 1, None)
        held.tag = 0

    def set_aside(self) -> None:
        if len(self.out) >= self.room:
            for key in self.holding.crowding(time.time() + 1, self.room // 2):
                self.holding.set_aside(key)

    def write(self) -> None:
        batch = self.holding.unwritten_next(self.choice.randint(1, 30))
        for held in batch:
            key = held.carried.stored.ordering_key
            self.rows[key].append((held.position, held.carried))
        if self.working and self.choice.random() < 0.3:
            self.acknowledge()  # while the transaction is being made
        self.holding.written(batch)
        for held in batch:
            self.tell(held)
        for held in self.holding.leftover:
            key = held.carried.stored.ordering_key
            self.rows[key] = [row for row in self.rows[key] if row[0] != held.position]
        self.holding.leftover.clear()

    def fail(self) -> None:
        """A consumer gives a message back."""
        if self.leased:
            now = time.time()
            held = self.holding.take(self.leased.pop(self.choice.randrange(len(self.leased))), now)
            assert held is not None
            self.holding.make_ready(held, now)

    def read(self) -> None:
        for held in self.holding.wanting(self.choice.randint(1, 15)):
            rows = self.rows[held.carried.stored.ordering_key]
            (carried,) = [carried for position, carried in rows if position == held.position]
            self.holding.filled(held, carried, time.time())
        lines, limit = self.holding.hungry(self.choice.randint(1, 15))
        for key, after in lines.items():
            rows = sorted((row for row in self.rows[key] if row[0] > after), key=lambda row: row[0])[:limit]
            found = [Held(c, next(self.numbers), 0, position=position) for position, c in rows]
            self.holding.refill(key, found, time.time(), complete=len(rows) < limit)

    def lose_the_channel(self) -> None:
        """RabbitMQ has back what it has not heard of; what the state has is not handed out from there."""
        parked = {carried.stored.message_id for rows in self.rows.values() for _, carried in rows}
        back = [self.out[number] for number in sorted(self.out)]
        self.queue = [c for c in back if c.stored.message_id not in parked] + self.queue
        self.out.clear()
        self.leased.clear()
        self.holding = Holding(ordered=True)
        counts = {key: len(rows) for key, rows in self.rows.items() if rows}
        last = max((row[0] for rows in self.rows.values() for row in rows), default=0)
        self.holding.resume(counts, last)
        self.read()


@pytest.mark.parametrize("seed", range(25))
def test_each_key_is_handed_out_once_and_in_order_wherever_its_line_is(seed: int) -> None:
    world = World(seed, room=40)
    hot, others = 400, 30
    for number in range(hot):
        for key in ("hot", "warm"):
            world.publish(key, number)
        if number < others:
            for cold in range(10):
                world.publish(f"cold{cold}", number)
    some = (world.arrive, world.lease, world.acknowledge, world.fail, world.set_aside, world.write)
    steps = (*some, world.read)
    total = 2 * hot + 10 * others
    for _ in range(100_000):
        world.choice.choice(steps)()
        if world.choice.random() < 0.001:
            world.lose_the_channel()
        if sum(map(len, world.done.values())) == total:
            break
    assert {key: numbers == sorted(numbers) for key, numbers in world.done.items()} == dict.fromkeys(
        world.done, True
    )
    assert sum(map(len, world.done.values())) == total
    assert (world.holding.counts(), world.holding.parked, world.out) == ((0, 0, 0), 0, {})


def test_a_line_that_does_not_move_leaves_the_window_to_the_others() -> None:
    world = World(1, room=40)
    for number in range(1000):
        world.publish("hot", number)
    for key in range(100):
        world.publish(f"cold{key}", 0)
    world.arrive()
    assert len(world.holding.lease(WORK, 1, 10**9, time.time())) == 1
    for _ in range(1000):
        world.set_aside()
        world.write()
        world.arrive()
        world.lease()
        world.acknowledge()
    assert sum(len(world.done[f"cold{key}"]) for key in range(100)) == 100
    assert not world.done["hot"]
    assert world.holding.counts() == (999, 1, 0)
    assert world.holding.parked == 1000


def test_keys_that_stand_still_leave_the_window_and_little_in_memory() -> None:
    world, still = World(1, room=40), 1000
    world.working = False
    for key in range(still):
        world.publish(f"still{key}", key)
    for _ in range(1000):
        for step in (world.arrive, world.lease, world.set_aside, world.write, world.read):
            step()
    assert world.holding.counts() == (0, still, 0)
    assert sum(bool(held.carried.stored.data) for held in world.holding.entries()) <= world.room

    while world.leased:
        world.fail()
    again: set[str] = set()
    while world.holding.counts()[0]:
        world.read()
        deliveries = world.holding.lease(WORK, 20, 10**9, time.time())
        again.update(f"still{delivery.data.decode()}" for delivery in deliveries)
    assert again == {f"still{key}" for key in range(still)}


def test_many_long_lines_keep_little_in_memory_and_their_order() -> None:
    world, keys, each = World(2, room=40), 300, 20
    world.working = False
    for number in range(each):
        for key in range(keys):
            world.publish(f"k{key}", number)
    for _ in range(2000):
        for step in (world.arrive, world.lease, world.set_aside, world.write, world.read):
            step()
    assert world.holding.counts() == (keys * (each - 1), keys, 0)
    assert world.holding.parked >= keys * each - world.room
    assert len(world.holding.entries()) <= 3000
    world.working = True
    for _ in range(20_000):
        for step in (world.acknowledge, world.arrive, world.lease, world.set_aside, world.write, world.read):
            step()
        if not any(world.holding.counts()):
            break
    assert world.done == {f"k{key}": list(range(each)) for key in range(keys)}


def test_what_the_state_has_no_more_is_not_counted() -> None:
    world = World(3, room=40)
    world.working = False
    for number in range(500):
        for key in ("a", "b"):
            world.publish(key, number)
    for _ in range(300):
        for step in (world.arrive, world.lease, world.set_aside, world.write, world.read):
            step()
    assert world.holding.counts() == (998, 2, 0)
    parked = world.holding.parked
    world.rows["a"] = [row for row in world.rows["a"] if row[0] <= world.rows["b"][-1][0] // 2]
    kept = {key: [position for position, _ in rows] for key, rows in world.rows.items()}
    world.holding.recount(kept)
    gone = 500 - len(kept["a"])
    assert gone > 100
    assert world.holding.counts() == (998 - gone, 2, 0)
    assert world.holding.parked == parked - gone
