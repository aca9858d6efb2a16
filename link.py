#!/usr/bin/env python3
"""LinK (Link is not Keepalived): several servers share virtual IPs (VIPs).

An agent runs on every server. For each VIP the agents elect, through a lock in ZooKeeper, one holder that binds the
address and announces it. A second witness, the wire itself, is asked who really answers for the address: it finds a
dead holder long before its session runs out, and decides alone while ZooKeeper is away, or where there is none.

    kernel (netlink) --.
    wire (AF_PACKET) --+--> facts --> decide() --> event --> TRANSITIONS --> state
    ZooKeeper ---------+                     `--> wanted address, place in the queue
    health checks -----+                              |
    HTTP API ----------'                              `--> Network (bind, announce), Referee (join, leave, take)

State machine (one per VIP; rows are states, columns are events):

               fault      elected    demoted  health_check_fail  health_check_success
    STANDBY    ACTIVATED  ACTIVATED  STANDBY  FAILING            STANDBY
    ACTIVATED  ACTIVATED  ACTIVATED  STANDBY  FAILING            ACTIVATED
    FAILING    FAILING    FAILING    FAILING  FAILING            STANDBY

The main thread owns every decision, all netlink and all sending; the other threads only post to its queue. They end
with the process. A hung loop ends the process; the supervisor restarts it, and it adopts what it finds.

Not promised: a virtual IP cannot be fenced by ARP. A host whose agent is hung keeps answering until its session has
ended and another host has taken the address over; two sides of a split network both serve, each for itself.

`link.py status` prints what the agent here knows of each IP (`link.py status --help`).

Exit codes: 0 stopped, 1 failed, 2 wrong configuration, 3 another agent runs on this interface or state directory.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import functools
import gc
import heapq
import hmac
import http.client
import http.server
import inspect
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import select
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

VERSION = "0.1.0"
log = logging.getLogger("link")

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface
PlainAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


# == Errors ============================================================================================================


class LinkError(Exception):
    """Status and JSON body for the caller: nothing was changed, but for 500, 504 and, where the agent ends, 503."""

    def __init__(self, status: int, message: str, detail: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **({"detail": detail} if detail else {}), **more}


class Invalid(LinkError):
    """What was sent, or stands in a file, is wrong."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(400, f"invalid {what}", why)
        self.args = (why,)


class ConfigError(Exception):
    """The configuration is wrong; the message names the key and the remedy."""


# == Model =============================================================================================================


Shape = Mapping[str, Any]  # a JSON Schema in few words: bodies are checked by it, and it stands in /openapi.json
JSON_TYPES = {dict: "object", list: "array", str: "string", int: "integer", type(None): "null"}


def _object(title: str, *required: str, **properties: Shape) -> Shape:
    like = f"an object such as {{{next(iter(properties))}: ...}}"
    known = {"required": [*required], "properties": properties, "additionalProperties": False}
    return {"title": title, "type": ["object"], "description": like, **known}


def _text(description: str, pattern: str = "", *more: str) -> Shape:
    return {"type": ["string", *more], "description": description, **({"pattern": pattern} if pattern else {})}


_PORT = {"type": ["integer"], "minimum": 1, "maximum": 65535, "description": "a whole number from 1 to 65535"}
CHECK = _object(
    "health check", "type", "host", "port", type=_text("TCP or HTTP", "^([Tt][Cc][Pp]|[Hh][Tt][Tt][Pp])$"), port=_PORT,
    host=_text("a host name or an address", "^[0-9A-Za-z._:-]{1,253}$"),
    path=_text("a path that begins with / and has no spaces", "^(/[!-~]*)?$", "null"))  # fmt: skip
_MORE: dict[str, Shape] = {  # null, and 0, as clients in Go say them: the default
    "checks": {"type": ["array", "null"], "items": CHECK, "description": "a list"},
    "healthcheck_interval": {
        "type": ["integer", "null"], "minimum": 0, "maximum": 3600, "description": "a whole number from 1 to 3600"},
}  # fmt: skip
_IP = _text("text such as 10.0.0.10")
IP = _object("IP", "ip", ip=_IP, id=_text("text", "", "null"), **_MORE)
NEW_IP = _object("IP", "ip", ip=_IP, id=_text("left out: LinK gives it", "^$", "null"), **_MORE)
CHANGE = _object("IP", healthchecks=_MORE["checks"], **_MORE)
ENDPOINT = _object("endpoint", "plugin_config", plugin=_text("arp", "^arp$"),
                   plugin_config=_object("plugin_config", "ip", ip=_IP), **_MORE)  # fmt: skip


def valid(value: Any, shape: Shape, what: str = "", of: str = "") -> Any:
    """The value, if it has this shape. Raises Invalid."""
    of, right = shape.get("title", of), JSON_TYPES.get(type(value)) in shape["type"]
    if isinstance(value, int):
        right = right and shape["minimum"] <= value <= shape["maximum"]
    if isinstance(value, str):
        right = right and bool(re.fullmatch(shape.get("pattern", "(?s).*"), value))
    if not right:
        raise Invalid(of, f"{what or of} must be {shape['description']}")
    if isinstance(value, dict):
        if unknown := value.keys() - shape["properties"].keys():
            raise Invalid(of, f"unknown field {sorted(map(str, unknown))[0]!r}")
        for key in dict.fromkeys([*shape["required"], *value]):
            valid(value.get(key), shape["properties"][key], key, of)
    for each in value if isinstance(value, list) else ():
        valid(each, shape["items"], of=of)
    return value


@dataclass(frozen=True)
class HealthCheck:
    """One probe of the service behind a VIP: TCP (connect) or HTTP (GET answers 2xx or 3xx)."""

    type: str
    host: str
    port: int
    path: str = "/"

    def __str__(self) -> str:
        return f"{self.type} {self.host}:{self.port}{self.path.partition('?')[0][:60] * (self.type == 'HTTP')}"

    @classmethod
    def parse(cls, raw: Any) -> HealthCheck:
        """Raises Invalid."""
        got = valid(raw, CHECK)
        return cls(got["type"].upper(), got["host"], got["port"], got.get("path") or "/")


def parse_address(text: str) -> Address:
    """An address a host can share; without a prefix length /32 or /128. Raises Invalid with the reason."""
    try:
        ip = ipaddress.ip_interface(text)
    except ValueError as error:
        raise Invalid("IP", str(error).replace("interface", "address")) from None
    host, net = ip.ip, ip.network
    inside, four = net.prefixlen < ip.max_prefixlen - 1, host.version == 4
    kinds = {
        "has a scope": "%" in text,
        "is an IPv4 address in disguise": getattr(host, "ipv4_mapped", None) is not None,
        "has the prefix length 0": net.prefixlen == 0,
        **{f"is a {kind} address": getattr(host, f"is_{kind}") for kind in ("unspecified", "loopback", "multicast")},
        "is a link-local address": host.is_link_local,
        "is the broadcast address": str(host) == "255.255.255.255",
        "is not a host's address": four and (host.packed[0] == 0 or host.packed[0] >= 240),
        "is a network address": inside and host == net.network_address,
        "is a broadcast address": inside and four and host == net.broadcast_address,
    }
    for why in (why for why, wrong in kinds.items() if wrong):
        raise Invalid("IP", f"{text} {why}")
    return ip


@dataclass(frozen=True)
class VirtualIP:
    """One virtual IP as configured on this host."""

    ip: Address
    checks: tuple[HealthCheck, ...] = ()
    healthcheck_interval: int = 5
    id: str = ""

    @classmethod
    def parse(cls, raw: Any, interval: int) -> VirtualIP:
        """From a request's body, a configuration entry or the state file; `interval` is the default. Raises Invalid."""
        got = valid(raw, IP)
        checks = tuple(map(HealthCheck.parse, got.get("checks") or ()))
        return cls(parse_address(got["ip"]), checks, got.get("healthcheck_interval") or interval, got.get("id") or "")

    @functools.cached_property
    def address(self) -> str:
        """The bare address, which makes two IPs the same one; the name of the lock in ZooKeeper."""
        return str(self.ip.ip)

    @functools.cached_property
    def bound(self) -> Address:
        """What the kernel gets: /32 or /128. With more an interface may lose its own address along with this one."""
        return ipaddress.ip_interface(self.ip.ip)

    @functools.cached_property
    def key(self) -> str:
        """The same as text: an address object is hashed anew each time, at five times the price."""
        return str(self.bound)

    def to_json(self) -> dict[str, Any]:
        """The IP as it is stored and shown."""
        checks = [asdict(check) for check in self.checks]
        return {"id": self.id, "ip": str(self.ip), "checks": checks, "healthcheck_interval": self.healthcheck_interval}


# == State machine: nothing but the table ==============================================================================


class State(StrEnum):
    """What this host is for a VIP; the words of the API. The address may stay bound until another host has it."""

    STANDBY = "STANDBY"
    ACTIVATED = "ACTIVATED"
    FAILING = "FAILING"


class Event(StrEnum):
    """What can move it."""

    FAULT = "fault"
    ELECTED = "elected"
    DEMOTED = "demoted"
    HEALTH_CHECK_FAIL = "health_check_fail"
    HEALTH_CHECK_SUCCESS = "health_check_success"


_S, _A, _F = State
TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (state, event): new
    for state, row in {_S: (_A, _A, _S, _F, _S), _A: (_A, _A, _S, _F, _A), _F: (_F, _F, _F, _F, _S)}.items()
    for event, new in zip(Event, row, strict=True)
}


# == Decision: the facts of one instant in, one decision out; no I/O, no clock =========================================

TICK = 1.0  # seconds: what moves is decided again this often, who was heard then counts as there, a hand-over at most
LONG = 10.0  # seconds: a stop's limit, and when a host that hears nobody at all, nor ZooKeeper, counts as alone
LINGER = 0.05  # seconds an address stays when its successor is heard: requests are still on their way
MUTE = ", and does not answer for the IP: see what filters ARP or neighbour discovery there, or here"
HEALTH = {True: (Event.HEALTH_CHECK_SUCCESS, "checks pass"), False: (Event.HEALTH_CHECK_FAIL, "checks fail")}
PATIENCE = (0.65, 0.4, 0.2)  # seconds a rival must stay before we yield: ours is the lower MAC; ZooKeeper is late; else


class Lock(StrEnum):
    """What ZooKeeper last confirmed, judged by our own monotonic lease clock."""

    MINE = "mine"
    OTHER = "other"
    NOBODY = "nobody"
    WAITING = "waiting"  # not known yet, doubted, or no answer for a moment
    UNKNOWN = "unknown"  # no answer for a session timeout, or no ZooKeeper at all


class Intent(StrEnum):
    """What the operator wants of this host."""

    RUN = "run"
    HAND_OVER = "hand over"
    STOP = "stop"
    DELETE = "delete"


class Look(Enum):
    """How an IP is to be watched on the wire."""

    NONE = "none"
    SLOW = "slow"  # now and then, one IP of each peer after the other
    FAST = "fast"  # the same at the pace of probe_interval: silence must be found at once
    SEARCH = "search"  # each IP by itself, of everybody


class Facts(NamedTuple):
    """All that a decision about one IP rests on, as numbers of one instant; times in seconds, inf: never."""

    lock: Lock = Lock.UNKNOWN
    next: bool = False  # our place in the queue is right behind the holder's, which is a LinK host's
    second: bool = False  # another standby stands before ours
    successor: bool = False  # another host waits for the IP, or has the lock
    heard: float = math.inf  # since another host was last heard to have it, in this term of the holder
    staying: float = 0.0  # for which it had been heard by then
    pace: float = 0.0  # between two questions of everybody
    slack: float = LINGER  # for which it may be heard before it serves
    alone: float = 0.0  # since then, or since we began to look
    met: bool = False  # the holder has answered a probe of this host in this term
    lower: bool = False  # our MAC is the lower one
    unanswered: int = 0  # probes in a row
    needed: int = 3  # so many are silence; 0: the wire is not asked
    nameless: bool = False  # we ask from `::`: whoever answers tells everybody, as if he announced it
    blind: bool = False  # it cannot be asked: no ARP, or the lock is another program's, which will not answer
    deaf: float = 0.0  # for which no witness but the accused has answered; 0: one does, or there is none
    empty: float = 0.0  # for which the queue has been empty while another host has the IP
    bound: float | None = None  # since we bound it
    trusted: bool = True  # nothing has made us doubt our right to it since then
    leaving: float | None = None  # since we began to let go
    given: bool = False  # who had it has just told us to take it
    taken: bool = False  # whom we told to take it is the one that is heard
    healthy: bool = True
    unsure: bool = False  # the last result of a check was a failure, or is too old
    rank: float = 0  # hosts that go before us when all fail; inf: our own checks have no verdict yet, or it is no VIP
    intent: Intent = Intent.RUN

    @property
    def proven(self) -> bool:
        """Whether so many questions in a row had no answer."""
        return self.unanswered >= self.needed > 0

    @property
    def served(self) -> bool:
        """Whether another host has it, as far as we know: a holder of many IPs is asked for one after the other."""
        return self.heard < math.inf and not self.proven

    @property
    def mute(self) -> bool:
        """Whether the holder has never answered us, asked for this IP by itself: so it will not its clients, either."""
        never = not (self.met or self.nameless or self.deaf) and max(self.alone, self.staying) > LONG
        return never and self.next and self.lock is Lock.OTHER and self.needed > 0  # though it may announce it

    @property
    def fit(self) -> bool:
        """Healthy, and not a standby that hears nobody at all: a deaf host would serve an island."""
        return self.healthy and not (self.bound is None and self.deaf > TICK and (self.proven or not self.met))

    @property
    def other(self) -> bool:
        """Whether another host is heard to have it, and has not fallen silent since."""
        return self.heard <= TICK and not self.proven

    @property
    def at_rest(self) -> bool:
        """Whether time alone changes nothing: all is as wanted, and whatever could move it is news."""
        if not self.fit or self.unsure or self.deaf or self.intent is not Intent.RUN:
            return False
        if self.bound is None:
            return not self.proven and (self.lock is Lock.OTHER or (self.lock is Lock.UNKNOWN and self.served))
        return self.lock in (Lock.MINE, Lock.UNKNOWN) and self.leaving is None and self.trusted and not self.other


class Decision(NamedTuple):
    """An event for the table (decide again after it), or what is wanted of the kernel, ZooKeeper and the wire."""

    event: Event | None
    reason: str
    wanted: bool = False  # the address is to be on this host
    contend: bool = False  # our node is to be in the queue
    accuse: bool = False  # the silent holder's node is to be deleted
    announce: bool = False  # everybody may be told that the address is here
    look: Look = Look.NONE


def decide(state: State, f: Facts) -> Decision:
    """The heart of LinK (`promise: at-least-one`): total over State x Facts; test_link.py checks all of its space."""
    if f.fit is (state is State.FAILING):
        return Decision(*HEALTH[f.fit])
    isolated = f.lock in (Lock.UNKNOWN, Lock.NOBODY) and f.deaf > LONG  # nobody at all is heard, nor a better word
    silent = f.proven and (f.deaf == 0 or isolated)
    doubts = f.unsure and f.bound is None and not silent  # a check has just failed: no reason to move it here
    runs, mine = f.intent is Intent.RUN, f.given or (f.lock is Lock.MINE and not doubts)
    after = f.bound is not None and f.bound - f.heard >= 2 * f.slack  # before, it may be letting go for us
    rivalled = f.bound is not None and f.other and not (mine or f.taken or f.lock is Lock.OTHER)
    beaten = rivalled and f.staying >= patience(f)
    relieved = (f.lock is Lock.OTHER or f.taken) and f.other and after and f.heard + f.staying >= f.slack
    orphan = f.lock is Lock.UNKNOWN or (f.lock is Lock.WAITING and f.next and f.met)
    last = f.lock in (Lock.UNKNOWN, Lock.NOBODY) and (f.unsure or not f.fit) and f.alone > TICK * (1 + 0.3 * f.rank)
    take = (f.fit and (mine or (orphan and (silent or f.blind)))) or (silent and last)
    again = state is State.ACTIVATED and f.bound is None and f.lock is not Lock.OTHER and not f.other
    ours, late = runs and not beaten and (take or again), f.leaving is not None and f.leaving > TICK
    gone = late and f.lock is Lock.OTHER and (f.blind or not f.needed or f.deaf > 0)
    if f.intent is Intent.DELETE:
        gone = late or not (f.successor or f.lock is Lock.WAITING)
    keep = f.bound is not None and not (relieved or beaten or gone)
    if ours and state is State.STANDBY:
        return Decision(Event.ELECTED if f.lock is Lock.MINE else Event.FAULT, _why(f, silent))
    if state is State.ACTIVATED and not (ours or keep):
        return Decision(Event.DEMOTED, "another host has the better claim" if beaten else _why(f, silent))
    stays = ", keeps the IP" + " until another host has it" * (f.leaving is not None)
    may_speak = (ours or keep) and runs and (f.trusted or f.bound is None) and f.lock is not Lock.OTHER
    return Decision(
        None,
        _why(f, silent) + stays * (keep and not ours),
        wanted=ours or keep,
        contend=_contend(f),
        accuse=silent and f.met and f.next and f.lock is Lock.OTHER and state is State.STANDBY and runs,
        announce=may_speak and (mine or (not f.deaf and (silent or not f.other))),
        look=_look(f),
    )


def at_most_one(state: State, f: Facts) -> Decision:
    """`promise: at-most-one`: let go first, and never hold without a confirmed lock; leave the queue last."""
    if f.fit is (state is State.FAILING):
        return Decision(*HEALTH[f.fit])
    mine = f.lock is Lock.MINE and f.intent is Intent.RUN and (f.bound is not None or not f.unsure)
    # The kernel ends what an earlier process bound before that one's session can end: until then it may stay.
    adopted = f.bound == math.inf and f.lock is Lock.WAITING and f.intent is Intent.RUN
    if state is State.STANDBY and mine:
        return Decision(Event.ELECTED, "has the lock")
    if state is State.ACTIVATED and not (mine or adopted):
        why = "the lock is not confirmed" if f.intent is Intent.RUN else f"{f.intent.value} was asked"
        return Decision(Event.DEMOTED, why)
    contend, held = f.bound is not None or _contend(f), state is State.ACTIVATED
    return Decision(None, "at most one host: only with a confirmed lock", held, contend, announce=held and mine)


def patience(f: Facts) -> float:
    """How long a rival must stay before a binder without a confirmed lock yields, in seconds: never two at once.

    At once who does not trust itself and who came late; then the higher MAC, last the lower one. With ZooKeeper there,
    who was heard first thing after we bound it may have been letting go for us. Where answers come seldom the higher
    MAC waits for the second one, the lower for the fourth: so two yield at one answer only if their paces differ.
    """
    sure = TICK * (f.intent is not Intent.RUN)  # who is to go may hear its predecessor, which lets go for it
    late = f.bound is not None and f.bound < TICK and (f.lock is Lock.UNKNOWN or f.bound - f.heard >= 2 * LINGER)
    if not f.trusted or (late and not f.lower and f.lock is not Lock.WAITING):
        return sure + 2 * LINGER * f.lower  # if neither does
    return sure + max(PATIENCE[0 if f.lower else 1 if f.lock is Lock.WAITING else 2], f.pace * (1.5 + 2 * f.lower))


def _contend(f: Facts) -> bool:
    """Who has just failed a check does not stand for election; an empty queue belongs first to who has the IP."""
    if f.bound is not None:
        return f.fit and f.intent is Intent.RUN
    waits = f.lock is Lock.NOBODY and f.served and f.empty < TICK
    return f.fit and f.intent is Intent.RUN and not f.unsure and not waits


def _look(f: Facts) -> Look:
    """Whom to ask, and how often."""
    if not f.needed or f.blind:
        return Look.NONE
    if f.bound is not None:
        if f.lock is Lock.MINE and f.intent is Intent.RUN:
            return Look.NONE
        calm = f.lock is not Lock.OTHER and f.leaving is None and f.trusted and not f.other
        return Look.SLOW if calm else Look.SEARCH
    if f.lock in (Lock.UNKNOWN, Lock.MINE) or (f.lock is Lock.NOBODY and (f.unsure or not f.fit)):
        return Look.SLOW if f.second or (f.proven and not f.met) else Look.FAST if f.met else Look.SEARCH
    return Look.FAST if f.next else Look.SLOW


def _why(f: Facts, silent: bool) -> str:
    """In words, for the log and the API."""
    if f.intent is not Intent.RUN:
        words = {Intent.HAND_OVER: "is being handed over", Intent.STOP: "the agent stops"}
        return words.get(f.intent, "is being removed")
    if not f.fit:
        return "checks fail" + (", but nobody else has the IP" if silent else "")
    heard = "nobody answers for the IP" if silent else "asks the wire"
    heard = "the wire cannot be asked" if f.blind else "another host answers for the IP" if f.served else heard
    return {
        Lock.MINE: "has the lock" + ("; nobody answers for the IP" if silent else ""),
        Lock.OTHER: "another host has the lock" + (MUTE if f.mute else " and the IP" if f.served else ""),
        Lock.NOBODY: "a check fails or cannot run; stands for no election" if f.unsure else "is joining the queue",
        Lock.WAITING: f"waits for ZooKeeper; {heard}",
        Lock.UNKNOWN: "was given the IP by its holder" if f.given else f"without a lock: {heard}",
    }[f.lock]


# == Frames: scapy makes a template per MAC and kind, addresses are patched in; read by struct =========================

WORD = b"LnK\x01"  # LinK's own word, version 1: frozen


class Kind(IntEnum):
    """What a frame says about an address; the words' numbers are ARP opcodes (RFC 5494: for experiments)."""

    ASK = 1  # who has it? A probe (RFC 5227, section 2.1.1), not a claim
    CLAIM = 2  # I have it
    WANT = 24  # LinK's word to the holder: I want it
    GIVE = 25  # LinK's word of the holder: take it, I let go when I hear you


class Heard(NamedTuple):
    """A frame of interest."""

    address: str
    mac: bytes
    kind: Kind
    broadcast: bool


class Frames:
    """All frames as sent from one MAC. `own` has this host's link-local IPv6 address under 6, if there is one.

    IPv4 (RFC 5227): both forms of gratuitous ARP, as some devices heed only one; the reply's target is our own MAC,
    which overrides entries younger than Linux's locktime (arp_is_garp() in net/ipv4/arp.c). Probes have the sender
    0.0.0.0: they change nobody's cache. IPv6 (RFC 4861): NA with Override; without a link-local address, NS from "::".
    """

    def __init__(self, mac: bytes, own: Mapping[int, str]) -> None:
        from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
        from scapy.layers.l2 import ARP, Ether

        src, link_local, ether = mac.hex(":"), own.get(6), Ether(src=mac.hex(":"), dst="ff:ff:ff:ff:ff:ff")
        arp = functools.partial(ARP, hwsrc=src, psrc="0.0.0.0", pdst="0.0.0.0")
        self._reply, self._named = bytes(ether / arp(op=2, hwdst=src)), bool(link_local)
        na = Ether(src=src, dst="33:33:00:00:00:01") / IPv6(src="::", dst="ff02::1", hlim=255)
        self._na = bytes(na / ICMPv6ND_NA(R=0, S=0, O=1, tgt="::") / ICMPv6NDOptDstLLAddr(lladdr=src))
        ns = Ether(src=src, dst="33:33:ff:00:00:00") / IPv6(src=link_local or "::", dst="ff02::1:ff00:0", hlim=255)
        ns = ns / ICMPv6ND_NS(tgt="::") / (ICMPv6NDOptSrcLLAddr(lladdr=src) if link_local else b"")
        self._asking = {Kind.ASK: (bytes(ether / arp(op=1, hwdst="00:00:00:00:00:00")), bytes(ns))}
        for kind in (Kind.WANT, Kind.GIVE):
            word, option = arp(op=kind, hwdst=(WORD + b"\0\0").hex(":")), b"\xfd\x01" + WORD + bytes((kind, 0))
            self._asking[kind] = bytes(ether / word), bytes(ns / option)  # RFC 4727

    def announce(self, address: PlainAddress) -> tuple[bytes, ...]:
        """The frames that say "I have it" to everybody."""
        ip, na = address.packed, self._na
        if address.version == 4:
            return tuple(f[:28] + ip + f[32:38] + ip for f in (self._asking[Kind.ASK][0], self._reply))
        return (_with_sum(na[:22] + ip + na[38:62] + ip + na[78:]),)

    def ask(self, address: PlainAddress, mac: bytes = b"", kind: Kind = Kind.ASK) -> bytes:
        """The question "who has it?" to one MAC or everybody, or a word: kernels heed neither (RFC 4861, section 4.6).

        A solicitation goes to the group of its address (RFC 4291, section 2.7.1), or to the address itself.
        """
        (arp, ns), ip = self._asking[kind], address.packed
        if address.version == 4:
            return (mac or arp[:6]) + arp[6:38] + ip
        to = ip if mac and kind is Kind.ASK and self._named else ns[38:51] + ip[13:]
        return _with_sum((mac or ns[:3] + ip[13:16]) + ns[6:38] + to + ns[54:62] + ip + ns[78:])


def _with_sum(frame: bytes) -> bytes:
    """The frame with its ICMPv6 checksum (RFC 4443): the sum of all words is the whole, modulo 2**16 - 1."""
    total = int.from_bytes(frame[22:56] + frame[58:], "big") + len(frame) - 54 + socket.IPPROTO_ICMPV6
    return frame[:56] + (-total % 0xFFFF).to_bytes(2, "big") + frame[58:]


def read_frame(frame: bytes) -> Heard | None:
    """An ARP packet or a neighbour solicitation / advertisement; None for anything else, however malformed.

    ARP must come from the MAC it speaks of. Hop limit 255 proves that no router forwarded it (RFC 4861, section 7.1).
    """
    mac, kind, about = frame[6:12], None, frame[62:78]
    if frame[12:21] == b"\x08\x06\x00\x01\x08\x00\x06\x04\x00" and frame[22:28] == mac and len(frame) >= 42:
        op, about = frame[21], frame[28:32]
        answers_a_claim = op == 2 and not frame[0] & 1 and frame[38:42] == about  # only a proxy does, for a router
        if any(about):
            kind = Kind.CLAIM if op in (1, 2) and not answers_a_claim else None
        elif op == Kind.ASK or (op in (Kind.WANT, Kind.GIVE) and frame[32:38] == WORD + b"\0\0"):
            kind, about = Kind(op), frame[38:42]
    elif frame[12:14] == b"\x86\xdd" and len(frame) >= 78 and frame[20:22] == b"\x3a\xff" and frame[54] in (135, 136):
        end = 54 + int.from_bytes(frame[18:20], "big")
        kind, option = None, frame[max(78, end - 8) : end]
        if end >= 78:  # a kernel takes no shorter one
            kind = Kind.ASK if frame[54] == 135 else Kind.CLAIM
        if kind is Kind.ASK and option[:5] == b"\xfd\x01" + WORD[:3]:  # maybe of another version
            kind = Kind(option[6]) if option[2:] in (WORD + b"\x18\0", WORD + b"\x19\0") else None
    if kind is None:
        return None
    address = socket.inet_ntoa(about) if len(about) == 4 else str(ipaddress.IPv6Address(about))
    return Heard(address, mac, kind, bool(frame[0] & 1))


