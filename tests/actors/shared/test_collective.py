"""Broadcast groups with real gloo. The members are threads of this process."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from sdft.actors.shared import collective
from sdft.actors.shared.collective import BroadcastGroup, bucket, cut, seal, visit, whole
from sdft.actors.shared.types import NotReceived, Snapshot, SnapshotDamaged, TensorEntry
from sdft.actors.transport.broadcast import BroadcastSender

CPU, HERE = torch.device("cpu"), "127.0.0.1"
LONG_S = 30.0  # no test waits this long
PAYLOAD = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
ENDS = (0, 123, 400, 1000)
ENTRIES = [
    TensorEntry(f"t{i}", "uint8", (b - a,), a, b - a, xxhash.xxh3_128_hexdigest(PAYLOAD[a:b].tobytes()))
    for i, (a, b) in enumerate(pairwise(ENDS))
]


def sender_of(payload: NDArray[np.uint8]) -> BroadcastSender:
    """Return the learner's end, which has been offered the payload."""
    sender = BroadcastSender("cpu", HERE)
    none = np.zeros(0, np.int32)
    sender.offer(Snapshot("student", 1, "", "", 1000, tuple(ENTRIES), none, none.astype(np.float32)), payload)
    return sender


def joined(sender: BroadcastSender, pool: ThreadPoolExecutor, members: int) -> list[BroadcastGroup]:
    """Return the members' ends of a new group. The learner's end is in the sender."""
    address, port = sender.meet("student")

    def end(rank: int) -> BroadcastGroup:
        return BroadcastGroup(visit(address, port, LONG_S), rank, members + 1, CPU, HERE, LONG_S)

    ends = [pool.submit(end, rank) for rank in range(1, members + 1)]
    sender.join("student", members + 1, LONG_S)
    return [end.result() for end in ends]


def received(group: BroadcastGroup) -> bytes:
    """Receive the payload as a member."""
    tensors = group.receive(ENTRIES, time.monotonic() + LONG_S)
    return b"".join(tensor.numpy().tobytes() for _, tensor in tensors)


def send_twice(sender: BroadcastSender) -> None:
    for _ in range(2):
        sender.send("student", LONG_S)


def test_consecutive_tensors_share_a_bucket_up_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "BUCKET", 10)
    assert cut([]) == []
    assert cut([4, 6, 1, 20, 3]) == [range(2), range(2, 3), range(3, 4), range(4, 5)]


def test_a_bucket_that_changed_on_the_way_is_not_whole() -> None:
    full = bucket(1001, CPU)
    assert len(full) % 8 == 0
    full[:1001] = 7
    seal(full)
    assert whole(full)
    full[1000] ^= 1
    assert not whole(full)


def test_all_members_get_what_the_learner_sends_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "BUCKET", 500)  # the payload needs two buckets
    sender = sender_of(PAYLOAD)
    with ThreadPoolExecutor() as pool:
        members = joined(sender, pool, 2)
        for _ in range(2):
            got = [pool.submit(received, member) for member in members]
            sender.send("student", LONG_S)
            assert [g.result() for g in got] == [PAYLOAD.tobytes()] * 2
        # A new group with other members replaces the old one.
        (member,) = joined(sender, pool, 1)
        its = pool.submit(received, member)
        sender.send("student", LONG_S)
        assert its.result() == PAYLOAD.tobytes()
        sender.close("student")


def test_the_loss_of_a_member_ends_the_broadcast_before_its_deadline() -> None:
    sender = sender_of(PAYLOAD)
    with ThreadPoolExecutor() as pool:
        lost, *others = joined(sender, pool, 3)
        lost.close()
        began = time.monotonic()
        got = [pool.submit(received, member) for member in others]
        with pytest.raises(NotReceived, match=r"^Connection closed by peer"):
            send_twice(sender)  # the first broadcast may succeed before the loss is known
        for g in got:
            assert isinstance(g.exception(), NotReceived) or g.result() == PAYLOAD.tobytes()
        assert time.monotonic() - began < LONG_S / 2


def test_a_member_that_does_not_answer_fails_the_broadcast_at_its_deadline() -> None:
    sender = sender_of(PAYLOAD)
    with ThreadPoolExecutor() as pool:
        (member,) = joined(sender, pool, 1)
        with pytest.raises(NotReceived, match="did not answer in time"):
            member.broadcast(bucket(8, CPU), time.monotonic() + 0.2)
        sender.close("student")


def test_a_tensor_damaged_in_the_learners_memory_is_not_sent() -> None:
    spoiled = PAYLOAD.copy()
    spoiled[200] ^= 1
    sender = sender_of(spoiled)
    with ThreadPoolExecutor() as pool:
        (member,) = joined(sender, pool, 1)
        got = pool.submit(received, member)
        with pytest.raises(SnapshotDamaged, match="t1 is damaged in the learner's memory"):
            sender.send("student", LONG_S)
        assert isinstance(got.exception(), NotReceived)
