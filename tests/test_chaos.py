"""Chaos: that the tool would see what it looks for, and a minute of it with a fresh seed."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import chaos
from lab import Probes, Result, Span

ENDED = 20.0
HOSTS = ("node1", "node2")


def judged(
    bound: dict[str, list[Span]],
    outages: list[Span],
    unfit: dict[str, list[Span]] | None = None,
    promise: str = "at-least-one",
) -> Any:
    """A round of 20 s in which these hosts had the IP; all faults had ended 8 s before its end."""
    raw: dict[str, Any] = {
        "began": 0.0, "ended": ENDED, "bound": {"vip": {host: bound.get(host, []) for host in HOSTS}},
        "probes": {"vip": {"sent": 1, "lost": 0, "outages": outages, "holders": [("node1", 0.0, ENDED)]}},
    }  # fmt: skip
    r = chaos.Round(1, promise, unfit={"vip": {host: (unfit or {}).get(host, []) for host in HOSTS}}, healed=ENDED - 8)
    result = Result(raw, {host: [] for host in HOSTS}, ["vip"])
    r.judge(result)
    return r, result


ALWAYS = [(0.0, ENDED)]
AWAY = (1.0, 1.0 + 6 + 0.1)


def test_one_holder_who_always_answers_is_as_it_should_be() -> None:
    assert judged({"node1": ALWAYS}, [])[0].wrong == []


def test_nobody_answers_while_a_host_is_fit() -> None:
    assert judged({"node1": ALWAYS}, [AWAY])[0].wrong == ["vip away 6.10 s (bound 6)"]
    assert judged({"node1": ALWAYS}, [AWAY], {"node1": [AWAY]})[0].wrong, "the other one was fit"
    assert not judged({"node1": ALWAYS}, [AWAY], {host: [AWAY] for host in HOSTS})[0].wrong
    in_between = {"node1": [(0.0, 4.0)], "node2": [(4.0, 8.0)]}
    assert not judged({"node1": ALWAYS}, [AWAY], in_between)[0].wrong, "neither was fit all the time"


def test_two_fit_hosts_have_it_and_still_do_when_all_has_ended() -> None:
    two = {"node1": ALWAYS, "node2": [(1.0, 3.1)]}
    assert judged(two, [])[0].wrong == ["vip two 2.10 s (bound 2)"]
    assert not judged(two, [], {"node2": [(1.0, 1.5)]})[0].wrong, "an unfit host's kernel may keep it"
    late = {"node1": ALWAYS, "node2": [(1.0, 15.5)]}
    assert judged(late, [], {"node2": [(0.0, 14.0)]})[0].wrong == ["vip one again 3.50 s (bound 3)"]
    assert judged({"node1": [(0.0, 15.0)]}, [])[0].wrong == ["vip one again inf s (bound 3)"]


def test_with_at_most_one_two_hosts_never_have_it_fit_or_not() -> None:
    briefly = {"node1": ALWAYS, "node2": [(1.0, 1.01)]}
    assert judged(briefly, [], {"node2": ALWAYS}, "at-most-one")[0].wrong == ["vip two 0.01 s (bound 0.001)"]
    assert not judged({"node1": [(0.0, 1.0)], "node2": [(1.0, ENDED)]}, [], {}, "at-most-one")[0].wrong


def test_what_is_wrong_is_in_the_picture() -> None:
    r, result = judged({"node1": ALWAYS, "node2": [(1.0, 3.5)]}, [AWAY])
    r.done = [("node1", "SIGSTOP", 1.0, 7.1), ("ZooKeeper", "2 hung", 2.0, 4.0)]
    svg = ElementTree.fromstring(r.picture(result))
    words = [element.text for element in svg.iter() if element.text]
    for expected in ("SIGSTOP", "2 hung", "away", "answers the client", "bound by node2", "all ended"):
        assert expected in words, expected
    assert any("two 2.50 s" in word for word in words)


def test_an_answer_that_comes_late_while_others_come_promptly_is_no_outage_of_its_own() -> None:
    probes = Probes(None, ["127.0.0.1"], interval=0.5, late=0.2)
    answers, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    answers.setblocking(False)
    for comes in [], [1], [0, 2]:  # the first answer comes with the third one
        time.sleep(max(0.0, probes.due - time.monotonic()))
        probes.send_due()
        for each in comes:
            kernel.send(struct.pack("!Q", each) + b"node1")
        probes.receive(answers)
    (start, end), *more = probes.report(time.monotonic())["127.0.0.1"]["outages"]
    assert 0.3 < end - start < 0.8 and not more, "until the second one, which was answered promptly"


def test_the_same_seed_gives_the_same_rounds_and_they_have_all_faults() -> None:
    some = [*islice(chaos.rounds(7, 4), 500)]
    assert some == [*islice(chaos.rounds(7, 4), 500)] != [*islice(chaos.rounds(8, 4), 500)]
    faults = Counter(event.fault for events in some for event in events)
    assert set(faults) == {*chaos.OF_HOSTS, *chaos.OF_ZOOKEEPER} and min(faults.values()) >= 5
    assert {len(events) for events in some} == {1, 2, 3}
    for events in some:
        assert len({event.rank for event in events}) == len(events)
        assert sum(event.fault in chaos.OF_ZOOKEEPER for event in events) <= 1


@pytest.mark.parametrize("hosts", [3, 4, 5])
def test_every_fault_has_a_victim_of_its_own_and_one_agent_never_ends(hosts: int) -> None:
    queue: list[Any] = [f"node{number}" for number in range(hosts)]
    befallen: Counter[str] = Counter()
    for spared in queue:
        for events in islice(chaos.rounds(1, hosts), 2000):
            pairs = chaos.victims(events, queue, spared)
            assert {event for event, _ in pairs} == set(events)
            assert not [event for event, host in pairs if chaos.ends(event) and host == spared]
            own = [host for event, host in pairs if event.fault in chaos.OF_HOSTS]
            assert len(set(own)) == len(own)
            befallen.update(own)
    assert set(befallen) == set(queue) and befallen["node0"] == max(befallen.values()), "the holder most of all"


def test_a_minute_of_chaos_with_a_fresh_seed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() or not Path("/usr/share/java/zookeeper.jar").exists():
        pytest.skip("needs root and Debian's zookeeper: sudo ./start.sh test")
    seed = random.SystemRandom().randrange(10**6)
    code = chaos.main(["--minutes", "1", "--seed", str(seed), "--keep", str(tmp_path)])
    logs = "\n".join(f"{path.name}\n{path.read_text()[-4000:]}" for path in sorted(tmp_path.glob("*.log")))
    assert code == 0, f"{''.join(capfd.readouterr())}\nagain: sudo ./start.sh chaos --seed {seed} --minutes 1\n{logs}"