# == Wire: whom to ask, how often, and what was heard; it judges nothing ===============================================


class WireView(NamedTuple):
    """What layer 2 knows about one IP at one instant, in the words of Facts."""

    mac: bytes = b""  # who was last heard to have it
    heard: float = math.inf
    staying: float = 0.0
    alone: float = 0.0
    met: bool = False
    unanswered: int = 0
    pace: float = 0.0


@dataclass(eq=False)
class _Ear:
    """One IP on the wire; what was heard counts for one term of its holder."""

    address: PlainAddress
    began: float  # its holder's term, as far as it is known
    look: Look = Look.NONE
    peer: bytes = b""  # whom to ask: the holder's MAC, as far as it is known
    mac: bytes = b""
    heard: float = -math.inf
    since: float = -math.inf  # heard without a break
    met: bool = False  # has answered a probe: only who did can fall silent
    unanswered: int = 0
    asked: bool = False  # a question is out
    pace: float = 0.0  # seconds between two questions of everybody, the last time
    stream: _Stream | None = None


@dataclass(eq=False)
class _Stream:
    """The probes of one kind to one peer, however many IPs it has."""

    look: Look
    peer: bytes
    ears: OrderedDict[_Ear, None] = field(default_factory=OrderedDict)  # whose turn it is comes first
    misses: int = 0
    sent: float = -math.inf
    next: float = -math.inf


@dataclass(eq=False)
class _Witness:
    """An address of somebody else on the LAN that proves that this host can hear; it counts once it has answered."""

    address: PlainAddress
    tries: int = 0  # to meet it
    met: bool = False
    asked: float = math.inf  # since when it owes an answer


class Wire:
    """The second witness: who *does* have an IP. Loop thread only; sends by `send`.

    A holder is asked for one of its IPs after the other, at rest every `rest` intervals, however many IPs it has. The
    first miss quickens the questions; the last one before the verdict goes to everybody, for all of that holder's IPs
    (its MAC may have changed). What fell silent, or never answered, is asked for by itself.
    """

    QUICK = 0.6  # of an interval: a kernel answers within a millisecond (measured: 0.5 ms)
    EACH = 3e-5  # seconds more for each IP that one host is asked for at once
    WITNESSES = 8  # are asked at most

    def __init__(self, interval: float, rest: float, count: int, send: Callable[[Iterable[bytes]], None]) -> None:
        self._interval, self._rest, self._count, self._send = interval, rest * interval, count, send
        self._frames: Frames | None = None
        self._mac = b""
        self._ears: dict[str, _Ear] = {}
        self._streams: dict[tuple[Look, bytes], _Stream] = {}
        self._moved: dict[_Ear, None] = {}  # may belong to another stream now
        self._witnesses: dict[str, _Witness] = {}
        self._heard = [-math.inf, -math.inf]  # anybody, who spoke to this host alone, by IPv4 and by IPv6
        self._others: dict[tuple[Kind, bytes], float] = {}  # who asks for our IPs (ASK) or claims them, and when last
        self._due = math.inf
        self.round_trip = math.nan  # seconds from the last probe that a holder has answered to its answer
        self.suspects = False  # a holder has missed a probe: ZooKeeper may be needed soon

    @property
    def due(self) -> float:
        """When run() wants to be called again."""
        return -math.inf if self._moved else self._due

    # -- what is to be watched

    def use(self, mac: bytes, own: Mapping[int, str]) -> None:
        """Send from this MAC; `own` as Frames wants it. Without a MAC nothing is sent."""
        self._mac, self._frames = mac, Frames(mac, own) if mac else None

    def add(self, address: PlainAddress, now: float) -> None:
        """Listen for an IP from now on."""
        self._ears[str(address)] = _Ear(address, now)

    def remove(self, address: str) -> None:
        """Listen for it no more."""
        if ear := self._ears.pop(address, None):
            ear.look, self._moved[ear] = Look.NONE, None

    def watch(self, address: str, look: Look, peer: bytes) -> None:
        """How to ask for an IP; `peer` is the holder's MAC by its record, until another one is heard."""
        ear = self._ears[address]
        peer = ear.mac or peer if look in (Look.SLOW, Look.FAST) else b""
        if (ear.look, ear.peer) != (look, peer):
            if look is Look.SEARCH or (ear.peer and not peer):  # one host's silence is not the silence of all
                ear.unanswered, ear.asked = 0, False
            ear.look, ear.peer, self._moved[ear] = look, peer, None

    def witnesses(self, addresses: Iterable[str]) -> bool:
        """Whom else to ask, to prove that this host can hear, the best first; whether meet() has anybody new to ask."""
        old, found = self._witnesses, [*dict.fromkeys(addresses)][: self.WITNESSES]
        self._witnesses = {each: old.get(each) or _Witness(ipaddress.ip_address(each)) for each in found}
        return bool(self._witnesses.keys() - old.keys())

    def term(self, address: str, mac: bytes, now: float) -> None:
        """A new holder, with this MAC: it has not answered yet."""
        ear = self._ears[address]
        ear.met, ear.began = False, now
        if ear.mac != mac or now - ear.heard > TICK:
            self.forget(address)

    def forget(self, address: str) -> None:
        """Count only what is heard from now on."""
        ear = self._ears[address]
        ear.mac, ear.heard, ear.since, ear.met = b"", -math.inf, -math.inf, False
        ear.unanswered, ear.asked, self._moved[ear] = 0, False, None

    def distrust(self) -> None:
        """Forget every question that is out: this process was late, or the link was down."""
        for ear in self._ears.values():
            ear.unanswered, ear.asked, self._moved[ear] = 0, False, None
        for stream in self._streams.values():
            stream.misses = 0
        for witness in self._witnesses.values():
            witness.asked = math.inf

    # -- what is known

    def view(self, address: str, now: float) -> WireView:
        """What was heard of an IP."""
        ear = self._ears[address]
        staying, alone = ear.heard - ear.since if ear.mac else 0.0, now - max(ear.heard, ear.began)
        return WireView(ear.mac, now - ear.heard, staying, alone, ear.met, ear.unanswered, ear.pace)

    def deaf(self, now: float, but: Collection[str] | None, of: str = "") -> float:
        """For how long no witness has answered, but for these (the accused's own); 0: one does, or none ever did.

        Without an accused (None) any frame is proof enough that has come since they were asked. For an address (`of`)
        its IP version counts, if such a witness has ever answered: who loses neighbour discovery may still hear ARP.
        """
        met = {address: w.asked for address, w in self._witnesses.items() if w.met and address not in (but or ())}
        same = [asked for address, asked in met.items() if of and (":" in address) is (":" in of)]
        owing, heard = same or met.values(), self._heard[":" in of] if same else max(self._heard)
        if not owing or (but is None and heard >= max(owing) and now - heard <= TICK):
            return 0.0
        return max(0.0, now - max(owing) - self._interval * self.QUICK / 2)

    def known(self) -> dict[str, bool]:
        """The witnesses' addresses, and whether each has ever answered: if none did, this host may hear nobody."""
        return {address: witness.met for address, witness in self._witnesses.items()}

    def askers(self, now: float) -> list[bytes]:
        """The MACs of the standbys, by their probes; the lowest first."""
        return sorted(mac for (kind, mac), at in self._others.items() if kind is Kind.ASK and now - at <= 2 * TICK)

    def claims_anew(self, mac: bytes, now: float) -> bool:
        """Another host claims an IP that is bound here: whether it has claimed none for a second."""
        if anew := now - self._others.get((Kind.CLAIM, mac), -math.inf) > TICK:
            self._others[Kind.CLAIM, mac] = now
        return anew

    # -- what comes in

    def hear(self, heard: Heard, known: bool, now: float) -> bool:
        """Take in a frame, and whether it is news; `known`: its sender is a host of ours, as far as can be told."""
        if not heard.broadcast:  # who hears these alone, as behind a switch with a stale table, is deaf to all answers
            self._heard[":" in heard.address] = now
        witness, ear = self._witnesses.get(heard.address), self._ears.get(heard.address)
        if witness and heard.kind is Kind.CLAIM:
            if self.deaf(now, (), heard.address) > self._interval:
                self.distrust()  # what was asked while nobody could be heard says nothing
            witness.met, witness.asked = True, math.inf
        if ear is None or not (known or (heard.kind is Kind.CLAIM and (heard.broadcast or heard.mac == ear.mac))):
            return False  # a proxy's answers count for nothing; it makes no announcements
        if heard.kind is not Kind.CLAIM:
            self._others[Kind.ASK, heard.mac] = now
            return False
        if now - ear.heard > TICK * (1 if ear.look is Look.NONE and ear.mac != heard.mac else 1.5):
            ear.since = now
        met = ear.met or not heard.broadcast
        if ear.asked and ear.stream and ear.stream.peer:
            self.round_trip = now - ear.stream.sent
        news = ear.mac != heard.mac or ear.met != met or ear.unanswered > 0 or now - ear.heard > TICK
        if ear.met != met or ear.unanswered >= self._count:
            self._moved[ear] = None
        ear.mac, ear.heard, ear.met, ear.unanswered, ear.asked = heard.mac, now, met, 0, False
        return news

    def give_way(self, address: str, mac: bytes) -> None:
        """This host asks everybody: where our last question is out, too, two claims would meet. The lower MAC goes."""
        if mac < self._mac and self._about_to_claim(ear := self._ears[address]):
            ear.unanswered, ear.asked, self._moved[ear] = 0, False, None

    def _about_to_claim(self, ear: _Ear) -> bool:
        """Whether the last question before the verdict is out, of who does not have the IP."""
        stream = self._streams.get((ear.look, ear.peer)) if self._turns(ear) else None
        return ear.asked and (stream.misses if stream else ear.unanswered) >= self._count - 1

    # -- what goes out

    def announce(self, address: str, ask: bool) -> None:
        """Tell everybody that the IP is here; `ask` also who else has it (a killed agent's kernel, for one)."""
        if self._frames and (ear := self._ears.get(address)):
            self._send((*self._frames.announce(ear.address), *([self._frames.ask(ear.address)] if ask else [])))

    def say(self, kind: Kind, address: str, mac: bytes = b"") -> None:
        """ASK everybody once, or say WANT or GIVE to one host."""
        if self._frames:
            self._send([self._frames.ask(self._ears[address].address, mac, kind)])

    def run(self, now: float) -> list[str]:
        """Ask what is due; the IPs whose silence is now proven."""
        self._arrange()
        proven: list[_Ear] = []
        for stream in self._streams.values():
            if now >= stream.next and self._frames:
                each = stream.look is Look.SEARCH
                ask = self._ask_each if each else self._ask_in_turn if stream.peer else self._ask_one
                proven += ask(stream, now, self._frames)
        self._due = min([stream.next for stream in self._streams.values() if self._frames], default=math.inf)
        return [str(ear.address) for ear in proven]

    def _turns(self, ear: _Ear) -> bool:
        """Whether it is asked for in its peer's turn: at full pace only what has answered and still does."""
        return bool(ear.peer) and (ear.look is Look.SLOW or (ear.met and ear.unanswered < self._count))

    def _arrange(self) -> None:
        """Sort what has moved into the streams; one that goes on keeps its pace and its misses."""
        for ear in self._moved:
            if old := ear.stream:
                del old.ears[ear]
            key = (ear.look, ear.peer) if self._turns(ear) or ear.look is Look.SLOW else (Look.SEARCH, b"")
            ear.stream = self._streams.setdefault(key, _Stream(*key)) if ear.look is not Look.NONE else None
            if ear.stream:
                ear.stream.ears[ear] = None
        if self._moved:
            self._streams = {key: stream for key, stream in self._streams.items() if stream.ears}
            self._moved.clear()

    def _ask_each(self, stream: _Stream, now: float, frames: Frames) -> list[_Ear]:
        """Every IP by itself: of everybody, or of a new holder, which may not have bound it yet when first asked."""
        proven, young, pace = [], False, max(self._interval, len(stream.ears) / 1000)  # a thousand in a second
        for ear in stream.ears:
            meets = ear.look is Look.FAST and not ear.met
            if ear.asked and not meets and ear.unanswered < self._count:
                ear.unanswered += 1
                if ear.unanswered == self._count:
                    proven.append(ear)
            young = young or (now - ear.began < TICK if meets else ear.unanswered < self._count)
            ear.asked, ear.pace = True, pace
            self._send([frames.ask(ear.address, ear.peer if meets else b"")])
        self._ask_witnesses(now)
        stream.next = now + max(self._interval * (1 if young else 4), pace)
        return proven

    def _ask_one(self, stream: _Stream, now: float, frames: Frames) -> list[_Ear]:
        """One IP of which no holder is known after the other, of everybody; no verdict over the others follows."""
        stream.ears.move_to_end(next(iter(stream.ears)))
        ear = next(iter(stream.ears))  # whose turn it is now
        silent = ear.asked and ear.unanswered == self._count - 1
        ear.unanswered, ear.asked = min(self._count, ear.unanswered + ear.asked), True
        self._send([frames.ask(ear.address)])
        if ear.unanswered:
            self._ask_witnesses(now)
        stream.next = now + 8 * self._interval
        return [ear] if silent else []

    def _ask_in_turn(self, stream: _Stream, now: float, frames: Frames) -> list[_Ear]:
        """One IP of this peer after the other; a missing answer is found out soon, whatever the pace."""
        ear, pace = next(iter(stream.ears)), TICK if stream.look is Look.SLOW else self._rest
        if not ear.asked:
            stream.misses = 0
            if now < stream.sent + pace:  # it was answered: all is well until the next turn
                stream.next = stream.sent + pace
                return []
            stream.ears.move_to_end(ear)
            ear = next(iter(stream.ears))
        else:
            stream.misses += 1
            self.suspects = self.suspects or stream.look is Look.FAST
            self._ask_witnesses(now)
        if stream.misses >= self._count:
            stream.misses, stream.next = 0, now
            silent = [ear for ear in stream.ears if ear.asked]  # has not answered the last question, either
            for ear in silent:
                ear.unanswered, ear.asked, self._moved[ear] = self._count, False, None
            return silent
        stream.sent, stream.next = now, now + self.QUICK * self._interval
        if 0 < stream.misses == self._count - 1:
            for each in stream.ears:
                each.asked = True
            self._send([frames.ask(each.address) for each in stream.ears])
            stream.next += len(stream.ears) * self.EACH
        else:
            ear.asked = True
            self._send([frames.ask(ear.address, stream.peer)])
        return []

    def meet(self, now: float) -> None:
        """Ask the witnesses that have never answered, often at first; to be called once a second (TICK)."""
        self._others = {other: at for other, at in self._others.items() if now - at <= 2 * TICK}
        for witness in self._witnesses.values() if self._frames else ():
            owes = witness.met and witness.asked < math.inf  # it, or its answer, may have been lost
            if owes or (not witness.met and (witness.tries < 5 or witness.tries % LONG == 0)):
                self._ask_witnesses(math.inf, witness)
            witness.tries += not witness.met

    def _ask_witnesses(self, now: float, *some: _Witness) -> None:
        for witness in some or self._witnesses.values():
            witness.asked = min(witness.asked, now)
        if self._frames:
            self._send([self._frames.ask(witness.address) for witness in some or self._witnesses.values()])


# == Referee: who should have each IP; the only place that knows kazoo =================================================

ANSWER = 0.1  # seconds in which ZooKeeper answers when all is well; later its word counts as not known


class Contender(NamedTuple):
    """One place in the queue for an IP, in the layout of kazoo's Lock recipe."""

    node: str
    session: int  # 0: another program's
    host: str  # "?": a LinK host whose record is not there


class Record(NamedTuple):
    """What a host publishes about itself while its session lives."""

    mac: str = ""
    addresses: tuple[str, ...] = ()  # its own, on the interface: witnesses for the others
    boot: str = ""
    promise: str = ""  # "": an earlier version's; all hosts of an IP are to give the same one

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Never fails: what cannot be read is an empty record."""
        try:
            got = json.loads(data)
            mac = bytes.fromhex(got["mac"].replace(":", ""))
            bare = [each.partition("%")[0] for each in got["addresses"][: Wire.WITNESSES]]  # a scope is that host's own
            own = tuple(str(ipaddress.ip_address(each)) for each in bare)
            boot, promise = str(got["boot"])[:64], str(got.get("promise", ""))[:64]
            return cls(mac.hex(":"), own, boot, promise) if len(mac) in (0, 6) else cls()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()


class Want(Enum):
    """The place that this host wants in a queue."""

    WATCH = 0
    IN = 1
    FIRST = 2  # all nodes ahead are to go
    GONE = 3  # out, and the queue is not followed any more


class LockView(NamedTuple):
    """What ZooKeeper last said of one IP, what that is worth now, and until when, unless it answers."""

    lock: Lock = Lock.UNKNOWN
    queue: tuple[Contender, ...] = ()  # first the holder; the last known one
    place: int = -1  # ours in it; -1: none
    until: float = math.inf


class NoReferee:
    """Where no ZooKeeper is configured: of a lock nothing is known, ever."""

    state, session, timeout, refused, due = "none", None, 0.0, "", math.inf
    rest, causes = 3.5, ""  # probe intervals between two questions while all is answered: every standby asks the holder
    records: Mapping[str, Record] = MappingProxyType({})
    start = stop = want = tick = ask = distrust = publish = staticmethod(lambda *_: None)
    view, age = staticmethod(lambda *_: LockView()), staticmethod(lambda now: math.inf)


@dataclass(eq=False)
class _Place:
    """One directory: what is wanted there against what was last listed."""

    address: str
    path: str
    watch: Callable[[str, str], Callable[[Any], None]]  # of an address, of a host: kazoo keeps each until it fires
    want: Want = Want.WATCH
    queue: tuple[Contender, ...] = ()  # as last listed
    listed: float = -math.inf  # when that was asked for; -inf: not since the last connect, or doubt
    stale: bool = True  # to be listed again: the watch has fired, we wrote, we doubt, it was refused
    heeded: bool = False  # `want` was decided after the last listing
    busy: bool = False  # one request at a time
    refused: float = math.inf  # since when it cannot be listed, or joined
    why: str = ""
    not_before: float = -math.inf  # after a refusal

    def at(self, session: int) -> int:
        """Where this session's first node is in the queue; -1: nowhere."""
        return next((n for n, c in enumerate(self.queue) if c.session == session), -1)


@dataclass(eq=False)
class _Hosts(_Place):
    """The directory in which each host has an ephemeral node of its name, with its record."""

    mine: Record = field(default_factory=Record)  # what is to stand there
    records: dict[str, Record] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)  # for their records, which watches guard; whose session it is
    told: bool = True  # what was read
    owners: dict[int, str] = field(default_factory=dict)  # session -> host: of the records, and of who is in a queue
    owner: int | None = None  # the session whose node has our name; -1: there is none; None: yet to be read
    dead: int = 0  # the session of an earlier process of this host: its nodes are to go
    named: int = 0  # the session in which the name was ours: who has had it since is no earlier process

    def found(self, children: Sequence[str], name: str, kept: set[int]) -> tuple[list[str], bool]:
        """Whose records are to be read, and whether some have gone. Owners stay known while they are, or in `kept`."""
        new = [host for host in children if host not in self.asked]
        self.asked = {host: self.asked.get(host, 0) for host in children}
        kept |= {self.dead, *self.asked.values()}
        self.owners = {session: host for session, host in self.owners.items() if session in kept}
        left = {host: record for host, record in self.records.items() if host in self.asked}
        self.records, gone = left, len(left) < len(self.records)
        if name not in self.asked or name in new:
            self.owner = None if name in self.asked else -1
        return new, gone

    def own(self, owner: int, own: int, record: Record) -> bool:
        """Who has our name; whether it is somebody else. `own` is our session.

        The same boot and card, or none known yet: an earlier process of this host. Else a stranger, or this host before
        its reboot: a dead one's session ends by itself; a living one, as a restored copy, keeps the name.
        """
        self.owner, macs = owner, {record.mac, self.mine.mac} - {""}
        if owner == own:
            self.named = owner
        elif record.boot == self.mine.boot and len(macs) < 2 and self.named != own:
            self.dead = owner
        return owner not in (own, self.dead, 0)  # 0: a node that lasts is nobody's, but of a copy

    def next(self, name: str, own: int, ask: Callable[..., None]) -> None:
        """What to ask for our record; once: the answers for other hosts' records lead here, too, one by one."""
        path, data = f"{self.path}/{name}", json.dumps(self.mine._asdict()).encode()
        owner, self.owner = self.owner, None
        if owner == -1:
            ask(self, "create", path, data, ephemeral=True)
        elif owner in (self.dead, 0):
            ask(self, "delete", path)
        elif owner == own and self.records[name] != Record.parse(data):
            self.asked.pop(name, None)
            ask(self, "set", path, data)
        else:
            self.owner = owner


# kazoo's Lock names its nodes <random UUID, 32 hex digits>__lock__<sequence>. Ours begin with the session; then comes a
# 0, where such a UUID has 8, 9, a or b (RFC 9562, 4.1): so a stranger's is known by its name.
NODE = re.compile(r"(?:([0-9a-f]{16})([0-9a-f])[0-9a-f]{15})?.*__lock__-?(\d{10})$")
_ORDINARY = ("NoNodeError", "NodeExistsError", "NotEmptyError")  # somebody else was there first, or still is
_UNDONE = ("RolledBackError", "RuntimeInconsistency")  # for another step's sake
_NO_ANSWER = ("ConnectionLoss", "SessionExpiredError", "ConnectionClosedError", "AuthFailedError")


class Referee:
    """Who *should* have each IP, by kazoo's asynchronous calls; for the loop's thread only, never waits.

    Level-triggered: asked is what is wanted against the last listing; every answer ends in `_next`. A request lost with
    its connection is forgotten: all is listed anew after each connect. kazoo reports LOST only when it is connected
    again, and its recipes block until then: the lease is counted by our own clock, from when the last request was sent
    that the *leader* answered (a server without a leader answers reads). Listeners, watches and completions run in
    kazoo's threads, and only post.
    """

    WINDOW = 16  # requests out at once, so that kazoo's threads leave the loop some of the interpreter's time
    BATCH = 64  # IPs in a transaction
    PARTS = 8  # of a session timeout: one without an answer is too long, and so often the leader is asked at least
    rest = 2.5  # as NoReferee's: the first standby alone asks; no switch port carries 10 ARP a second

    def __init__(self, config: Config, now: Callable[[], float], post: Any, news: Callable[[str], None]) -> None:
        self._config, self._now, self._post, self._news = config, now, post, news
        self._client: Any = None
        watch = functools.cache(functools.partial(functools.partial, post, self._fired))  # never two for one node
        self._places: dict[str, _Place] = {"": _Hosts("", f"{config.ensemble[1]}/hosts", watch)}
        self._out: dict[object, tuple[float, str]] = {}  # requests: when each was sent, and what it asks
        self._later: deque[Callable[[], None]] = deque()  # what does not fit into the window
        self._takes: list[_Place] = []  # where the nodes ahead are to go, in the next transaction
        self._connected, self._confirmed, self._wrong = False, now(), dict[str, str]()
        self.session: tuple[int, bytes] | None = None
        self.timeout = config.session_timeout  # what the server granted
        self.due = -math.inf  # when tick() wants to be called again

    # -- the session

    @property
    def _hosts(self) -> _Hosts:
        return cast(_Hosts, self._places[""])

    @property
    def records(self) -> Mapping[str, Record]:
        """What the hosts publish, by name."""
        return self._hosts.records

    @property
    def state(self) -> str:
        """The word of GET /health."""
        return "lost" if self.age(self._now()) > self.timeout else "connected" if self._connected else "connecting"

    @property
    def causes(self) -> str:
        """Why it has been out of reach since the last connect, in kazoo's words."""
        return self._wrong.get("lost", "")

    @property
    def refused(self) -> str:
        """What ZooKeeper refuses, in words."""
        wrong = {**self._wrong, "lost": ""}.values()
        said = [*filter(None, [*wrong, *{place.why: 0 for place in self._places.values()}])]
        return "; ".join(said[:3]) + f"; and {len(said) - 3} more" * (len(said) > 3)

    def age(self, now: float) -> float:
        """Of the leader's last word, in seconds."""
        return now - self._confirmed

    def start(self, session: tuple[int, bytes] | None, record: Record) -> None:
        """Connect, re-attaching to an earlier process's session if given; tries for ever, at most 0.5 s apart."""
        self._hosts.mine = record
        client = self._client = _kazoo_client(self._config, session, functools.partial(self._post, self._said))
        _tell_granted(client, functools.partial(self._post, self._granted))

        def listener(state: str) -> None:
            own = client.client_id if state == "CONNECTED" else None
            self._post(self._on_state, own, client.client_state == "EXPIRED_SESSION")

        client.add_listener(listener)
        client.start_async()

    def stop(self, wait: float) -> None:
        """End the session (its nodes go at once), waiting at most so many seconds for the answer."""
        if client := self._client:
            thread = threading.Thread(target=lambda: (client.stop(), client.close()), daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread is to be had now: the session ends by itself
                thread.start()
                thread.join(wait)

    def tick(self, now: float) -> None:
        """Keep the lease clock wound, and give up what does not answer; kazoo would wait for 2/3 of the session."""
        if now < self.due:
            return
        part, lost = self.timeout / self.PARTS, self._confirmed + self.timeout + 0.001  # whatever the rounding
        if self.due <= lost <= now:
            self._news("")
        self.due = min(now + part / 2, lost if lost > now else math.inf)
        if not self._client._connection._connection_routine.is_alive():
            log.error("ZooKeeper: the client's thread has died: starting another one")
            self.stop(0.0)  # nothing that it says reaches the server any more: the session goes on
            self.start(self.session, self._hosts.mine)
            self.due = now + TICK
        elif now - self._oldest() > part:
            log.warning("ZooKeeper's server does not answer: trying another one")
            self._hosts.listed = now  # it is we who end this connection
            self._out.clear()
            with contextlib.suppress(OSError, AttributeError):
                self._client._connection._socket.shutdown(socket.SHUT_RDWR)
        elif self.age(now) >= part:
            self.ask()
        if not self._connected and self.age(now) > self.timeout:
            self._client.last_zxid = 0  # else an ensemble that lost its data would turn us away for ever
        for place in [place for place in self._places.values() if place.stale]:  # it was refused
            self._next(place)

    def ask(self) -> None:
        """Have the leader prove that it is there, unless it has yet to answer."""
        if "sync" not in {call for _, call in self._out.values()}:
            self._ask(None, "sync", self._hosts.path)

    def distrust(self, address: str = "") -> None:
        """What ZooKeeper said may be old: ask the leader, and list the queue (or all) again."""
        self._hosts.asked = self._hosts.asked if address else {}
        self._ask(None, "sync", self._hosts.path)  # answered before the listings are
        for at in [self._places[address]] if address else tuple(self._places.values()):
            at.stale, at.heeded, at.listed = True, False, at.listed if at.address == address else -math.inf
            self._next(at)

    def _oldest(self) -> float:
        """When the oldest request was sent that has no answer; inf: there is none."""
        return next((sent for sent, _ in self._out.values()), math.inf)

    def _granted(self, timeout: float) -> None:
        if timeout != self.timeout:
            log.info("ZooKeeper grants a session timeout of %.1f s, not %.1f s", timeout, self.timeout)
        self.timeout = timeout
        short, strict = f"ZooKeeper grants {timeout:.1f} s; at-most-one needs 2 s", self._config.at_most_one
        self._refuse("timeout", f"{short}: raise maxSessionTimeout" * (strict and timeout < 2))

    def _said(self, what: str) -> None:
        """A warning of kazoo's. Of servers that are all tried again and again each cause is told once."""
        if not self._connected and ": " in what and what not in self.causes and len(self.causes) < 500:
            self._wrong["lost"] = "; ".join(filter(None, [self.causes, what]))
            log.warning("ZooKeeper: %s", what)

    def _on_state(self, session: tuple[int, bytes] | None, expired: bool) -> None:
        mute = self._connected and self._hosts.listed == -math.inf  # nothing was answered since the last connect
        known = logging.DEBUG if self._wrong.get("session") else logging.INFO
        self._connected, again = session is not None, session is not None and self._own == _number(session[0])
        self.session = None if expired else session or self.session
        for gone in (self._out, self._later, self._takes, self._hosts.asked):
            gone.clear()
        for place in self._places.values():
            place.busy, place.stale, place.heeded = False, True, False
            if expired or (session and not again):
                place.queue = ()
            if session and not (again and self._config.at_most_one):
                place.listed = -math.inf  # while we were away somebody may have taken a lock of ours
        if session:
            log.log(known, "ZooKeeper: connected, session 0x%016x%s", self._own, " again" if again else "")
            self._hosts.owners[self._own], self._wrong["lost"] = self._config.hostname, ""
            self.ask()
            for place in tuple(self._places.values()):
                self._next(place)  # not by an earlier tick(), which would make one client after the other
        else:
            said = "the session has ended" if expired else "out of reach"
            log.log(known if mute else logging.WARNING, "ZooKeeper: %s", said)
            self._refuse("session", "ZooKeeper ends each session at once: see zookeeper_auth, and its log" * mute)
        self._news("")

    @property
    def _own(self) -> int:
        return _number(self.session[0]) if self.session else -1

    # -- requests

    def _ask(self, place: _Place | None, call: str, *args: Any, then: Any = None, **more: Any) -> None:
        """Call kazoo's `<call>_async`; `then` gets the value, or the exception that says no, and when it was asked."""
        if place:
            place.busy = True
        if not self._connected or self._client.client_id != self.session:
            return  # else kazoo would send it when it is connected again, maybe in another session: too late to be true
        if len(self._out) >= self.WINDOW and call != "sync":  # that goes before the listings which wait for its word
            first = place in (None, self._hosts) or place.want is Want.FIRST
            send = functools.partial(self._ask, place, call, *args, then=then, **more)
            return (self._later.appendleft if first else self._later.append)(send)
        ticket = object()
        self._out[ticket] = (self._now(), call)
        ask = functools.partial(_delete, self._client) if call == "multi" else getattr(self._client, call + "_async")
        ask(*args, **more).rawlink(lambda r: self._post(self._answered, ticket, place, then, r.exception or r.value))

    def _answered(self, ticket: object, place: _Place | None, then: Any, answer: Any) -> None:
        if isinstance(answer, list):  # of a transaction: what was wrong with it
            answer = next((e for e in answer if isinstance(e, Exception) and type(e).__name__ not in _UNDONE), answer)
        name = type(answer).__name__ if isinstance(answer, Exception) else ""
        sent, call = self._out.pop(ticket, (0.0, ""))
        if not call or name in _NO_ANSWER:  # or of an earlier connection
            return
        refused = name not in ("", *_ORDINARY)
        if not refused and call not in ("get", "exists", "get_children"):
            self._confirmed = max(self._confirmed, sent)  # the leader has spoken
        if place:
            place.busy = False
        if place and refused:  # nothing is known; again later
            place.why = f"ZooKeeper refuses {call} in {place.path}: {name}; see zookeeper_auth, its ACL and quota"
            if self._now() - place.not_before > 2 * TICK:  # else it goes on
                log.error("%s", place.why)
            place.stale, place.not_before, place.refused = True, self._now() + TICK, min(place.refused, sent)
            self._hosts.asked.clear()  # nor is it known whose record it was
        elif then:
            then(place, answer, sent)
        elif place:  # what counts is the listing after a write, whatever the answer
            place.stale = True
        if place:
            self._next(place)
        while self._later and len(self._out) < self.WINDOW:
            self._later.popleft()()

    def _refuse(self, what: str, why: str) -> None:
        if why and why != self._wrong.get(what):
            log.error("%s", why)
        self._wrong[what] = why

    # -- one directory

    def publish(self, record: Record) -> None:
        """Tell the other hosts about this one."""
        self._hosts.mine = record
        self._next(self._hosts)

    def want(self, address: str, want: Want) -> None:
        """The place that we want in the queue of an address; following it begins with the first call."""
        if (place := self._places.get(address)) is None:
            path = f"{self._config.ensemble[1]}/ips/{address}"
            place = self._places[address] = _Place(address, path, self._hosts.watch)
        place.want, place.heeded = want, True
        self._next(place)

    def view(self, address: str, now: float, since: float) -> LockView:
        """The lock by our own lease clock; to be ours it must have been confirmed after `since`."""
        place, late = self._places[address], self._oldest() + ANSWER
        at = place.at(self._own)
        known, lock = place.listed > -math.inf, Lock.OTHER if place.queue else Lock.NOBODY
        if max(self.age(now), now - place.refused) > self.timeout:
            lock = Lock.UNKNOWN
        elif at == 0:
            lock = Lock.MINE if known and min(self._confirmed, place.listed) >= since else Lock.WAITING
        elif not known or not self._connected or now > late:
            lock = Lock.WAITING
        acts = late > now and (at == 1 or self._config.at_most_one)  # then, or when it is heard again
        return LockView(lock, place.queue, at, late if acts else math.inf)

    def _fired(self, address: str, host: str, _: Any) -> None:
        self._hosts.asked.pop(host, None)
        if place := self._places.get(address):
            place.stale = True
            self._next(place)

    def _next(self, place: _Place) -> None:
        """The one thing to ask for this directory now; every answer ends here again."""
        if place.busy or not self._connected or self._now() < place.not_before:
            return
        path, queue = place.path, place.queue
        mine, stands = [c.node for c in queue if c.session == self._own], place.want in (Want.IN, Want.FIRST)
        ahead = queue[: max(0, place.at(self._own))]
        out = mine[1:] if stands else mine  # twice: the answer to a create was lost
        out += [c.node for c in ahead if c.session == self._hosts.dead != 0]  # behind ours it would be alive
        echo = place.heeded and place.at(self._own) == 0 and self._now() < place.listed + TICK  # of our own deed
        if place.stale and not (echo and self._out):
            place.stale = False  # not when it is answered: kazoo may tell of a watch before of the listing that set it
            self._ask(place, "get_children", path, then=self._listed, watch=place.watch(place.address, ""))
        elif isinstance(place, _Hosts):
            place.next(self._config.hostname, self._own, self._ask)
        elif not place.heeded and place.want is not Want.GONE:
            pass  # who decides is told of the listing, and answers by want()
        elif out:
            if not stands:
                place.listed = -math.inf  # a lock that is being given back is ours no more
            self._ask(place, "delete", f"{path}/{out[0]}")
        elif place.want is Want.GONE:
            del self._places[place.address]
            self._ask(None, "delete", path)  # with the last contender; else it is not empty
        elif stands and not mine:
            node, data = f"{path}/{self._own:016x}0{uuid.uuid4().hex[17:]}__lock__", self._config.hostname.encode()
            self._ask(place, "create", node, data, ephemeral=True, sequence=True, makepath=True)
        elif place.want is Want.FIRST and ahead:
            place.busy = True
            self._takes.append(place)
            if len(self._takes) == 1:
                self._post(self._take, self._takes)

    def _take(self, places: list[_Place], most: int = BATCH) -> None:
        """In one transaction for many: one for each of a thousand IPs would last long."""
        while some := places[:most]:
            del places[:most]
            queues = [[f"{place.path}/{c.node}" for c in place.queue[: place.at(self._own) + 1]] for place in some]
            ours, others = [queue.pop() for queue in queues], [node for queue in queues for node in queue]
            then = functools.partial(self._taken, some)
            self._ask(some[0] if len(some) == 1 else None, "multi", ours, others, then=then)

    def _taken(self, places: list[_Place], _: Any, answer: Any, sent: float) -> None:
        """What it changed is known: no listing has to be waited for. A step that was wrong is found by halves."""
        if isinstance(answer, Exception) and len(places) > 1:
            return self._take(places, len(places) // 2)
        for place in places:  # of each is asked more when it is decided on: many are bound before they are listed
            place.busy, place.stale = False, place.stale or isinstance(answer, Exception)
            if not isinstance(answer, Exception):
                place.queue, place.listed, place.heeded = place.queue[place.at(self._own) :], sent, False
                self._news(place.address)

    def _listed(self, place: _Place, answer: Any, sent: float) -> None:
        if place.stale and place.listed == -math.inf:
            return  # doubted since it was asked for
        if isinstance(answer, Exception) and place.want is not Want.GONE:  # a watch needs a directory
            return self._ask(place, "create", place.path, makepath=True)
        children, known = [] if isinstance(answer, Exception) else answer, place.listed > -math.inf
        place.listed, queue = sent, _queue(children, self._hosts.owners)
        self._refuse("session", "")
        if place.want not in (Want.IN, Want.FIRST) or self._own in [c.session for c in queue]:
            place.refused, place.why = math.inf, ""  # else it is not known that we may join it
        if place is not self._hosts:
            if known and queue and queue[0].host == "?":  # the first listing may come before the hosts' records
                node = f"{place.path}/{queue[0].node}"
                self._ask(None, "exists", node, then=functools.partial(_end_copy, self._ask, node))
            if not (known and place.heeded and queue == place.queue):  # else it is what was decided on
                place.queue, place.heeded = queue, False
                self._news(place.address)
            return
        kept = {self._own, *(c.session for each in self._places.values() for c in each.queue)}
        new, gone = self._hosts.found(children, self._config.hostname, kept)
        if gone:
            self._news("")
        for host in new:
            read = functools.partial(self._read, host)
            self._ask(place, "get", f"{place.path}/{host}", then=read, watch=place.watch("", host))

    def _read(self, host: str, hosts: _Hosts, answer: Any, _: float) -> None:
        if isinstance(answer, Exception):
            hosts.asked.pop(host, None)  # it has just gone
            return
        record, owner = Record.parse(answer[0]), _number(answer[1].ephemeralOwner)
        known = hosts.records.get(host) == record and hosts.owners.get(owner) == host
        hosts.records[host], hosts.owners[owner] = record, host
        if host in hosts.asked:  # else its watch has been told of before this, which is old: it is read again
            hosts.asked[host] = owner
        if host == self._config.hostname:
            taken = f"the name {host} is taken in ZooKeeper by another host (give each its own `hostname`), or this one"
            self._refuse("name", f"{taken} before a reboot" * hosts.own(owner, self._own, record))
        if not known and hosts.told:
            hosts.told = False
            self._post(self._tell, hosts)

    def _tell(self, hosts: _Hosts) -> None:
        """Once for many records: to tell of each of a thousand would keep the loop from all else."""
        hosts.told = True
        for place in self._places.values():
            place.queue = _queue((c.node for c in place.queue), hosts.owners)
        self._news("")


def _tell_granted(client: Any, granted: Callable[[float], None]) -> None:
    """Have kazoo say which session timeout it was granted (it reads for 2/3), and take no answer of two gigabytes."""
    connect, read = client._connection._connect, client._connection._read

    def negotiated(*args: Any) -> Any:
        timeouts = connect(*args)
        granted(timeouts[0] / 1000 * 3 / 2)
        return timeouts

    client._connection._connect = negotiated
    client._connection._read = lambda size, timeout: read(size * (size < 1 << 24), timeout)


def _delete(client: Any, ours: Iterable[str], others: Iterable[str]) -> Any:
    """In one step: check that our nodes exist, delete exactly the others."""
    from kazoo.protocol.serialization import CheckVersion, Delete

    transaction = client.transaction()  # its methods look through each path anew
    transaction.operations += [*(CheckVersion(node, -1) for node in ours), *(Delete(node, -1) for node in others)]
    return transaction.commit_async()


def _end_copy(ask: Callable[..., None], node: str, _: Any, answer: Any, __: float) -> None:
    """In a copy of an ensemble's data nothing is ephemeral: such a lock would never end."""
    if getattr(answer, "ephemeralOwner", None) == 0:
        log.warning("ZooKeeper: %s is no living host's, but of a copy: it is removed", node)
        ask(None, "delete", node)


def _queue(nodes: Iterable[str], owners: Mapping[int, str]) -> tuple[Contender, ...]:
    """Whose nodes they are, in their order."""
    queue = []
    for found in sorted(filter(None, map(NODE.match, nodes)), key=lambda found: found[3]):
        session = int(found[1] or "0", 16)
        ours = found[2] == "0" or session in owners.keys() - {0}  # 0: a record that is a node which lasts
        queue.append(Contender(found[0], session * ours, owners.get(session, "?") if ours else "another program"))
    return tuple(queue)


def _number(session: int) -> int:
    """Of a session or an ephemeral node's owner; kazoo reads it as signed."""
    return session & (1 << 64) - 1


class _Ahead(socket.socket):
    """Reads many answers at once, and gives them out by parts, as SSLSocket: kazoo asks for head and body of each."""

    rest = b""

    def pending(self) -> int:
        return len(self.rest)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.rest = self.rest or super().recv(max(size, 4096), flags)
        got, self.rest = self.rest[:size], self.rest[size:]
        return got


def _kazoo_client(config: Config, session: tuple[int, bytes] | None, said: Callable[[str], object]) -> Any:
    """A client that tries the next server soon, for ever (kazoo: T per server, one hour); its warnings go to `said`."""
    from kazoo.client import KazooClient
    from kazoo.handlers.threading import SequentialThreadingHandler
    from kazoo.retry import KazooRetry
    from kazoo.security import make_digest_acl

    patience = max(0.5, 2 * config.session_timeout / Referee.PARTS)

    class Handler(SequentialThreadingHandler):  # type: ignore[misc]
        """Waits less: a server that is black-holed, or takes a connection and is mute, must not cost the session."""

        def create_connection(self, *args: Any, **more: Any) -> Any:
            sock = super().create_connection(*args, **{**more, "timeout": min(more["timeout"], patience)})
            return sock if isinstance(sock, ssl.SSLSocket) else _Ahead(fileno=sock.detach())  # kazoo sets its timeout

        def select(self, reads: Any, writes: Any, _: Any, timeout: float) -> Any:
            """By poll(2); kazoo makes an epoll(7) each time, and does not see what has been read ahead."""
            known = {sock.fileno() for sock in reads if getattr(sock, "pending", int)()}
            poll = select.poll()
            for sock in (*reads, *writes):
                poll.register(sock, select.POLLOUT if sock in writes else select.POLLIN)
            found = known.union(number for number, _ in poll.poll(0 if known else min(timeout, patience) * 1000))
            return *([sock for sock in socks if sock.fileno() in found] for socks in (reads, writes)), []

    retry = KazooRetry(max_tries=-1, delay=0.1, max_delay=0.5, max_jitter=0.3)
    logger = logging.Logger("kazoo", logging.WARNING)
    logger.addFilter(lambda r: bool(said(re.sub(r": Connect\(.*", "", r.getMessage()).replace("None", "timed out"))))
    more: dict[str, Any] = {"handler": Handler(), "connection_retry": retry, "logger": logger}
    if auth := config.zookeeper_auth:
        more.update(auth_data=[("digest", auth)], default_acl=[make_digest_acl(*auth.split(":", 1), all=True)])
    if ca := config.zookeeper_tls_ca:
        cert, key = config.zookeeper_tls_cert or None, config.zookeeper_tls_key or None
        more.update(use_ssl=True, ca=ca, check_hostname=True, certfile=cert, keyfile=key)
    return KazooClient(config.ensemble[0], config.session_timeout, session, **more)


# == Network: the only place that knows netlink and packet sockets =====================================================

ETH_P_ARP, ETH_P_IPV6, SOL_PACKET = 0x0806, 0x86DD, 263
IFF_UP, IFF_LOOPBACK, IFF_NOARP, IFF_LOWER_UP = 0x1, 0x8, 0x80, 0x10000  # <linux/if.h>
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_OPERSTATE, IFLA_LINKINFO, IFLA_EXT_MASK = 1, 3, 10, 16, 18, 29
IFLA_INFO_SLAVE_KIND, RTEXT_FILTER_SKIP_STATS = 4, struct.pack("I", 8)
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS, IFA_PROTO = 1, 2, 6, 8, 11  # <linux/if_addr.h>
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200  # the same
FOR_EVER = 0xFFFFFFFF  # INFINITY_LIFE_TIME, <net/addrconf.h>
IFA_PROTO_LINK = b"\x4c"  # marks our addresses (Linux 5.18): never touch one that LinK did not add
RTA_DST, RTA_OIF, RTA_GATEWAY, RTM_F_FIB_MATCH, RTN_LOCAL = 1, 4, 5, 0x2000, 2  # <linux/rtnetlink.h>
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR, RTM_GETROUTE = 16, 17, 18, 20, 21, 22, 26
NLM_F_REQUEST_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP, NLM_F_REPLACE_CREATE = 0x5, 0x10, 0x300, 0x500  # <linux/netlink.h>
NLMSG_ERROR, NLMSG_DONE = 2, 3  # either ends an answer
GONE = (errno.ENODEV, errno.ENXIO)  # an interface is not there; any other error says nothing about it
Attributes = dict[int, bytes]  # of a netlink message, by kind


class Link(NamedTuple):
    """The interface as it is now; number 0 where there is none. Troubles name the remedy."""

    number: int = 0  # its index
    mac: bytes = b""
    up: bool = False  # administratively up, with carrier
    arp: bool = False  # the wire can be asked at all
    trouble: str = "the interface does not exist"
    trouble4: str = ""  # concerns IPv4 addresses only
    trouble6: str = ""  # concerns IPv6 addresses only


class Netlink:
    """Requests to rtnetlink(7), one at a time. Own code: pyroute2 takes ten times as long, and hides torn dumps."""

    def __init__(self) -> None:
        self._number = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(2 * TICK), 0))

    def ask(self, request: int, flags: int, head: bytes, more: Attributes | None = None) -> list[bytes]:
        """The bodies of all answers; attributes follow `head`. Raises OSError, EAGAIN if a dump was torn five times."""
        body = head + b"".join(struct.pack(f"2H{len(v)}s0I", 4 + len(v), kind, v) for kind, v in (more or {}).items())
        for _ in range(5):
            self._number += 1
            first = struct.pack("I2H2I", 16 + len(body), request, flags | NLM_F_REQUEST_ACK, self._number, 0)
            self._socket.send(first + body)
            answers, torn, last = list[bytes](), 0, 0
            while last not in (NLMSG_ERROR, NLMSG_DONE):
                for (kind, marks, number, _), answer in parts(self._socket.recv(1 << 16), "I2H2I"):
                    if number == self._number:  # else it is late
                        answers.append(answer)
                        torn, last = torn | marks & NLM_F_DUMP_INTR, kind
            if error := -struct.unpack_from("i", answers.pop())[0]:
                raise OSError(error, "needs CAP_NET_ADMIN" if error == errno.EPERM else os.strerror(error))
            if not torn:
                return answers
        raise OSError(errno.EAGAIN, "the kernel's list changes faster than it can be read")


def parts(data: bytes, form: str, at: int = 0) -> Iterator[tuple[list[int], bytes]]:
    """Head and body of each of the things that follow one another, their sizes first (netlink(7), rtnetlink(7))."""
    head = struct.calcsize(form)
    while at + head <= len(data):
        size, *more = struct.unpack_from(form, data, at)
        yield more, data[at + head : at + size]
        at += max(head, size + 3 & ~3)


def attributes(data: bytes, at: int = 0) -> Attributes:
    """What stands behind the first `at` bytes."""
    return {kind & 0x3FFF: value for (kind,), value in parts(data, "2H", at)}


class Network:
    """One interface's link and addresses (rtnetlink(7)) and frames (packet(7)); for the loop's thread only."""

    def __init__(self, interface: str) -> None:
        self.name = interface  # as it is called now
        self.unsent: dict[int, tuple[float, float, str]] = {}  # by protocol: all is lost since, as of, why
        self._interface, self._index = interface, 0
        self._packets: dict[int, socket.socket] = {}  # by protocol
        self._wanted: frozenset[str] | None = None  # whom hear_only() named
        self._macs: set[bytes] = set()  # of this machine: another interface on the same LAN is no rival
        self._netlink = Netlink()
        self._hints = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._hints.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._hints.bind((0, 0x1 | 0x10 | 0x100))  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR

    def sync(self, listen: bool = True) -> tuple[Link, dict[Address, bool], dict[int, str]]:
        """The link, its addresses (True: LinK added it), and this host's own one per IP version (6: link-local).

        Raises OSError where the kernel could not be asked: an error is not absence. The interface is followed by index
        while that lives, else by name, so one made anew is found. Without `listen` no packet socket is opened.
        """
        found = self._netlink.ask(RTM_GETLINK, NLM_F_DUMP, bytes(16), {IFLA_EXT_MASK: RTEXT_FILTER_SKIP_STATS})
        links = {i: (flags, attributes(body, 16)) for body in found for i, flags in [struct.unpack_from("iI", body, 4)]}
        names = {index: more[IFLA_IFNAME].rstrip(b"\0").decode(errors="replace") for index, (_, more) in links.items()}
        self._macs = {more.get(IFLA_ADDRESS, b"") for _, more in links.values()}
        index = self._index if self._index in links else next((i for i in names if names[i] == self._interface), 0)
        name = names.get(index, self._interface)
        if 0 < index == self._index and name != self.name:
            log.warning("%s is called %s now", self.name, name)
        self.name = name
        if index != self._index or (listen and not self._packets):
            self._open(index, listen)
        if not index:
            return Link(trouble=f"{self.name} does not exist: name another interface, or make it"), {}, {}
        bound = [*self._bound()]
        addresses = {ip: ours for at, ip, ours, _ in bound if at == index}
        foreign = [ip for ip, ours in addresses.items() if not ours and (ip.version == 4 or ip.is_link_local)]
        own: dict[int, str] = {ip.version: str(ip.ip) for ip in reversed(foreign)}  # the first counts
        if self._ignores_arp() not in ("1", "2", "8"):  # the kernel answers for the addresses of all its interfaces
            others = [ip for at, ip, ours, _ in bound if at != index and not ours]
            for ip in [ip for ip in others if ip.version == 4 and not ip.is_loopback]:
                addresses.setdefault(ip, False)
        return self._link(*links[index], names, own), addresses, own

    def _ignores_arp(self) -> str:
        """arp_ignore of the interface: the higher of two counts (kernel: Documentation/networking/ip-sysctl.rst)."""
        return max(_sysctl(f"ipv4/conf/{each}/arp_ignore") or "0" for each in ("all", self.name))

    def _link(self, flags: int, more: Attributes, names: Mapping[int, str], own: Mapping[int, str]) -> Link:
        name, mac, off = self.name, more.get(IFLA_ADDRESS, b""), _sysctl(f"ipv6/conf/{self.name}/disable_ipv6")
        dormant = "is dormant (802.1X?)" if more.get(IFLA_OPERSTATE) == b"\5" else ""
        why = "is down" if not flags & IFF_UP else "has no carrier" if not flags & IFF_LOWER_UP else dormant
        trouble, four, six = why and f"{name} {why}", "", ""
        if flags & (IFF_NOARP | IFF_LOOPBACK) or len(mac) != 6:
            trouble = f"{name} does not speak ARP, by which clients find an IP: set arp on, or name another interface"
        master = names.get(int.from_bytes(more.get(IFLA_MASTER, b""), sys.byteorder))
        kind = attributes(more.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_SLAVE_KIND)
        if master and kind != b"vrf\0":  # a port of a bridge, bond, team or OVS hands all frames to its master
            use = "the bridge's internal port" if master == "ovs-system" else master
            trouble = f"{name} is a port of {master}: use {use}"
        ignore = self._ignores_arp()
        if ignore == "8" or (ignore == "2" and 4 not in own):  # 2: only who is in a subnet of ours is answered (tried)
            four = f"arp_ignore is {ignore}, no client is answered: set it to 1 for all and {name}"
        if off != "0":
            remedy = "set disable_ipv6 to 0" if off else "by ipv6.disable, or an MTU below 1280"
            six = f"IPv6 is switched off on {name}: {remedy}"
        return Link(self._index, mac, not why, not trouble, trouble, four, six)

    def _bound(self) -> Iterator[tuple[int, Address, bool, int]]:
        """Index, address, whether it is tagged as ours, lifetime, on all interfaces: by index it is torn unseen."""
        for body in self._netlink.ask(RTM_GETADDR, NLM_F_DUMP, bytes(8)):
            (family, length, _, _, index), more = struct.unpack_from("4BI", body), attributes(body, 8)
            if family in (socket.AF_INET, socket.AF_INET6):
                bare, ours = more.get(IFA_LOCAL) or more[IFA_ADDRESS], more.get(IFA_PROTO) == IFA_PROTO_LINK
                make = ipaddress.IPv4Interface if len(bare) == 4 else ipaddress.IPv6Interface
                yield index, make((bare, length)), ours, struct.unpack_from("2I", more[IFA_CACHEINFO])[1]

    def _open(self, index: int, listen: bool = True) -> None:
        for sock in self._packets.values():
            sock.close()
        packets = dict[int, socket.socket]()
        self._packets, self._index = {}, index
        for protocol in (ETH_P_ARP, ETH_P_IPV6) if index and listen else ():
            try:
                sock = packets[protocol] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            except PermissionError:
                raise PermissionError(errno.EPERM, "needs CAP_NET_RAW for packet sockets") from None
            with contextlib.suppress(PermissionError):  # refused inside a user namespace
                sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE: a thousand IPs may answer at once
            self._filter(protocol, sock)
            if protocol == ETH_P_IPV6:
                sock.setsockopt(SOL_PACKET, 1, struct.pack("iHH8s", index, 2, 0, b""))  # PACKET_ADD_MEMBERSHIP ALLMULTI
            sock.bind((self.name, protocol))  # nothing is heard before
        self._packets = packets

    def hear_only(self, addresses: Collection[str] | None) -> None:
        """Let the kernel drop frames about any other address (None: of none): a flood then costs nothing here."""
        if (wanted := addresses if addresses is None else frozenset(addresses)) != self._wanted:
            self._wanted = wanted
            for protocol, sock in self._packets.items():
                self._filter(protocol, sock)

    def _filter(self, protocol: int, sock: socket.socket) -> None:
        for wanted in (self._wanted, None):  # all frames, if there is no room for more (net.core.optmem_max)
            program = frame_filter(protocol, self._index, wanted)
            code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
            pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))  # struct sock_fprog
            with contextlib.suppress(OSError):
                return sock.setsockopt(socket.SOL_SOCKET, 26, pointer)  # SO_ATTACH_FILTER

    def ready(self, ip: Address) -> bool:
        """Whether the kernel takes packets for it; for a new IPv6 address it does some milliseconds later."""
        head = struct.pack("2B10x", socket.AF_INET if ip.version == 4 else socket.AF_INET6, ip.max_prefixlen)
        more = {RTA_DST: ip.ip.packed, RTA_OIF: struct.pack("i", self._index)}
        with contextlib.suppress(OSError):
            return self._netlink.ask(RTM_GETROUTE, 0, head, more)[0][7] == RTN_LOCAL
        return False

    def add(self, ip: Address, lifetime: int = 0) -> None:
        """Bind, or refresh the lifetime in seconds (0: for ever). Raises OSError.

        RTM_NEWADDR with NLM_F_REPLACE: exact address and prefix, no prefix route, no duplicate address detection.
        """
        valid = lifetime or FOR_EVER
        preferred = valid if ip.version == 4 else 0  # never a source of this host's own traffic (RFC 6724, rule 3)
        flags = struct.pack("I", IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if ip.version == 6 else 0))
        more = {IFA_FLAGS: flags, IFA_PROTO: IFA_PROTO_LINK, IFA_CACHEINFO: struct.pack("4I", preferred, valid, 0, 0)}
        self._ask(RTM_NEWADDR, ip, self._index, NLM_F_REPLACE_CREATE, more)

    def remove(self, ip: Address) -> None:
        """Unbind; no error where it is not there. Raises OSError."""
        try:
            self._ask(RTM_DELADDR, ip, self._index)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENOENT, *GONE):
                raise

    def clear(self, addresses: Collection[Address], lasting: bool = False) -> None:
        """Remove these, if ours, from *other* interfaces; `lasting`: here, too, what never ends. Raises OSError."""
        for index, ip, ours, lifetime in self._bound():
            if ours and ip in addresses and (index != self._index or (lasting and lifetime == FOR_EVER)):
                self._ask(RTM_DELADDR, ip, index)

    def _ask(self, kind: int, ip: Address, index: int, flags: int = 0, more: Attributes | None = None) -> list[bytes]:
        """With the prefix length: without it the kernel takes the first match, maybe not ours."""
        family, bare = socket.AF_INET if ip.version == 4 else socket.AF_INET6, ip.ip.packed
        head = struct.pack("4BI", family, ip.network.prefixlen, 0, 0, index)
        return self._netlink.ask(kind, flags, head, {IFA_LOCAL: bare, IFA_ADDRESS: bare, **(more or {})})

    def send(self, frames: Iterable[bytes]) -> None:
        """Never raises; `unsent` tells for how long all of a protocol is lost (ENOBUFS: a full queue, or a filter)."""
        for frame in frames if self._packets else ():
            protocol = ETH_P_IPV6 if frame[12:14] == b"\x86\xdd" else ETH_P_ARP
            try:
                self._packets[protocol].send(frame)
                self.unsent.pop(protocol, None)
            except OSError as error:
                if error.errno in (errno.ENETDOWN, *GONE):
                    continue  # sync() reports those
                now = time.monotonic()
                first, last, _ = self.unsent.get(protocol, (now, now, ""))
                first = first if now - last < 2 * LONG else now  # else somebody is asked once a minute, and that is all
                self.unsent[protocol] = first, now, str(error.strerror)
                if last - first < LONG / 2 <= now - first:
                    log.warning("%s", self.send_error)

    @property
    def send_error(self) -> str:
        """Why nothing of a protocol gets out, for a while by now; that a full queue loses some frames is no trouble."""
        lost = [why for old, last, why in self.unsent.values() if old + LONG / 2 <= last > time.monotonic() - 2 * LONG]
        return f"cannot send on {self.name} ({lost[0]}): see `tc qdisc`, and the egress filters of nft" if lost else ""

    def receive(self, limit: int = 512) -> tuple[list[Heard], bool]:
        """What the wire brought since the last call, at most `limit` frames of a family; whether there may be more."""
        heard, more = list[Heard](), False
        for sock in self._packets.values():
            with contextlib.suppress(OSError):
                for _ in range(limit):
                    frame = read_frame(sock.recv(128))
                    if frame and frame.mac not in self._macs:
                        heard.append(frame)
                more = True
        return heard, more

    def changed(self) -> bool:
        """Whether the kernel reported a change of our link or its addresses: a hint; so is an overrun (ENOBUFS)."""
        seen = False
        try:
            for _ in range(1000):
                for (kind, *_), body in parts(self._hints.recv(1 << 16), "I2H2I"):
                    family, index = struct.unpack_from("B3xi", body)
                    seen |= index == self._index or not self._index  # while there is none, any may be ours
                    if kind == RTM_NEWLINK and not family:  # sync() forgets the MACs that are gone
                        self._macs.add(attributes(body, 16).get(IFLA_ADDRESS, b""))
                    elif kind == RTM_DELLINK and not family and index == self._index:
                        self._open(0)  # its number may be given anew: the sockets hear what is gone
        except OSError as error:
            return seen or error.errno != errno.EAGAIN
        return True

    def gateways(self) -> list[str]:
        """The default gateways reached through the interface, one per IP version, without reading all routes."""
        found, oif = [], struct.pack("i", self._index)
        for family, nowhere in ((socket.AF_INET, "240.0.0.1"), (socket.AF_INET6, "4000::1")):  # by no other route
            address = socket.inet_pton(family, nowhere)
            head = struct.pack("2B6xI", family, 8 * len(address), RTM_F_FIB_MATCH)
            with contextlib.suppress(OSError):
                route = attributes(self._netlink.ask(RTM_GETROUTE, 0, head, {RTA_DST: address, RTA_OIF: oif})[0], 12)
                if RTA_GATEWAY in route and route.get(RTA_OIF) == oif:
                    found.append(socket.inet_ntop(family, route[RTA_GATEWAY]))
        return found

    def files(self) -> list[int]:
        """Descriptors that become readable when receive() or changed() has news."""
        return [sock.fileno() for sock in [*self._packets.values(), self._hints]]


def reserved(addresses: Mapping[Address, bool]) -> frozenset[str]:
    """Of those of a host what LinK did not add, and their networks' broadcast addresses (RFC 3021: a /31 has none)."""
    found = [ip for ip, ours in addresses.items() if not ours]
    nets = [ip.network for ip in found if ip.version == 4 and ip.network.prefixlen < 31]
    return frozenset(map(str, [*(ip.ip for ip in found), *(net.broadcast_address for net in nets)]))


def _sysctl(name: str) -> str:
    """A setting below /proc/sys/net; empty where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", encoding="ascii") as file:
        return file.read().strip()
    return ""


def frame_filter(protocol: int, index: int, addresses: Collection[str] | None) -> list[tuple[int, int, int, int]]:
    """Classic BPF: ARP or neighbour discovery (hop limit 255) about these addresses; None lets all through.

    A line is load, jump if equal, mask, jump or return (kernel: Documentation/networking/filter.rst). Another VLAN's
    frame is PACKET_OTHERHOST, or has its own interface's index (net/core/dev.c; its tag is gone by now). Compared are
    the last 32 bits without the first (a number above 2**31 takes the kernel twice the room); no jump goes beyond 255.
    """
    accept, drop = (0x06, 0, 0, 0x40000), (0x06, 0, 0, 0)
    program = [(0x20, 0, 0, 0xFFFFF008), (0x15, 1, 0, index), drop]  # SKF_AD_IFINDEX
    program += [(0x20, 0, 0, 0xFFFFF004), (0x15, 0, 1, 3), drop]  # SKF_AD_PKTTYPE: not PACKET_OTHERHOST
    if protocol == ETH_P_ARP:  # the sender's address or, where that is 0.0.0.0, the target's
        program += [(0x20, 0, 0, 28), (0x15, 0, 1, 0), (0x20, 0, 0, 38)]
    else:  # ICMPv6 that no router has forwarded; the target's last word
        program += [(0x28, 0, 0, 20), (0x15, 1, 0, 0x3AFF), drop, (0x20, 0, 0, 74)]
    if addresses is None:
        return [*program, accept]
    family, ours = (socket.AF_INET6, True) if protocol == ETH_P_IPV6 else (socket.AF_INET, False)
    last = [socket.inet_pton(family, each)[-4:] for each in addresses if (":" in each) is ours]
    keys = [int.from_bytes(word, "big") & 0x7FFFFFFF for word in last]
    program.append((0x54, 0, 0, 0x7FFFFFFF))
    for group in (keys[start : start + 250] for start in range(0, len(keys), 250)):
        program += [(0x15, len(group) - i, 0, key) for i, key in enumerate(group)]
        program += [(0x05, 0, 0, 1), accept]  # none of them: over the one line, on to the next group
    return [*program, drop]


# == Checks: whether the service behind an IP is there =================================================================


def run_check(check: HealthCheck, timeout: float) -> str:
    """'' if healthy, else why not: TCP must connect, HTTP answer GET by 2xx or 3xx. Runs in the pool's threads."""
    end, got = time.monotonic() + timeout, b""
    try:
        with socket.create_connection((check.host, check.port), timeout) as sock:
            if check.type == "TCP":
                return ""
            host = f"[{check.host}]" if ":" in check.host else check.host
            fields = f"Host: {host}:{check.port}\r\nUser-Agent: LinK/{VERSION}\r\nConnection: close\r\n\r\n"
            sock.sendall(f"GET {check.path} HTTP/1.1\r\n{fields}".encode())
            more = b"."
            while more and b"\n" not in got and len(got) < 4096:
                sock.settimeout(max(0.001, end - time.monotonic()))  # for the whole answer, not for each byte of it
                more = sock.recv(4096)
                got += more
        status = got.partition(b"\n")[0].strip().decode("latin-1")
        why = "" if re.match(r"HTTP/1\.[01] [23]\d\d\b", status) else status or "no answer"
    except (OSError, ValueError) as error:  # ValueError: a name that IDNA refuses
        why = str(error) or type(error).__name__
    return why and f"{check}: {why.encode('unicode_escape').decode()[:200]}"  # a service may say anything


@dataclass(eq=False)
class _Probe:
    """The running record of one check."""

    check: HealthCheck
    ok: bool  # the verdict
    row: int = 0  # so many passes in a row; below 0: failures
    reason: str = "not checked yet"
    next: float = -math.inf  # when it is to run again
    out: bool = False  # it is in the pool's queue, or running
    begun: bool = False  # set by the pool's thread
    starved: bool = False  # late before it had begun


class Checks:
    """The health checks of one IP: results in a row make a verdict.

    A run that is still out a timeout after the next one was due has failed. One that has not even begun (others hang)
    says nothing of its service: the verdict stays, unsure, so this host keeps what it has and stands for nothing more.
    """

    SPREAD = 0.1  # of the interval: many checks that began together are not to stay together

    def __init__(self, vip: VirtualIP, config: Config, run: Callable[[HealthCheck, float], str], ok: bool) -> None:
        self._name, self._interval, self._config, self._run = str(vip.ip), vip.healthcheck_interval, config, run
        self._probes = [_Probe(check, ok) for check in vip.checks]

    @property
    def trouble(self) -> str:
        """'' or why the IP cannot be served here."""
        return next((probe.reason for probe in self._probes if not probe.ok), "")

    @property
    def results(self) -> dict[str, bool]:
        """The verdict of each check, by its name; the worst of those that differ only in what the name leaves out."""
        return {str(probe.check): probe.ok for probe in sorted(self._probes, key=lambda probe: not probe.ok)}

    @property
    def unsure(self) -> bool:
        """Whether the last result of a check was a failure, or is too old."""
        return any(probe.row < 0 or probe.starved for probe in self._probes)

    @property
    def judged(self) -> bool:
        """Whether there is a verdict on each; none can be waited for where too many others hang."""
        return all(p.ok or p.starved or p.row <= -self._config.health_check_fall for p in self._probes)

    def begin(self, now: float, pool: Executor, post: Callable[..., None]) -> float:
        """Start what is due, say what is late; when it wants to be called again."""
        timeout = self._config.health_check_timeout
        for probe in self._probes:
            late = timeout if probe.out else 0.0
            if now < probe.next + late:
                continue
            probe.next = now + self._interval * random.uniform(1 - self.SPREAD, 1 + self.SPREAD) - late
            if not probe.out:
                probe.out, probe.begun = True, False
                try:
                    pool.submit(self._work, probe, post)
                except RuntimeError:  # no thread can be started now
                    probe.out, probe.next = False, now + TICK
            elif probe.begun:
                self._count(probe, f"{probe.check}: no result in time")
            elif not probe.starved:
                probe.starved, probe.reason = True, f"check cannot begin, too many others hang: {probe.check}"
                log.warning("vip=%s %s", self._name, probe.reason)
        return min((probe.next + timeout * probe.out for probe in self._probes), default=math.inf)

    def _work(self, probe: _Probe, post: Callable[..., None]) -> None:
        probe.begun = True
        post(self._ran, probe, self._run(probe.check, self._config.health_check_timeout))

    def _ran(self, probe: _Probe, reason: str) -> None:
        probe.out = probe.starved = False
        self._count(probe, reason)

    def _count(self, probe: _Probe, reason: str) -> None:
        was, probe.row = probe.ok, min(probe.row, 0) - 1 if reason else max(probe.row, 0) + 1
        probe.reason = reason or probe.reason
        if probe.row <= -self._config.health_check_fall:
            probe.ok = False
        elif probe.row >= self._config.health_check_rise:
            probe.ok, probe.reason = True, ""
        if reason:
            level = logging.WARNING if probe.row == -1 else logging.DEBUG
            log.log(level, "vip=%s check failed: %s", self._name, reason)
        elif probe.ok and not was:
            log.info("vip=%s check passes: %s", self._name, probe.check)


# == Story: what people are told of an IP; nothing is decided by it ====================================================

HISTORY = 20  # changes of an IP that are remembered


@dataclass(eq=False)
class Story:
    """What happened to one IP, or (as "") to this host; the counts are this process's, the history is also older."""

    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))  # as the API shows it
    began: str = ""
    events: dict[Event, int] = field(default_factory=lambda: dict.fromkeys(Event, 0))  # that changed the state
    announced: int = 0
    takeovers: int = 0  # from a host that fell silent
    gaps: dict[str, float] = field(default_factory=dict)  # seconds: the last planned and the last unplanned one
    before: str = ""  # who had the lock the last time when it was another's
    conflicts: int = 0
    rival: bytes = b""  # the MAC of the last one

    def told(self, first: str = State.FAILING.value) -> str:
        """The state that people were last told of; `first`: the one that an IP, or a host, starts in."""
        return str(self.history[-1]["to"]) if self.history else first

    @property
    def since(self) -> str:
        """Of the last change of state, or where there is none of the start: ISO 8601, UTC."""
        return next((f"{was['time'][:19]}Z" for was in [*self.history][::-1] if was["from"] != was["to"]), self.began)

    def moved(self, wire: WireView, needed: int) -> None:
        """It is bound here now: for how long it can have been away is told by when it was last heard elsewhere."""
        if wire.heard < math.inf:
            self.gaps["planned" if wire.heard <= TICK and wire.unanswered < needed else "unplanned"] = wire.heard

    def remember(self, change: dict[str, Any]) -> None:
        """Keep it; of conflicts with no change between them only the latest: they push none out."""
        if self.history and self.history[-1]["event"] == change["event"] == "conflict":
            self.history.pop()
        self.history.append(change)


class Notices:
    """Tells `on_change` of each change, in order, in a thread of its own: a URL three times at most, a program once."""

    MOST = 10000  # that wait; more are dropped, and counted

    def __init__(self, target: str, post: Callable[..., None]) -> None:
        self._target, self._post = target, post
        self._pool = ThreadPoolExecutor(1, "notices")  # begins with the first one, when no signal is blocked any more
        self.waiting = self.sent = self.lost = 0
        self.trouble, self.story = "", Story()  # of the last one; of this host
        self._child: subprocess.Popen[bytes] | None = None

    def tell(self, change: Mapping[str, Any]) -> None:
        """Loop thread only; never waits."""
        if self._target and self.waiting < self.MOST:
            self.waiting += 1
            with contextlib.suppress(RuntimeError):  # the end; or no thread is to be had now: kept until the next one
                self._pool.submit(self._work, json.dumps(change).encode(), change)
        elif self._target:
            self._told(f"more than {self.MOST} changes wait", 0)

    def end(self) -> None:
        """The process ends, or executes another program: a child would be nobody's."""
        if self.waiting:
            log.warning("on_change: changes that nobody was told of: %d", self.waiting)
        self._pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._child and self._child.returncode is None:
                os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait(TICK)  # else it stays, as a zombie, while the next program runs

    def _work(self, body: bytes, change: Mapping[str, Any]) -> None:
        trouble, web = "", "://" in self._target
        for pause in (0.0, TICK, 2 * TICK) if web else (0.0,):
            threading.Event().wait(pause)
            try:
                trouble = self._send(body) if web else self._call(body, change)
            except (OSError, ValueError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
            if not trouble:
                break
        self._post(self._told, trouble)

    def _told(self, trouble: str, done: int = 1) -> None:
        self.waiting -= done
        self.sent, self.lost = self.sent + (not trouble), self.lost + bool(trouble)
        if trouble != self.trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "on_change: %s", trouble or "told again")
        self.trouble = trouble

    def _send(self, body: bytes) -> str:
        """'' or what is wrong. Raises OSError (also for a status that is none of 2xx, 3xx), HTTPException."""
        fields = {"Content-Type": "application/json", "User-Agent": f"LinK/{VERSION}"}
        with urllib.request.urlopen(urllib.request.Request(self._target, body, fields), timeout=LONG / 2) as answer:
            return "" if answer.url == self._target else "it sends elsewhere: name the URL where it ends"

    def _call(self, body: bytes, change: Mapping[str, Any]) -> str:
        """As _send(). The program has the change on stdin and as LINK_*, and none of the agent's secrets."""
        env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env |= {f"LINK_{key.upper()}": str(value or "") for key, value in change.items()}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen([self._target], stdin=pipe, stdout=null, env=env, start_new_session=True) as child:
            try:
                self._child = child
                child.communicate(body, LONG / 2)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                return f"not done in {LONG / 2:g} s: killed"
        return f"exit code {child.returncode}" if child.returncode else ""


# == One IP: facts gathered, decisions carried out =====================================================================

ANNOUNCE_AT = (0.0, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0)  # seconds: for lost frames, slow ports, ARP locktime, the last word
REFRESH = 60.0  # seconds between later announcements
QUIET = 30.0  # seconds for which nobody is accused after a take-over that was contested


@dataclass(eq=False)
class Order:
    """What somebody waits for: answered in one place, when it is done, too late, or can never be."""

    kind: str  # lock, failover, delete
    by: str  # who gave it, in words
    future: Future[Any]
    deadline: float


@dataclass(eq=False)
class _Moments:
    """When what happened to an IP; None or -inf: it has not."""

    bound: float = -math.inf
    yielded: float = -math.inf  # let go without a word of ZooKeeper
    trusted: float = -math.inf  # we were last sure of it
    leaving: float | None = None
    empty: float | None = None  # the queue, while another host has the IP
    quiet: float = -math.inf  # until then nobody is accused
    given: tuple[bytes, float] = b"", -math.inf  # who told us to take it, and when
    retry: float = -math.inf  # the next try to bind
    announce: float = math.inf  # the next time; inf: not to be announced
    rivalled: float = -math.inf  # another host had it at the same time
    rival_since: float = -math.inf  # without a longer break
    told: float = -math.inf  # of that, in the log


def strict(agent: Agent, host: str) -> bool:
    """Whether this host, or another one, promises at-most-one: then nobody takes over its lock, it lets go."""
    return agent.config.at_most_one or (host in agent.peers and agent.peers[host].promise == "at-most-one")


class Vip:
    """One virtual IP at run time; loop thread only. reconcile() does the difference of what is decided and what is."""

    def __init__(self, agent: Agent, vip: VirtualIP, state: State, adopted: bool, story: Story) -> None:
        self.agent, self.vip, self.story = agent, vip, story
        self.state, self.reason, self.intent = state, "not checked yet", Intent.RUN
        self.checks = Checks(vip, agent.config, agent.pool.check, ok=adopted and state is not State.FAILING)
        self.at, self.orders = _Moments(), list[Order]()
        self.seen = LockView()  # as of the last time
        self.took = (0, "")  # the session that we declared dead, and its node
        self.step = -1 if adopted else 0  # in ANNOUNCE_AT; -1: another process did
        self.failed = (0, "")  # tries to bind, and why
        self.gave = dict[bytes, float]()  # whom we told to take it, and when last

    def change(self, vip: VirtualIP) -> None:
        """Other checks, and another id after a DELETE, which ends with this; nothing moves unless a check fails."""
        self.checks = Checks(vip, self.agent.config, self.agent.pool.check, ok=not self.trouble(self.agent.loop.now))
        self.vip = vip
        if self.intent is Intent.DELETE:
            self.intent = Intent.RUN
            self.end(LinkError(404, "not found", resource="IP"))

    # -- facts -------------------------------------------------------------------------------------

    @property
    def bound(self) -> bool:
        """Whether the kernel has it, by our doing."""
        return self.agent.kernel.addresses.get(self.vip.key, False)

    def trouble(self, now: float) -> str:
        """'' or why this host cannot serve the IP."""
        link = self.agent.kernel.link
        of_family = link.trouble6 if self.vip.ip.version == 6 else link.trouble4
        foreign = (owner := self.agent.owner(self.vip.address)) and f"{owner} has the address for itself"
        failed = f"cannot bind: {self.failed[1]}" * (self.failed[0] > 0 and now < self.at.retry)
        return link.trouble or of_family or foreign or failed or self.checks.trouble

    def lock(self, now: float) -> LockView:
        """What ZooKeeper says; who hears a rival, or has yielded to one, wants it confirmed anew."""
        wire = self.agent.wire.view(self.vip.address, now)
        since = now - wire.heard - wire.staying
        rivalled = self.bound and self.intent is Intent.RUN and not self.agent.config.at_most_one
        if not rivalled or wire.heard > TICK or since <= self.at.bound + TICK:  # then: who let go for us
            since = self.at.yielded
        return self.agent.referee.view(self.vip.address, now, since)

    def facts(self, now: float, lock: LockView, trouble: str | None = None) -> Facts:
        """Everything that decide() is told."""
        a, at, bound, unknown = self.agent, self.at, self.bound, lock.lock is Lock.UNKNOWN
        wire, link, given = a.wire.view(self.vip.address, now), a.kernel.link, now - at.given[1]
        heard, own, holder = wire._asdict(), link.mac.hex(":"), lock.queue[0] if lock.queue else Contender("", 0, "?")
        mac = heard.pop("mac")
        known = bool(holder.session) and holder.host in a.peers
        foreign = bound and lock.lock is Lock.OTHER and not holder.session  # another program: nobody will answer
        judged = known and not bound and lock.lock in (Lock.OTHER, Lock.WAITING)
        accused = (a.peers[holder.host].addresses if lock.place == 1 and wire.met else ()) if judged else None
        may = self.checks.judged and not a.owner(self.vip.address)
        return Facts(
            **heard,
            lock=lock.lock,
            next=known and lock.place == 1 and now >= at.quiet and not strict(a, holder.host),
            second=unknown and lock.place > 1,
            successor=bool(a.wire.askers(now)) if unknown else len(lock.queue) > (lock.place >= 0),
            slack=LINGER * (3 if self.vip.ip.version == 6 else 1),
            lower=link.mac < mac,
            needed=a.config.probe_count,
            nameless=self.vip.ip.version == 6 and 6 not in a.kernel.own,
            blind=not link.arp or foreign,
            deaf=min(a.wire.deaf(now, accused, self.vip.address), wire.alone),  # a new holder has had no time
            empty=now - at.empty if at.empty is not None else 0.0,
            bound=now - at.bound if bound else None,
            trusted=at.trusted > a.loop.distrusted,
            leaving=now - at.leaving if at.leaving is not None else None,
            given=unknown and not bound and at.given[0] == mac and given <= TICK and not self.checks.unsure,
            taken=unknown and at.leaving is not None and mac in self.gave and wire.heard <= TICK,
            healthy=not (self.trouble(now) if trouble is None else trouble),
            unsure=self.checks.unsure,
            rank=sum(r.mac < own for r in a.peers.values() if r.mac) if may else math.inf,
            intent=self.intent,
        )

    # -- decisions carried out -----------------------------------------------------------------------

    def reconcile(self, now: float) -> float:
        """The one place from which anything is bound, unbound, joined or left; when it wants to be called again."""
        due, lock = self.checks.begin(now, self.agent.pool, self._post_result), self.lock(now)
        self._note(lock, not (trouble := self.trouble(now)), now)
        facts, decide_ = self.facts(now, lock, trouble), at_most_one if self.agent.config.at_most_one else decide
        while (decision := decide_(self.state, facts)).event is not None:
            self._enter(decision.event, decision.reason, now)
        if self.state is State.FAILING and self.checks.judged:  # from the start: no event has led to it
            self.agent.tell(self, Event.HEALTH_CHECK_FAIL, trouble or self.agent.hears_nobody)
        trouble = trouble or ("" if facts.fit else self.agent.hears_nobody)
        self.reason = f"{decision.reason} ({trouble})" if trouble else decision.reason
        if self.bound and not decision.wanted and lock.lock is Lock.WAITING:
            self.at.yielded = now  # the lock that it had is worth nothing until it is confirmed
            self.agent.referee.distrust(self.vip.address)
        self._stand(decision, facts, lock, now)
        self._apply(decision, now)
        self._announce(decision, now)
        self._note_conflict(facts, now)
        self._finish(lock, now)
        if self.agent.vips.get(self.vip.address) is self:
            self.agent.wire.watch(self.vip.address, decision.look, self._holder_mac(lock))
        return min(due, self._due(facts, now))

    def _post_result(self, function: Callable[..., Any], *args: Any) -> None:
        self.agent.loop.post(function, *args)
        self.agent.loop.post(self.agent.news, self.vip.address)

    def _enter(self, event: Event, reason: str, now: float) -> None:
        old, self.state = self.state, TRANSITIONS[self.state, event]
        if self.state is not old:
            trouble = self.trouble(now) or (self.agent.hears_nobody if event is Event.HEALTH_CHECK_FAIL else "")
            why = f"{reason}: {trouble}" if trouble else reason + self.story.before * (self.state is State.ACTIVATED)
            log.info("vip=%s %s -> %s (%s: %s)", self.vip.ip, old.value, self.state.value, event.value, why)
            self.agent.tell(self, event, why)
            self.agent.save_soon()

    def _holder_mac(self, lock: LockView) -> bytes:
        record = self.agent.peers.get(lock.queue[0].host) if lock.queue else None
        return bytes.fromhex(record.mac.replace(":", "")) if record else b""

    def _note(self, lock: LockView, fit: bool, now: float) -> None:
        """What is new in the queue, and since when it is as it is."""
        a, at, address, before, self.seen = self.agent, self.at, self.vip.address, self.seen, lock
        if lock.queue is not before.queue or lock.place != before.place:
            old, new = ([c.node for n, c in enumerate(view.queue) if n != view.place] for view in (before, lock))
            if lock.queue and lock.place != 0 and (before.place == 0 or new[:1] != old[:1]):
                a.wire.term(address, self._holder_mac(lock), now)
                self.story.before = f"; {lock.queue[0].host} had it before"
            if lock.lock is Lock.MINE and before.queue and not {*new} <= {*old}:
                self.announce_anew(now)  # who joins may bring clients with stale caches
        if self.took[0] and any(c.session == self.took[0] and c.node != self.took[1] for c in lock.queue):
            self.took, at.quiet = (0, ""), now + QUIET
            log.warning("vip=%s who was taken for dead lives: no take-over for %.0f s", self.vip.ip, QUIET)
        wire, bound = a.wire.view(address, now), self.bound
        silent = bound and wire.unanswered >= a.config.probe_count > 0 and not a.wire.deaf(now, None, address)
        if bound and (lock.lock is Lock.MINE or silent or not a.kernel.link.arp):
            at.trusted = now
        asked = not fit or any(now - told <= TICK for told in self.gave.values())
        asked = self.intent is not Intent.RUN or (asked and lock.lock is Lock.UNKNOWN)
        leaves = bound and (asked or lock.lock is Lock.OTHER or (lock.lock is Lock.WAITING and at.leaving is not None))
        if leaves and at.leaving is None:
            a.wire.forget(address)  # only who is heard from now on is our successor
            if lock.lock is Lock.OTHER:
                a.wire.say(Kind.ASK, address)  # it may have spoken already
        elif not leaves:
            self.gave.clear()
        at.leaving = (at.leaving or now) if leaves else None
        waits = lock.lock is Lock.NOBODY and not bound and fit and wire.heard < math.inf
        at.empty = (at.empty or now) if waits else None

    def _stand(self, decision: Decision, facts: Facts, lock: LockView, now: float) -> None:
        """Our place in the queue. Without a lock: say WANT to the holder, or GIVE to one standby after the other."""
        wire, address, ordered = self.agent.wire, self.vip.address, any(order.kind == "lock" for order in self.orders)
        if decision.accuse and lock.queue and self.took[1] != lock.queue[0].node:
            self.story.takeovers += 1
            log.warning("vip=%s %s fell silent: taking over its lock", self.vip.ip, lock.queue[0].host)
            self.took = lock.queue[0].session, lock.queue[0].node
        first = decision.accuse or (ordered and decision.contend)
        self.agent.referee.want(address, Want.FIRST if first else Want.IN if decision.contend else Want.WATCH)
        if lock.lock is not Lock.UNKNOWN:
            return
        if ordered and not self.bound and (holder := wire.view(address, now).mac):
            wire.say(Kind.WANT, address, holder)
        goes = facts.leaving is not None and not facts.taken and not (facts.healthy and self.intent is Intent.RUN)
        if goes and now - max(self.gave.values(), default=self.at.given[1]) >= LINGER:  # who was told has had its time
            for mac in [mac for mac in wire.askers(now) if now - self.gave.get(mac, -math.inf) > TICK][:1]:
                self.gave[mac] = now
                wire.say(Kind.GIVE, address, mac)

    def _apply(self, decision: Decision, now: float) -> None:
        """Bind, begin a finite lifetime anew, or cancel the announcements and unbind."""
        a, at, ip, bound, strict = self.agent, self.at, self.vip.bound, self.bound, self.agent.config.at_most_one
        if bound and not decision.wanted:
            at.announce, at.given = math.inf, (b"", -math.inf)
            a.unbind(ip)
            if not self.bound:
                log.info("vip=%s unbound (%s)", self.vip.ip, self.reason)
        able = a.kernel.link.number and self.vip.key not in a.kernel.addresses and now >= at.retry
        able = strict and self.seen.lock is Lock.MINE if bound else able
        late = strict and not a.in_time(a.clock.now())  # we may have been stopped since `now`
        if late or not (decision.wanted and able):
            return
        fails, why = self.failed
        try:
            a.network.add(ip, a.lifetime)
        except OSError as error:
            if not bound:
                self.failed, at.retry = (fails + 1, str(error)), now + min(QUIET, TICK * 2 ** min(fails, 9))
                log.log(logging.DEBUG if why else logging.WARNING, "vip=%s cannot be bound: %s", self.vip.ip, error)
                a.news(self.vip.address)
            return
        at.bound = now if at.bound == -math.inf or not bound else at.bound  # it is no earlier process's any more
        if not bound:
            self.story.moved(a.wire.view(self.vip.address, now), a.config.probe_count)
            self.failed, self.step, at.trusted, at.announce = (0, ""), 0, now, math.inf
            a.kernel.addresses[self.vip.key] = True
            a.wire.forget(self.vip.address)
            again = f", after {fails} failures" * bool(fails)
            log.info("vip=%s bound on %s (%s)%s", self.vip.ip, a.config.interface, self.reason, again)
            a.save_soon()
            if not decision.announce:  # else that follows at once
                a.news(self.vip.address)

    # -- announcements ---------------------------------------------------------------------------------

    def _announce(self, decision: Decision, now: float) -> None:
        """From the moment when we are sure: the schedule, then now and then. Ownership is decided anew for each."""
        at = self.at
        if not (decision.announce and self.bound):
            at.announce = math.inf
        elif at.announce == math.inf:
            # what was found bound, too: who knows what happened meanwhile; but no switch is to count 15 ARP a second
            at.announce = now + random.random() * min(REFRESH, len(self.agent.vips) / 3) * (self.step < 0)
            self.step = len(ANNOUNCE_AT) - 2 if self.step < 0 else 0
        if now < at.announce:
            return
        if self.vip.ip.version == 6 and now < at.bound + 2 * LINGER and not self.agent.network.ready(self.vip.bound):
            at.announce = now + LINGER / 10
            return
        self.agent.wire.announce(self.vip.address, ask=self.step > 1)
        self.story.announced += 1
        self.step = min(self.step + 1, len(ANNOUNCE_AT))
        lost = self.agent.network.unsent.get(ETH_P_ARP if self.vip.ip.version == 4 else ETH_P_IPV6)
        at.announce = now + (LONG if lost else REFRESH) * random.uniform(0.9, 1.1)
        if self.step < len(ANNOUNCE_AT):
            at.announce = now + max(ANNOUNCE_AT[self.step] - ANNOUNCE_AT[self.step - 1], len(self.agent.vips) / 3000)

    def announce_anew(self, now: float, crossed: bool = False) -> None:
        """Once more from the beginning, at most once a second (RFC 5227, section 2.4, asks for such restraint)."""
        if self.at.announce < math.inf and ANNOUNCE_AT[self.step - 1] >= TICK:
            self.step, self.at.announce = 0, now
        elif crossed and self.step == 1:  # clients may follow the other one: ours comes again, and earlier
            self.at.announce = min(self.at.announce, now + LINGER / 10)

    # -- what comes in -----------------------------------------------------------------------------------

    def hear(self, heard: Heard, known: bool, fresh: bool, now: float) -> None:
        """Somebody has, asks for, wants or gives it."""
        unknown = not (claims := heard.kind is Kind.CLAIM) and self.lock(now).lock is Lock.UNKNOWN
        if heard.kind is Kind.ASK and heard.broadcast and unknown:  # else the queue says who goes first
            self.agent.wire.give_way(self.vip.address, heard.mac)
        if heard.kind is Kind.GIVE and unknown and not heard.broadcast:
            self.at.given = heard.mac, now
        elif heard.kind is Kind.WANT and unknown and self.bound:
            others = [at for mac, at in (*self.gave.items(), self.at.given) if mac != heard.mac]
            if now - max(others, default=-math.inf) > TICK:  # else three would have it: one hand-over after the other
                self.gave[heard.mac] = now
                self.agent.wire.say(Kind.GIVE, self.vip.address, heard.mac)
        elif self.bound and self.intent is Intent.RUN and heard.kind in (Kind.ASK, Kind.CLAIM):
            if claims and not (known or heard.broadcast or now - self.at.told < REFRESH):
                self.at.told, text = now, "vip=%s is also answered for by %s: remove it there, unless that is proxy ARP"
                log.warning(text, self.vip.ip, heard.mac.hex(":"))
            if claims or (known and heard.broadcast):
                self.announce_anew(now, crossed=heard.broadcast and claims)
            if claims and fresh and now > self.at.bound + TICK:
                self.agent.referee.distrust(self.vip.address)

    def _note_conflict(self, f: Facts, now: float) -> None:
        """Another host has it for so long that we might yield; but who let go for us is heard for a moment.

        Said once a minute while it goes on, as of a host whose agent was stopped and whose kernel keeps the address.
        """
        at, heard = self.at, now - f.heard
        if not (self.bound and at.leaving is None and f.other and heard > at.bound + TICK) or f.staying < PATIENCE[-1]:
            return
        mac = self.agent.wire.view(self.vip.address, now).mac
        new = heard - at.rivalled > (REFRESH + LONG if mac == self.story.rival else TICK)
        at.rivalled, at.rival_since = heard, heard if heard - at.rivalled > 2 * TICK else at.rival_since
        if new or now - at.told >= REFRESH:
            self.story.conflicts, self.story.rival, at.told = self.story.conflicts + new, mac, now
            names = [f"{host}, another contender" for host, known in self.agent.macs.items() if known == mac.hex(":")]
            who = [*names, "a foreign host" if self.agent.macs else "maybe another contender"][0]
            why = f"is also answered for by {mac.hex(':')} ({who})" + ": remove it there" * (not (names and new))
            log.log(logging.INFO if names and new else logging.WARNING, "vip=%s %s", self.vip.ip, why)
            if new:
                self.agent.note(self.story, self.vip.address, self.state.value, self.state.value, "conflict", why)

    # -- orders --------------------------------------------------------------------------------------------

    def order(self, kind: str, who: str, now: float) -> Future[Any]:
        """A future for the moment when it is done, or 504 a little after a hand-over's limit."""
        self.orders.append(Order(kind, f"{kind} from {who}", Future(), now + 3 * TICK))
        self.agent.news(self.vip.address)
        return self.orders[-1].future

    def _finish(self, lock: LockView, now: float) -> None:
        """End intents that are fulfilled and answer who waits for it."""
        bound, mine = self.bound, lock.lock in (Lock.MINE, Lock.UNKNOWN)
        if self.intent is Intent.DELETE and not bound:
            self.agent.drop(self)
        done = {"lock": bound and mine and self.at.leaving is None, "failover": not bound, "delete": not bound}
        waiting, self.orders, expired = self.orders, [], False
        for order in waiting:
            if done[order.kind]:
                order.future.set_result(None)
            elif now >= order.deadline:
                expired = True
                why = "; ".join(filter(None, (self.reason, self.agent.referee.refused)))
                order.future.set_exception(LinkError(504, "not done in time", why, ip=show(self, now)))
            else:
                self.orders.append(order)
        if self.intent is Intent.HAND_OVER and (expired or not (bound or lock.lock in (Lock.MINE, Lock.WAITING))):
            self.intent = Intent.RUN
            self.agent.news(self.vip.address)

    def end(self, error: LinkError | None = None) -> None:
        """It is here no more, or the process ends: nobody waits for ever."""
        waiting, self.orders = self.orders, []
        for future, kind in ((order.future, order.kind) for order in waiting):
            future.set_exception(error) if error and kind != "delete" else future.set_result(None)

    def may_be_relieved(self, now: float) -> bool:
        """Whether a stop may wait: our node is about to go, or somebody can take it, or has it already.

        Without a lock for two seconds only: of hosts that stop at the same time one keeps it, not all.
        """
        lock, referee = self.lock(now), self.agent.referee
        facts, unread = self.facts(now, lock), lock.lock is Lock.WAITING and not lock.queue  # as right after a start
        if facts.lock is Lock.UNKNOWN:
            heard = facts.successor or now - self.agent.loop.distrusted <= 2 * TICK  # who was late has heard nobody yet
            return heard and min(facts.leaving or 0.0, referee.age(now) - referee.timeout) < 2 * TICK
        joins = self.agent.macs and self.agent.wire.askers(now) and (facts.leaving or 0.0) < 3 * TICK  # soon
        return any((facts.lock is Lock.MINE, unread, joins, facts.successor, facts.heard <= TICK))

    def _due(self, f: Facts, now: float) -> float:
        """When to look again without any news: soon while something moves, else now and then."""
        rests, soon = f.at_rest and not self.orders and now >= self.at.quiet, min(now + TICK, self.seen.until)
        times = [self.at.announce, math.ceil(now + random.uniform(LONG, QUIET)) if rests else soon]  # many in one turn
        if self.orders or f.leaving is not None or (self.bound and f.other) or (f.deaf and f.proven):
            times += [now + LINGER, now - f.heard - f.staying + f.slack + 0.001]  # whatever the rounding
        if f.unsure or not f.fit:
            times.append(now - f.alone + TICK * (1 + 0.3 * f.rank))
        if self.bound and self.agent.lifetime:
            times.append(now + self.agent.lifetime / 4)  # to begin it anew
        return min((when for when in times if when > now), default=math.inf)


def show(vip: Vip, now: float) -> dict[str, Any]:
    """The IP as the API shows it."""
    lock, wire, a = vip.lock(now), vip.agent.wire.view(vip.vip.address, now), vip.agent
    needed, mac, mute = a.config.probe_count, wire.mac.hex(":"), vip.facts(now, lock).mute
    answered = not mute and wire.unanswered < needed and (wire.heard <= TICK if vip.bound else wire.met)
    state = "answered" if answered else "silent" if mute or wire.unanswered >= needed > 0 else "looking"
    state = state if needed and a.kernel.link.arp else "blind"
    since = a.clock.stamp(wire.heard + wire.staying) if answered else None
    named = lock.queue and lock.lock is not Lock.UNKNOWN  # else what ZooKeeper said last may be long over
    return {
        **vip.vip.to_json(),
        "status": vip.state.value,
        "bound": vip.bound,
        "holder": lock.queue[0].host if named else a.config.hostname if vip.bound else None,
        "hosts": [contender.host for contender in lock.queue],
        "since": vip.story.since,
        "reason": vip.reason,
        "wire": {"state": state, "mac": mac if answered else None, "since": since},
        "conflicts": {"count": vip.story.conflicts, "mac": vip.story.rival.hex(":") or None},
    }


# == State directory: what must survive the process ====================================================================

JOURNAL = 1000  # lines of ips.journal after which ips.json is written anew
HISTORY_SIZE = 4 << 20  # bytes, at least, after which the file `history` is written anew
_private = functools.partial(os.open, mode=0o600)


class Store:
    """`ips.*` (what the operator added: never silently lost), `session.json` (what a restart adopts), `history`.

    Written by a thread of its own, one thing after the other: a disk may stall, and the loop must not. The session is
    bound to this host and this boot: a copied directory gives none away. `trouble`: why it could not be written, or ''.
    """

    def __init__(self, config: Config) -> None:
        self._dir, self._config = Path(config.state_dir), config
        self.identity, self.trouble, self._below = [config.hostname, boot_id()], "", config.ensemble[1]
        self._entries: dict[str, VirtualIP | Any] = {}  # by address; what cannot be parsed: as it is, maybe by its text
        self._lines: int | None = None  # of the journal; None: to be begun anew
        self._changes: deque[tuple[str, Mapping[str, Any] | None]] = deque()  # to be written
        self._session, self._disk, self._most = b"", ThreadPoolExecutor(1, "disk"), HISTORY_SIZE
        self._saved = self._told = cast(Any, None)  # the last futures

    def read_ips(self) -> dict[str, str]:
        """What is wrong, by file or entry. Changes nothing. Raises OSError where a file cannot be read."""
        self._entries, wrong = {}, dict[str, str]()

        def note(raw: Any, key: str = "") -> None:
            try:
                vip = VirtualIP.parse(raw, self._config.health_check_interval)
                self._entries.setdefault(vip.address, vip)  # of two in the file the first one counts
            except Invalid as error:
                text = json.dumps(raw)
                self._entries[key or text] = raw
                wrong[text[:200]] = f"is no IP to this version ({error}): it is kept, and not served"

        try:
            for raw in json.loads(self._read("ips.json", b'{"ips": []}'))["ips"]:
                note(raw)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            wrong["ips.json"] = f"cannot be read ({error})"
        for line in self._read("ips.journal", b"").split(b"\n")[:-1]:  # the last one is torn: never answered
            try:
                address, raw = json.loads(line)
                self._entries.pop(address, None)
                if raw is not None:
                    note(raw, address)
            except (ValueError, TypeError, RecursionError):
                note(line.decode(errors="replace"))  # what it was is for a human to say
        return wrong

    def load_ips(self) -> list[VirtualIP]:
        """The IPs; an ips.json that cannot be understood is set aside, and nothing is removed from it."""
        wrong = self.read_ips()
        if "ips.json" in wrong:
            aside = self._dir / f"ips.json.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            wrong["ips.json"] += f": set aside as {aside}; add its IPs again or repair it"
            with contextlib.suppress(OSError):
                (self._dir / "ips.json").rename(aside)
        for what, why in wrong.items():
            log.error("%s: %s %s", self._dir, what, why)
        self._disk.submit(int)  # starts its thread: later there may be none to be had, and what is given to it is kept
        return [entry for entry in self._entries.values() if isinstance(entry, VirtualIP)]

    def save_ip(self, address: str, vip: VirtualIP | None) -> Future[None]:
        """Add, replace or (None) remove; on disk when it is done. It raises LinkError; then nothing has changed."""
        return self._disk.submit(self._change, address, vip)

    def found(self, config: Config) -> Collection[str]:
        """The addresses that a process with this configuration would find; nothing is written meanwhile."""
        other = Store(config)
        return self._disk.submit(lambda: (other.read_ips(), other._entries)).result()[1]

    def _change(self, address: str, vip: VirtualIP | None) -> None:
        """One line and one fdatasync(2): cheaper than a file of a thousand IPs. A line may be applied twice."""
        line = json.dumps([address, vip and vip.to_json()]).encode() + b"\n"
        lines, self._lines = self._lines, None
        try:
            with open(self._dir / "ips.journal", "ab", buffering=0, opener=_private) as file:
                size = file.tell()
                if lines is None or lines >= JOURNAL or not size:
                    entries = [e.to_json() if isinstance(e, VirtualIP) else e for e in self._entries.values()]
                    self._write("ips.json", json.dumps({"ips": entries}).encode(), sync=True)
                    size = lines = file.truncate(0)  # after what it held is on disk elsewhere
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fdatasync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise LinkError(503, "state directory", f"{self._dir} cannot be written: {error.strerror}") from None
        self._lines = lines + 1
        self._entries.pop(address, None)
        self._entries |= {address: vip} if vip else {}

    def load_history(self) -> dict[str, Story]:
        """The last changes of each IP, by address, and (as "") of this host; what cannot be read is left out."""
        stories = dict[str, Story]()
        with contextlib.suppress(OSError):
            for line in self._read("history", b"").splitlines():
                with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
                    host, address, change = json.loads(line)
                    if host != self.identity[0]:
                        continue  # a copy
                    if change is None:
                        del stories[address]
                    elif datetime.fromisoformat(f"{change['time'][:19]}Z") and (not address or State(change["to"])):
                        known = {key: change[key] for key in ("time", "from", "to", "event", "reason", "by")}
                        stories.setdefault(address, Story()).remember(known)
        return stories

    def save_change(self, address: str, change: Mapping[str, Any] | None) -> None:
        """Remember a change, or (None) forget all of this address. Best effort and soon; nobody waits for it."""
        self._changes.append((address, change))
        self._told = self._soon(self._told, self._write_changes)

    def _soon(self, last: Any, write: Callable[[], Any]) -> Any:  # a future; what has yet to begin writes this, too
        return self._disk.submit(write) if last is None or last.running() or last.done() else last

    def _write_changes(self) -> None:
        with contextlib.suppress(OSError):
            with open(self._dir / "history", "ab", opener=_private) as file:
                while self._changes:  # a torn line before it takes none along
                    file.write(b"\n" + json.dumps([self.identity[0], *self._changes.popleft()]).encode())
                size = file.tell()
            if size > self._most:  # anew, with what counts
                host, stories = self.identity[0], self.load_history().items()
                lines = [json.dumps([host, ip, change]) for ip, story in stories for change in story.history]
                self._write("history", "\n".join(lines).encode(), sync=False)
                self._most = max(HISTORY_SIZE, 2 * sum(map(len, lines)))

    def load_session(self) -> dict[str, Any]:
        """What the last process of this host left; empty where it is another host's, another boot's, or unreadable."""
        try:
            got = json.loads(self._read("session.json", b"null"))
            if got is None:
                return {}
            host, boot = got["identity"][:2]  # earlier versions have more in it, and no namespace
            if host == self.identity[0] and boot in (self.identity[1], self.identity[1].partition(".")[0]):
                number, password = got.get("session") or (0, "")
                int(number), bytes.fromhex(password)
                if got.get("below", self._below) != self._below:  # its nodes are elsewhere, and end with it
                    got["session"] = None
                list(map(ipaddress.ip_interface, got.get("states", {})))
                list(map(State, got.get("states", {}).values()))
                known = {key: dict(got.get(key, {})) for key in ("hosts", "macs")}
                # without ZooKeeper nobody would ever tell who else has joined or left
                return {**got, **known} if self._config.zookeeper else {**got, "hosts": {}, "macs": {}}
            log.warning("session.json is not of this host and boot: starting afresh")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.warning("session.json cannot be used (%s): starting afresh", error)
        return {}

    def save_session(self, content: Mapping[str, Any], now: bool = False) -> bool:
        """Best effort and soon; the latest content counts. `now`: wait for all, a second at most. Else False."""
        self._session = json.dumps({"identity": self.identity, "below": self._below, **content}).encode()
        self._saved = self._soon(None if now else self._saved, self._write_session)
        return not now or (not wait_for([self._saved], TICK).not_done and self._saved.result())

    def _write_session(self) -> bool:
        trouble = ""
        try:
            self._write("session.json", self._session, sync=False)
        except OSError as error:
            trouble = f"{self._dir} cannot be written ({error.strerror}): a restart will not remember the session"
        if trouble != self.trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "%s", trouble or f"{self._dir} is written again")
        self.trouble = trouble
        return not trouble

    def _read(self, name: str, absent: bytes) -> bytes:
        try:
            return (self._dir / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return absent

    def _write(self, name: str, data: bytes, sync: bool) -> None:
        """Atomic: a kill at any moment leaves the old file or the new one."""
        new = (self._dir / name).with_suffix(".new")
        with open(new, "wb", opener=_private) as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        new.replace(self._dir / name)
        if sync:
            directory = os.open(self._dir, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def boot_id() -> str:
    """Of the running kernel (proc(5)) and its network namespace: sessions outlive neither, nor go with a container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}.{os.stat('/proc/self/ns/net').st_ino}"
    return ""


# == Agent: the loop that hears, decides and acts ======================================================================

SLICE = 0.004  # seconds the loop decides before it listens again
HOSTS = 256  # that are gone are known by their MAC
Change = Generator[Future[None], None, Any]  # a change of what is kept on disk, in steps


class Clock:
    """Time for decisions (monotonic, seconds) and for people (UTC)."""

    def now(self) -> float:
        """Unaffected by steps of the wall clock; goes on while the machine is suspended (clock_gettime(2))."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def stamp(self, ago: float = 0.0, digits: str = "seconds") -> str:
        """ISO 8601, UTC, so many seconds ago."""
        return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat(timespec=digits).replace("+00:00", "Z")


class Pool(ThreadPoolExecutor):
    """Runs the health checks, so many at the same time: a thousand that hang must not be a thousand threads."""

    check = staticmethod(run_check)

    def __init__(self) -> None:
        super().__init__(32, "check")


class Loop:
    """The loop's inbox and wake-ups: who has something for it posts; decide() says when to decide again for an IP."""

    def __init__(self, clock: Clock) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self.changes: deque[tuple[Future[Any], Change]] = deque()  # the first one is under way
        self._clock, self.now = clock, clock.now()  # read once a turn
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._due: dict[str, float] = {}  # when to decide again for each IP
        self._order: list[tuple[float, int, str]] = []  # the same as a heap, with some that are over
        self._serial = itertools.count()
        self.since, self.turns = clock.stamp(), 0
        self.late = self.latest = 0.0  # seconds behind time: in all turns together, and in the worst one
        self.distrusted = -math.inf  # what we remember from before may be old
        self.tick_at = self.save_at = -math.inf

    def decide(self, address: str, when: float) -> None:
        """Wake up for this IP then, at the latest."""
        if when < self._due.get(address, math.inf):
            self._due[address] = when
            heapq.heappush(self._order, (when, next(self._serial), address))

    @property
    def due(self) -> float:
        """When the first IP is to be decided again."""
        while self._order and self._due.get(self._order[0][2]) != self._order[0][0]:
            heapq.heappop(self._order)
        return self._order[0][0] if self._order else math.inf

    def take(self) -> str:
        """The IP for which that is."""
        address = heapq.heappop(self._order)[2]
        del self._due[address]
        return address

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call this; from any thread or signal handler."""
        self._queue.put((function, args))
        os.eventfd_write(self.wake, 1)

    def ask(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have the loop call this; the result, or the future that it returns. From any thread.

        A generator yields the future of what it writes, and goes on when that is on disk (or the error is thrown into
        it): the loop turns meanwhile. One after the other: what such a function has looked at, no other one changes.
        """
        future: Future[Any] = Future()
        self.post(self._answer, future, function, args)
        return future

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """As ask(), and wait for the result. From other threads."""
        asked = result = self.ask(function, *args)
        while isinstance(result, Future):
            if wait_for([result], timeout).not_done:
                if result is asked and result.cancel():
                    raise LinkError(503, "busy", f"it could not be begun within {timeout:g} s; nothing was done")
                raise LinkError(504, "not done in time", "see GET /ips")
            result = result.result()
        return result

    def _answer(self, future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if inspect.isgeneratorfunction(function):
            self.changes.append((future, function(*args)))
            if len(self.changes) == 1:
                self._change()
        elif future.set_running_or_notify_cancel():  # else the caller was told that nothing happened
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)

    def _change(self, written: Future[None] | None = None) -> None:
        """Go on with the first of the changes; where it has ended, with the next."""
        while self.changes:
            future, steps = self.changes[0]
            try:
                if written or future.set_running_or_notify_cancel():
                    error = written and written.exception()
                    on_disk = steps.throw(error) if error else next(steps)
                    return on_disk.add_done_callback(lambda done: self.post(self._change, done))
            except StopIteration as end:
                future.set_result(end.value)
            except Exception as error:
                future.set_exception(error)
            self.changes.popleft()
            written = None

    def serve(self) -> None:
        """Call what was posted; in slices, so that the wire is heard meanwhile."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        while not self._queue.empty():
            function, args = self._queue.get()
            function(*args)
            if self._clock.now() - self.now >= SLICE:
                return os.eventfd_write(self.wake, 1)


@dataclass(eq=False)
class _Kernel:
    """The kernel's view of the interface, as last seen."""

    link: Link = field(default_factory=Link)
    addresses: dict[str, bool] = field(default_factory=dict)  # with their prefix lengths; True: LinK added it
    own: dict[int, str] = field(default_factory=dict)  # this host's own one per IP version
    foreign: frozenset[str] = frozenset()  # as reserved() says
    due: float = -math.inf  # when to look again
    again: float = -math.inf  # not before: at most 1/30 of the time, as every change of an address is reported
    error: str = ""


class Agent:
    """One host's agent: everything but loop.post() runs in the loop's thread."""

    SLACK = 0.6  # seconds by which the kernel's timer may end an address too late
    hears_nobody = "hears nobody: neither the holder nor any witness answers; check its switch port and VLAN"

    def __init__(
        self,
        config: Config,
        network: Network,
        store: Store,
        connect: Callable[[Agent], Referee | NoReferee] = lambda agent: NoReferee(),
        clock: Clock | None = None,
        pool: Any = None,
    ) -> None:
        self.config, self.network, self.store, self.clock = config, network, store, clock or Clock()
        self.pool = pool or Pool()
        self.loop, self.kernel = Loop(self.clock), _Kernel()
        self.notices = Notices(config.on_change, self.loop.post)
        self.vips: dict[str, Vip] = {}
        self.peers: dict[str, Record] = {}  # the last known records of the other hosts
        self.macs: dict[str, str] = {}  # of the other hosts, and the last HOSTS that left: one may rejoin unseen
        self.stopping: float | None = None
        self.execute: Callable[[], None] | None = None  # replaces the process at the loop's end
        self.referee = connect(self)
        self.wire = Wire(config.probe_interval, self.referee.rest, config.probe_count, network.send)

    # -- the loop --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load what is configured, adopt what an earlier process left, begin to contend."""
        saved = self.store.load_session()
        vips = {vip.address: vip for vip in [*self.store.load_ips(), *self.config.virtual_ips]}
        self.peers = {host: Record.parse(json.dumps(each).encode()) for host, each in saved.get("hosts", {}).items()}
        self.macs.update(saved.get("macs", {}))
        self.loop.now = self.loop.distrusted = self.clock.now()
        self._sync()
        states = {address: State(word) for address, word in saved.get("states", {}).items()}
        known = {address: VirtualIP(ipaddress.ip_interface(address)) for address in states} | vips
        stories = self.store.load_history()
        self.notices.story = stories.get("", self.notices.story)
        with contextlib.suppress(OSError):  # an earlier process had another interface, or promise?
            self.network.clear({vip.bound for vip in known.values()}, lasting=self.config.at_most_one)
            self.kernel.due = -math.inf
            self._sync()
        number, password = saved.get("session") or (None, "")
        self.referee.start((number, bytes.fromhex(password)) if number else None, self._record())
        for ip in [ipaddress.ip_interface(text) for text, ours in self.kernel.addresses.items() if ours]:
            if (vip := known.get(str(ip.ip))) is None:
                log.warning("%s was left by an earlier process and is not configured: removed", ip)
            elif ip != vip.bound and not self.lifetime:  # bound by an earlier version: never none of both
                with contextlib.suppress(OSError):
                    self.network.add(vip.bound)
                    self.kernel.addresses[vip.key] = True
            if vip is None or ip != vip.bound:
                self.unbind(ip)
        for address, vip in known.items():
            managed = self._manage(vip, states.get(address, State.FAILING), stories.get(address))
            if address not in vips:
                log.info("vip=%s is not configured any more", vip.ip)
                managed.intent = Intent.DELETE  # its lock may still be ours: another host goes first
        self._find_witnesses()

    def run(self) -> None:
        """Go round until stopped."""
        threading.Thread(target=self._watchdog, daemon=True, name="watchdog").start()
        expected = math.inf
        while not self.turn(expected):
            expected, poll = self.expected, select.poll()
            for file in (self.loop.wake, *self.network.files()):  # those of the network may be others each time
                poll.register(file, select.POLLIN)
            poll.poll(max(0.0, expected - self.clock.now()) * 1000 if expected < math.inf else None)
        self.loop.turns = -1

    @property
    def expected(self) -> float:
        """When the loop is to go round again at the latest."""
        loop = self.loop
        due = min(loop.due, loop.tick_at, loop.save_at, self.wire.due, self.referee.due, self.kernel.due)
        return max(loop.now, due)

    def turn(self, expected: float) -> bool:
        """One round: hear, then act. True when the agent has stopped."""
        loop = self.loop
        loop.now, loop.turns = now, _ = self.clock.now(), loop.turns + 1
        late = max(0.0, now - expected)
        loop.late, loop.latest = loop.late + late, max(loop.latest, late)
        if late > TICK:
            log.warning("the loop was %.1f s late: looking again before acting", late)
            self.network.receive(1 << 16)  # heard while nobody listened: too old to mean anything
            self._distrust()
        frames, more = self.network.receive()
        for heard in frames:
            self._hear(heard)
        self._sync()
        loop.serve()
        if now >= loop.tick_at:
            loop.tick_at = now + TICK
            if self.referee.refused or self.wire.deaf(now, ()):
                self.news(*self.vips)
            if self.referee.records and not self.peers.keys() <= self.referee.records.keys():  # gone by now?
                self._find_peers()
            self.network.hear_only({*self.vips, *self.wire.known()})
            self.wire.meet(now)
            self._tell_troubles()
            notify("WATCHDOG=1")
        if now >= loop.save_at:
            self.save(now=False)
        self.referee.tick(now)
        self._settle()
        if self.wire.due <= now and not more:  # who has answered may be among those that are still to be read
            self.news(*self.wire.run(now))
            if self.wire.suspects:
                self.referee.ask()
                self.wire.suspects = False
            self._settle()
        return self._stopped()

    def _settle(self) -> None:
        """Decide again for every IP whose time has come; in slices, so that the wire is heard meanwhile."""
        loop, done = self.loop, set[str]()
        while loop.due <= loop.now:
            if (address := loop.take()) in done:  # what a decision did may be news
                return loop.decide(address, loop.now)
            done.add(address)
            if vip := self.vips.get(address):
                loop.decide(address, vip.reconcile(loop.now))
            if self.clock.now() - loop.now >= SLICE:
                break

    def news(self, *addresses: str) -> None:
        """Decide again for these; who has waited for longest comes first."""
        for address in addresses:
            self.loop.decide(address, self.loop.now)

    def _distrust(self) -> None:
        """What we remember may be old (late loop, link up): ask ZooKeeper and the wire before acting on it."""
        self.loop.distrusted = self.loop.now
        self.wire.distrust()
        self.referee.distrust()
        self.news(*self.vips)

    def _watchdog(self) -> None:
        """A loop that hangs while kazoo keeps the session keeps every lock: end the process, its stacks in the log.

        By turns, not by the clock: a process that was stopped is not one that hangs. The next one adopts what is there.
        """
        pause, turns, strikes = threading.Event(), -1, 0
        while strikes < max(2, self.referee.timeout):
            pause.wait(TICK)
            strikes, turns = (strikes + 1 if turns == self.loop.turns else 0), self.loop.turns
            if turns < 0:  # it has ended
                return
        faulthandler.dump_traceback()
        os._exit(1)

    def busy(self) -> bool:
        """Whether somebody waits for an order, for the disk, or for a notice."""
        return bool(self.loop.changes or self.notices.waiting) or any(vip.orders for vip in self.vips.values())

    def save_soon(self) -> None:
        """Once for many changes."""
        self.loop.save_at = min(self.loop.save_at, self.loop.now + LINGER + len(self.vips) / 1000)

    def save(self, now: bool = True) -> None:
        """Write down what a restart adopts; `now`: wait for it."""
        self.loop.save_at, session = math.inf, self.referee.session
        content = {
            "session": [session[0], session[1].hex()] if session and not self.stopping else None,
            "states": {address: vip.state.value for address, vip in self.vips.items()},
            "hosts": {host: record._asdict() for host, record in self.peers.items()},
            "macs": self.macs,
        }
        self.store.save_session(content, now=now)

    def tell(self, vip: Vip, event: Event, why: str) -> None:
        """Of a change of state, unless an earlier process has: after a restart all is found as it was."""
        if vip.state.value != (told := vip.story.told()):
            why = why if TRANSITIONS[State(told), event] is vip.state else f"began anew; {why}"
            ordered = vip.orders and event in (Event.ELECTED, Event.FAULT, Event.DEMOTED)
            by = vip.orders[0].by if ordered else "SIGTERM" if vip.intent is Intent.STOP else None
            self.note(vip.story, vip.vip.address, told, vip.state.value, event, why, by)
            vip.story.events[event] += 1

    def note(self, story: Story, address: str, old: str, new: str, event: str, why: str, by: str | None = None) -> None:
        """Into the history, and to whoever is told of changes; without an address it is of this host."""
        time = self.clock.stamp(digits="milliseconds")
        change = {"time": time, "from": old, "to": new, "event": event, "reason": why, "by": by}
        story.remember(change)
        self.store.save_change(address, change)
        self.notices.tell({"host": self.config.hostname, "ip": address, **change})

    def _tell_troubles(self) -> None:
        """Once a second; while ZooKeeper is yet to be reached, or to be lost, nothing is well again."""
        story, well = self.notices.story, "nothing is wrong"
        old, why = story.told("healthy"), "; ".join(troubles(self)) or well
        last = story.history[-1]["reason"] if story.history else well
        if why != last and (why != well or self.referee.state != "connecting"):
            new, event = ("healthy", "recovered") if why == well else ("unhealthy", "trouble")
            self.note(story, "", old, new, event, why)

    # -- the world outside -----------------------------------------------------------------------------

    def _hear(self, heard: Heard) -> None:
        vip, now = self.vips.get(heard.address), self.loop.now
        if heard.mac == self.kernel.link.mac:
            return
        known = not self.macs or heard.mac.hex(":") in self.macs.values()
        fresh = vip is not None and (known or heard.broadcast) and self.wire.view(heard.address, now).heard > TICK
        lets_go = vip and vip.bound and heard.mac == vip.at.given[0] and now - vip.at.given[1] <= TICK
        if vip and lets_go and heard.kind is Kind.CLAIM and heard.mac not in vip.gave:
            return  # who has given it to us answers until it hears that we have it, and is no rival
        news = self.wire.hear(heard, known, now)
        if not vip or (heard.kind is Kind.ASK and not heard.broadcast) or not (known or heard.kind is Kind.CLAIM):
            return
        vip.hear(heard, known, fresh, now)
        if news or vip.bound or heard.kind in (Kind.GIVE, Kind.WANT):
            self.news(heard.address)
        if fresh and vip.bound and heard.kind is Kind.CLAIM and self.wire.claims_anew(heard.mac, now):
            for each in self.vips.values():  # who has one of our addresses may have them all
                unsure = each.bound and each is not vip and each.lock(now).lock is not Lock.MINE
                if unsure and self.wire.view(each.vip.address, now).heard > TICK:
                    self.wire.say(Kind.ASK, each.vip.address)

    def referee_news(self, address: str) -> None:
        """ZooKeeper has news: of one address, or ('') of the session or the hosts."""
        if address:
            return self.news(address)
        self._find_peers()
        self.save(now=False)  # at once: who is killed right after it has connected is to find its session again
        self.news(*self.vips)

    def _find_peers(self) -> None:
        """The other hosts; one that stands in a queue is there, though its record may not be for a moment."""
        others = {host: record for host, record in self.referee.records.items() if host != self.config.hostname}
        queued = {c.host for vip in self.vips.values() for c in vip.lock(self.loop.now).queue}
        peers = {host: record for host, record in self.peers.items() if host in queued} | others
        if self.config.hostname in self.referee.records and peers != self.peers:
            self.peers, macs = peers, {host: record.mac for host, record in others.items() if record.mac}
            self.macs = dict([each for each in self.macs.items() if each[0] not in macs][-HOSTS:]) | macs
            self._find_witnesses()

    def _find_witnesses(self) -> None:
        """What the operator names, the gateways on this interface, and other contenders' own addresses."""
        found = [*self.config.witness_addresses, *(self.network.gateways() if self.kernel.link.number else ())]
        found += sorted(address for record in self.peers.values() for address in record.addresses)
        if self.wire.witnesses(each for each in found if each not in self.kernel.foreign and each not in self.vips):
            self.loop.tick_at = -math.inf  # to meet them, once the kernel lets their answers through

    def owner(self, address: str) -> str:
        """Which host is known to have it for itself, so that it can be no virtual IP; '': none."""
        peers = (host for host, record in self.peers.items() if address in record.addresses)
        return "this host, or its network," if address in self.kernel.foreign else next(peers, "")

    def _record(self) -> Record:
        own = tuple(sorted(self.kernel.own.values()))
        return Record(self.kernel.link.mac.hex(":"), own, boot_id(), self.config.promise)

    def _sync(self) -> None:
        """Take in the kernel's view, if it may have changed. An error is not absence: the last view stays."""
        began, old = self.clock.now(), self.kernel
        if self.network.changed():  # only a hint
            old.due = min(old.due, old.again)
        if began < old.due:
            return
        try:
            link, found, own = self.network.sync()
        except OSError as error:
            log.log(logging.DEBUG if old.error else logging.WARNING, "%s: %s", self.config.interface, error)
            old.error, old.due, old.again = str(error), began + TICK, began + TICK
            return
        again = began + min(TICK, 30 * (self.clock.now() - began))
        addresses = {str(ip): ours for ip, ours in found.items()}
        self.kernel = _Kernel(link, addresses, own, reserved(found), began + 5 * TICK, again)
        for address, vip in self.vips.items():
            was, there = old.addresses.get(vip.vip.key), addresses.get(vip.vip.key)
            if was and not there and link.number:
                by = "somebody else, or its lifetime has ended" if self.config.at_most_one else "somebody else"
                log.warning("vip=%s was removed by %s", vip.vip.ip, by)
            if was != there or (address in old.foreign) != (address in self.kernel.foreign):
                self.news(address)
        if (link, own) != (old.link, old.own):
            self._link_changed(old.link)
        self._find_witnesses()  # routes come and go without a word

    def _link_changed(self, old: Link) -> None:
        link = self.kernel.link
        if link.trouble != old.trouble and (old.number or link.trouble):
            log.warning("%s", link.trouble or f"{self.config.interface} is up")
        self.wire.use(link.mac, self.kernel.own)
        self.referee.publish(self._record())
        if link.up and not old.up and old.number:
            self._distrust()
        elif link.mac != old.mac:
            for vip in self.vips.values():
                vip.announce_anew(self.loop.now)
        self.news(*self.vips)

    def unbind(self, ip: Address) -> None:
        """Remove it from the interface."""
        try:
            self.network.remove(ip)
        except OSError as error:
            log.error("%s cannot be removed: %s", ip, error)
            return
        self.kernel.addresses.pop(str(ip), None)
        self.news(str(ip.ip))
        self.save_soon()

    @property
    def lifetime(self) -> int:
        """At most one: the kernel's own deadline, in whole seconds, over before the session is; 0: none."""
        return max(1, int(self.referee.timeout * 3 / 4 - self.SLACK)) if self.config.at_most_one else 0

    def in_time(self, now: float) -> bool:
        """Whether a lifetime begun now ends before the session can."""
        return self.referee.age(now) <= self.referee.timeout - self.lifetime - self.SLACK

    # -- the registry ------------------------------------------------------------------------------------

    def _manage(self, vip: VirtualIP, state: State = State.FAILING, story: Story | None = None) -> Vip:
        adopted, story = self.kernel.addresses.get(vip.key, False), story or Story()
        story.began = self.clock.stamp()
        self.vips[vip.address] = managed = Vip(self, vip, state if adopted else State.FAILING, adopted, story)
        if adopted:
            log.info("vip=%s found bound: adopted as %s", vip.ip, state.value)
            if not self.lifetime:  # it may still have one, of another promise
                with contextlib.suppress(OSError):
                    self.network.add(vip.bound)
        self.wire.add(vip.ip.ip, self.loop.now)
        self.referee.want(vip.address, Want.WATCH)
        self.network.hear_only(None)  # until the next tick: a thousand are listed once for all
        self.news(vip.address)
        return managed

    def drop(self, vip: Vip) -> None:
        """It is here no more."""
        self.referee.want(vip.vip.address, Want.GONE)
        self.wire.remove(vip.vip.address)
        self.vips.pop(vip.vip.address, None)
        self.news(vip.vip.address)
        vip.end(LinkError(404, "not found", resource="IP"))
        self.store.save_change(vip.vip.address, None)
        self.save_soon()

    # -- stopping ----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """SIGTERM: hand every IP over, all at the same time; the next program does, if one is to be executed."""
        if self.stopping is None and self.execute is None:
            log.info("stopping: IPs to hand over: %d", sum(vip.bound for vip in self.vips.values()))
            notify("STOPPING=1")
            self.stopping = self.loop.now + LONG
            for vip in self.vips.values():
                vip.intent = vip.intent if vip.intent is Intent.DELETE else Intent.STOP
            self.news(*self.vips)

    def _stopped(self) -> bool:
        now = self.loop.now
        if self.execute is not None:
            for vip in self.vips.values() if self.lifetime and self.in_time(self.clock.now()) else ():
                if vip.bound and vip.lock(now).lock is Lock.MINE:  # the next process has all of its lifetime to begin
                    with contextlib.suppress(OSError):
                        self.network.add(vip.vip.bound, self.lifetime)
            self.notices.end()
            self.refuse("restarting")
            return True
        if self.stopping is None:
            return False
        left, soon = [vip for vip in self.vips.values() if vip.bound], self.stopping - LONG + TICK
        if (now < self.stopping and any(vip.may_be_relieved(now) for vip in left)) or (
            now < soon and (self.loop.changes or self.notices.waiting)
        ):
            return False
        for vip in left:
            log.warning("vip=%s stays bound here: no other host can take it", vip.vip.ip)
            self.wire.announce(vip.vip.address, ask=False)  # clients may follow one that took it, and stops, too
        self.loop.turns = -1  # what follows is no turn, to the watchdog
        self.notices.end()
        self.refuse("stopping")
        self.save()
        self.referee.stop(max(ANSWER, min(2 * TICK, self.stopping - now)))
        log.info("stopped")
        return True

    def refuse(self, why: str) -> None:
        """Answer whoever waits for an order: this process ends."""
        for vip in self.vips.values():
            vip.end(LinkError(503, why, "this agent ends: ask again when the next one answers, or another host's"))


def troubles(agent: Agent) -> list[str]:
    """What is wrong with this host, in words that name the remedy."""
    link, referee, vips, now = agent.kernel.link, agent.referee, agent.vips.values(), agent.loop.now
    lost = ": ".join(filter(None, ["ZooKeeper is lost", referee.causes])) * (referee.state == "lost")
    wrong = [link.trouble or agent.kernel.error, agent.network.send_error, lost, referee.refused]
    wrong += sorted({link.trouble6 if vip.vip.ip.version == 6 else link.trouble4 for vip in vips})
    two = [vip for vip in vips if vip.bound and vip.at.rivalled > max(now - LONG, vip.at.rival_since + TICK)]
    also = "{} is on two hosts, here and at {}: remove it there, or give both hosts the same zookeeper"
    wrong += [also.format(vip.vip.ip, vip.story.rival.hex(":")) for vip in two[:3]]
    kept = [v for v in vips if v.bound and now - (v.at.leaving or now) > LONG and v.lock(now).lock is Lock.OTHER][:3]
    wrong += [f"{v.vip.ip} is kept: {v.lock(now).queue[0].host} has the lock but is silent; mend the LAN" for v in kept]
    alone = agent.wire.deaf(now, None) > LONG or any(agent.hears_nobody in vip.reason for vip in vips)
    wrong += [agent.hears_nobody] * alone
    mac, boot = link.mac.hex(":"), agent.store.identity[1]  # another agent of this machine may have it, too (VLANs)
    twins = [host for host, record in agent.peers.items() if record.mac == mac != "" and record.boot != boot]
    wrong += [f"{twins[0]} has this host's MAC {mac}: give one of them its own"] if twins else []
    other = [host for host, record in agent.peers.items() if record.promise not in ("", agent.config.promise)]
    wrong += [f"{other[0]} does not promise {agent.config.promise}: let all hosts promise the same"] if other else []
    return [*filter(None, wrong)]


class Api(Agent):
    """The Agent with what the API can ask of it; each function raises a LinkError where nothing has changed."""

    def find(self, key: str) -> Vip:
        """By id or address, in any spelling, with or without its prefix length. Raises LinkError."""
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_interface(key.strip("[]"))
            if (vip := self.vips.get(str(ip.ip))) and ("/" not in key or ip in (vip.vip.ip, vip.vip.bound)):
                return vip
        if named := [vip for vip in self.vips.values() if key == vip.vip.id]:
            return named[0]
        raise LinkError(404, "not found", resource="IP")

    def add_ip(self, raw: Any) -> Change:
        """POST /ips: this host shares it, too. Raises LinkError; then nothing has changed."""
        vip = VirtualIP.parse(raw, self.config.health_check_interval)
        if self.stopping is not None:
            raise LinkError(503, "stopping", "this agent ends: ask again when the next one answers")
        old = self.vips.get(vip.address)
        if old and old.intent is not Intent.DELETE:
            raise LinkError(409, "already exists", f"{old.vip.ip} is {old.vip.id}", id=old.vip.id)
        if not old and len(self.vips) >= self.config.max_ips:
            raise LinkError(409, "too many IPs", f"this host has max_ips ({self.config.max_ips}) IPs")
        if self.network.ready(vip.bound):  # the host has got this address, maybe just now
            self.kernel.due = -math.inf
            self._sync()
        owner = self.owner(vip.address) or "ZooKeeper" * (vip.address in self.config.servers)
        if owner := owner or "a gateway or witness" * (vip.address in self.wire.known()):
            raise Invalid("IP", f"{vip.address} is an address that {owner} has for itself")
        vip = replace(vip, id=f"vip-{uuid.uuid4()}")
        yield self.store.save_ip(vip.address, vip)
        if old := self.vips.get(vip.address):  # it was being removed, and may be gone by now
            old.change(vip)
        managed = old or self._manage(vip)
        managed.intent = Intent.RUN if self.stopping is None else Intent.STOP  # since it was asked
        log.info("vip=%s added by the API as %s", vip.ip, vip.id)
        managed.reconcile(self.loop.now)
        return show(managed, self.loop.now)

    def _of_api(self, key: str, verb: str) -> Vip:
        vip = self.find(key)
        if any(each.address == vip.vip.address for each in self.config.virtual_ips):
            raise LinkError(409, "configured", f"{vip.vip.ip} is from the configuration file; {verb} it there")
        return vip

    def update_ip(self, key: str, raw: Any) -> Change:
        """PATCH or PUT /ips/:id: the checks are replaced. Nothing moves unless one of them fails."""
        managed = self._of_api(key, "change")
        if managed.intent is Intent.DELETE:
            raise LinkError(404, "not found", resource="IP")
        got = {**raw}
        got |= {"checks": got.pop("healthchecks")} if "healthchecks" in got else {}  # its older name
        vip = VirtualIP.parse({**managed.vip.to_json(), **got}, self.config.health_check_interval)
        yield self.store.save_ip(vip.address, vip)
        managed.change(vip)
        managed.reconcile(self.loop.now)
        return show(managed, self.loop.now)

    def delete_ip(self, key: str, who: str = "API") -> Change:
        """DELETE /ips/:id: this host shares it no more. Bound until a waiting host is heard to have it, at most 1 s."""
        vip = self._of_api(key, "remove")
        yield self.store.save_ip(vip.vip.address, None)
        if self.vips.get(vip.vip.address) is not vip:
            return None  # an earlier order has done it meanwhile
        vip.intent = Intent.DELETE
        log.info("vip=%s is being removed by the API", vip.vip.ip)
        return vip.order("delete", who, self.loop.now)

    def take_lock(self, key: str, who: str = "API") -> Future[Any]:
        """POST /ips/:id/lock: this host takes it. The future is done when this host holds it. Raises LinkError."""
        vip, lock = self._movable(key)
        if vip.state is State.FAILING:
            raise LinkError(409, "failing", f"this host cannot take {vip.vip.ip}: {vip.trouble(self.loop.now)}")
        if vip.checks.unsure and not vip.bound:
            raise LinkError(409, "failing", "a check has just failed here, or could not run; ask again when it passes")
        if foreign := [c.host for n, c in enumerate(lock.queue) if not c.session and n != lock.place]:
            raise LinkError(409, "foreign lock", f"{foreign[0]}, which is no LinK host, holds or waits for the lock")
        if lock.queue and lock.place != 0 and strict(self, lock.queue[0].host):
            raise LinkError(409, "at-most-one", f"the holder must let go first: POST failover on {lock.queue[0].host}")
        return vip.order("lock", who, self.loop.now)

    def failover(self, key: str, who: str = "API") -> Future[Any]:
        """POST /ips/:id/failover: this host, the holder, gives it to the next one. Raises LinkError."""
        vip, lock = self._movable(key)
        if not (lock.place == 0 if lock.queue else vip.bound):
            holder = lock.queue[0].host if lock.queue else "another host, or nobody,"
            more = "; it stays bound here until another host has it" if vip.bound else ""
            raise LinkError(409, "not the holder", f"{holder} holds {vip.vip.ip}{more}")
        if not vip.facts(self.loop.now, lock).successor:
            raise LinkError(409, "nobody can take it", f"no other host waits for {vip.vip.ip}")
        vip.intent = Intent.HAND_OVER
        return vip.order("failover", who, self.loop.now)

    def _movable(self, key: str) -> tuple[Vip, LockView]:
        """The IP, and its lock as it is. Raises LinkError where nothing can be moved now."""
        vip = self.find(key)
        if vip.intent is not Intent.RUN or vip.orders:
            raise LinkError(409, "busy", f"another order for {vip.vip.ip} is under way: {vip.intent.value}")
        lock = vip.lock(self.loop.now)
        if self.referee.state not in ("none", "connected") or (self.referee.session and lock.lock is Lock.UNKNOWN):
            raise LinkError(409, "ZooKeeper is out of reach", "GET /health tells when it is back")
        return vip, lock

    def get_ip(self, key: str) -> dict[str, Any]:
        """GET /ips/:id: one of them, with its history."""
        vip = self.find(key)
        return {"ip": {**show(vip, self.loop.now), "history": [*vip.story.history]}}

    def list_ips(
        self, words: Callable[[Vip, float], Any] = show, then: Callable[[list[Any]], Any] = lambda shown: {"ips": shown}
    ) -> Future[Any]:
        """GET /ips: the IPs that this host shares. In slices, so that the wire is heard meanwhile."""
        future, left, shown = Future[Any](), [*self.vips.values()], list[Any]()

        def go_on() -> None:
            shown.extend(words(vip, self.loop.now) for vip in left[:50] if self.vips.get(vip.vip.address) is vip)
            del left[:50]
            self.loop.post(go_on) if left else future.set_result(then(shown))

        go_on()
        return future

    def health(self) -> dict[str, Any]:
        """GET /health: what is wrong here. That it is answered proves that the loop goes round."""
        referee, timeout = self.referee, self.referee.timeout or None
        met = any(self.wire.known().values()) or not self.wire.known()
        slow = "" if met else "no witness has answered: name one on this network in `witnesses`"
        slow = slow if self.config.probe_count else "probe_count is 0: a dead holder is found by its session"
        wrong = troubles(self)
        return {
            "healthy": not wrong,
            "trouble": [*filter(None, [*wrong, slow, self.store.trouble, self.notices.trouble])],
            "hostname": self.config.hostname,
            "since": self.loop.since,
            "interface": self.kernel.link.trouble or self.kernel.error or "up",
            "quick": not slow,
            "slow_because": slow or None,
            "zookeeper": {"state": referee.state, "session_timeout": timeout, "refused": referee.refused or None},
            "state_dir": self.store.trouble or "written",
            "on_change": self.notices.trouble or ("told" if self.config.on_change else "nobody is told"),
            "on_change_waiting": self.notices.waiting,
            "ips": {state.value: sum(vip.state is state for vip in self.vips.values()) for state in State},
            "history": [*self.notices.story.history],
        }


# == Metrics: the text format of Prometheus, 0.0.4 =====================================================================

Values = float | list[tuple[dict[str, str], float]]  # the latter where more labels tell them apart
Families = dict[str, tuple[str, Values]]  # by name: what it means, and what it is
Document = tuple[str, str]  # its type and its text: sent as it is, not as JSON
ZOOKEEPER = ("none", "connecting", "connected", "lost")


def of_host(a: Api) -> Families:
    """What is told of this host."""
    health, build = a.health(), {"host": a.config.hostname, "version": VERSION, "python": sys.version.split()[0]}
    return {
        "build_info": ("1; the host's name, the version of LinK and of Python", [(build, 1)]),
        "healthy": ("as in GET /health", health["healthy"]),
        "quick": ("as in GET /health", health["quick"]),
        "interface_up": (
            "whether the interface can be used", [({"interface": a.config.interface}, health["interface"] == "up")]),
        "state_dir_written": ("whether what must outlive the process could be written", not a.store.trouble),
        "zookeeper_state": ("1 for what it is", [({"state": s}, s == a.referee.state) for s in ZOOKEEPER]),
        "zookeeper_refused": ("whether ZooKeeper refuses something", bool(a.referee.refused)),
        "zookeeper_lease_age_seconds": ("since the leader's last word", a.referee.age(a.loop.now)),
        "zookeeper_session_timeout_seconds": ("as granted; 0: no ZooKeeper is configured", a.referee.timeout),
        "probe_round_trip_seconds": (
            "from the last probe that a holder answered to its answer, as the loop sees them", a.wire.round_trip),
        "loop_turns_total": ("turns of the loop", a.loop.turns),
        "loop_late_seconds_total": ("how late the loop was in all turns together", a.loop.late),
        "loop_latest_seconds": ("how late it was in its worst turn", a.loop.latest),
        "notices_total": ("changes that on_change was told of, or not", [
            ({"result": "sent"}, a.notices.sent), ({"result": "lost"}, a.notices.lost)]),
        "notices_waiting": ("changes that on_change is yet to be told of", a.notices.waiting),
    }  # fmt: skip


def of_ip(vip: Vip) -> Families:
    """What is told of each IP."""
    story, since = vip.story, datetime.fromisoformat(vip.story.since).timestamp()
    return {
        "ip_status": ("1 for what this host is for the IP", [({"status": s}, s is vip.state) for s in State]),
        "ip_bound": ("whether this host's kernel has the IP", vip.bound),
        "ip_since_timestamp_seconds": ("when the status last changed, also by an earlier process", since),
        "ip_transitions_total": (
            "changes of the status by this process", [({"event": e}, n) for e, n in story.events.items()]),
        "ip_conflicts_total": (
            "how often another host had it at the same time without a planned move", story.conflicts),
        "ip_takeovers_total": ("how often this host has taken its lock from a silent holder", story.takeovers),
        "ip_announcements_total": ("announcements sent", story.announced),
        "ip_gap_seconds": (
            "at the last move to this host: since it was last heard elsewhere, the most it can have been away",
            [({"move": move}, seconds) for move, seconds in story.gaps.items()]),
        "ip_check_ok": ("the verdict of each check", [({"check": c}, ok) for c, ok in vip.checks.results.items()]),
    }  # fmt: skip


def metrics(agent: Api) -> Future[Any]:
    """GET /metrics: numbers for Prometheus. Who asks writes them down, not the loop."""
    host: tuple[dict[str, str], Families] = {}, of_host(agent)
    return agent.list_ips(
        lambda vip, _: ({"ip": vip.vip.address}, of_ip(vip)),
        lambda ips: functools.partial(write_metrics, [host, *ips]),
    )


def write_metrics(told: Iterable[tuple[dict[str, str], Families]]) -> Document:
    """Each family with its HELP and TYPE."""
    lines = dict[str, list[str]]()
    for labels, families in told:
        for name, (text, values) in families.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            family = lines.setdefault(name, [f"# HELP link_{name} {text}", f"# TYPE link_{name} {kind}"])
            for more, value in values if isinstance(values, list) else [({}, values)]:
                words = [f"{key}={json.dumps(word, ensure_ascii=False)}" for key, word in {**labels, **more}.items()]
                family += [f"link_{name}{{{','.join(words)}}} {float(value)}"] if math.isfinite(value) else []
    return "text/plain; version=0.0.4; charset=utf-8", "\n".join([*itertools.chain(*lines.values()), ""])


# == Page: what a browser is shown =====================================================================================

PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>LinK</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --line: #8883; --good: #0a6b2d; --bad: #b3121d; --dim: #5b6270 }
@media (prefers-color-scheme: dark) { :root { --good: #63d892; --bad: #ff8087; --dim: #a3abb8 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.3rem } p { margin: .3rem 0; min-height: 1.45em } .bad, .FAILING { color: var(--bad) }
table { border-collapse: collapse; width: 100% } td td { background: #8881; font-size: .9em } th { color: var(--dim) }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line) }
.ACTIVATED { color: var(--good) } .ACTIVATED, .FAILING { font-weight: 600 } button { font: inherit; cursor: pointer }
td:first-child button { border: 0; padding: 0; background: none; color: inherit; text-decoration: underline dotted }
</style></head><body><h1>LinK</h1><p id="health">asks the agent</p><p id="news" role="alert"></p><table>
<thead><tr><th>IP<th>Holder<th>Next in line<th id="here"><th>Since (UTC)<th>Why<th>Conflicts<th>Move</tr></thead>
<tbody id="ips"></tbody></table><template id="row">
<tr><td><button></button><td><td><td><td><td><td><td><button></button><tr hidden><td colspan="8"></template><script>
const rows = new Map(), find = id => document.getElementById(id), make = tag => document.createElement(tag)
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; return node }
const utc = time => time.replace("T", " ").replace("Z", "")
let host = "", seen = "never"
async function ask(path, method = "GET") {
  const answer = await fetch(location.origin + path, {method, signal: AbortSignal.timeout(8000)})
  const text = await answer.text(), body = text ? JSON.parse(text) : {}
  if (!answer.ok && !("healthy" in body)) throw Error(body.detail || body.error)
  return body
}
const next = ip => ip.hosts.filter(name => name !== (ip.holder || host))
const words = ip => ip.bound ? `hand over to ${next(ip)[0] || "another host"}` : `take to ${host}`
function order({ip}) {
  const what = ip.bound ? "failover" : "lock"
  if (!confirm(`${ip.ip}: ${words(ip)}?`)) return
  put(find("news"), `${ip.ip}: ${what} asked for`)
  ask(`/ips/${ip.id}/${what}`, "POST").then(() => "done", error => error.message)
    .then(result => put(find("news"), `${ip.ip}: ${what}: ${result}`))
}
function newRow(id) {
  const [line, past] = find("row").content.cloneNode(true).children, [name, move] = line.querySelectorAll("button")
  const row = {line, past, name, move, cells: line.cells}
  name.onclick = () => { past.hidden = !past.hidden; show(row.ip) }
  move.onclick = () => order(row)
  find("ips").append(line, past)
  return rows.set(id, row).get(id)
}
async function show(ip) {
  const row = rows.get(ip.id) || newRow(ip.id), other = ip.wire.state === "answered" ? ip.wire.mac : ""
  const holder = ip.holder || other || "nobody known", two = ip.bound && other ? `, also at ${other}` : ""
  const {count, mac} = ip.conflicts, state = ip.status + (ip.bound ? ", bound" : ""), last = mac ? `, last: ${mac}` : ""
  const texts = [holder + two, next(ip).join(", "), state, utc(ip.since), ip.reason, count + last]
  row.ip = ip
  texts.forEach((text, n) => put(row.cells[n + 1], text))
  row.cells[1].className = two || holder === "nobody known" ? "bad" : ""
  row.cells[3].className = ip.status
  put(row.name, ip.ip)
  put(row.move, words(ip))
  row.move.ariaLabel = `${words(ip)}: ${ip.ip}`
  row.name.ariaExpanded = !row.past.hidden
  if (row.past.hidden) return
  const table = make("table"), {ip: {history: past}} = await ask(`/ips/${ip.id}`)
  const told = past.reverse().map(was => [utc(was.time), `${was.from} → ${was.to}`, was.event, was.reason, was.by])
  for (const texts of [[`On ${host}, latest first`, "Change", "Event", "Why", "Ordered by"], ...told])
    table.insertRow().append(...texts.map(text => put(make("td"), text || "nobody")))
  row.past.cells[0].replaceChildren(table)
}
async function refresh() {
  try {
    const [health, {ips}] = await Promise.all([ask("/health"), ask("/ips")])
    host = health.hostname
    seen = utc(new Date().toISOString().slice(0, 19))
    find("health").className = health.healthy ? "" : "bad"
    put(find("health"), `As ${host} knows it at ${seen} UTC. ${health.trouble.join("; ") || "This host is well"}.`)
    put(find("here"), `On ${host}`)
    await Promise.allSettled(ips.map(show))
    for (const [id, {ip, line, past}] of rows) ips.includes(ip) || [line.remove(), past.remove(), rows.delete(id)]
    if (find("news").textContent.startsWith("No answer")) put(find("news"), "The agent answers again")
  } catch (error) {
    put(find("news"), `No answer from the agent (${error.message}): what is shown is of ${seen} UTC`)
  }
  setTimeout(refresh, 1000)
}
refresh()</script></body></html>"""
PAGE_MAY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


# == HTTP ==============================================================================================================

MAX_BODY = 65536
REQUEST_TIME = LONG  # from the connect to the end of the request; twice what the loop has for its answer
MAX_REQUESTS = 64  # at the same time
IP_FREEBIND = 15  # <linux/in.h>: bind to an address that is not there yet
# Methods, path ({id} is an id or an address), what else the loop's function gets (a Shape: the body; client, accept),
# status of success, function
Route = tuple[str, str, Any, int, Callable[..., Any]]


def routes(agent: Api) -> list[Route]:
    """The API."""

    def endpoint(vip: Vip, now: float) -> dict[str, Any]:
        return {**show(vip, now), "plugin": "arp", "election_key": vip.vip.address}

    def find(key: str) -> dict[str, Any]:
        return endpoint(agent.find(key), agent.loop.now)

    def front(accept: str) -> Any:
        """GET /: the page for a browser, else the links."""
        if "text/html" in accept:
            return "text/html; charset=utf-8", PAGE
        return {"version": VERSION, "links": ["/ips", "/health", "/metrics", "/version", "/openapi.json"]}

    def add(raw: Any) -> Change:
        """POST /endpoints: as POST /ips."""
        got = {key: raw[key] for key in raw if key in IP["properties"]} | raw["plugin_config"]
        made = find((yield from agent.add_ip(got))["id"])
        return {**made, "endpoint": made}  # some of its clients read it bare, some wrapped

    return [
        ("GET HEAD", "/", "accept", 200, front),
        ("GET HEAD", "/ips", "", 200, agent.list_ips),
        ("POST", "/ips", NEW_IP, 201, agent.add_ip),
        ("GET HEAD", "/ips/{id}", "", 200, agent.get_ip),
        ("PATCH PUT", "/ips/{id}", CHANGE, 200, agent.update_ip),
        ("DELETE", "/ips/{id}", "client", 204, agent.delete_ip),
        ("POST", "/ips/{id}/lock", "client", 204, agent.take_lock),
        ("POST", "/ips/{id}/failover", "client", 204, agent.failover),
        ("GET HEAD", "/version", "", 200, lambda: {"version": VERSION}),
        ("GET HEAD", "/health", "", 200, agent.health),
        ("GET HEAD", "/metrics", "", 200, functools.partial(metrics, agent)),
        ("GET HEAD", "/openapi.json", "", 200, lambda: functools.partial(openapi, agent)),
        # in the words of Scalingo/link v3
        ("GET HEAD", "/endpoints", "", 200, lambda: agent.list_ips(endpoint, lambda each: {"endpoints": each})),
        ("POST", "/endpoints", ENDPOINT, 201, add),
        ("GET HEAD", "/endpoints/{id}", "", 200, lambda key: {"endpoint": find(key)}),
        ("PATCH PUT", "/endpoints/{id}", CHANGE, 200, agent.update_ip),
        ("DELETE", "/endpoints/{id}", "client", 204, agent.delete_ip),
        ("POST", "/endpoints/{id}/failover", "client", 204, agent.failover),
        ("GET HEAD", "/endpoints/{id}/hosts", "", 200,
         lambda key: {"hosts": [{"hostname": host} for host in find(key)["hosts"]]}),
    ]  # fmt: skip


def openapi(agent: Api) -> dict[str, Any]:
    """The routes as OpenAPI 3.1. A summary is the sentence after "GET /ips: " in the docstring of the function."""
    name = {"name": "id", "in": "path", "required": True, "description": "id or address", "schema": {"type": "string"}}
    error = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}
    paths, guarded = dict[str, Any](), bool(agent.config.password)
    for methods, path, takes, status, function in routes(agent):
        one, body, changes = "{id}" in path, isinstance(takes, Mapping), "GET" not in methods
        codes = [400, *[401] * guarded, 403, *[404] * one, *[409] * changes, 411, 413, *[415] * body, 503, 504]
        kinds = {"/": ["application/json", "text/html"], "/metrics": ["text/plain"]}.get(path, ["application/json"])
        content = {status: {kind: {} for kind in kinds if status != 204}, **dict.fromkeys(codes, error)}
        said = (getattr(function, "func", function).__doc__ or "").partition(": ")[2].partition(". ")[0].rstrip(".")
        answers = {str(c): {"description": http.HTTPStatus(c).phrase, "content": content[c]} for c in content}
        operation = {"summary": said, "responses": answers}
        if body:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": takes}}}
        item = paths.setdefault(path, {"parameters": [name]} if one else {})
        item |= {method.lower(): operation for method in methods.split()}
    basic = {"securitySchemes": {"basic": {"type": "http", "scheme": "basic"}}}
    words = {"openapi": "3.1.0", "info": {"title": "LinK", "version": VERSION}, "components": basic}
    return {**words, "security": [{"basic": []}] * guarded, "paths": paths}


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; runs in a thread of its own, asks the loop and waits with a deadline."""

    protocol_version, timeout = "HTTP/1.1", REQUEST_TIME
    server_version, sys_version = f"LinK/{VERSION}", ""
    disable_nagle_algorithm = True  # head and body are two writes
    server: Server

    def handle(self) -> None:
        """What a refused client still sends is read: a reset would take the answer from it (RFC 9112, section 9.6)."""
        try:
            super().handle()
            self.server.clients[self.connection] = time.monotonic() + 2 * TICK
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(MAX_BODY):
                pass
        except (OSError, ValueError):
            log.debug("%s went away", self.client_address[0])

    def _serve(self) -> None:
        try:
            status, body = self._route()
        except LinkError as error:
            status, body = error.status, error.body
        except Exception:
            log.exception("%s '%s'", _safe(self.command), _safe(self.path))
            status, body = 500, {"error": "internal error", "detail": "see the agent's log"}
        if self.command not in ("GET", "HEAD"):  # why an IP moved may be that somebody asked for it
            log.info("API: %s '%s' from %s: %d", _safe(self.command), _safe(self.path), self.client_address[0], status)
        self._reply(status, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _route(self) -> tuple[int, Any]:
        if whole := re.match(r"(?i:https?)://([^/?#]+)", self.path):  # its host counts (RFC 9112, section 3.2.2)
            del self.headers["Host"]
            self.headers["Host"], self.path = whole[1], self.path[whole.end() :]
        self._refuse_strangers()
        path, allowed = self.path.partition("?")[0].rstrip("/") or "/", set[str]()
        for methods, pattern, takes, status, function in self.server.routes:
            found = re.fullmatch(re.escape(pattern).replace(r"\{id\}", r"([^/]+(?:/\d+)?)"), path)
            if found and self.command in methods.split():
                args, body = [*map(urllib.parse.unquote, found.groups())], self._body(takes)
                self.server.clients[self.connection] = math.inf
                more = {"client": self.client_address[0], "accept": self.headers.get("Accept", "")}
                args += [body] if isinstance(takes, Mapping) else [more[takes]] if takes else []
                result = self.server.agent.loop.call(function, *args, timeout=REQUEST_TIME / 2)
                result = result() if callable(result) else result  # what is long is written here
                return (503 if isinstance(result, dict) and result.get("healthy") is False else status), result
            allowed.update(methods.split() if found else ())
        if allowed:
            raise LinkError(405, "method not allowed", allow=sorted(allowed))
        raise LinkError(404, "not found", resource="path")

    def _refuse_strangers(self) -> None:
        """Who has no password; and a page in a browser here, which can post and, by DNS rebinding, read without any."""
        config = self.server.agent.config
        names = {"localhost", config.hostname.lower(), socket.gethostname().lower()}
        for host in self.headers.get_all("Host", []):
            name = re.sub(r":\d*$", "", host.strip().lower()).rstrip(".")
            with contextlib.suppress(ValueError):
                name = "localhost" if ipaddress.ip_address(name.strip("[]")) else name
            if name not in names:
                raise LinkError(403, "unknown host", f"Host must be an address or one of: {', '.join(sorted(names))}")
        scheme = "https" if self.server.tls else "http"
        if self.headers.get("Origin", own := f"{scheme}://{self.headers.get('Host')}") != own:
            raise LinkError(403, "no foreign pages", "leave out Origin: in a browser only this agent's page may ask")
        wanted = credentials(config.user, config.password)
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        right = scheme.lower() == "basic" and hmac.compare_digest(given.strip().encode(), wanted.encode())
        if config.password and not right:
            raise LinkError(401, "unauthorized")

    def _body(self, shape: Any) -> Any:
        """The JSON body, at most 64 KiB. curl's own content type is accepted: people forget the header."""
        required = isinstance(shape, Mapping)
        lengths = self.headers.get_all("Content-Length", [] if required else ["0"])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise LinkError(411, "length required")
        if len({*lengths}) > 1 or not re.fullmatch(r"\d{1,18}", lengths[0]):
            raise Invalid("Content-Length", "it must be one whole number")
        if (length := int(lengths[0])) > MAX_BODY:
            raise LinkError(413, "body too large", f"at most {MAX_BODY} bytes")
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else "application/json"
        if required and kind not in ("application/json", "application/x-www-form-urlencoded"):
            raise LinkError(415, "unsupported media type", "send application/json")
        data = b""
        with contextlib.suppress(OSError):  # the client went away
            data = self.rfile.read(length)
        if len(data) < length:
            raise Invalid("json", "the body is shorter than its Content-Length")
        try:
            return valid(json.loads(data, object_pairs_hook=_once), shape) if required else None
        except (ValueError, RecursionError) as error:
            raise Invalid("json", str(error)) from None

    def _reply(self, status: int, body: Any) -> None:
        kind, text = body if isinstance(body, tuple) else ("application/json", json.dumps(body) + "\n")
        data = b"" if status == 204 else text.encode()
        more = {"Content-Type": kind, "Content-Length": str(len(data))} if data else {}
        more |= {"Content-Security-Policy": PAGE_MAY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        more |= {"WWW-Authenticate": 'Basic realm="LinK"'} if status == 401 else {}
        more |= {"Allow": ", ".join(body["allow"])} if status == 405 else {}
        self.send_response(status)
        for header in {**more, "Connection": "close"}.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON, too: a malformed request line; a method that no route has."""
        if code == http.HTTPStatus.NOT_IMPLEMENTED:
            return self._serve()
        self.request_version, self.command = self.protocol_version, self.command or "GET"
        self._reply(code, {"error": (message or http.HTTPStatus(code).phrase).lower()})

    def log_message(self, format: str, *args: Any) -> None:
        """The access log is for debugging."""
        log.debug("http %s %s", self.client_address[0], _safe(format % args))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object: of two keys of one name json would take the last one, and say nothing. Raises ValueError."""
    for key in (key for key, other in itertools.pairwise(sorted(key for key, _ in pairs)) if key == other):
        raise ValueError(f"the key {key[:60]!r} is there twice: remove one")
    return dict(pairs)


def credentials(user: str, password: str) -> str:
    """What follows "Basic" in an Authorization header (RFC 7617)."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _safe(text: str) -> str:
    """What a client sent, for the log: no control characters, not endless."""
    return ascii(text)[1:-1][:200]


def tls_context(config: Config, of: str = "") -> ssl.SSLContext | None:
    """For the API (None: plain HTTP); with "zookeeper_" a trial of what kazoo is to load. Raises ConfigError."""
    ca, cert, key = (getattr(config, f"{of}tls_{part}", "") for part in ("ca", "cert", "key"))
    if bool(cert) != bool(key):
        raise ConfigError(f"{of}tls_cert: needs {of}tls_key, too, and the other way round")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if ca or cert else None
    try:
        if context and ca:
            context.load_verify_locations(ca)
        if context and cert:
            context.load_cert_chain(cert, key, password="")  # of an encrypted key: it fails, instead of asking
    except (OSError, ValueError) as error:
        where = f"{of}tls_{'ca' if ca else 'cert'}: {', '.join(filter(None, (ca, cert, key)))}"
        raise ConfigError(f"{where}: not PEM files that fit together: {error}") from None
    return context


class Server(socketserver.ThreadingTCPServer):  # HTTPServer's look-up of its own name can take half a minute
    """Bounded: past MAX_REQUESTS at once, whoever has owed us its request for longest makes room for the next.

    `clients` are the open connections, oldest first, and until when each owes us its request (inf: we owe the answer).
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, agent: Api, clients: dict[Any, float] | None = None) -> None:
        """Raises OSError where it cannot listen."""
        self.agent, self.routes, self.clients = agent, routes(agent), {} if clients is None else clients
        self._free, self.tls = threading.BoundedSemaphore(MAX_REQUESTS), tls_context(agent.config)
        self.address_family, *_, address = socket.getaddrinfo(*agent.config.listen_address)[0]  # with its scope
        super().__init__(cast(Any, address), Handler)
        if self.tls:  # the handshake is at the first read: its thread's, not the acceptor's
            self.socket = self.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        """Also to an address that is not there yet."""
        self.socket.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)  # holds for IPv6, too
        super().server_bind()

    def service_actions(self) -> None:
        """After each accept, or each half second: whoever is late is cut off."""
        self._cut(time.monotonic(), MAX_REQUESTS)

    def _cut(self, before: float, most: int) -> None:
        """The oldest of those due before: their threads, wherever they read or write, are woken up and end."""
        for client in [client for client, due in self.clients.copy().items() if due < before][:most]:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> Any:
        """Out of descriptors accept() fails at once, again and again: not in a hot loop."""
        try:
            return super().get_request()
        except OSError as error:
            threading.Event().wait(ANSWER * (error.errno in (errno.EMFILE, errno.ENFILE)))
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a new thread. Raises RuntimeError where there is none to be had."""
        if not self._free.acquire(blocking=False):
            self._cut(math.inf, 1)
            if not self._free.acquire(timeout=2 * ANSWER):
                raise RuntimeError("busy")
        self.clients[request] = time.monotonic() + REQUEST_TIME
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No thread was to be had: before its request was read, so that only a short answer can arrive."""
        log.debug("http %s: %s", client_address[0], sys.exc_info()[1])
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(0)
            request.send(head + b'Content-Length: 18\r\n\r\n{"error": "busy"}\n')

    def shutdown_request(self, request: Any) -> None:
        """The end of every connection."""
        super().shutdown_request(request)
        if self.clients.pop(request, None):
            self._free.release()


def serve_api(agent: Api, clients: dict[Any, float]) -> None:
    """Thread "http", for ever. The IPs come first: where the API cannot listen it tries again."""
    trouble = ""
    while True:
        try:
            with Server(agent, clients) as server:
                if trouble:
                    log.info("API: listens on %s after all", agent.config.listen)
                trouble = ""
                server.serve_forever()
        except Exception as error:
            if str(error) != trouble:
                log.warning("API: %s: %s; the IPs are served, and it is tried again", agent.config.listen, error)
            trouble = str(error)
        threading.Event().wait(TICK)


# == Configuration: one table feeds the file, the environment, the flags, --help and the README ========================


def option(default: Any, text: str, *, low: float = 0, high: float = 1e6, choices: Any = (), flag: bool = True) -> Any:
    """A row: default, help, range of a number, words allowed, whether it has a flag."""
    meta = {"help": text, "default": default, "low": low, "high": high, "choices": choices, "flag": flag}
    return field(default_factory=lambda: default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """The configuration of one agent; times in seconds."""

    hostname: str = option("", "name of this host among the contenders; default: the machine's")
    interface: str = option("", "network interface that carries the virtual IPs; required")
    zookeeper: str = option("", 'ensemble, "h1:2181,h2:2181,h3:2181/optional-chroot"; empty: the wire alone decides')
    zookeeper_auth: str = option("", '"user:password" (digest); nodes are then LinK\'s alone', flag=False)
    zookeeper_tls_ca: str = option("", "PEM file of the authority that signed ZooKeeper's certificate: turns TLS on")
    zookeeper_tls_cert: str = option("", "PEM file of this host's certificate for ZooKeeper")
    zookeeper_tls_key: str = option("", "PEM file of that certificate's key")
    session_timeout: float = option(4.0, "seconds asked of ZooKeeper; what it grants is what counts", low=1)
    listen: str = option("127.0.0.1:1313", "address and port of the HTTP API")
    user: str = option("", "HTTP basic authentication; required unless listen is loopback")
    password: str = option("", "HTTP basic authentication; required unless listen is loopback", flag=False)
    tls_cert: str = option("", "PEM file: serve the API over HTTPS")
    tls_key: str = option("", "PEM file of that certificate's key")
    state_dir: str = option("/var/lib/link", "where IPs added through the API and the session are kept")
    health_check_interval: int = option(5, "seconds between checks where an IP does not say", low=1, high=3600)
    health_check_timeout: float = option(5.0, "seconds after which a check has failed", low=0.1)
    health_check_fall: int = option(3, "failures in a row that make an IP FAILING", low=1)
    health_check_rise: int = option(1, "successes in a row that end FAILING", low=1)
    probe_interval: float = option(0.05, "seconds between two probes of a holder", low=0.005)
    probe_count: int = option(3, "unanswered probes that make a holder silent; 0: never ask the wire")
    witnesses: list[Any] = option([], "addresses on the interface that prove this host can hear", flag=False)
    promise: str = option(
        "at-least-one", "at-least-one, or at-most-one for services that must not run twice",
        choices=("at-least-one", "at-most-one"))  # fmt: skip
    on_change: str = option("", "URL or program that is told of each change, as JSON", flag=False)
    max_ips: int = option(1000, "most IPs this host accepts", low=1)
    ips: list[Any] = option([], "IPs that this host always has: ip, checks, healthcheck_interval", flag=False)
    log_level: str = option("INFO", "DEBUG, INFO, WARNING or ERROR", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    @functools.cached_property
    def virtual_ips(self) -> list[VirtualIP]:
        """`ips`, parsed. The id of a configured IP depends on its address alone, so it survives restarts."""
        parsed = [VirtualIP.parse(raw, self.health_check_interval) for raw in self.ips]
        ids = (f"vip-{uuid.uuid5(uuid.NAMESPACE_URL, 'link:' + vip.address)}" for vip in parsed)
        return [replace(vip, id=vip.id or new) for vip, new in zip(parsed, ids, strict=True)]

    @property
    def witness_addresses(self) -> list[str]:
        """`witnesses` as they are read from the wire: FE80::0099 is fe80::99. Raises ValueError."""
        return [str(ipaddress.ip_address(valid(witness, _IP, "each"))) for witness in self.witnesses]

    @property
    def servers(self) -> list[str]:
        """ZooKeeper's hosts, as they are written but for capitals."""
        return [server.rpartition(":")[0].strip("[]").lower() for server in self.ensemble[0].split(",")]

    @property
    def ensemble(self) -> tuple[str, str]:
        """ZooKeeper's servers, and the node below which the locks are: /link, also below a chroot."""
        servers, _, chroot = self.zookeeper.partition("/")
        return servers, f"/{chroot}".rstrip("/") + "/link"

    @property
    def at_most_one(self) -> bool:
        """Whether this host must rather let go than share."""
        return self.promise == "at-most-one"

    @property
    def listen_address(self) -> tuple[str, int]:
        """`listen` as an address (localhost's is 127.0.0.1) and a port. Raises ValueError."""
        host, _, port = self.listen.rpartition(":")
        host = "127.0.0.1" if host == "localhost" else re.sub(r"^\[(.*)]$", r"\1", host)
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) and 0 <= int(port) <= 65535:
                return host, int(port)
        raise ValueError(f"{self.listen!r} is not address:port, e.g. 127.0.0.1:1313")


OPTIONS = fields(Config)
REMOVED = {  # keys of earlier versions, and what to do instead
    "on_fault": "what is silent is taken; who wants none rather than two sets promise: at-most-one",
    "zookeeper_root": "locks are below /link; a chroot in zookeeper, h1:2181/x, makes it /x/link; stop all to change",
    "handover_timeout": "it is 1 s",
    "stop_timeout": "it is 10 s",
    "announce_count": "announcements go out 0, 0.1, 0.3, 1, 2, 5 and 10 s after a bind",
    "announce_interval": "announcements are repeated each 60 s",
    "log_format": "journalctl -o json prints the log as JSON",
}
KEYS = {"LINK_" + key.upper(): key for key in (*(option.name for option in OPTIONS), *REMOVED)}  # by variable


def _wrong_values(c: Config) -> Iterator[tuple[str, Any]]:
    """Key, and what is wrong with it (anything false: nothing); each may rely on those before it."""
    for o in OPTIONS:
        value, (low, high, choices) = getattr(c, o.name), (o.metadata[m] for m in ("low", "high", "choices"))
        outside = isinstance(value, int | float) and not low <= value <= high
        yield o.name, outside and f"{value} is out of range; use {low:g} to {high:g}"
        yield o.name, choices and value not in choices and f"{value!r} is none of {', '.join(choices)}"
    for key, parsed in (("listen", "listen_address"), ("witnesses", "witness_addresses"), ("ips", "virtual_ips")):
        try:
            getattr(c, parsed)
        except (ValueError, Invalid) as error:
            yield key, str(error)
    url = re.fullmatch(r"(/.*|https?://(\[[^]]+\]|[^][/?#@:\s]+)(:(?P<port>[0-9]{1,5}))?([/?#]\S*)?)?", c.on_change)
    address = "use http[s]://HOST[:PORT]/PATH, with no user or space, or the whole path of a program"
    yield "on_change", not url and address
    yield "on_change", url and int(url["port"] or 0) > 65535 and "its port is out of range; use 1 to 65535"
    yield "state_dir", not c.state_dir and "name the whole path of a directory, e.g. /var/lib/link"
    right = re.fullmatch(r"[0-9A-Za-z][\w.-]{0,252}", c.hostname, re.ASCII)
    yield "hostname", not right and f"{c.hostname!r} is not a host name"
    yield "interface", not c.interface and "required; name the one that carries the virtual IPs, e.g. interface: eth0"
    yield "interface", not re.fullmatch(r"[^\s/]{1,15}", c.interface) and f"{c.interface!r} is not an interface name"
    yield "zookeeper", _wrong_ensemble(c)
    yield "zookeeper_auth", c.zookeeper_auth and ":" not in c.zookeeper_auth and "must be user:password"
    short = c.at_most_one and c.session_timeout < 2
    yield "session_timeout", short and "at-most-one needs 2 s or more: kernels count address lifetimes in whole seconds"
    open_ = not c.password and not ipaddress.ip_address(c.listen_address[0]).is_loopback
    yield "user", open_ and f"required with password because listen ({c.listen}) is not loopback"
    yield "user", c.user and not c.password and "needs password, too"
    yield "password", c.password and not c.user and "needs user, too"
    slow = c.probe_interval * max(c.probe_count, 1) >= c.session_timeout
    yield "probe_interval", slow and "probe_interval * probe_count must be less than session_timeout; lower one"
    yield "probe_count", c.probe_count == 1 and "one lost packet is no silence; use 0, or 2 or more"
    alone = not c.zookeeper
    yield "probe_count", alone and not c.probe_count and "without zookeeper the wire decides: set it, or use 2 or more"
    scoped = [witness for witness in c.witness_addresses if "%" in witness]
    yield "witnesses", scoped and f"{scoped[0]}: leave out the scope, it is the interface"
    own = [witness for witness in c.witness_addresses if witness in [vip.address for vip in c.virtual_ips]]
    yield "witnesses", own and f"{own[0]} is one of ips, and proves nothing; name an address of somebody else"
    yield "promise", alone and c.at_most_one and "at-most-one needs ZooKeeper; set zookeeper, or use at-least-one"
    names = [vip.address for vip in c.virtual_ips]
    own = sorted({*names} & {*c.servers})
    yield "ips", own and f"{own[0]} is an address that ZooKeeper has for itself; remove it"
    yield "ips", len({*names}) < len(names) and f"{max(names, key=names.count)} is there twice; remove one"
    yield "ips", len(names) > c.max_ips and f"{len(names)} IPs are more than max_ips ({c.max_ips}); raise max_ips"


def _wrong_ensemble(c: Config) -> str:
    """Also what kazoo would take and die of later: names that the idna codec refuses (RFC 1035, section 2.3.4)."""
    servers, _, chroot = c.zookeeper.partition("/")
    for server in servers.split(",") if c.zookeeper else ():
        host, _, port = server.rpartition(":")
        if ":" in host and not host.startswith("["):
            return f"{server}: put IPv6 addresses into brackets, e.g. [fd77::11]:2181"
        right = len(host) < 254 and bool(re.fullmatch(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?", host, re.ASCII))
        with contextlib.suppress(ValueError):
            right = right or (host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1])))
        if not right or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            return f"{server!r} is not host:port; use host:port[,host:port...][/chroot]"
    path = re.fullmatch(r"((?!\.{1,2}(/|$))[!-.0-~]+(/|$))*", chroot)
    return "" if path else f"the chroot {'/' + chroot!r} is no path; use host:port[,host:port...][/chroot]"


def _typed(option: Any, value: Any) -> Any:
    """`value` (text from the environment or a flag, or YAML) as the option's type. Raises ConfigError."""
    kind = type(option.metadata["default"])
    value = _yaml(value, option.name) if isinstance(value, str) and kind is list else value
    text = isinstance(value, str) and not re.search(r"[\0-\x1f\x7f\ud800-\udfff]", value)
    if (kind is str and text) or (kind is list and isinstance(value, list)):
        return value
    with contextlib.suppress(ValueError, OverflowError):
        number = kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool)
        if number and (kind is float or float(value) == int(float(value))):
            return kind(float(value))
    words = {int: "a whole number", float: "a number", list: "a list"}
    wanted = "text without control characters, in quotes where YAML takes it for a number, a date, or yes and no"
    raise ConfigError(f"{option.name}: must be {words.get(kind, wanted)}")  # not what it is: it may be a secret


def _yaml(text: str, where: str) -> Any:
    """What it says. Raises ConfigError with the place, but not with the text that stands there: it may be a secret."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Of two keys of one name YAML would take the last one, and say nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for key in (key for key, _ in node.value if names.count(key.value) > 1):
                why = "a key is there twice: remove one"
                raise yaml.constructor.ConstructorError(problem=why, problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # !!bool x: a KeyError
        mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "a value cannot be read"
        at = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = re.sub("[\"'].*[\"']", "…", why)
        raise ConfigError(f"{where}: not valid YAML{at}: {why}; text that is not plain belongs into quotes") from None


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, also for a key that does not exist."""
    try:
        got = _yaml(Path(path).read_text(encoding="utf-8"), path) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(got, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    if unknown := [key for key in got if key not in KEYS.values()]:
        raise ConfigError(f"{path}: unknown key {str(unknown[0]).partition(':')[0]!r}; see link.py --help for the keys")
    return got


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """What to say of each LINK_* that is no key. No error: container engines set LINK_PORT for a service named link."""
    names = sorted(name for name in environ if name.startswith("LINK_") and name not in KEYS)
    return [f"{name} in the environment is no key, and ignored; see link.py --help for the keys" for name in names]


def make_config(file: Mapping[str, Any], environ: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """Defaults < file < LINK_* environment < flags, validated. Raises ConfigError."""
    variables = {key: environ[name] for name, key in KEYS.items() if name in environ}
    given = {key: value for each in (file, variables, flags) for key, value in each.items() if value is not None}
    for key in REMOVED.keys() & given.keys():
        raise ConfigError(f"{key}: is no key any more, remove it: {REMOVED[key]}")
    values = {option.name: _typed(option, given[option.name]) for option in OPTIONS if option.name in given}
    config = Config(**{**values, "hostname": values.get("hostname") or socket.gethostname()})
    for key, wrong in _wrong_values(config):
        if wrong:
            raise ConfigError(f"{key}: {wrong}")
    tls_context(config, "zookeeper_")
    return config


# == Main ==============================================================================================================

RUN = Path("/run/link")  # of root or the service (RuntimeDirectory=)
CHECKED = b"configuration OK\n"  # what each version's --check ends with, where all is right


def notify(message: str) -> None:
    """sd_notify(3); does nothing where no supervisor listens."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)


class LogQueue(logging.handlers.QueueHandler):
    """Hands lines to a thread that writes them: a stderr that blocks (a full pipe, a stopped journal) stops no loop."""

    queue: queue.Queue[logging.LogRecord]
    lost, prepare = 0, staticmethod(lambda record: record)  # the thread makes the text: nothing told changes later

    def enqueue(self, record: logging.LogRecord) -> None:
        """Drop it where the queue is full, and say so when there is room again."""
        if self.lost:
            record.msg = f"{record.msg} ({self.lost} lines before this one were lost: the log was blocked)"
        try:
            self.queue.put_nowait(record)
            self.lost = 0
        except queue.Full:
            self.lost += 1

    def drain(self, wait: float = 1.0) -> None:
        """Return when all is written, or after so many seconds."""
        with self.queue.all_tasks_done:
            self.queue.all_tasks_done.wait_for(lambda: not self.queue.unfinished_tasks, wait)


def set_up_logging(config: Config) -> LogQueue:
    """To stderr; no time of our own where the journal adds it."""
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s.%(msecs)03d "
    handler, stderr = LogQueue(queue.Queue(10000)), logging.StreamHandler()
    stderr.setFormatter(logging.Formatter(stamp + "%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.handlers.QueueListener(handler.queue, stderr).start()
    logging.basicConfig(level=logging.CRITICAL, handlers=[handler], force=True)  # the libraries: not a word
    log.setLevel(config.log_level)
    return handler


def load(argv: Sequence[str]) -> tuple[Config, bool]:
    """The configuration, and whether only to check it. Raises ConfigError, SystemExit (--help; a wrong flag: 2)."""
    parser = argparse.ArgumentParser(prog="link.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: /etc/link/link.yml if it exists)")
    parser.add_argument("--check", action="store_true", help="validate the configuration and exit: 0 right, 2 wrong")
    parser.add_argument("--version", action="version", version=f"LinK {VERSION}")
    secret = ", ".join(option.name for option in OPTIONS if not option.metadata["flag"])
    more = "also keys of the file, and LINK_<KEY> in the environment; file < environment < flags\n"
    group = parser.add_argument_group("configuration", f"{more}in the file and the environment only: {secret}")
    for option in (option for option in OPTIONS if option.metadata["flag"]):
        default = option.metadata["default"]
        text = option.metadata["help"] + (f" (default: {default})" if default != "" else "")
        group.add_argument("--" + option.name.replace("_", "-"), metavar="VALUE", help=text.replace("%", "%%"))
    args, path = parser.parse_args(argv), config_path(argv)
    return make_config(read_config(path) if path else {}, os.environ, vars(args)), args.check


def config_path(argv: Sequence[str]) -> str:
    """The configuration file; '' where there is none."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    default = "/etc/link/link.yml"
    return parser.parse_known_args(argv)[0].config or (default if Path(default).exists() else "")


def check(config: Config) -> None:
    """All that can be known before a start; changes nothing. Raises ConfigError, or OSError: the agent would fail."""
    for name in ("kazoo.client", "scapy.layers.l2", "scapy.layers.inet6", "yaml"):
        try:
            __import__(name)
        except ImportError as error:
            raise ConfigError(f"cannot import {name} ({error}): pip install -r requirements.txt") from None
    tls_context(config)  # a start serves the IPs without the API
    warnings, state_dir = unknown_variables(os.environ), Path(config.state_dir)
    try:
        for path in (path for path in (state_dir, *state_dir.parents) if os.path.lexists(path) and not path.is_dir()):
            raise ConfigError(f"state_dir: {path} is no directory: name another one, or remove it")
        warnings += [f"{config.state_dir}: {what} {why}" for what, why in Store(config).read_ips().items()]
    except PermissionError as error:  # to whoever checks; if the agent is another user
        if os.stat(config.state_dir).st_uid == os.geteuid():
            raise
        warnings += [f"{config.state_dir}: was not looked at ({error})"]
    try:
        link, addresses, _ = (network := Network(config.interface)).sync(listen=False)
        if gateways := {*network.gateways()} & {vip.address for vip in config.virtual_ips}:
            raise ConfigError(f"ips: {gateways.pop()} is this host's default gateway; remove it")
        own = sorted(reserved(addresses) & {vip.address for vip in config.virtual_ips})
        warnings += [f"ips: {each} is this host's own, or its network's: FAILING while it has it" for each in own]
        found = [link.trouble, link.trouble4, link.trouble6 * any(vip.ip.version == 6 for vip in config.virtual_ips)]
    except OSError as error:
        found = [f"was not looked at ({error})"]
    warnings += [f"{config.interface}: {trouble}" for trouble in found if trouble]  # the interface may come later
    if (program := config.on_change).startswith("/") and not (os.path.isfile(program) and os.access(program, os.X_OK)):
        warnings.append("on_change: there is no such program, or it may not be executed")
    warned = [(f"link.py: warning: {warning}\n", sys.stderr) for warning in warnings]
    for text, to in (*warned, (CHECKED.decode(), sys.stdout)):
        with contextlib.suppress(OSError):  # a reload is not to fail where the log's disk is full
            print(text, end="", file=to)


def lock(config: Config, but: Config | None = None) -> list[int]:
    """State directory and interface (each network namespace has its own of that name), until this process ends.

    Without what cannot be locked; raises BlockingIOError where another agent has it. flock(2) on files that nobody
    else may open, in directories of our own: any user could bind an abstract socket's name. `but`: but for its.
    """
    locks, number = list[int](), os.stat("/proc/self/ns/net").st_ino
    wanted, held = ({Path(c.state_dir, "lock"), RUN / f"{c.interface}.{number}"} if c else set() for c in (config, but))
    for path in sorted(wanted - held):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks.append(file)
        except BlockingIOError:
            raise
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second agent away", path, error.strerror)
    return locks


class Upgrade:
    """SIGHUP: prove the new program and configuration in a child process, then execute them in place of this one.

    One proof at a time. What has changed since, or was asked for again, is proven anew: nothing unproven is executed.
    """

    def __init__(self, agent: Agent, argv: Sequence[str], clients: Mapping[Any, float]) -> None:
        self._agent, self._argv, self._clients = agent, argv, clients
        self._command = [sys.executable, os.path.abspath(__file__), *argv]
        self._asked = self._proves = False

    def ask(self, *_: object) -> None:
        """Loop thread only."""
        self._asked = True
        if not self._proves and self._agent.stopping is None:
            self._proves, self._asked = True, False
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                threading.Thread(target=self._prove, daemon=True).start()
            except RuntimeError as error:  # there is none to be had now
                self._proven(str(error), self._files(), 0.0)

    def _files(self) -> list[bytes]:
        with contextlib.suppress(OSError):
            return [Path(path).read_bytes() for path in (self._command[1], config_path(self._argv)) if path]
        return []

    def _prove(self) -> None:
        why, files, agent = "", self._files(), self._agent
        try:
            done = subprocess.run([*self._command, "--check"], stdout=subprocess.PIPE, timeout=3 * LONG, check=False)
            wrong = f"exit code {done.returncode}" if done.returncode else "it is no whole program"
            why = self._loses(load(self._argv)[0]) if done.returncode == 0 and done.stdout.endswith(CHECKED) else wrong
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        except Exception as error:  # the new program may understand what this one does not
            log.debug("reload: %s", error)
        agent.loop.post(self._proven, why, files, agent.clock.now() + 3)

    def _loses(self, config: Config) -> str:
        """What this host would lose by that configuration, and why; '': nothing. Raises OSError."""
        agent, vips = self._agent, [*self._agent.vips.items()]  # first: what is added meanwhile is found, too
        try:
            for held in lock(config, but=agent.config):
                os.close(held)
        except BlockingIOError:
            return "another agent has that interface or state_dir"
        if config.interface != agent.network.name and not agent.kernel.link.trouble:
            with contextlib.suppress(OSError):  # many IPs change just now: it cannot be known
                if trouble := Network(config.interface).sync(listen=False)[0].trouble:
                    return trouble
        kept = {*agent.store.found(config), *(vip.address for c in (config, agent.config) for vip in c.virtual_ips)}
        lost = [ip for ip, vip in vips if vip.intent is Intent.RUN and ip not in kept]
        return f"{config.state_dir} has not {', '.join(lost[:3])}: take its ips.* along" * bool(lost)

    def _proven(self, why: str, files: list[bytes], deadline: float) -> None:
        agent, now = self._agent, self._agent.clock.now()
        if not why and (agent.busy() or math.inf in [*self._clients.values()]) and now < deadline:
            if now > deadline - TICK:
                agent.refuse("restarting")
            return threading.Timer(LINGER, agent.loop.post, (self._proven, why, files, deadline)).start()
        self._proves = False
        if self._asked or files != self._files():
            self.ask()
        elif why:
            log.error("reload: the new program or configuration is wrong (%s): going on as before", why)
            notify("READY=1")
        elif agent.stopping is None:
            log.info("reload: executing %s", self._command[1])
            agent.execute = lambda: os.execv(sys.executable, self._command)


def serve(config: Config, argv: Sequence[str], written: Callable[[], None]) -> None:
    """Run until stopped. Raises OSError."""

    def stop(number: int, _: object) -> None:
        stops.append(number)
        agent.loop.post(agent.stop)

    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    make = functools.partial(Referee, config) if config.zookeeper else lambda *_: NoReferee()
    agent = Api(
        config, Network(config.interface), Store(config), lambda a: make(a.clock.now, a.loop.post, a.referee_news)
    )
    clients, stops = dict[Any, float](), list[int]()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, functools.partial(agent.loop.post, Upgrade(agent, argv, clients).ask))
    agent.start()
    threading.Thread(target=serve_api, args=(agent, clients), daemon=True, name="http").start()
    log.info("LinK %s on %s: interface %s, API on %s", VERSION, config.hostname, config.interface, config.listen)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    gc.freeze()  # the libraries: to look through them all now and then would halt the loop for 50 ms
    notify("READY=1")
    agent.run()
    if agent.execute:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number in stops[:1]:  # too late for the loop; it stays pending for the next program (execve(2))
            signal.pthread_kill(threading.get_ident(), number)
        agent.save()
        written()
        agent.execute()


def status(argv: Sequence[str]) -> int:
    """`link.py status`: what an agent knows, as a table. 0: every IP is somewhere, once; 1: not so; 2: no answer."""
    words = "exit code 0: each IP is held, once; 1: one is nobody's, FAILING or on two hosts; 2: no answer"
    parser = argparse.ArgumentParser(prog="link.py status", description="What the agent knows.", epilog=words)
    parser.add_argument("--config", metavar="FILE", help="whose agent to ask (default: /etc/link/link.yml)")
    parser.add_argument("--url", help="or its API: http[s]://[USER:PASSWORD@]HOST:PORT")
    args, context = parser.parse_args(argv), ssl.create_default_context()
    to = urllib.parse.urlsplit(args.url or "")
    user, password = (urllib.parse.unquote(word or "") for word in (to.username, to.password))
    if not args.url:
        config = load(["--config", args.config] if args.config else [])[0]
        to = urllib.parse.urlsplit(f"http{'s' * bool(config.tls_cert)}://{config.listen}")
        user, password = config.user, config.password
        if config.tls_cert:  # it is this host's own, whatever name it has
            context.load_verify_locations(config.tls_cert)
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever has signed it
    ask = functools.partial(fetch, to, context, f"Basic {credentials(user, password)}")
    for wait in (0.0, TICK):  # while an IP moves it is on two hosts for a moment
        threading.Event().wait(wait)
        try:
            health = ask("/health")
            trouble = [f"{health['hostname']}: {each}" for each in health["trouble"]]
            rows, wrong = read_status(ask("/ips")["ips"])
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
            raise ValueError("what answers there is no agent of this version: reload it, or name another URL") from None
        if not wrong:
            break
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print(*trouble + wrong or ["all is well"], sep="\n")
    return bool(wrong)


def fetch(to: urllib.parse.SplitResult, context: ssl.SSLContext, authorization: str, path: str) -> Any:
    """GET what is JSON. Raises OSError, HTTPException, ValueError."""
    if to.scheme not in ("http", "https"):
        raise ValueError("the URL must begin with http:// or https://")
    connection = http.client.HTTPConnection(to.hostname or "", to.port or 80, timeout=LONG)
    if to.scheme == "https":
        connection = http.client.HTTPSConnection(to.hostname or "", to.port or 443, timeout=LONG, context=context)
    with contextlib.closing(connection):
        connection.request("GET", to.path.rstrip("/") + path, headers={"Authorization": authorization})
        got = json.load(connection.getresponse())
    if "error" in got:
        raise OSError(f"{to.hostname}: {got['error']}")
    return got


def read_status(ips: Iterable[Mapping[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, and what is wrong."""
    rows, wrong = [["IP", "HOLDER", "QUEUE", "HERE", "SINCE", "WHY"]], list[str]()
    for ip in ips:
        other = ip["wire"]["mac"] if ip["wire"]["state"] == "answered" else None
        here = ip["status"] + ", bound" * ip["bound"]
        rows.append([ip["ip"], ip["holder"] or other or "?", ",".join(ip["hosts"]), here, ip["since"], ip["reason"]])
        odd = f"is on two hosts: here and at {other}" if ip["bound"] and other else ""
        odd = odd or ("" if ip["holder"] or other else "is nobody's, as far as is known here")
        odd = odd or (f"is FAILING here: {ip['reason']}" if ip["status"] == "FAILING" else "")
        silent = ip["wire"]["state"] == "silent" and not ip["bound"]
        odd = odd or (f"is nobody's: {ip['holder']} has the lock, and nobody answers" if silent else "")
        wrong += [f"{ip['ip']} {odd}"] if odd else []
    return rows, wrong


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # a reload that is asked for now waits until we serve
    try:
        if argv[:1] == ["status"]:
            return status(argv[1:])
        config, only_check = load(argv)
        if only_check:
            check(config)
            return 0
    except (ConfigError, OSError, ValueError, http.client.HTTPException) as error:
        print(f"link.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) or argv[:1] == ["status"] else 1
    written, held, code = set_up_logging(config).drain, None, 0
    for warning in unknown_variables(os.environ):
        log.warning("%s", warning)
    sys.setswitchinterval(0.0005)  # the loop must not wait 5 ms for each of kazoo's turns
    try:
        held = lock(config)
        serve(config, argv, written)
    except Exception as error:
        code = 3 if held is None and isinstance(error, BlockingIOError) else 1
        other = f"another agent runs on interface {config.interface} or with state_dir {config.state_dir}"
        why = f"{other}: stop it, or give this one its own" if code == 3 else f"the agent has failed: {error}"
        log.error("%s", why, exc_info=code == 1 and not getattr(error, "filename", None))  # a file says enough
    written()
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError, AttributeError):  # its disk is full, or it is closed
        sys.stdout.flush()
    os._exit(code)  # taking the libraries apart would last longer than handing over an IP
