#!/usr/bin/env python3
"""LinK (Link is not Keepalived): several servers share virtual IPs (VIPs).

An agent runs on every server. For each VIP the agents elect, through a lock in ZooKeeper, one holder that binds the
address and announces it by gratuitous ARP (IPv4) or unsolicited neighbour advertisements (IPv6). A second witness, the
wire itself, is asked who really answers for the address: it finds a dead holder long before its session runs out,
keeps the VIP where it is while ZooKeeper is away, and decides alone where no ZooKeeper is configured.

    kernel (netlink) --.
    wire (AF_PACKET) --+--> facts --> decide() --> event --> TRANSITIONS --> state
    ZooKeeper ---------+                     `--> wanted address, place in the queue
    health checks -----+                              |
    HTTP API ----------'                              `--> Network (bind, announce), Coordinator (join, leave, take)

State machine (one per VIP; rows are states, columns are events):

               fault      elected    demoted  health_check_fail  health_check_success
    STANDBY    ACTIVATED  ACTIVATED  STANDBY  FAILING            STANDBY
    ACTIVATED  ACTIVATED  ACTIVATED  STANDBY  FAILING            ACTIVATED
    FAILING    FAILING    FAILING    FAILING  FAILING            STANDBY

Threads: the main thread runs the Agent's loop and owns every decision, all netlink and all sending. HTTP handlers,
kazoo's threads, health checks and the program check before an upgrade only post to its queue; they are daemon threads
and end with the process. A dead loop ends the process; the supervisor restarts it and it adopts what it finds.

Not promised: a virtual IP cannot be fenced by ARP. A host whose agent is hung keeps answering until its session has
ended and another host has taken the address over; two sides of a split network both serve, each for itself.

Exit codes: 0 stopped, 1 failed, 2 wrong configuration, 3 another agent runs on this interface or state directory.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import heapq
import hmac
import http.client
import http.server
import ipaddress
import json
import logging
import os
import queue
import random
import re
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "0.1.0"
log = logging.getLogger("link")

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface
PlainAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

################################################################################
# Errors
################################################################################


class LinkError(Exception):
    """An error to show to the caller: HTTP status and JSON body."""

    status = 500

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message)
        self.body: dict[str, Any] = {"error": message, **more}


class ConfigError(LinkError):
    """The configuration is wrong; the message names the key and the remedy."""


class Invalid(LinkError):
    """400: the request is wrong; nothing was changed."""

    status = 400


class NotFound(LinkError):
    """404: no such IP or path."""

    status = 404


class Refused(LinkError):
    """409: the request is right but cannot be done in this state; nothing was changed."""

    status = 409


class Unavailable(LinkError):
    """503: the agent cannot do it now (its loop is late, its state directory cannot be written)."""

    status = 503


class Unfinished(LinkError):
    """504: the move was begun but not seen to end in time; the body carries the IP as it is now."""

    status = 504


################################################################################
# Model
################################################################################


def _take(raw: Any, known: Iterable[str], what: str) -> dict[str, Any]:
    """A copy of the mapping `raw`; Invalid where it is none or has a key that is not known."""
    if not isinstance(raw, dict):
        raise Invalid(f"invalid {what}", detail=f"{what} must be an object such as {{{next(iter(known))}: ...}}")
    if unknown := set(raw) - set(known):
        raise Invalid(f"invalid {what}", detail=f"unknown field {sorted(map(str, unknown))[0]!r}")
    return dict(raw)


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Invalid(f"invalid {what}", detail=f"{what} must be a whole number from {low} to {high}")
    return value


@dataclass(frozen=True)
class HealthCheck:
    """One probe of the service behind a VIP: TCP (connect) or HTTP (GET answers 2xx or 3xx)."""

    type: str
    host: str
    port: int
    path: str = "/"

    @classmethod
    def parse(cls, raw: Any) -> HealthCheck:
        """Raises Invalid."""
        got = _take(raw, ("type", "host", "port", "path"), "health check")
        kind, host, path = str(got.get("type", "")).upper(), got.get("host"), got.get("path")
        path = "/" if path in (None, "") else path
        if kind not in ("TCP", "HTTP"):
            raise Invalid("invalid health check", detail="type must be TCP or HTTP")
        if not isinstance(host, str) or not re.fullmatch(r"[0-9A-Za-z._:-]{1,253}", host):
            raise Invalid("invalid health check", detail="host must be a host name or an address")
        if not isinstance(path, str) or not re.fullmatch(r"/[!-~]*", path):
            raise Invalid("invalid health check", detail="path must begin with / and have no spaces")
        return cls(kind, host, _whole(got.get("port"), 1, 65535, "port"), path)

    def to_json(self) -> dict[str, Any]:
        """The check as the API shows it."""
        return {"type": self.type, "host": self.host, "port": self.port, "path": self.path}


def parse_checks(raw: Any) -> tuple[HealthCheck, ...]:
    """A list of checks; nothing at all means none. Raises Invalid."""
    if not isinstance(raw, list | None):
        raise Invalid("invalid health check", detail="checks must be a list")
    return tuple(HealthCheck.parse(item) for item in raw or [])


def parse_address(text: Any) -> Address:
    """An address a host can share; without a prefix length /32 or /128. Raises Invalid with the reason."""
    if not isinstance(text, str):
        raise Invalid("invalid IP", detail='ip is missing or no text; send {"ip": "10.0.0.10/32"}')
    try:
        ip = ipaddress.ip_interface(text)
    except ValueError as error:
        raise Invalid("invalid IP", detail=str(error).replace("interface", "address")) from None
    host, net = ip.ip, ip.network
    inside = net.prefixlen < ip.max_prefixlen - 1
    kinds = (
        ("%" in str(text), "has a scope"),
        (isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None, "is an IPv4 address in disguise"),
        (host.is_unspecified, "is the unspecified address"),
        (net.prefixlen == 0, "has the prefix length 0"),
        (host.is_loopback, "is a loopback address"),
        (host.is_multicast, "is a multicast address"),
        (host.is_link_local, "is a link-local address"),
        (str(host) == "255.255.255.255", "is the broadcast address"),
        (host.version == 4 and (host.packed[0] == 0 or host.packed[0] >= 240), "is not a host's address"),
        (inside and host == net.network_address, "is a network address"),
        (inside and host.version == 4 and host == net.broadcast_address, "is a broadcast address"),
    )
    for wrong, why in kinds:
        if wrong:
            raise Invalid("invalid IP", detail=f"{text} {why}")
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
        got = _take(raw, ("ip", "id", "checks", "healthcheck_interval"), "IP")
        every = got.get("healthcheck_interval")
        every = interval if every is None or (every == 0 and every is not False) else every  # Go leaves out, or says 0
        every = _whole(every, 1, 3600, "healthcheck_interval")
        if not isinstance(name := got.get("id") or "", str):
            raise Invalid("invalid IP", detail="id must be text")
        return cls(parse_address(got.get("ip")), parse_checks(got.get("checks")), every, name)

    @functools.cached_property
    def address(self) -> str:
        """The bare address: the name of the lock in ZooKeeper."""
        return str(self.ip.ip)

    def to_json(self) -> dict[str, Any]:
        """The IP as it is stored and shown."""
        checks = [check.to_json() for check in self.checks]
        return {
            "id": self.id,
            "ip": str(self.ip),
            "checks": checks,
            "healthcheck_interval": self.healthcheck_interval,
        }


################################################################################
# Configuration: one table feeds the file, the environment, the flags, --help and the README
################################################################################


def option(
    default: Any, text: str, *, low: float = 0, high: float = 1e6, choices: Sequence[str] = (), flag: bool = True
) -> Any:
    """A row of the table: default, help, the range of a number, the words allowed, whether a flag exists."""
    meta = {"help": text, "low": low, "high": high, "choices": choices, "flag": flag}
    return field(default_factory=lambda: default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """The configuration of one agent; times in seconds."""

    hostname: str = option("", "name of this host among the contenders; default: the machine's")
    interface: str = option("", "network interface that carries the virtual IPs; required")
    zookeeper: str = option("", 'ensemble, "h1:2181,h2:2181,h3:2181/optional-chroot"; empty: the wire alone decides')
    zookeeper_root: str = option("/link", "node below which LinK keeps its locks")
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
    on_fault: str = option(
        "probe",
        "ZooKeeper lost: probe (take what is silent), claim (take at once), hold (take nothing)",
        choices=("probe", "claim", "hold"),
    )
    promise: str = option(
        "at-least-one",
        "at-least-one, or at-most-one for services that must not run twice",
        choices=("at-least-one", "at-most-one"),
    )
    handover_timeout: float = option(1.0, "longest wait to hear a new holder before letting go", low=0.1)
    stop_timeout: float = option(10.0, "longest time a stop may take", low=1)
    announce_count: int = option(6, "announcements after a bind: at 0, 0.1, 1, 2, 5 and 10 s", low=1)
    announce_interval: float = option(60.0, "seconds between later announcements; 0: none")
    max_ips: int = option(1000, "most IPs this host accepts", low=1)
    ips: list[Any] = option([], "IPs that this host always has: ip, checks, healthcheck_interval", flag=False)
    log_level: str = option("INFO", "DEBUG, INFO, WARNING or ERROR", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    log_format: str = option("text", "text or json", choices=("text", "json"))

    @property
    def virtual_ips(self) -> list[VirtualIP]:
        """`ips`, parsed. The id of a configured IP depends on its address alone, so it survives restarts."""
        parsed = [VirtualIP.parse(raw, self.health_check_interval) for raw in self.ips]
        ids = (f"vip-{uuid.uuid5(uuid.NAMESPACE_URL, 'link:' + vip.address)}" for vip in parsed)
        return [replace(vip, id=vip.id or new) for vip, new in zip(parsed, ids, strict=True)]

    @property
    def at_most_one(self) -> bool:
        """Whether this host must rather let go than share."""
        return self.promise == "at-most-one"

    @property
    def listen_address(self) -> tuple[str, int]:
        """`listen` as host and port."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


OPTIONS = fields(Config)


def default_of(opt: Any) -> Any:
    """The default of a row of the table."""
    return opt.default_factory()


def _typed(option: Any, value: Any) -> Any:
    """`value` (text from the environment or a flag, or YAML) as the option's type. Raises ConfigError."""
    kind = type(default_of(option))
    if isinstance(value, str) and kind is list:
        value = _yaml(value, f"{option.name}")
    try:
        if kind is list and isinstance(value, list):
            return value
        if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
    except (ValueError, OverflowError):
        pass
    words = {str: "text", int: "a whole number", float: "a number", list: "a list"}
    raise ConfigError(f"{option.name}: {value!r} is not {words[kind]}")


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, also for a key that does not exist."""
    try:
        got = _yaml(Path(path).read_text(encoding="utf-8"), path) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(got, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    for key in got:
        if key not in {option.name for option in OPTIONS}:
            raise ConfigError(f"{path}: unknown key {key!r}; see link.py --help for the keys")
    return got


def make_config(file: Mapping[str, Any], environ: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """Defaults < file < LINK_* environment < flags, validated. Raises ConfigError."""
    values: dict[str, Any] = {}
    for opt in OPTIONS:
        for source in (flags.get(opt.name), environ.get("LINK_" + opt.name.upper()), file.get(opt.name)):
            if source is not None:
                values[opt.name] = _typed(opt, source)
                break
    values["hostname"] = values.get("hostname") or socket.gethostname()
    config = Config(**values)
    _check_ranges(config)
    _check_relations(config)
    return config


def _check_ranges(config: Config) -> None:
    for opt in OPTIONS:
        value, choices = getattr(config, opt.name), opt.metadata["choices"]
        low, high = opt.metadata["low"], opt.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            raise ConfigError(f"{opt.name}: {value} is out of range; use {low:g} to {high:g}")
        if choices and value not in choices:
            raise ConfigError(f"{opt.name}: {value!r} is none of {', '.join(choices)}")


def _is_ensemble(text: str) -> bool:
    """Whether it is a connect string of ZooKeeper, or empty."""
    servers = [re.fullmatch(r"[^\s/]+:(\d{1,5})", server) for server in text.partition("/")[0].split(",")]
    return not text or (" " not in text and all(found and 0 < int(found[1]) < 65536 for found in servers))


def _check_relations(config: Config) -> None:
    """What one key says about another: refused here rather than found at three in the morning."""
    for wrong, message in (*_checks_here(config), *_checks_of_zookeeper(config)):
        if wrong:
            raise ConfigError(message)
    for key in ("zookeeper_tls_ca", "zookeeper_tls_cert", "zookeeper_tls_key", "tls_cert", "tls_key"):
        if (path := getattr(config, key)) and not os.access(path, os.R_OK):
            raise ConfigError(f"{key}: {path} cannot be read; name a PEM file that this user may read")
    tls_context(config)
    if config.zookeeper_tls_ca:
        try:
            ssl.create_default_context(cafile=config.zookeeper_tls_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"zookeeper_tls_ca: {config.zookeeper_tls_ca} is no PEM certificate: {error}") from None
    _check_listen(config)
    _check_ips(config)


def _checks_here(c: Config) -> tuple[tuple[bool, str], ...]:
    """What is wrong, and what to say then."""
    return (
        (not c.interface, "interface: required; name the interface that carries the virtual IPs, e.g. interface: eth0"),
        (len(c.interface) > 15 or "/" in c.interface, f"interface: {c.interface!r} is not an interface name"),
        (
            not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]{0,252}", c.hostname),
            f"hostname: {c.hostname!r} is not a host name",
        ),
        (bool(c.tls_cert) != bool(c.tls_key), "tls_cert: needs tls_key, too"),
        (bool(c.user) > bool(c.password), "user: needs password, too"),
        (bool(c.user) < bool(c.password), "password: needs user, too"),
        (
            c.probe_interval * max(c.probe_count, 1) >= c.session_timeout,
            "probe_interval: probe_interval * probe_count must be less than session_timeout; lower one of them",
        ),
        (c.probe_count == 1, "probe_count: one lost packet is no silence; use 0, or 2 or more"),
        (c.handover_timeout >= c.stop_timeout, "handover_timeout: must be less than stop_timeout; lower it"),
        (len(c.ips) > c.max_ips, f"ips: {len(c.ips)} IPs are more than max_ips ({c.max_ips}); raise max_ips"),
    )


def _checks_of_zookeeper(c: Config) -> tuple[tuple[bool, str], ...]:
    """The same for what has to do with ZooKeeper."""
    return (
        (
            not re.fullmatch(r"(/(?!\.{1,2}(/|$))[^/\s]+)+", c.zookeeper_root),
            "zookeeper_root: must be an absolute path such as /link",
        ),
        (not _is_ensemble(c.zookeeper), f"zookeeper: {c.zookeeper!r} is not host:port[,host:port...][/chroot]"),
        (
            not c.zookeeper and (not c.probe_count or c.on_fault == "hold"),
            "zookeeper: without it the wire decides: set it, or probe_count above 0 and on_fault other than hold",
        ),
        (bool(c.zookeeper_auth) and ":" not in c.zookeeper_auth, "zookeeper_auth: must be user:password"),
        (bool(c.zookeeper_tls_cert) != bool(c.zookeeper_tls_key), "zookeeper_tls_cert: needs zookeeper_tls_key, too"),
        (
            c.at_most_one and not c.zookeeper,
            "promise: at-most-one needs ZooKeeper; set zookeeper, or use at-least-one",
        ),
        (
            c.at_most_one and c.session_timeout < 2,
            "session_timeout: at-most-one needs 2 s or more: the kernel counts address lifetimes in whole seconds",
        ),
    )


def tls_context(config: Config) -> ssl.SSLContext | None:
    """For the API; None where it is plain HTTP. Raises ConfigError where the files are no certificate and its key."""
    if not config.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert: {config.tls_cert} and tls_key do not fit together: {error}") from None
    return context


def _check_listen(config: Config) -> None:
    try:
        host, port = config.listen_address
        if not 0 <= port <= 65535 or not host:
            raise ValueError
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"listen: {config.listen!r} is not address:port, e.g. 127.0.0.1:1313") from None
    if not loopback and not config.password:
        raise ConfigError(f"user: required with password because listen ({config.listen}) is not loopback")


def _check_ips(config: Config) -> None:
    try:
        vips = config.virtual_ips
        for witness in config.witnesses:
            ipaddress.ip_address(str(witness))
    except Invalid as error:
        raise ConfigError(f"ips: {error}: {error.body.get('detail', '')}") from None
    except ValueError as error:
        raise ConfigError(f"witnesses: {error}") from None
    names = [vip.address for vip in vips]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"ips: {min(twice)} is there twice; remove one")


################################################################################
# State machine: nothing but the table
################################################################################


class State(StrEnum):
    """What this host is for a VIP; the words of the API."""

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


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.STANDBY, Event.FAULT): State.ACTIVATED,
    (State.STANDBY, Event.ELECTED): State.ACTIVATED,
    (State.STANDBY, Event.DEMOTED): State.STANDBY,
    (State.STANDBY, Event.HEALTH_CHECK_FAIL): State.FAILING,
    (State.STANDBY, Event.HEALTH_CHECK_SUCCESS): State.STANDBY,
    (State.ACTIVATED, Event.FAULT): State.ACTIVATED,
    (State.ACTIVATED, Event.ELECTED): State.ACTIVATED,
    (State.ACTIVATED, Event.DEMOTED): State.STANDBY,
    (State.ACTIVATED, Event.HEALTH_CHECK_FAIL): State.FAILING,
    (State.ACTIVATED, Event.HEALTH_CHECK_SUCCESS): State.ACTIVATED,
    (State.FAILING, Event.FAULT): State.FAILING,
    (State.FAILING, Event.ELECTED): State.FAILING,
    (State.FAILING, Event.DEMOTED): State.FAILING,
    (State.FAILING, Event.HEALTH_CHECK_FAIL): State.FAILING,
    (State.FAILING, Event.HEALTH_CHECK_SUCCESS): State.STANDBY,
}


def step(state: State, event: Event) -> State:
    """The state after the event."""
    return TRANSITIONS[state, event]

################################################################################
# Decision: facts in, one decision out; no I/O, no clock
################################################################################


class Lock(StrEnum):
    """What ZooKeeper last confirmed, judged by our own monotonic lease clock."""

    MINE = "mine"
    OTHER = "other"
    NOBODY = "nobody"
    WAITING = "waiting"  # not known yet, or out of reach for less than the session timeout
    UNKNOWN = "unknown"  # out of reach for longer, or no ZooKeeper at all


class Wire(StrEnum):
    """What layer 2 says about other hosts that have the VIP."""

    ANSWERED = "answered"
    SILENT = "silent"
    LOOKING = "looking"  # asked, not long enough to tell
    BLIND = "blind"  # cannot be asked: no carrier, a NOARP interface, probing off, or this host hears nobody


class Intent(StrEnum):
    """What the operator wants of this host."""

    RUN = "run"
    HAND_OVER = "hand over"
    STOP = "stop"
    DELETE = "delete"


class Facts(NamedTuple):
    """All that a decision about one VIP rests on."""

    lock: Lock
    wire: Wire
    healthy: bool
    intent: Intent
    bound: bool  # what the kernel has
    outranked: bool = False  # no confirmed lock, and a rival on the wire has the better claim
    successor: bool = False  # another contender waits in the queue, or has the lock
    overdue: bool = False  # letting go for longer than handover_timeout
    accused: bool = False  # the holder answered in this term, fell silent, and we may say so
    doubtful: bool = False  # healthy by health_check_fall, but the last result of a check was a failure
    on_fault: str = "probe"
    at_most_one: bool = False


class Decision(NamedTuple):
    """An event for the table (decide again after it), or the wanted address and place in the queue."""

    event: Event | None
    wanted: bool  # the address is to be on this host
    contend: bool  # our node is to be in the queue
    accuse: bool  # the silent holder's node is to be deleted
    reason: str


def decide(state: State, f: Facts) -> Decision:
    """The heart of LinK: total over State x Facts, checked cell by cell in test_link.py."""
    claims = f.lock is Lock.UNKNOWN and f.on_fault == "claim" and f.healthy  # the operator prefers two to none
    f = f._replace(outranked=f.outranked and f.bound and f.lock is not Lock.MINE and not claims)
    if f.healthy and state is State.FAILING:
        return Decision(Event.HEALTH_CHECK_SUCCESS, f.bound, False, False, "checks pass")
    if not f.healthy and state is not State.FAILING:
        return Decision(Event.HEALTH_CHECK_FAIL, f.bound, False, False, "checks fail")
    if f.at_most_one:
        return _at_most_one(state, f)
    event, wanted, reason = _at_least_one(state, f)
    contend = state is not State.FAILING and f.intent is Intent.RUN
    accuse = f.accused and state is State.STANDBY and f.intent is Intent.RUN and f.lock is Lock.OTHER
    return Decision(event, wanted, contend, accuse and event is None, reason)


def _at_most_one(state: State, f: Facts) -> Decision:
    """Let go first, and never hold without a confirmed lock; leave the queue only when the address is gone."""
    mine = f.lock is Lock.MINE and f.intent is Intent.RUN
    contend = f.bound or (state is not State.FAILING and f.intent is Intent.RUN)
    if state is State.STANDBY and mine:
        return Decision(Event.ELECTED, False, True, False, "has the lock")
    if state is State.ACTIVATED and not mine:
        why = "the lock is not confirmed" if f.intent is Intent.RUN else f"{f.intent.value} was asked"
        return Decision(Event.DEMOTED, False, contend, False, why)
    return Decision(None, state is State.ACTIVATED, contend, False, "at most one host: only with a confirmed lock")


def _at_least_one(state: State, f: Facts) -> tuple[Event | None, bool, str]:
    named = f.lock is Lock.OTHER or (f.lock is Lock.MINE and f.intent is not Intent.RUN)  # our node goes
    seen = f.wire is Wire.ANSWERED or (f.overdue and f.wire is Wire.BLIND and f.lock is Lock.OTHER)
    relieved = named and seen
    if f.intent is Intent.DELETE:
        named = f.successor and f.lock in (Lock.MINE, Lock.OTHER)
        waits = (named or f.lock is Lock.WAITING) and not relieved and not f.overdue
        return None, f.bound and waits, "is being removed from this host"
    if state is State.FAILING:
        return _failing(f, relieved)
    if state is State.ACTIVATED:
        return _activated(f, relieved)
    return _standby(f, relieved)


def _failing(f: Facts, relieved: bool) -> tuple[Event | None, bool, str]:
    """Not available for election; yet bound until relieved, and the last resort for a silent address."""
    if f.bound:
        if relieved or f.outranked:
            return None, False, "checks fail, another host has the IP"
        return None, True, "checks fail, but no other host has the IP yet"
    orphan = f.lock is Lock.NOBODY or (f.lock is Lock.UNKNOWN and f.on_fault != "hold")
    if orphan and f.wire is Wire.SILENT and f.intent is Intent.RUN:
        return None, True, "checks fail, but nobody else has the IP"
    return None, False, "checks fail"


def _activated(f: Facts, relieved: bool) -> tuple[Event | None, bool, str]:
    if relieved:
        return Event.DEMOTED, False, "another host has the lock and the IP"
    if f.outranked:
        return Event.DEMOTED, False, "another host answers for the IP with the better claim"
    claims = f.lock is Lock.UNKNOWN and f.on_fault == "claim"
    taken = f.lock is Lock.OTHER or (f.lock is not Lock.MINE and f.wire is Wire.ANSWERED and not claims)
    if taken and not f.bound:
        return Event.DEMOTED, False, "another host has the IP, and it is not bound here any more"
    words = {
        Lock.MINE: "has the lock",
        Lock.OTHER: "another host has the lock, but is not heard to have the IP yet",
        Lock.NOBODY: "nobody has the lock",
        Lock.WAITING: "the lock is not confirmed yet",
        Lock.UNKNOWN: "without a lock: nobody else answers for the IP",
    }
    return None, True, words[f.lock]


def _standby(f: Facts, relieved: bool) -> tuple[Event | None, bool, str]:
    keep = f.bound and not relieved and not f.outranked
    if f.intent is not Intent.RUN:
        return None, keep, f.intent.value
    if f.lock is Lock.MINE:
        doubts = f.doubtful and f.wire in (Wire.ANSWERED, Wire.LOOKING) and not f.bound
        why = "; but a check has just failed here, and another host may still have the IP" if doubts else ""
        return None if doubts else Event.ELECTED, keep, f"has the lock{why}"
    if f.lock is Lock.WAITING and f.accused and f.wire is Wire.SILENT and f.on_fault != "hold" and not f.outranked:
        return Event.FAULT, keep, "ZooKeeper is out of reach and the holder fell silent"
    if f.lock is Lock.UNKNOWN and not f.outranked:
        if f.on_fault == "claim" and f.wire is not Wire.LOOKING:
            return Event.FAULT, keep, "ZooKeeper is out of reach"
        if (f.on_fault == "probe" or f.bound) and f.wire in (Wire.SILENT, Wire.BLIND):
            heard = "nobody answers for the IP" if f.wire is Wire.SILENT else "the wire cannot be asked"
            return Event.FAULT, keep, f"without ZooKeeper, and {heard}"
    words = {
        Lock.OTHER: "another host has the lock",
        Lock.NOBODY: "is joining the queue",
        Lock.WAITING: "waits for ZooKeeper",
        Lock.UNKNOWN: "without ZooKeeper; another host answers for the IP"
        if f.wire is Wire.ANSWERED
        else "without ZooKeeper; asks the wire",
    }
    return None, keep, words[f.lock] + (", keeps the IP until it is heard" if keep else "")


################################################################################
# Frames: built by scapy when an IP is added, read by struct
################################################################################

BROADCAST = b"\xff" * 6
ANNOUNCE_AT = (0.0, 0.1, 1.0, 2.0, 5.0, 10.0)  # seconds after a bind: lost frames, slow switch ports, ARP locktime
ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD


class Frames(NamedTuple):
    """The frames of one address as sent from one MAC."""

    announce: tuple[bytes, ...]
    ask_all: bytes  # "who has it?" to everybody
    ask_one: bytes  # the same to one MAC: its first six bytes are the destination


class Heard(NamedTuple):
    """A frame of interest: somebody has, or asks for, an address."""

    address: str
    mac: bytes
    asks: bool  # a probe (RFC 5227, section 2.1.1), not a claim
    broadcast: bool


def build_frames(address: PlainAddress, mac: bytes, own: Mapping[int, str]) -> Frames:
    """All frames for one address. `own` has this host's link-local IPv6 address under 6, if there is one.

    IPv4 (RFC 5227): both forms of gratuitous ARP, since some devices heed only one; the reply names our own MAC as
    target, which lets it override entries younger than Linux's locktime (arp_is_garp() in net/ipv4/arp.c). Probes
    have the sender 0.0.0.0, so that they change nobody's cache. IPv6 (RFC 4861, section 7.2.6): NA with Override.
    """
    return _arp_frames(address, mac) if address.version == 4 else _nd_frames(address, mac, own.get(6))


def _mac_text(mac: bytes) -> str:
    return mac.hex(":")


def _arp_frames(address: PlainAddress, mac: bytes) -> Frames:
    from scapy.layers.l2 import ARP, Ether

    src, ip, everyone = _mac_text(mac), str(address), "ff:ff:ff:ff:ff:ff"
    ether = Ether(src=src, dst=everyone)
    request = ether / ARP(op=1, hwsrc=src, psrc=ip, hwdst="00:00:00:00:00:00", pdst=ip)
    reply = ether / ARP(op=2, hwsrc=src, psrc=ip, hwdst=src, pdst=ip)
    probe = bytes(ether / ARP(op=1, hwsrc=src, psrc="0.0.0.0", hwdst="00:00:00:00:00:00", pdst=ip))
    return Frames((bytes(request), bytes(reply)), probe, probe)


def _nd_frames(address: PlainAddress, mac: bytes, own: str | None) -> Frames:
    from scapy.layers.inet6 import (
        ICMPv6ND_NA,
        ICMPv6ND_NS,
        ICMPv6NDOptDstLLAddr,
        ICMPv6NDOptSrcLLAddr,
        IPv6,
    )
    from scapy.layers.l2 import Ether

    src, ip, low = _mac_text(mac), str(address), address.packed[-3:]
    group = str(ipaddress.IPv6Address(bytes.fromhex("ff0200000000000000000001ff") + low))
    na = ICMPv6ND_NA(R=0, S=0, O=1, tgt=ip) / ICMPv6NDOptDstLLAddr(lladdr=src)
    announce = bytes(Ether(src=src, dst="33:33:00:00:00:01") / IPv6(src=ip, dst="ff02::1", hlim=255) / na)
    ask = ICMPv6ND_NS(tgt=ip) / ICMPv6NDOptSrcLLAddr(lladdr=src) if own else ICMPv6ND_NS(tgt=ip)
    sender = own or "::"
    group_mac = "33:33:" + (b"\xff" + low).hex(":")
    to_all = bytes(Ether(src=src, dst=group_mac) / IPv6(src=sender, dst=group, hlim=255) / ask)
    to_one = bytes(Ether(src=src, dst=group_mac) / IPv6(src=sender, dst=ip if own else group, hlim=255) / ask)
    return Frames((announce,), to_all, to_one)


def read_frame(frame: bytes) -> Heard | None:
    """An ARP packet or a neighbour solicitation / advertisement; None for anything else, however malformed.

    Hop limit 255 proves that no router forwarded it (RFC 4861, section 7.1).
    """
    if len(frame) < 42:
        return None
    broadcast, kind = bool(frame[0] & 1), int.from_bytes(frame[12:14], "big")
    if kind == ETH_P_ARP and frame[14:20] == b"\x00\x01\x08\x00\x06\x04":
        mac, sender, target = frame[22:28], frame[28:32], frame[38:42]
        asks = sender == b"\0\0\0\0"
        if asks and frame[20:22] != b"\0\1":
            return None
        return Heard(socket.inet_ntoa(target if asks else sender), mac, asks, broadcast)
    if kind == ETH_P_IPV6 and len(frame) >= 78 and frame[20:22] == b"\x3a\xff" and frame[54] in (135, 136):
        address = str(ipaddress.IPv6Address(frame[62:78]))
        return Heard(address, frame[6:12], frame[54] == 135, broadcast)
    return None


################################################################################
# Network: the only place that knows netlink and packet sockets
################################################################################

IFF_UP, IFF_NOARP, IFF_LOWER_UP = 0x1, 0x80, 0x10000  # <linux/if.h>
IFA_F_NODAD, IFA_F_TENTATIVE, IFA_F_NOPREFIXROUTE = 0x02, 0x40, 0x200  # <linux/if_addr.h>
IFA_PROTO_LINK = 0x4C  # marks our addresses (IFA_PROTO, Linux 5.18): never touch one that LinK did not add
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS, IFA_PROTO = 1, 2, 6, 8, 11  # the same
RTM_NEWADDR, RTM_DELADDR = 20, 21  # <linux/rtnetlink.h>
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400  # <linux/netlink.h>
RTMGRP = 0x1 | 0x10 | 0x100  # link, IPv4 and IPv6 address groups, <linux/rtnetlink.h>
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33  # <asm-generic/socket.h>
# Classic BPF: IPv6, next header ICMPv6, type 135 or 136 (neighbour solicitation, advertisement).
ND_FILTER = (
    *((0x30, 0, 0, 20), (0x15, 0, 4, 58), (0x30, 0, 0, 54), (0x15, 1, 0, 135), (0x15, 0, 1, 136)),
    *((0x06, 0, 0, 0x40000), (0x06, 0, 0, 0)),
)


class Link(NamedTuple):
    """The interface as it is now; number 0 where there is none."""

    number: int = 0  # its index
    mac: bytes = b""
    up: bool = False  # administratively up, with carrier
    arp: bool = False  # the wire can be asked at all
    trouble: str = "the interface does not exist"


class Network:
    """Addresses, link state and frames of one interface, for the loop's thread only.

    pyroute2 and rtnetlink(7) for addresses, AF_PACKET sockets for frames (packet(7)).
    A simulated one has the same methods.
    """

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self._index = 0
        self._ipr: Any = None
        self._packets: list[socket.socket] = []
        self._saved: set[Address] = set()  # added by us on a kernel that does not keep IFA_PROTO
        self._macs: set[str] = set()  # of all of this machine's interfaces: another one on the same LAN is no rival
        self._requests = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._hints = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._hints.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._hints.bind((0, RTMGRP))

    def sync(self) -> tuple[Link, dict[Address, bool], dict[int, str]]:
        """The link, its addresses (True: LinK added it), and this host's own one per IP version (6: link-local).

        The interface is looked up by name each time, so one that was made anew is found.
        """
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self._ipr = self._ipr or IPRoute()
            index = socket.if_nametoindex(self.interface)
            if index != self._index:
                self._open(index)
            links = list(self._ipr.get_links())
            self._macs = {str(msg.get_attr("IFLA_ADDRESS")) for msg in links}
            return next((self._link(msg) for msg in links if msg["index"] == index), Link()), *self._addresses(index)
        except (OSError, NetlinkError) as error:  # it is not there, or went while we looked; its end is reported
            log.debug("%s: %s", self.interface, error)
            self._open(0)
            return Link(), {}, {}

    def _link(self, msg: Any) -> Link:
        flags, mac = msg["flags"], msg.get_attr("IFLA_ADDRESS") or ""
        up, carrier = bool(flags & IFF_UP), bool(flags & IFF_LOWER_UP)
        trouble = "" if up and carrier else f"{self.interface} {'has no carrier' if up else 'is down'}"
        usable = up and carrier and not flags & IFF_NOARP and len(mac) == 17
        return Link(msg["index"], bytes.fromhex(mac.replace(":", "")), up and carrier, usable, trouble)

    def _addresses(self, index: int) -> tuple[dict[Address, bool], dict[int, str]]:
        found: dict[Address, bool] = {}
        own: dict[int, str] = {}
        for msg in self._ipr.get_addr():
            if msg["index"] != index:
                continue
            text = msg.get_attr("IFA_LOCAL") or msg.get_attr("IFA_ADDRESS")
            ip = ipaddress.ip_interface(f"{text}/{msg['prefixlen']}")
            found[ip] = msg.get_attr("IFA_PROTO") == IFA_PROTO_LINK or ip in self._saved
            if (not found[ip] and ip.version == 4) or ip.is_link_local:
                own.setdefault(ip.version, str(ip.ip))
        return found, own

    def _open(self, index: int) -> None:
        for sock in self._packets:
            sock.close()
        self._packets, self._index = [], index
        for protocol in (0, ETH_P_ARP, ETH_P_IPV6) if index else ():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 23)  # a thousand IPs may answer at once
            if protocol == ETH_P_IPV6:
                _attach(sock, ND_FILTER)
                everyone = struct.pack("iHH8s", index, 2, 0, b"")  # struct packet_mreq, PACKET_MR_ALLMULTI
                sock.setsockopt(263, 1, everyone)  # SOL_PACKET, PACKET_ADD_MEMBERSHIP
            sock.bind((self.interface, protocol))
            self._packets.append(sock)

    def adopt(self, addresses: Iterable[str]) -> None:
        """Addresses an earlier process added, for kernels that do not keep IFA_PROTO."""
        self._saved.update(map(ipaddress.ip_interface, addresses))

    def ready(self, ip: Address) -> bool:
        """Whether the kernel takes packets for it: IPv6 is tentative for some milliseconds, even without DAD.

        /proc/net/if_inet6 (address, index, prefix length, scope, flags, interface) is cheaper than a dump by netlink.
        """
        if ip.version == 4:
            return True
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith(ip.ip.packed.hex())]
        return any(line[5] == self.interface and not int(line[4], 16) & IFA_F_TENTATIVE for line in lines)

    def add(self, ip: Address, lifetime: int = 0) -> None:
        """Bind, or refresh the lifetime in seconds (0: for ever). Raises OSError.

        RTM_NEWADDR with NLM_F_REPLACE: exact address and prefix, no prefix route, no duplicate address detection.
        """
        valid = lifetime or 0xFFFFFFFF
        preferred = valid if ip.version == 4 else 0  # never a source of this host's own traffic (RFC 6724, rule 3)
        more = (
            (IFA_FLAGS, struct.pack("I", IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if ip.version == 6 else 0))),
            (IFA_PROTO, struct.pack("B", IFA_PROTO_LINK)),
            (IFA_CACHEINFO, struct.pack("4I", preferred, valid, 0, 0)),
        )
        self._request(RTM_NEWADDR, NLM_F_REPLACE | NLM_F_CREATE, ip, self._index, *more)
        self._saved.add(ip)

    def remove(self, ip: Address) -> None:
        """Unbind; no error where it is not there. Raises OSError.

        RTM_DELADDR with prefix length: without it the kernel removes the first match, maybe not ours.
        """
        self._saved.discard(ip)
        try:
            self._request(RTM_DELADDR, 0, ip, self._index)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENOENT):
                raise

    def clear(self, interface: str, addresses: Iterable[str]) -> None:
        """Remove these from another interface, if it is there; no error where they are not."""
        for ip in map(ipaddress.ip_interface, addresses):
            with contextlib.suppress(OSError):
                self._request(RTM_DELADDR, 0, ip, socket.if_nametoindex(interface))

    def _request(self, kind: int, flags: int, ip: Address, index: int, *more: tuple[int, bytes]) -> None:
        """One request for an address and its acknowledgement (rtnetlink(7)). Raises OSError.

        Built here because pyroute2 takes 20 times as long, and a host may have to hand over hundreds of addresses.
        """
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        body = struct.pack("4BI", family, ip.network.prefixlen, 0, 0, index)
        for name, value in ((IFA_LOCAL, ip.ip.packed), (IFA_ADDRESS, ip.ip.packed), *more):
            body += struct.pack("HH", 4 + len(value), name) + value + bytes(-len(value) % 4)
        self._requests.send(struct.pack("I2H2I", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body)
        (error,) = struct.unpack_from("i", self._requests.recv(4096), 16)
        if error:
            raise OSError(-error, os.strerror(-error))

    def send(self, frames: Iterable[bytes]) -> None:
        """Through one persistent socket; a full queue, a downed or vanished interface is no error here."""
        for frame in frames if self._packets else ():
            try:
                self._packets[0].send(frame)
            except OSError as error:
                log.debug("send on %s: %s", self.interface, error)
                return

    def receive(self) -> Iterator[Heard]:
        """What the wire brought since the last call, without waiting."""
        for sock in self._packets[1:]:
            with contextlib.suppress(OSError):
                while True:
                    heard = read_frame(sock.recv(128))
                    if heard and _mac_text(heard.mac) not in self._macs:
                        yield heard

    def changed(self) -> bool:
        """Whether the kernel reported a change of a link or an address: a hint; so is an overrun (ENOBUFS)."""
        seen = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._hints.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                seen = True
        return seen

    def gateways(self) -> list[str]:
        """Default gateways reached through the interface."""
        routes = [r for family in (socket.AF_INET, socket.AF_INET6) for r in self._ipr.get_default_routes(family)]
        mine = [r.get_attr("RTA_GATEWAY") for r in routes if r.get_attr("RTA_OIF") == self._index]
        return [gateway for gateway in mine if gateway]

    def files(self) -> list[int]:
        """Descriptors that become readable when receive() or changed() has news."""
        return [sock.fileno() for sock in [*self._packets[1:], self._hints]]


def _attach(sock: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Attach a classic BPF program (struct sock_fprog, <linux/filter.h>)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))


################################################################################
# Coordinator: the only place that knows kazoo
################################################################################


class Contender(NamedTuple):
    """One place in the queue for a VIP, in the layout of kazoo's Lock recipe."""

    node: str
    host: str  # the identifier that Lock.contenders() shows
    session: int


class Record(NamedTuple):
    """What a host publishes about itself while its session lives."""

    mac: str
    addresses: tuple[str, ...]  # its own, on the interface: witnesses for the others
    boot: str

    def to_bytes(self) -> bytes:
        """As kept in ZooKeeper."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Never fails: what cannot be read is an empty record."""
        try:
            got = json.loads(data)
            bytes.fromhex(got["mac"].replace(":", ""))
            own = tuple(str(ipaddress.ip_address(each)) for each in got["addresses"])
            return cls(got["mac"], own, str(got["boot"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls("", (), "")


@dataclass
class _Queue:
    """The loop's view of one lock directory."""

    watch: Callable[[Any], None]
    children: list[str] = field(default_factory=list)
    known: dict[str, Contender] = field(default_factory=dict)
    shown: tuple[Contender, ...] | None = None  # the last listing of which every node is known
    joining: bool = False  # our create is out, or what it made is not listed yet
    created: bool = False  # it was answered; the next listing counts
    settling: bool = False  # that listing is being read
    leaving: bool = False  # forgotten, but our node may still be there
    refused_at: float = float("-inf")  # ZooKeeper said no to a request: it is made again a little later

    def complete(self) -> None:
        """Show the listing if all of it has been read."""
        if all(child in self.known for child in self.children):
            self.shown = tuple(self.known[child] for child in self.children)
            if self.settling:
                self.joining = self.settling = False


# kazoo's Lock names its nodes <32 hex digits>__lock__<sequence>; half of ours are the session's id.
UNKNOWN_HOST = "?"  # of a node that may not be read
NODE = re.compile(r"(?:([0-9a-f]{16})[0-9a-f]{16})?.*__lock__-?\d{10}$")


class Coordinator:
    """Who should hold each VIP, by kazoo's asynchronous calls; for the loop's thread only, never waits.

    `session` is the id and password, `timeout` what the server granted (s), `confirmed_at` the monotonic send time of
    the last answered request, `records` what the hosts publish. A simulated one has the same methods.

    Error handling: a request that is lost with its connection is forgotten, since everything is read anew after each
    connect. kazoo reports LOST only once it is connected again, and its recipes block while it is not (hence no
    `Lock` object here); `confirmed_at` lets the agent count the lease by itself. Listeners, watches and completions
    run in kazoo's threads and only post.
    """

    def __init__(
        self, config: Config, clock: Callable[[], float], post: Callable[..., None], changed: Callable[[str], None]
    ) -> None:
        self._config, self._clock, self._post, self._changed = config, clock, post, changed
        servers, slash, chroot = config.zookeeper.partition("/")
        self._servers, self._root = servers, (slash + chroot).rstrip("/") + config.zookeeper_root
        self._client: Any = None
        self._queues: dict[str, _Queue] = {}
        self._record = Record("", (), "")
        self._owners: dict[str | None, tuple[str, int]] = {}  # whose sessions they are, from the records
        self._dead: set[int] = set()  # sessions of this host's earlier processes
        self._pinging = self._ping_again = False
        self.syncing_since: float | None = None  # the leader was asked, and has not answered yet
        self._said: set[str] = set()
        self.connected = False
        self.session: tuple[int, bytes] | None = None
        self.timeout = config.session_timeout
        self.confirmed_at = clock()
        self.records: dict[str, Record] = {}

    def start(self, session: tuple[int, bytes] | None, record: Record) -> None:
        """Connect, re-attaching to an earlier process's session if given; tries for ever, at most 0.5 s apart."""
        self._record = record
        self._client = _kazoo_client(self._config, self._servers, session)
        connection = self._client._connection
        connect = connection._connect

        def negotiated(*args: Any) -> Any:  # kazoo has no public word for what the server granted
            timeouts = connect(*args)
            self._post(self._granted, timeouts[0] * 1.5 / 1000)
            return timeouts

        connection._connect = negotiated
        # A server that accepts and says nothing, as one that starts may: kazoo would wait for a whole session.
        invoke, limit = connection._invoke, _patience(self._config)
        connection._invoke = lambda timeout, *args, **more: invoke(min(timeout, limit), *args, **more)
        self._client.add_listener(lambda state: self._post(self._on_state, str(state), self._client.client_id))
        self._client.start_async()

    def _granted(self, timeout: float) -> None:
        if timeout != self.timeout:
            log.info("ZooKeeper grants a session timeout of %.1f s, not %.1f s", timeout, self.timeout)
        self.timeout = timeout
        if self._config.at_most_one and timeout < 2:
            self._complain(f"ZooKeeper grants {timeout:.1f} s; at-most-one needs 2 s: raise maxSessionTimeout")

    def _on_state(self, state: str, client_id: tuple[int, bytes] | None) -> None:
        self._pinging, self.syncing_since = False, None
        for queue_ in self._queues.values():
            queue_.joining = queue_.created = queue_.settling = False
        self.connected = state == "CONNECTED" and client_id is not None
        if not self.connected:
            log.warning("ZooKeeper: %s", "the session has ended" if state == "LOST" else "out of reach")
            if state == "LOST":
                self._forget_session()
        elif client_id is not None:
            self._attach(client_id)
        self._changed("")

    def _forget_session(self) -> None:
        self.session = None
        for queue_ in self._queues.values():
            queue_.shown, queue_.known = None, {}

    def _attach(self, client_id: tuple[int, bytes]) -> None:
        again = self.session is not None and self.session[0] == client_id[0]
        if not again:
            self._forget_session()
        log.info("ZooKeeper: connected, session 0x%x%s", client_id[0] & (1 << 64) - 1, " again" if again else "")
        self.session = client_id
        for queue_ in self._queues.values() if not self._config.at_most_one else ():
            queue_.shown = None  # while we were away somebody may have taken a lock of ours
        self.publish(self._record)
        for address in self._queues:
            self._list(address)

    def _ask(self, then: Callable[[Any], None], call: str, *args: Any, **more: Any) -> None:
        """Call kazoo's `<call>_async`; `then` gets the value, or the exception of an answer that says no."""
        if self.connected:
            self._link(then, getattr(self._client, call + "_async")(*args, **more))

    def _link(self, then: Callable[[Any], None], result: Any) -> None:
        sent, session = self._clock(), self.session
        result.rawlink(lambda r: self._post(self._answered, sent, session, then, r.exception or r.value))

    def _answered(self, sent: float, session: Any, then: Callable[[Any], None], answer: Any) -> None:
        if isinstance(answer, Exception) and type(answer).__name__ in _NO_ANSWER:
            return
        if session == self.session:
            self.confirmed_at = max(self.confirmed_at, sent)
            if isinstance(answer, Exception) and type(answer).__name__ not in _ORDINARY:
                self._complain(f"ZooKeeper refuses: {type(answer).__name__} {answer}".strip())
            then(answer)

    def _complain(self, text: str) -> None:
        level = logging.DEBUG if text in self._said else logging.ERROR
        self._said.add(text)
        log.log(level, "%s", text)

    def _path(self, address: str, node: str = "") -> str:
        return f"{self._root}/ips/{address}" + (f"/{node}" if node else "")

    def queue(self, address: str) -> tuple[Contender, ...] | None:
        """The contenders, first the holder; None before the first answer in this session."""
        queue_ = self._queues.get(address)
        return queue_.shown if queue_ else None

    def watch(self, address: str) -> None:
        """Begin to follow the queue of an address: one child watch, set again with each listing."""
        queue_ = self._queues.get(address)
        if queue_ is None or queue_.leaving:
            queue_ = self._queues.setdefault(address, _Queue(watch=lambda event: self._post(self._list, address)))
            queue_.leaving = False
            self._list(address)

    def _list(self, address: str) -> None:
        if queue_ := self._queues.get(address):
            self._ask(lambda a: self._listed(address, a), "get_children", self._path(address), watch=queue_.watch)

    def _listed(self, address: str, answer: Any) -> None:
        def made(answer: Any) -> None:
            (self._listed if isinstance(answer, Exception) else lambda *_: self._list(address))(address, answer)

        queue_ = self._queues.get(address)
        if queue_ is None:
            return
        if isinstance(answer, Exception):
            if type(answer).__name__ == "NoNodeError" and queue_.leaving:
                self._queues.pop(address)
            elif type(answer).__name__ == "NoNodeError":
                self._ask(made, "ensure_path", self._path(address))
            else:
                queue_.refused_at = self._clock()
            return
        children = sorted((c for c in answer if NODE.match(c)), key=lambda c: int(c[-10:]))
        queue_.known = {child: queue_.known[child] for child in children if child in queue_.known}
        queue_.children = children
        queue_.settling, queue_.created = queue_.settling or queue_.created, False
        for child in children:
            owner = self._owners.get(NODE.match(child)[1])  # type: ignore[index]
            if owner and child not in queue_.known:
                queue_.known[child] = Contender(child, *owner)
            elif child not in queue_.known:
                self._ask(lambda a, c=child: self._got(address, c, a), "get", self._path(address, child))  # type: ignore[misc]
        self._show(address, queue_)

    def _got(self, address: str, child: str, answer: Any) -> None:
        queue_ = self._queues.get(address)
        if queue_ is None or child not in queue_.children:
            return
        if type(answer).__name__ == "NoNodeError":
            queue_.children.remove(child)
        elif isinstance(answer, Exception):  # it may not be read; it has its place all the same
            queue_.known[child] = Contender(child, UNKNOWN_HOST, 0)
        else:
            data, stat = answer
            queue_.known[child] = Contender(child, (data or b"").decode(errors="replace"), stat.ephemeralOwner)
        self._show(address, queue_)

    def _show(self, address: str, queue_: _Queue) -> None:
        queue_.complete()
        if queue_.leaving and queue_.shown is not None and not queue_.joining:
            if self._mine(address):
                self.leave(address)  # its end is seen by the watch
            else:
                self._queues.pop(address)
                self._ask(lambda answer: None, "delete", self._path(address))
            return
        twice = self._mine(address)[1:]  # the answer to our first create was lost
        for contender in queue_.shown or ():
            if contender.session in self._dead or contender in twice:
                self._delete(address, contender.node)
        self._changed(address)

    def _mine(self, address: str) -> list[Contender]:
        owner = self.session[0] if self.session else None
        return [c for c in self.queue(address) or () if c.session == owner]

    def join(self, address: str) -> None:
        """Put a node at the end of the queue, unless one is there or on its way.

        What counts is the listing after the create, also if its answer is lost.
        """
        queue_ = self._queues.get(address)
        if queue_ is None or queue_.joining or not self.connected or self._mine(address):
            return
        if self._clock() - queue_.refused_at < REFUSED:
            return
        queue_.joining = True

        def then(answer: Any) -> None:
            if isinstance(answer, Exception) and type(answer).__name__ not in _ORDINARY:
                queue_.refused_at = self._clock()
            queue_.created = True
            self._list(address)

        node = self._path(address, f"{_hex(self.session[0] if self.session else 0)}{uuid.uuid4().hex[16:]}__lock__")
        self._ask(then, "create", node, self._config.hostname.encode(), ephemeral=True, sequence=True, makepath=True)

    def leave(self, address: str) -> None:
        """Delete our node."""
        for contender in self._mine(address):
            self._delete(address, contender.node)

    def _delete(self, address: str, node: str) -> None:
        self._ask(lambda answer: self._gone(address, [node]), "delete", self._path(address, node))

    def _gone(self, address: str, nodes: Sequence[str]) -> None:
        queue_ = self._queues.get(address)
        if queue_ and queue_.shown:
            queue_.children = [child for child in queue_.children if child not in nodes]
            queue_.shown = tuple(contender for contender in queue_.shown if contender.node not in nodes)
            self._changed(address)

    def take(self, address: str, mine: Contender, ahead: Sequence[Contender]) -> None:
        """In one transaction (ZooKeeper `multi`): check that our node exists, delete exactly these nodes."""
        if not self.connected:
            return
        transaction = self._client.transaction()
        transaction.check(self._path(address, mine.node), -1)
        for contender in ahead:
            transaction.delete(self._path(address, contender.node))

        def then(answers: Any) -> None:
            if isinstance(answers, list) and not any(isinstance(a, Exception) for a in answers):
                self._gone(address, [contender.node for contender in ahead])
            else:
                self._list(address)

        self._link(then, transaction.commit_async())

    def forget(self, address: str) -> None:
        """Leave the queue and stop following it; the lock's directory goes with its last contender."""
        self.watch(address)
        self._queues[address].leaving = True  # until a listing shows that our node is gone, also after an outage
        self.leave(address)
        self._list(address)

    def publish(self, record: Record) -> None:
        """Tell the other hosts about this one: an ephemeral node per host.

        One left by an earlier process of this host is replaced, and its locks with it.
        """
        self._record = record
        path, data = f"{self._root}/hosts/{self._config.hostname}", record.to_bytes()

        def created(answer: Any) -> None:
            if type(answer).__name__ == "NodeExistsError":
                self._ask(found, "get", path)
            else:
                self._list_hosts()  # not before: a watch needs a directory

        def found(answer: Any) -> None:
            if isinstance(answer, Exception):
                return
            owner, theirs = answer[1].ephemeralOwner, Record.parse(answer[0])
            if self.session and owner == self.session[0]:
                self._ask(self._list_hosts, "set", path, data)
            elif theirs.mac == record.mac and (theirs.mac or theirs.boot == record.boot):
                self._dead.add(owner)
                self._ask(lambda a: self.publish(self._record), "delete", path)
                for address in self._queues:
                    self._list(address)
            else:
                self._complain(f"another host calls itself {self._config.hostname}; give each its own hostname")

        self._ask(created, "create", path, data, ephemeral=True, makepath=True)

    def _list_hosts(self, _: Any = None) -> None:
        def listed(answer: Any) -> None:
            if isinstance(answer, Exception):
                return
            self._owners = {owner: who for owner, who in self._owners.items() if who[0] in answer}
            for gone in set(self.records) - set(answer):
                del self.records[gone]
            for host in answer:
                path = f"{self._root}/hosts/{host}"
                self._ask(lambda a, h=host: got(h, a), "get", path, watch=self._poke_hosts)  # type: ignore[misc]

        def got(host: str, answer: Any) -> None:
            if not isinstance(answer, Exception):
                self.records[host] = Record.parse(answer[0])
                self._owners[_hex(answer[1].ephemeralOwner)] = (host, answer[1].ephemeralOwner)
            self._changed("")

        self._ask(listed, "get_children", f"{self._root}/hosts", watch=self._poke_hosts)

    def _poke_hosts(self, event: Any) -> None:
        self._post(self._list_hosts)

    def retry(self) -> None:
        """Ask again for the queues that ZooKeeper has not shown, also after a refusal; to be called now and then."""
        for address, queue_ in self._queues.items():
            if queue_.shown is None and self._clock() - queue_.refused_at >= REFUSED:
                self._list(address)

    def ping(self) -> None:
        """Have the session confirmed, one request at a time; finding our record gone publishes it again."""

        def then(stat: Any) -> None:
            again, self._pinging, self._ping_again = self._ping_again, False, False
            if again:  # who asked meanwhile wants an answer to a request sent since then
                self.ping()
            if stat is None:
                self.publish(self._record)

        if not self.connected and self._clock() - self.confirmed_at > self.timeout:
            self._client.last_zxid = 0  # else an ensemble that lost its data would turn us away for ever
        self._ping_again = self._pinging
        if self.connected and not self._pinging:
            self._pinging = True
            self._ask(then, "exists", f"{self._root}/hosts/{self._config.hostname}")

    def sync(self) -> None:
        """Ask the leader whether it is there: a read is answered by any server, also by one whose leader is gone."""
        if self.connected and self.syncing_since is None:
            self.syncing_since = self._clock()

            def then(answer: Any) -> None:
                self.syncing_since = None

            self._ask(then, "sync", f"{self._root}/hosts")

    def drop(self) -> None:
        """Give up a connection that does not answer; kazoo itself would wait for two thirds of the session."""
        connection = getattr(self._client.handler, "connection", None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self, wait: float) -> None:
        """End the session (its nodes go at once), waiting at most so many seconds for the answer."""
        if self._client is not None:
            thread = threading.Thread(target=self._client.stop, daemon=True)
            thread.start()
            thread.join(wait)


def _hex(session: int) -> str:
    return f"{session & (1 << 64) - 1:016x}"


REFUSED = 0.9  # seconds before a request that ZooKeeper refused is made again
_ORDINARY = ("NoNodeError", "NodeExistsError", "NotEmptyError")  # somebody else was there first, or still is
_NO_ANSWER = ("ConnectionLoss", "SessionExpiredError", "ConnectionClosedError", "AuthFailedError")


def _patience(config: Config) -> float:
    """Seconds for one server to take a connection, or to answer its first words, before the next one is tried."""
    return max(0.5, config.session_timeout / 4)


def _kazoo_client(config: Config, servers: str, session: tuple[int, bytes] | None) -> Any:
    """A client that tries the next server soon and never stops trying (kazoo's own limits: T per server, one hour)."""
    from kazoo.client import KazooClient
    from kazoo.handlers.threading import SequentialThreadingHandler
    from kazoo.retry import KazooRetry
    from kazoo.security import make_digest_acl

    class Handler(SequentialThreadingHandler):  # type: ignore[misc]
        """Connects with a deadline of its own: one black-holed server must not cost the session."""

        connection: Any = None  # the last one, for Coordinator.drop()

        def create_connection(self, *args: Any, **more: Any) -> Any:
            more["timeout"] = min(more["timeout"], _patience(config))
            self.connection = super().create_connection(*args, **more)
            return self.connection

    more: dict[str, Any] = {}
    if config.zookeeper_auth:
        user, _, password = config.zookeeper_auth.partition(":")
        more["auth_data"] = [("digest", config.zookeeper_auth)]
        more["default_acl"] = [make_digest_acl(user, password, all=True)]
    if config.zookeeper_tls_ca:
        more.update(use_ssl=True, ca=config.zookeeper_tls_ca, check_hostname=True)
        more.update(certfile=config.zookeeper_tls_cert or None, keyfile=config.zookeeper_tls_key or None)
    retry = KazooRetry(max_tries=-1, delay=0.1, max_delay=0.5, max_jitter=0.3)
    quiet = logging.getLogger("kazoo")
    return KazooClient(
        servers, config.session_timeout, session, Handler(), connection_retry=retry, logger=quiet, **more
    )


################################################################################
# State directory: what must survive the process
################################################################################


class Store:
    """`ips.json` (what the operator added; never silently lost) and `session.json` (what a restart adopts).

    Bound to this host, this boot, this interface and this ensemble: a copied directory gives away no session.
    """

    def __init__(self, config: Config, mac: str) -> None:
        self._dir = Path(config.state_dir)
        self._interval = config.health_check_interval
        ensemble = [config.zookeeper, config.zookeeper_root, config.interface]
        self.identity = [config.hostname, boot_id(), mac, *ensemble]

    def load_ips(self) -> list[VirtualIP]:
        """A file that cannot be understood is set aside with an error and nothing is removed from it."""
        path = self._dir / "ips.json"
        try:
            return [VirtualIP.parse(raw, self._interval) for raw in json.loads(path.read_bytes())["ips"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError, LinkError) as error:
            aside = path.with_name(f"ips.json.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
            log.error("%s cannot be read (%s): set aside as %s; add its IPs again or repair it", path, error, aside)
            with contextlib.suppress(OSError):
                path.rename(aside)
            return []

    def save_ips(self, vips: Iterable[VirtualIP]) -> None:
        """Raises Unavailable where it cannot be written; then the old file is still there."""
        try:
            self._write("ips.json", {"ips": [vip.to_json() for vip in vips]}, sync=True)
        except OSError as error:
            detail = f"{self._dir} cannot be written: {error.strerror}"
            raise Unavailable("state directory", detail=detail) from None

    def load_session(self) -> dict[str, Any]:
        """What the last process of this host left; empty where it is another host's, another boot's, or unreadable."""
        try:
            got = json.loads((self._dir / "session.json").read_bytes())
            if got["identity"] == self.identity:
                return _checked_session(got)
            log.warning("session.json is not of this host, boot, interface and configuration: starting afresh")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.warning("session.json cannot be used (%s): starting afresh", error)
        return {}

    def elsewhere(self) -> tuple[str, list[str]]:
        """The other interface that an earlier process of this host worked on in this boot, and what it had bound."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            got = json.loads((self._dir / "session.json").read_bytes())
            if got["identity"][:2] == self.identity[:2] and got["identity"][-1] != self.identity[-1]:
                return str(got["identity"][-1]), list(map(str, got["addresses"]))
        return "", []

    def save_session(self, content: Mapping[str, Any]) -> None:
        """Best effort: without it a restart is a start."""
        try:
            self._write("session.json", {"identity": self.identity, **content}, sync=False)
        except OSError as error:
            log.debug("session.json: %s", error)

    def _write(self, name: str, content: Any, sync: bool) -> None:
        """Atomic: a kill at any moment leaves the old file or the new one."""
        path = self._dir / name
        with open(path.with_suffix(".new"), "w", encoding="utf-8", opener=_private) as file:
            json.dump(content, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        path.with_suffix(".new").replace(path)
        if sync:
            directory = os.open(self._dir, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _checked_session(got: dict[str, Any]) -> dict[str, Any]:
    """The content of session.json; raises one of many errors where something in it is not what it should be."""
    if got.get("session"):
        _hex(got["session"][0]), bytes.fromhex(got["session"][1])
    list(map(ipaddress.ip_interface, got.get("addresses", [])))
    list(map(State, got.get("states", {}).values()))
    macs = {str(host): str(mac) for host, mac in got.get("macs", {}).items()}
    return {**got, "hosts": dict(got.get("hosts", {})), "macs": macs}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def boot_id() -> str:
    """Of the running kernel (proc(5)): sessions do not outlive it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


################################################################################
# Health checks
################################################################################


def check_tcp(check: HealthCheck, timeout: float) -> None:
    """Raises OSError where no connection comes about in `timeout` seconds."""
    socket.create_connection((check.host, check.port), timeout).close()


def check_http(check: HealthCheck, timeout: float) -> None:
    """GET must be answered by 2xx or 3xx. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(check.host, check.port, timeout=timeout)
    try:
        connection.request("GET", check.path, headers={"User-Agent": f"LinK/{VERSION}", "Connection": "close"})
        status = connection.getresponse().status
        if not 200 <= status < 400:
            raise OSError(f"HTTP status {status}")
    finally:
        connection.close()


def run_check(check: HealthCheck, timeout: float) -> str:
    """'' if healthy, else the reason. Runs in a thread of its own."""
    try:
        (check_http if check.type == "HTTP" else check_tcp)(check, timeout)
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a name that IDNA refuses
        return f"{check.type} {check.host}:{check.port}: {error or type(error).__name__}"


@dataclass(eq=False)
class Probe:
    """The running record of one health check; loop thread only."""

    check: HealthCheck
    ok: bool = False
    fails: int = 0
    passes: int = 0
    running: bool = False
    asked_at: float | None = None  # a run that has not been counted yet
    began_at: float = float("-inf")  # the last run
    reason: str = "not checked yet"

    def count(self, reason: str, fall: int, rise: int) -> None:
        """Take in one result."""
        self.asked_at = None
        self.fails, self.passes = (self.fails + 1, 0) if reason else (0, self.passes + 1)
        if reason:
            self.reason = reason
        if self.fails >= fall:
            self.ok = False
        if self.passes >= rise:
            self.ok, self.reason = True, ""


################################################################################
# The wire: whom to ask, how often, and what silence means
################################################################################

RIVAL_FRESH = 1.0  # seconds for which another host heard to have a VIP that we have counts as there
RIVAL_STAYS = 0.4  # seconds of a rival's staying after our defence that prove its claim the better one
SLOW = 1.0  # seconds between the looks of a host that need not be quick
DOUBT = 0.4  # seconds between the looks of a binder without a lock


class Look(Enum):
    """How a VIP is to be watched on the wire."""

    NONE = 0
    SLOW = 1  # one per second and holder: the second and later standbys
    FAST = 2  # one stream of probes per holder: the first standby, and all where ZooKeeper is silent
    DOUBT = 3  # one VIP after the other, by broadcast: bound without a lock, or with a rival
    MEET = 4  # one VIP after the other, unicast: the holder has not answered for it in this term
    ALL = 5  # broadcast for this VIP itself: nothing is known of a holder, or we are letting go


@dataclass
class Hearing:
    """What was heard of other hosts that have one VIP, in this term of its holder."""

    mac: bytes = b""
    at: float = float("-inf")
    since: str = ""
    rival_since: float = float("-inf")
    misses: int = 0  # probes in a row without an answer; probe_count of them are silence
    pending: bool = False  # asked, not answered yet

    def fresh(self, now: float) -> bool:
        """Whether the other host was heard just now."""
        return now - self.at <= RIVAL_FRESH


@dataclass(eq=False)
class Stream:
    """The probes that go to one holder host, however many VIPs it has."""

    look: Look
    mac: bytes
    members: list[Managed] = field(default_factory=list)
    target: int = 0
    misses: int = 0
    next_at: float = 0.0

    def member(self) -> Managed:
        """The VIP to ask for."""
        return self.members[self.target % len(self.members)]


class Prober:
    """Sends the probes and counts what is not answered. Runs in the loop; sends through `send`."""

    def __init__(self, config: Config, send: Callable[[Iterable[bytes]], None]) -> None:
        self.interval, self.count, self._send = config.probe_interval, config.probe_count, send
        self._streams: dict[tuple[Look, bytes], Stream] = {}
        self.witness_frames: list[bytes] = []
        self.suspects = False  # a holder has missed a probe: ZooKeeper may be needed soon
        self.due = float("inf")

    def arrange(self, wanted: Iterable[tuple[Managed, Look, bytes]], now: float) -> None:
        """Sort the VIPs into streams; a stream that goes on keeps its pace and its misses."""
        old, self._streams = self._streams, {}
        for managed, look, mac in wanted:
            if look is Look.NONE or managed.frames is None:
                continue
            key = (look, b"" if look is Look.ALL else mac)
            stream = self._streams.get(key)
            if stream is None:
                before = old.get(key)
                pace = now if before is None else before.next_at
                stream = self._streams[key] = Stream(*key, next_at=pace, target=before.target if before else 0)
                stream.misses = before.misses if before else 0
            stream.members.append(managed)
        self.due = min((s.next_at for s in self._streams.values()), default=float("inf"))

    def run(self, now: float) -> list[Managed]:
        """Send what is due; the VIPs whose silence is now proven."""
        silent: list[Managed] = []
        for stream in self._streams.values():
            if now >= stream.next_at:
                rates = stream.mac and stream.look in (Look.FAST, Look.SLOW)
                ask = self._ask_all if stream.look is Look.ALL else self._ask_one if rates else self._ask_in_turn
                silent += ask(stream, now)
        self.due = min((s.next_at for s in self._streams.values()), default=float("inf"))
        return silent

    def _ask_all(self, stream: Stream, now: float) -> list[Managed]:
        silent = []
        for managed in stream.members:
            hearing = managed.hearing
            if hearing.pending and hearing.misses < self.count:
                hearing.misses += 1
                if hearing.misses == self.count:
                    silent.append(managed)
                    continue
            hearing.pending = True
            self._send((managed.frames.ask_all,) if managed.frames else ())
        self._send(self.witness_frames)
        young = any(managed.hearing.misses < self.count for managed in stream.members)
        stream.next_at = now + max(self.interval if young else 4 * self.interval, len(stream.members) / 1000)
        return silent

    def _ask_in_turn(self, stream: Stream, now: float) -> list[Managed]:
        """One question for one VIP; no verdict over the others follows."""
        stream.target += 1
        managed = stream.member()
        hearing = managed.hearing
        silent = hearing.pending and hearing.misses == self.count - 1
        hearing.misses, hearing.pending = min(self.count, hearing.misses + hearing.pending), True
        if managed.frames:
            self._send([stream.mac + managed.frames.ask_one[6:] if stream.mac else managed.frames.ask_all])
        stream.next_at = now + {Look.DOUBT: DOUBT, Look.MEET: 4 * self.interval}.get(stream.look, SLOW)
        return [managed] if silent else []

    def _ask_one(self, stream: Stream, now: float) -> list[Managed]:
        """Unicast to one VIP of the holder after the other; the last probe before the verdict asks for all, of all."""
        hearing = stream.member().hearing
        stream.misses = stream.misses + 1 if hearing.pending else 0
        if not stream.misses:
            stream.target += 1
        stream.next_at = now + (self.interval if stream.look is Look.FAST else SLOW)
        if stream.misses >= self.count:
            return self._verdict(stream, now)
        if stream.misses:
            self._send(self.witness_frames)
            self.suspects = self.suspects or stream.look is Look.FAST
        if stream.misses and stream.misses == self.count - 1:
            for managed in stream.members:
                managed.hearing.pending = True
                self._send((managed.frames.ask_all,) if managed.frames else ())
            stream.next_at = now + self.interval / 2 + len(stream.members) * 0.0003  # all of them have to answer
        else:
            frames = stream.member().frames
            stream.member().hearing.pending = True
            self._send((stream.mac + frames.ask_one[6:],) if frames else ())
        return []

    def _verdict(self, stream: Stream, now: float) -> list[Managed]:
        """Whoever is not taken over now (no witness answered, ZooKeeper is slow) is asked again soon, all at once."""
        silent = [managed for managed in stream.members if managed.hearing.pending]
        for managed in silent:
            managed.hearing.misses = self.count
        stream.misses = max(0, self.count - 2)
        stream.next_at = now + max(4 * self.interval if stream.look is Look.FAST else SLOW, len(stream.members) / 100)
        return silent

    def about_to_claim(self, managed: Managed) -> bool:
        """Whether the last probe before a verdict is out for this VIP: the moment when two claims would meet."""
        look, mac = managed.look
        stream = self._streams.get((look, b"" if look is Look.ALL else mac))
        if stream is None or not managed.hearing.pending:
            return False
        misses = managed.hearing.misses if stream.look is Look.ALL else stream.misses
        return misses == self.count - 1

    def restart(self, managed: Managed) -> None:
        """Begin to count anew for this VIP."""
        managed.hearing.misses, managed.hearing.pending = 0, False

    def distrust(self) -> None:
        """Forget every probe that is out: this process was late, not the holder."""
        for stream in self._streams.values():
            stream.misses = 0
            for managed in stream.members:
                self.restart(managed)


################################################################################
# Agent: the loop that gathers facts and carries out decisions
################################################################################

LATE = 1.0  # a loop this late (stopped, suspended, starved) looks first and acts after
SLICE = 0.02  # seconds the loop decides before it listens again
TICK = 1.0  # everything is decided again this often: level-triggered
JOIN_LATER = 2.0  # a host that hears another one have the IP gives it so long to join an empty queue first
BACKOFF = (1.0, 60.0)  # doubled by each take-over that was contested, up to this many seconds without another
ALONE = 10.0  # a host that hears nobody at all, nor ZooKeeper, takes an IP only after so many seconds
ANSWER = 0.1  # seconds within which ZooKeeper must answer when a holder is to be replaced
DOUBTS = 2.0  # seconds for which a host that has the lock and saw a check fail lets the IP be served where it is
CHECK_AGAIN = 0.5  # seconds between its checks meanwhile
LINGER = 0.05  # seconds an address stays after its new holder is heard: requests are still on their way to the old one


@dataclass(eq=False)
class Managed:
    """One VIP at run time. Loop thread only; `state` is written by Agent._enter alone."""

    vip: VirtualIP
    probes: list[Probe]
    since: str
    state: State = State.FAILING
    reason: str = "not checked yet"
    intent: Intent = Intent.RUN
    frames: Frames | None = None
    hearing: Hearing = field(default_factory=Hearing)
    look: tuple[Look, bytes] = (Look.NONE, b"")
    term: str = ""  # the holder's lock node
    nodes: set[str] | None = None  # the others in the queue as last seen
    unwanted_since: float = float("inf")  # relieved, and lingering
    letting_go: float | None = None  # since when we wait to be relieved
    verify: bool = False  # bound, but look before trusting it
    rivalled: bool = False  # bound without a lock, and so is another host
    adopted: bool = False  # bound by an earlier process, which has announced it
    taking: bool = False  # POST lock
    doubts_since: float | None = None  # has the lock, and a check has failed
    schedule: int = 0  # which announcement schedule is valid
    defended_at: float = float("-inf")
    conflicts: int = 0  # that no move explains
    conflict_mac: str = ""
    rival: str = ""
    rival_at: float = float("-inf")
    doubted_at: float = float("-inf")  # a rival was heard: is the lock still ours?
    empty_since: float | None = None
    quiet_until: float = float("-inf")  # accuses nobody before
    backoff: float = BACKOFF[0]
    took: tuple[int, str] = (0, "")  # the session that we declared dead, and its node
    took_at: float = float("-inf")
    bound_at: float = float("-inf")
    bind_error: str = ""
    bind_fails: int = 0
    bind_at: float = float("-inf")  # next try
    waiters: list[tuple[Callable[[], bool], Future[Any], float]] = field(default_factory=list)


class Clock:
    """Time for decisions (monotonic, seconds) and for people (UTC)."""

    def now(self) -> float:
        """Unaffected by steps of the wall clock; goes on while the machine is suspended (clock_gettime(2))."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def stamp(self) -> str:
        """ISO 8601, UTC."""
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Agent:
    """One host's agent. Everything but post() and call() runs in the loop's thread."""

    def __init__(
        self,
        config: Config,
        network: Network,
        connect: Callable[[Agent], Coordinator] | None,
        clock: Clock | None = None,
        check: Callable[[HealthCheck, float], str] = run_check,
    ) -> None:
        self.config, self.network, self.clock, self._check = config, network, clock or Clock(), check
        self._queue: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._timers: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0
        self.since = self.clock.stamp()
        self.vips: dict[str, Managed] = {}
        self._dirty: set[str] = set()
        self._muted: set[str] = set()  # bound, and not announced because nobody was heard at all
        self._link, self._kernel, self._own = Link(), dict[Address, bool](), dict[int, str]()
        self._peers: dict[str, Record] = {}  # the last known records of the other hosts
        self._macs: dict[str, str] = {}  # of every other host ever seen: one may rejoin while we are cut off
        self._witnesses: dict[str, float] = {}  # address -> when it last answered
        self._trust_after = float("-inf")  # what ZooKeeper said before does not count any more
        self._rearrange = False
        self._suspected_at = self._heard_at = float("-inf")
        self._began_at = self.clock.now()
        self._synced_at = self._sync_next = float("-inf")
        self._stale = False  # a look at the kernel is due at _sync_next
        self._save_at: float | None = None
        self.stopping: float | None = None
        self.execute: Callable[[], None] | None = None  # replaces the process at the loop's end
        self.prober = Prober(config, network.send)
        self._link, self._kernel, self._own = network.sync()
        self.store = Store(config, _mac_text(self._link.mac))
        self.coordinator = connect(self) if connect else None

    # -- the loop --------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call this; from any thread or signal handler."""
        self._queue.put((function, args))
        os.eventfd_write(self._wake, 1)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """Have the loop call this and wait for the result, or for the future that it returns. From other threads."""
        future: Future[Any] = Future()
        self.post(self._answer, future, function, args)
        try:
            result = future.result(timeout)
            return result.result(timeout + self.config.handover_timeout) if isinstance(result, Future) else result
        except FutureTimeout:
            future.cancel()
            raise Unavailable("busy", detail=f"the agent's loop did not answer within {timeout:g} s") from None

    @staticmethod
    def _answer(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # the caller was told that nothing happened
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    def at(self, when: float, function: Callable[..., Any], *args: Any) -> None:
        """Call it at that monotonic time."""
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, function, args))

    def start(self) -> None:
        """Load what is configured, adopt what an earlier process left, begin to contend."""
        saved = self.store.load_session()
        vips = {vip.address: vip for vip in [*self.store.load_ips(), *self.config.virtual_ips]}
        for host, record in saved.get("hosts", {}).items():
            self._peers[host] = Record.parse(json.dumps(record).encode())
        self._macs.update(saved.get("macs", {}))
        self.network.adopt(saved.get("addresses", []))
        self.network.clear(*self.store.elsewhere())
        self._link, self._kernel, self._own = self.network.sync()
        states = {address: State(word) for address, word in saved.get("states", {}).items()}
        gone = [ip for ip, ours in self._kernel.items() if ours and str(ip.ip) not in vips]
        for ip in gone:
            if self.coordinator is None or str(ip.ip) not in states:
                log.warning("%s was left by an earlier process and is not configured: removed", ip)
                self._unbind(ip)
        if self.coordinator:  # first: it connects while the frames are built
            number, password = saved.get("session") or (None, "")
            session = (number, bytes.fromhex(password)) if number else None
            self.coordinator.start(session, self._record())
            for address in set(states) - set(vips):  # the session may still have its lock
                self.coordinator.forget(address)
        for vip in vips.values():
            self._manage(vip, states.get(vip.address, State.FAILING))
        for ip in filter(self._kernel.get, gone):
            log.info("vip=%s is not configured any more", ip)
            self._manage(VirtualIP(ip), states[str(ip.ip)]).intent = Intent.DELETE
        self._find_witnesses()
        if self._link.trouble:
            log.warning("%s", self._link.trouble if self._link.number else f"waiting for {self.config.interface}")
        self._tick()
        self._ping()

    def run(self) -> None:
        """Go round until stopped."""
        poll = select.poll()
        known: set[int] = set()
        expected = float("inf")
        while not self.turn(expected):
            files = {self._wake, *self.network.files()}
            for gone in known - files:
                with contextlib.suppress(KeyError):
                    poll.unregister(gone)
            for file in files:
                poll.register(file, select.POLLIN)
            known = files
            expected = min(self._timers[0][0] if self._timers else float("inf"), self.prober.due)
            poll.poll(max(0.0, expected - self.clock.now()) * 1000 if expected < float("inf") else None)

    def turn(self, expected: float) -> bool:
        """One round: hear, then act. True when the agent has stopped."""
        now = self.clock.now()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        if now - expected > LATE:
            self._was_late(now - expected)
        for heard in self.network.receive():
            self._heard(heard)
        if self.network.changed() or now - self._synced_at > 5:
            self._refresh()
        self._serve_queue()
        while self._timers and self._timers[0][0] <= now:
            _, _, function, args = heapq.heappop(self._timers)
            function(*args)
        self._settle()
        if self.prober.due <= now:
            self._dirty.update(managed.vip.address for managed in self.prober.run(now))
            if self.prober.suspects and self.coordinator:
                self.coordinator.sync()
            self.prober.suspects = False
            self._settle()
        return self._stopped(now)

    def _serve_queue(self) -> None:
        """What other threads posted; in slices, so that the wire is heard meanwhile."""
        began = self.clock.now()
        while not self._queue.empty():
            function, args = self._queue.get()
            function(*args)
            if self.clock.now() - began >= SLICE:
                return self.at(began, lambda: None)

    def _settle(self) -> None:
        """Decide again for every VIP about which something is new; in slices, so that the wire is heard meanwhile."""
        began = self.clock.now()
        while self._dirty and self.clock.now() - began < SLICE:
            managed = self.vips.get(self._dirty.pop())
            if managed:
                self._reconcile(managed)
        if self._dirty:
            self.at(began, lambda: None)
        if self._rearrange:
            self._rearrange = False
            self.prober.arrange(((m, *m.look) for m in self.vips.values()), self.clock.now())

    def _was_late(self, by: float) -> None:
        log.warning("the loop was %.1f s late: looking again before acting", by)
        for _ in self.network.receive():
            pass  # heard while nobody listened: too old to mean anything
        self.prober.distrust()
        self._distrust()

    def _distrust(self) -> None:
        """What we remember may be old (late loop, link up): ask ZooKeeper and the wire before acting on it."""
        self._trust_after = self.clock.now()
        self._verify(self.vips.values())
        self._dirty.update(self.vips)
        if self.coordinator:
            self.coordinator.ping()

    def _verify(self, doubtful: Iterable[Managed]) -> None:
        for managed in doubtful:
            if self._bound(managed):
                managed.verify = True
                self.prober.restart(managed)
                self._dirty.add(managed.vip.address)

    def _tick(self) -> None:
        self._dirty.update(self.vips)
        if self.coordinator:
            self.coordinator.retry()
        notify("WATCHDOG=1")
        self.at(self.clock.now() + TICK, self._tick)

    def _ping(self) -> None:
        """Keep the lease clock wound: several times within each session timeout."""
        if self.coordinator:
            self.coordinator.ping()
            if self.config.at_most_one:
                self.at(self.clock.now() + 0.05, self._refresh_lifetimes)  # when the answer is there
            self.at(self.clock.now() + max(0.1, self.coordinator.timeout / 8), self._ping)

    def _save_session(self, now: bool = False) -> None:
        """Soon, and once for many changes."""
        if not now:
            if self._save_at is None:
                self._save_at = self.clock.now() + 0.05 + len(self.vips) / 1000
                self.at(self._save_at, self._save_session, True)
            return
        self._save_at = None
        session = self.coordinator.session if self.coordinator else None
        content = {
            "session": [session[0], session[1].hex()] if session and not self.stopping else None,
            "addresses": [str(ip) for ip, ours in self._kernel.items() if ours],
            "states": {address: m.state.value for address, m in self.vips.items()},
            "hosts": {host: record._asdict() for host, record in self._peers.items()},
            "macs": self._macs,
        }
        self.store.save_session(content)

    # -- facts -----------------------------------------------------------------

    def _bound(self, managed: Managed) -> bool:
        return self._kernel.get(managed.vip.ip, False)

    def _contenders(self, managed: Managed) -> tuple[Contender, ...]:
        return (self.coordinator.queue(managed.vip.address) or ()) if self.coordinator else ()

    def _mine(self, contender: Contender) -> bool:
        session = self.coordinator.session if self.coordinator else None
        return session is not None and contender.session == session[0]

    def _lock(self, managed: Managed) -> Lock:
        """The lock by our own lease clock (kazoo does not notice the end of a session while it is cut off)."""
        c = self.coordinator
        if c is None or self.clock.now() - c.confirmed_at > c.timeout:
            return Lock.UNKNOWN
        contenders = c.queue(managed.vip.address)
        if contenders and self._mine(contenders[0]):
            doubts = managed.intent is Intent.RUN and not self.config.at_most_one
            since = max(self._trust_after, managed.doubted_at if doubts else float("-inf"))
            return Lock.MINE if c.confirmed_at >= since else Lock.WAITING
        if contenders is None or not c.connected or c.confirmed_at < self._trust_after:
            return Lock.WAITING
        return Lock.OTHER if contenders else Lock.NOBODY

    def _wire(self, managed: Managed) -> Wire:
        hearing, asked_enough = managed.hearing, managed.hearing.misses >= self.config.probe_count
        if not self.config.probe_count or not self._link.arp or managed.frames is None:
            return Wire.BLIND
        if self._bound(managed):
            first = self._contenders(managed)[:1]
            foreign = managed.term and first and first[0].host not in {*self._peers, UNKNOWN_HOST}
            if foreign:  # the lock is another program's: nobody will answer
                return Wire.BLIND
            hears = self._hears() or self.clock.now() - self._heard_at <= RIVAL_FRESH
            silence = (Wire.SILENT if hears else Wire.BLIND) if asked_enough else Wire.LOOKING
            return Wire.ANSWERED if self._heard_now(managed) else silence
        all_asked = bool(hearing.mac) or not managed.look[1]  # not only a holder that has yet to bind it
        if asked_enough and all_asked and self._last_resort(managed) and self._not_deaf(managed):
            return Wire.SILENT
        return Wire.ANSWERED if hearing.mac and not asked_enough else Wire.LOOKING

    def _heard_now(self, managed: Managed) -> bool:
        """Whether another host has the VIP; where we let go of it, only what was heard since then counts."""
        now, hearing = self.clock.now(), managed.hearing
        asked = managed.intent is not Intent.RUN
        since = managed.letting_go if managed.letting_go is not None else now
        early = 0.0 if asked else 0.03  # a new holder may be heard that much before ZooKeeper names it
        lets_go = asked or self._lock(managed) is Lock.OTHER
        return hearing.fresh(now) and (not lets_go or hearing.at >= since - early)

    def _not_deaf(self, managed: Managed) -> bool:
        """Without ZooKeeper: who hears no witness and not one frame is deaf, or alone. Then it does not matter soon."""
        now, contenders = self.clock.now(), self._contenders(managed)
        hears = now - self._heard_at <= 1.0 or self._hears(contenders[0].host if contenders else "")
        return hears or now - max(managed.hearing.at, self._began_at) > ALONE

    def _hears(self, accused: str = "") -> bool:
        """Whether this host can hear at all: a witness other than the accused answered just now, or there is none."""
        biased = self._peers[accused].addresses if accused in self._peers else ()
        times = [heard for address, heard in self._witnesses.items() if address not in biased]
        return not times or self.clock.now() - max(times) <= self.config.probe_interval * (self.config.probe_count + 4)

    def _outranked(self, managed: Managed, lock: Lock) -> bool:
        """Of two binders without a confirmed lock the higher MAC yields; so does who came late, or is not believed."""
        hearing, now = managed.hearing, self.clock.now()
        if lock is Lock.MINE or not self._bound(managed) or not hearing.fresh(now):
            return False
        # Two must not yield together: at once who came late, then the higher MAC, last the lower one.
        # With ZooKeeper there, who was heard first thing after binding may have been letting go for us.
        stays = lock is Lock.UNKNOWN or hearing.at - managed.bound_at >= 2 * LINGER
        higher, late = self._link.mac > hearing.mac, stays and now - managed.bound_at < RIVAL_FRESH
        patience = RIVAL_STAYS + 0.25
        if higher:
            patience = RIVAL_STAYS if lock is Lock.WAITING else 0.0 if late else RIVAL_STAYS / 2
        return managed.verify or hearing.at - hearing.rival_since >= patience

    def _accused(self, managed: Managed) -> bool:
        """All the rules under which a standby may declare the holder dead. Without a carrier it is none: it FAILS."""
        contenders, config = self._contenders(managed), self.config
        return (
            managed.hearing.misses >= config.probe_count > 0
            and bool(managed.hearing.mac)  # it answered this host in this term
            and len(contenders) > 1
            and self._mine(contenders[1])
            and contenders[0].host in self._peers
            and not config.at_most_one
            and self.clock.now() >= managed.quiet_until
            and self._hears(contenders[0].host)
        )

    def _last_resort(self, managed: Managed) -> bool:
        """A failing host waits for its checks' verdict, and a second more, so that a healthy one goes first.

        Of several the one with the lowest MAC goes first, and the others hear it in time.
        """
        rank = sum(record.mac < _mac_text(self._link.mac) for record in self._peers.values() if record.mac)
        judged = all(probe.ok or probe.fails >= self.config.health_check_fall for probe in managed.probes)
        silent_since = max(managed.hearing.at, self._began_at)
        return managed.state is not State.FAILING or (judged and self.clock.now() - silent_since > 1.0 + 0.3 * rank)

    def _healthy(self, managed: Managed) -> str:
        """'' or why this host cannot serve the IP."""
        if self._link.trouble:
            return self._link.trouble
        if self._kernel.get(managed.vip.ip) is False:
            return "this host has the address for itself"
        if managed.bind_error and self.clock.now() < managed.bind_at:
            return f"cannot bind: {managed.bind_error}"
        return next((probe.reason for probe in managed.probes if not probe.ok), "")

    def _doubtful(self, managed: Managed) -> bool:
        now = self.clock.now()
        return any(probe.fails for probe in managed.probes) and now - (managed.doubts_since or now) < DOUBTS

    def facts(self, managed: Managed) -> Facts:
        """Everything that decide() is told."""
        lock = self._lock(managed)
        letting_go = managed.letting_go
        return Facts(
            lock=lock,
            wire=self._wire(managed),
            healthy=not self._healthy(managed),
            intent=managed.intent,
            bound=self._bound(managed),
            outranked=self._outranked(managed, lock),
            successor=any(not self._mine(c) for c in self._contenders(managed)),
            overdue=letting_go is not None and self.clock.now() - letting_go >= self.config.handover_timeout,
            accused=self._accused(managed),
            doubtful=self._doubtful(managed),
            on_fault=self.config.on_fault,
            at_most_one=self.config.at_most_one,
        )

    # -- decisions carried out -------------------------------------------------

    def _reconcile(self, managed: Managed) -> None:
        """The one place from which anything is bound, unbound, joined or left."""
        self._note_term(managed)
        decision = decide(managed.state, self.facts(managed))
        while decision.event is not None:
            self._enter(managed, decision.event, decision.reason)
            decision = decide(managed.state, self.facts(managed))
        unhealthy = self._healthy(managed)
        managed.reason = f"{decision.reason} ({unhealthy})" if unhealthy else decision.reason
        self._contend(managed, decision.contend)
        self._check_again(managed)
        if decision.accuse:
            self._accuse(managed)
        if managed.taking:
            self._take_over(managed)
        self._watch_letting_go(managed)
        self._apply(managed, decision.wanted)
        self._finish(managed)
        self._end_verify(managed)
        look = self._look(managed)
        if look != managed.look:
            if managed.look[1] and not look[1]:  # one host did not answer; now all are asked
                self.prober.restart(managed)
            managed.look, self._rearrange = look, True

    def _end_verify(self, managed: Managed) -> None:
        """Confirmed, or nobody else answers any more: the address is ours to announce."""
        sure = self._lock(managed) is Lock.MINE or managed.hearing.misses >= self.config.probe_count
        if (managed.verify or managed.rivalled) and sure and self._bound(managed):
            managed.verify = managed.rivalled = False
            self._announce(managed)

    def _enter(self, managed: Managed, event: Event, reason: str) -> None:
        old, managed.state = managed.state, step(managed.state, event)
        if managed.state is not old:
            unhealthy = self._healthy(managed)
            why = f"{reason}: {unhealthy}" if unhealthy else reason
            managed.since = self.clock.stamp()
            log.info("vip=%s %s -> %s (%s: %s)", managed.vip.ip, old.value, managed.state.value, event.value, why)
            self._save_session()

    def _note_term(self, managed: Managed) -> None:
        """A new holder has not answered yet: only what is heard from it from now on can fall silent."""
        contenders = self._contenders(managed)
        term = contenders[0].node if contenders and not self._mine(contenders[0]) else ""
        if term != managed.term:
            lost = bool(managed.term == "" and managed.state is State.ACTIVATED)
            managed.term, hearing, now = term, managed.hearing, self.clock.now()
            if term and not (hearing.fresh(now) and hearing.mac.hex(":") == self._mac_of(contenders[0].host)):
                managed.hearing = Hearing()
            if lost and managed.intent is Intent.RUN:
                managed.quiet_until = max(managed.quiet_until, now + 1.0)  # who lost its lock does not accuse back

    def _mac_of(self, host: str) -> str:
        return self._peers[host].mac if host in self._peers else ""

    def _contend(self, managed: Managed, contend: bool) -> None:
        """Join the queue, or leave it. An empty one belongs to who has the IP: who hears that host lets it go first."""
        c, now = self.coordinator, self.clock.now()
        contenders = c.queue(managed.vip.address) if c and c.connected else None
        yields = contend and contenders == () and not self._bound(managed) and self._wire(managed) is Wire.ANSWERED
        managed.empty_since = (managed.empty_since or now) if yields else None
        if c is None or contenders is None:
            return
        if any(self._mine(contender) for contender in contenders):
            if not contend:
                c.leave(managed.vip.address)
        elif contend and (managed.empty_since is None or now - managed.empty_since >= JOIN_LATER):
            c.join(managed.vip.address)

    def _accuse(self, managed: Managed) -> None:
        holder, mine = self._contenders(managed)[:2]
        log.warning("vip=%s %s fell silent: taking over its lock", managed.vip.ip, holder.host)
        if self.clock.now() - managed.took_at > BACKOFF[1]:
            managed.backoff = BACKOFF[0]
        managed.took, managed.took_at = (holder.session, holder.node), self.clock.now()
        if self.coordinator:
            self.coordinator.take(managed.vip.address, mine, [holder])
            self.coordinator.sync()  # unless it was asked with the first miss, and has not answered since
            asked_at = self.coordinator.syncing_since or managed.took_at
            managed.quiet_until = max(managed.took_at + 0.01, asked_at + ANSWER)
            self.at(managed.quiet_until, self._hurry, managed, asked_at)

    def _hurry(self, managed: Managed, asked_at: float) -> None:
        """ZooKeeper's server may have died with the holder: without an answer go on by `fault`, and try another one."""
        c = self.coordinator
        if c is not None and c.connected and c.syncing_since == asked_at:
            self._dirty.add(managed.vip.address)
            if self._trust_after < asked_at:  # else another VIP of that holder was first
                self._trust_after = self.clock.now()
                log.warning("ZooKeeper's server does not answer: trying another one")
                c.drop()

    def _take_over(self, managed: Managed) -> None:
        """POST lock: once our node is in the queue, all nodes ahead of it go, in one transaction."""
        contenders = self._contenders(managed)
        place = next((i for i, contender in enumerate(contenders) if self._mine(contender)), None)
        if place is not None:
            managed.taking = False
            if place and self.coordinator:
                self.coordinator.take(managed.vip.address, contenders[place], contenders[:place])

    def _watch_letting_go(self, managed: Managed) -> None:
        """Time the wait to be relieved, and look again when it is over."""
        waits = self._bound(managed) and (
            self._lock(managed) is Lock.OTHER or managed.intent in (Intent.HAND_OVER, Intent.DELETE, Intent.STOP)
        )
        if not waits:
            managed.letting_go = None
        elif managed.letting_go is None:
            managed.letting_go = self.clock.now()
            self.prober.restart(managed)
            self.at(managed.letting_go + self.config.handover_timeout, self._dirty.add, managed.vip.address)

    def _look(self, managed: Managed) -> tuple[Look, bytes]:
        """How to watch this VIP on the wire now."""
        if not self.config.probe_count or not self._link.arp or self.config.at_most_one:
            return Look.NONE, b""
        lock, hearing = self._lock(managed), managed.hearing
        if self._bound(managed):
            if lock is Lock.OTHER or managed.verify or (lock is not Lock.MINE and hearing.fresh(self.clock.now())):
                return Look.ALL, b""
            return (Look.NONE if lock is Lock.MINE and not hearing.fresh(self.clock.now()) else Look.DOUBT), b""
        return self._look_for_holder(managed, lock)

    def _look_for_holder(self, managed: Managed, lock: Lock) -> tuple[Look, bytes]:
        hearing, contenders = managed.hearing, self._contenders(managed)
        first = len(contenders) > 1 and self._mine(contenders[1])
        if lock in (Lock.UNKNOWN, Lock.MINE) or (lock is Lock.NOBODY and managed.state is State.FAILING):
            if hearing.mac:
                return Look.FAST, hearing.mac
            return (Look.ALL if hearing.misses < self.config.probe_count else Look.SLOW), b""
        if hearing.mac and first:
            return Look.FAST, hearing.mac
        mac = hearing.mac or bytes.fromhex(self._mac_of(contenders[0].host).replace(":", "") if contenders else "")
        return (Look.MEET if first and mac else Look.SLOW), mac

    def _apply(self, managed: Managed, wanted: bool) -> None:
        """Bind, then announce; cancel announcements, then unbind."""
        ip, bound = managed.vip.ip, self._bound(managed)
        if wanted or not bound:
            if bound and managed.unwanted_since < float("inf"):
                managed.rivalled = True  # its successor is gone again: the clients must be called back
                self.network.send(managed.frames.announce if managed.frames else ())
            managed.unwanted_since = float("inf")
        free = self._link.number and ip not in self._kernel
        if wanted and not bound and free and self.clock.now() >= managed.bind_at:
            if (not self.config.at_most_one or self._in_time()) and self._bind(managed):
                managed.hearing = Hearing()
                if ip.version == 4:
                    self._announce(managed)
                else:  # its route follows its tentative flag by a moment
                    self.at(self.clock.now() + 0.01, self._announce, managed)
        elif bound and not wanted:
            managed.schedule += 1
            managed.verify = managed.rivalled = False
            now = self.clock.now()
            managed.unwanted_since = min(managed.unwanted_since, now)
            # IPv6: what was heard may be a kernel's answer, some milliseconds before its agent announces the address.
            stays_until = managed.unwanted_since + LINGER * (3 if ip.version == 6 else 1)
            if managed.letting_go is not None and now < stays_until and not self.config.at_most_one:
                self.at(stays_until, self._dirty.add, managed.vip.address)
                return
            log.info("vip=%s unbound (%s)", ip, managed.reason)
            self._unbind(ip)

    def _bind(self, managed: Managed) -> bool:
        try:
            self.network.add(managed.vip.ip, self._lifetime())
        except OSError as error:
            managed.bind_fails += 1
            managed.bind_error = str(error)
            managed.bind_at = self.clock.now() + min(30.0, 2.0 ** (managed.bind_fails - 1))
            level = logging.WARNING if managed.bind_fails == 1 else logging.DEBUG
            log.log(level, "vip=%s cannot be bound: %s", managed.vip.ip, error)
            self._dirty.add(managed.vip.address)
            return False
        if managed.bind_fails:
            log.info("vip=%s can be bound again, after %d failures", managed.vip.ip, managed.bind_fails)
        managed.bind_fails, managed.bind_error, managed.bind_at = 0, "", float("-inf")
        self._kernel[managed.vip.ip], managed.bound_at = True, self.clock.now()
        log.info("vip=%s bound on %s (%s)", managed.vip.ip, self.config.interface, managed.reason)
        self._save_session()
        return True

    def _unbind(self, ip: Address) -> None:
        try:
            self.network.remove(ip)
        except OSError as error:
            log.error("%s cannot be removed: %s", ip, error)
            return
        self._kernel.pop(ip, None)
        self._save_session()

    def _lifetime(self) -> int:
        """At most one: the kernel's own deadline, in whole seconds, over before the session is."""
        return max(1, int(self.coordinator.timeout * 0.75 - 0.6)) if self.config.at_most_one and self.coordinator else 0

    def _in_time(self) -> bool:
        """Whether a lifetime begun now ends, with 0.6 s of slack for the kernel's timer, before the session can."""
        c = self.coordinator
        return c is not None and self.clock.now() - c.confirmed_at <= c.timeout - self._lifetime() - 0.6

    def _refresh_lifetimes(self) -> None:
        self._dirty.update(self.vips)
        for managed in self.vips.values() if self._in_time() else ():
            if self._bound(managed) and managed.state is State.ACTIVATED and self._lock(managed) is Lock.MINE:
                with contextlib.suppress(OSError):
                    self.network.add(managed.vip.ip, self._lifetime())

    # -- announcements ---------------------------------------------------------

    def _announce(self, managed: Managed) -> None:
        """Begin the schedule anew; at its end where an earlier process has been through it."""
        managed.schedule += 1
        if not managed.adopted:
            self._announce_next(managed, managed.schedule, 0)
        elif self.config.announce_interval:
            pause = self.config.announce_interval * random.random()
            self.at(self.clock.now() + pause, self._announce_next, managed, managed.schedule, len(ANNOUNCE_AT))
        managed.adopted = False

    def _announce_next(self, managed: Managed, schedule: int, sent: int) -> None:
        if schedule != managed.schedule or not self._bound(managed) or managed.frames is None:
            return
        lock, now = self._lock(managed), self.clock.now()
        unsure = lock is not Lock.MINE
        if managed.intent is not Intent.RUN or lock is Lock.OTHER:
            pass  # who lets go does not call the clients back
        elif unsure and ALONE / 2 < now - self._heard_at < float("inf"):
            self._muted.add(managed.vip.address)  # maybe this host is deaf: who follows it would be lost
        elif unsure and managed.hearing.fresh(now) and managed.hearing.misses < self.config.probe_count:
            pass  # a rival: the winner's words are _defend's
        elif not self.network.ready(managed.vip.ip):
            self.at(self.clock.now() + 0.005, self._announce_next, managed, schedule, sent)
            return
        elif not managed.verify:
            # Later ones also ask: a killed agent's kernel may still have the address, and clients must follow us.
            self.network.send((*managed.frames.announce, managed.frames.ask_all)[: None if sent > 1 else -1])
        pause = self.config.announce_interval * random.uniform(0.9, 1.1)
        if sent + 1 < min(self.config.announce_count, len(ANNOUNCE_AT)):
            pause = ANNOUNCE_AT[sent + 1] - ANNOUNCE_AT[sent]
        if pause:
            self.at(self.clock.now() + pause, self._announce_next, managed, schedule, sent + 1)

    def _defend(self, managed: Managed) -> None:
        """Answer a rival's claim at once and have the last word, when it must have yielded; then pause for a second.

        RFC 5227, section 2.4, asks for such restraint.
        """
        now = self.clock.now()
        if now - managed.defended_at >= 1.0:
            managed.defended_at = now
            for pause in (0.0, 0.1, RIVAL_STAYS / 2 + 0.05, RIVAL_STAYS + 0.2):
                self.at(now + pause, self._say, managed)

    def _say(self, managed: Managed) -> None:
        holds = managed.state is State.ACTIVATED and managed.intent is Intent.RUN  # who lets go does not defend
        ready = self._bound(managed) and self.network.ready(managed.vip.ip)
        if holds and ready and managed.frames and not managed.verify:
            self.network.send(managed.frames.announce)

    # -- what comes in ---------------------------------------------------------

    def _heard(self, heard: Heard) -> None:
        if heard.mac == self._link.mac:
            return
        self._heard_at = self.clock.now()
        if self._muted:
            self._verify([self.vips[address] for address in self._muted if address in self.vips])
            self._muted.clear()
        if heard.address in self._witnesses and not heard.asks:
            self._witnesses[heard.address] = self.clock.now()
        managed = self.vips.get(heard.address)
        if managed is None:
            return
        contender = not self._macs or _mac_text(heard.mac) in self._macs.values()
        if heard.asks:
            rival = contender and heard.broadcast and heard.mac < self._link.mac
            if rival and not self._bound(managed) and self.prober.about_to_claim(managed):
                self.prober.restart(managed)
            if contender and heard.broadcast and self._bound(managed):
                self._suspect_all(self.clock.now())
                if self._wins(managed, heard.mac):
                    self._defend(managed)
            return
        if managed.intent is Intent.RUN and self._bound(managed):
            self._count_conflict(managed, heard.mac, contender)
        if contender:
            self._note_heard(managed, heard.mac)

    def _note_heard(self, managed: Managed, mac: bytes) -> None:
        now, hearing = self.clock.now(), managed.hearing
        news = hearing.mac != mac or hearing.misses or not hearing.fresh(now)
        if hearing.mac != mac:
            hearing.since = self.clock.stamp()
            log.debug("vip=%s heard from %s", managed.vip.ip, _mac_text(mac))
        if now - hearing.at > 1.5 * RIVAL_FRESH:
            hearing.rival_since = now
        hearing.mac, hearing.at, hearing.misses, hearing.pending = mac, now, 0, False
        if news or self._bound(managed):
            self._dirty.add(managed.vip.address)

    def _count_conflict(self, managed: Managed, mac: bytes, contender: bool) -> None:
        """Somebody else has an address that is bound here and to stay."""
        now = self.clock.now()
        if now - managed.rival_at > 10 * RIVAL_FRESH or managed.rival != _mac_text(mac):
            managed.rival = _mac_text(mac)
            self.at(now + 0.2, self._tell_conflict, managed, managed.rival, contender)
        managed.rival_at = now
        if not managed.hearing.fresh(now):
            self._suspect_all(now)
            managed.doubted_at = now
            if self.coordinator:
                self.coordinator.ping()
                self.at(now + 0.02, self._dirty.add, managed.vip.address)
        managed.rivalled = managed.rivalled or (contender and self._lock(managed) is not Lock.MINE)
        if not contender or self._wins(managed, mac):
            self._defend(managed)

    def _tell_conflict(self, managed: Managed, mac: str, contender: bool) -> None:
        """Unless the lock, which may be told of a moment later than heard, or an order explains it."""
        if managed.intent is Intent.RUN and self._lock(managed) is not Lock.OTHER:
            managed.conflicts, managed.conflict_mac = managed.conflicts + 1, mac
            level, who = (logging.INFO, "a contender") if contender else (logging.WARNING, "a foreign host")
            log.log(level, "vip=%s is also answered for by %s (%s)", managed.vip.ip, mac, who)

    def _wins(self, managed: Managed, rival: bytes) -> bool:
        """Whether this host has the better claim: a confirmed lock, or in a cluster without ZooKeeper the lower MAC."""
        return self._lock(managed) is Lock.MINE or (self.coordinator is None and self._link.mac < rival)

    def _suspect_all(self, now: float) -> None:
        """Who has one of our addresses may have them all: ask once, at most once a second."""
        if now - self._suspected_at >= 1.0:
            self._suspected_at = now
            unsure = [m for m in self.vips.values() if self._bound(m) and self._lock(m) is not Lock.MINE]
            self.network.send([m.frames.ask_all for m in unsure if m.frames and not m.hearing.fresh(now)])

    def coordinator_changed(self, address: str) -> None:
        """ZooKeeper has news: of one address, or ('') of the session or the hosts."""
        c = self.coordinator
        if c is None:
            return
        if address in self.vips:
            if c.queue(address) is not None:
                self._welcome(self.vips[address])
            self._dirty.add(address)
        if address:
            return
        others = {host: record for host, record in c.records.items() if host != self.config.hostname}
        queued = {contender.host for managed in self.vips.values() for contender in self._contenders(managed)}
        kept = {host: record for host, record in self._peers.items() if host in queued}  # a hole in its record
        if self.config.hostname in c.records and {**kept, **others} != self._peers:
            self._peers = {**kept, **others}
            self._macs |= {host: record.mac for host, record in others.items() if record.mac}
            self._find_witnesses()
        if not c.connected:
            self.at(c.confirmed_at + c.timeout + 0.001, self._dirty.update, self.vips)
        self._save_session()
        self._dirty.update(self.vips)

    def _welcome(self, managed: Managed) -> None:
        """A contender that joins or rejoins may bring clients with stale caches (a healed partition): announce."""
        contenders = self._contenders(managed)
        nodes = {contender.node for contender in contenders if not self._mine(contender)}
        if managed.nodes is not None and nodes - managed.nodes and self._lock(managed) is Lock.MINE:
            self._defend(managed)
        managed.nodes = nodes
        took, node = managed.took
        if took and any(c.session == took and c.node != node for c in contenders):
            managed.took, managed.backoff = (0, ""), min(2 * managed.backoff, BACKOFF[1])
            managed.quiet_until = self.clock.now() + managed.backoff
            log.warning("vip=%s who was taken for dead lives: no take-over for %.0f s", managed.vip.ip, managed.backoff)

    def _find_witnesses(self) -> None:
        """Other contenders' own addresses, the gateways on this interface, and what the operator names."""
        found = {str(witness) for witness in self.config.witnesses}
        if self._link.number:
            found.update(self.network.gateways())
        found.update(address for record in self._peers.values() for address in record.addresses)
        found -= set(self._own.values())
        self._witnesses = {address: self._witnesses.get(address, float("-inf")) for address in found}
        if self._link.mac:
            frames = (build_frames(ipaddress.ip_address(w), self._link.mac, self._own) for w in sorted(found)[:8])
            self.prober.witness_frames = [frame.ask_all for frame in frames]

    def _record(self) -> Record:
        return Record(_mac_text(self._link.mac), tuple(sorted(self._own.values())), boot_id())

    def _refresh(self) -> None:
        """Take in the kernel's view, now or soon: it costs 35 us per address, and every change of one is reported."""
        if self.clock.now() >= self._sync_next:
            self._sync()
        elif not self._stale:
            self._stale = True
            self.at(self._sync_next, self._refresh)

    def _sync(self) -> None:
        """Take in the kernel's view; the notifications were only a hint."""
        self._stale, self._synced_at = False, self.clock.now()
        old_link, old_kernel, old_own = self._link, self._kernel, self._own
        self._link, self._kernel, self._own = self.network.sync()
        self._sync_next = self.clock.now() + 9 * (self.clock.now() - self._synced_at)  # a tenth of the time at most
        for managed in self.vips.values():
            if old_kernel.get(managed.vip.ip) and not self._bound(managed) and self._link.number:
                by = "somebody else, or its lifetime has ended" if self.config.at_most_one else "somebody else"
                log.warning("vip=%s was removed by %s", managed.vip.ip, by)
        if self._link != old_link or self._own != old_own:
            self._link_changed(old_link)
        if self._link != old_link or self._kernel != old_kernel:
            self._dirty.update(self.vips)

    def _link_changed(self, old: Link) -> None:
        if self._link.trouble != old.trouble:
            log.warning("%s", self._link.trouble or f"{self.config.interface} is up")
        self._build_frames(self._link.mac != old.mac)
        self._find_witnesses()
        if self.coordinator:
            self.coordinator.publish(self._record())
        if self._link.up and not old.up:
            self._distrust()
        elif self._link.mac != old.mac:
            for managed in self.vips.values():
                self._announce(managed)

    def _build_frames(self, anew: bool) -> None:
        for managed in self.vips.values():
            if anew or managed.vip.ip.version == 6:
                managed.frames = build_frames(managed.vip.ip.ip, self._link.mac, self._own) if self._link.mac else None

    # -- health checks ---------------------------------------------------------

    def _begin_checks(self, managed: Managed) -> None:
        for probe in managed.probes:
            self._run_check(managed, probe)

    def _run_check(self, managed: Managed, probe: Probe) -> None:
        """One thread per run, at most one run per check: one that still hangs at its next turn has failed again."""
        if self.vips.get(managed.vip.address) is not managed or probe not in managed.probes:
            return
        now, interval = self.clock.now(), managed.vip.healthcheck_interval
        if not probe.running:
            self._start_check(managed, probe)
        elif now - probe.began_at >= 0.8 * interval:  # not one that _check_again has just started
            probe.asked_at = now
            self._checked(managed, probe, now, "still no result")
        self.at(now + interval * random.uniform(0.9, 1.1), self._run_check, managed, probe)

    def _start_check(self, managed: Managed, probe: Probe) -> None:
        now, timeout = self.clock.now(), self.config.health_check_timeout
        probe.running, probe.asked_at, probe.began_at = True, now, now

        def work() -> None:
            self.post(self._ran, managed, probe, now, self._check(probe.check, timeout))

        threading.Thread(target=work, daemon=True, name=f"check {managed.vip.address}").start()
        self.at(now + timeout + 0.5, self._checked, managed, probe, now, "no result in time")

    def _check_again(self, managed: Managed) -> None:
        """Who has the lock and doubts its health must know soon: the next turn of its checks may be an hour away."""
        now = self.clock.now()
        failed = [probe for probe in managed.probes if probe.fails]
        if not failed or managed.state is not State.STANDBY or self._lock(managed) is not Lock.MINE:
            managed.doubts_since = None
            return
        if managed.doubts_since is None:
            managed.doubts_since = now
            self.at(now + DOUBTS, self._dirty.add, managed.vip.address)
        for probe in failed:
            if not probe.running and now - probe.began_at >= CHECK_AGAIN:
                self._start_check(managed, probe)
                self.at(now + CHECK_AGAIN, self._dirty.add, managed.vip.address)

    def _ran(self, managed: Managed, probe: Probe, started: float, reason: str) -> None:
        probe.running = False
        self._checked(managed, probe, started, reason)

    def _checked(self, managed: Managed, probe: Probe, started: float, reason: str) -> None:
        if probe.asked_at == started:
            was = probe.ok
            probe.count(reason, self.config.health_check_fall, self.config.health_check_rise)
            if reason:
                level = logging.WARNING if probe.fails == 1 else logging.DEBUG
                log.log(level, "vip=%s check failed: %s", managed.vip.ip, reason)
            elif not was and probe.ok:
                log.info("vip=%s check passes: %s:%d", managed.vip.ip, probe.check.host, probe.check.port)
            self._dirty.add(managed.vip.address)

    # -- the registry ----------------------------------------------------------

    def _manage(self, vip: VirtualIP, state: State = State.FAILING) -> Managed:
        managed = Managed(vip, [Probe(check) for check in vip.checks], self.clock.stamp())
        if self._bound(managed):
            managed.state = state
            for probe in managed.probes:
                probe.ok = state is not State.FAILING
            managed.verify = managed.adopted = True
            log.info("vip=%s found bound: adopted as %s", vip.ip, state.value)
        if self._link.mac:
            managed.frames = build_frames(vip.ip.ip, self._link.mac, self._own)
        self.vips[vip.address] = managed
        if self.coordinator:
            self.coordinator.watch(vip.address)
        self._begin_checks(managed)
        self._dirty.add(vip.address)
        return managed

    def find(self, key: str) -> Managed:
        """By id or address, in any spelling, with or without its prefix length. Raises NotFound."""
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_interface(key.strip("[]"))
            key = str(ip if "/" in key else ip.ip)
        for managed in self.vips.values():
            if key in (managed.vip.id, managed.vip.address, str(managed.vip.ip)):
                return managed
        raise NotFound("not found", resource="IP")

    def _kept(self) -> list[VirtualIP]:
        """The IPs of the state file: all but those of the configuration."""
        configured = {vip.address for vip in self.config.virtual_ips}
        return [m.vip for m in self.vips.values() if m.vip.address not in configured and m.intent is not Intent.DELETE]

    def add_ip(self, raw: Any) -> dict[str, Any]:
        """POST /ips. Raises Invalid, Refused, Unavailable; then nothing has changed."""
        if isinstance(raw, dict) and raw.get("id"):
            raise Invalid("invalid IP", detail="id is given by LinK; leave it out")
        vip = VirtualIP.parse(raw, self.config.health_check_interval)
        if self.stopping is not None:
            raise Unavailable("stopping", detail="this agent is being stopped")
        old = self.vips.get(vip.address)
        if old and old.intent is not Intent.DELETE:
            raise Refused("already exists", detail=f"{old.vip.ip} is {old.vip.id}", id=old.vip.id)
        if not old and len(self.vips) >= self.config.max_ips:
            raise Refused("too many IPs", detail=f"this host has max_ips ({self.config.max_ips}) IPs")
        if self._stale:  # the kernel has news: this very address may have been given to the host just now
            self._sync()
        if owner := self._owner(vip):
            raise Invalid("invalid IP", detail=f"{vip.address} is an address that {owner} has for itself")
        vip = VirtualIP(vip.ip, vip.checks, vip.healthcheck_interval, f"vip-{uuid.uuid4()}")
        self.store.save_ips([*self._kept(), vip])
        if old:
            self._drop(old)
            for _, future, _ in old.waiters:  # of the DELETE, which is done with it
                future.set_result(None)
        managed = self._manage(vip)
        log.info("vip=%s added by the API as %s", vip.ip, vip.id)
        self._settle()
        return self.show(managed)

    def _owner(self, vip: VirtualIP) -> str:
        """The host that has this address for itself, as far as it is known."""
        if any(ip.ip == vip.ip.ip and not ours for ip, ours in self._kernel.items()):
            return "this host"
        return next((host for host, record in self._peers.items() if vip.address in record.addresses), "")

    def update_ip(self, key: str, raw: Any) -> dict[str, Any]:
        """PATCH or PUT /ips/:id: the checks are replaced; nothing moves unless one of them fails."""
        managed = self.find(key)
        got = _take(raw, ("healthchecks", "checks", "healthcheck_interval"), "IP")
        old = managed.vip
        if any(vip.address == old.address for vip in self.config.virtual_ips):
            raise Refused("configured", detail=f"{old.ip} is from the configuration file; change it there")
        checks = parse_checks(got["healthchecks"] if "healthchecks" in got else got.get("checks"))
        every = _whole(got.get("healthcheck_interval", old.healthcheck_interval), 1, 3600, "healthcheck_interval")
        if not {"healthchecks", "checks"} & set(got):
            checks = old.checks
        vip = VirtualIP(old.ip, checks, every, old.id)
        self.store.save_ips([vip if kept is old else kept for kept in self._kept()])
        healthy = not self._healthy(managed)
        managed.vip, managed.probes = vip, [Probe(check, ok=healthy) for check in checks]
        self._begin_checks(managed)
        self._reconcile(managed)
        return self.show(managed)

    def delete_ip(self, key: str) -> Future[Any] | None:
        """DELETE /ips/:id: bound here only until a waiting host is heard to have it, at most handover_timeout."""
        managed = self.find(key)
        if any(vip.address == managed.vip.address for vip in self.config.virtual_ips):
            raise Refused("configured", detail=f"{managed.vip.ip} is from the configuration file; remove it there")
        self.store.save_ips([vip for vip in self._kept() if vip is not managed.vip])
        managed.intent = Intent.DELETE
        log.info("vip=%s is being removed by the API", managed.vip.ip)
        return self._when(managed, lambda: managed.vip.address not in self.vips, self.config.handover_timeout + 2)

    def _drop(self, managed: Managed) -> None:
        if self._bound(managed):
            self._unbind(managed.vip.ip)
        managed.schedule += 1
        if self.coordinator:
            self.coordinator.forget(managed.vip.address)
        self.vips.pop(managed.vip.address, None)
        self._rearrange = True
        self._save_session()

    def _when(self, managed: Managed, done: Callable[[], bool], wait: float) -> Future[Any]:
        """A future for the moment when `done` is seen to be true, or 504 after `wait` seconds."""
        future: Future[Any] = Future()
        deadline = self.clock.now() + wait
        managed.waiters.append((done, future, deadline))
        self.at(deadline + 0.001, self._dirty.add, managed.vip.address)
        self._dirty.add(managed.vip.address)
        return future

    def _finish(self, managed: Managed) -> None:
        """End intents that are fulfilled and answer who waits for it."""
        bound = self._bound(managed)
        if managed.intent is Intent.DELETE and not bound:
            self._drop(managed)
        if managed.intent is Intent.HAND_OVER and not bound and self._lock(managed) in (Lock.OTHER, Lock.NOBODY):
            managed.intent = Intent.RUN
            self._dirty.add(managed.vip.address)
        waiting, managed.waiters = managed.waiters, []
        for done, future, deadline in waiting:
            if done():
                future.set_result(None)
            elif self.clock.now() >= deadline:
                managed.taking = False
                if managed.intent is Intent.HAND_OVER:
                    managed.intent = Intent.RUN
                    self._dirty.add(managed.vip.address)
                future.set_exception(Unfinished("not done in time", detail=managed.reason, ip=self.show(managed)))
            else:
                managed.waiters.append((done, future, deadline))

    def _queue_now(self, managed: Managed) -> tuple[Contender, ...]:
        """The queue, if ZooKeeper can be reached. Raises Refused."""
        c = self.coordinator
        if c is None:
            raise Refused("no ZooKeeper", detail="a move needs ZooKeeper; zookeeper is not configured")
        if managed.intent is not Intent.RUN:
            raise Refused("busy", detail=f"another order for {managed.vip.ip} is under way: {managed.intent.value}")
        lost = not c.connected or self.clock.now() - c.confirmed_at > c.timeout
        if lost or c.queue(managed.vip.address) is None:
            raise Refused("ZooKeeper is out of reach", detail="GET /health tells when it is back")
        return self._contenders(managed)

    def take_lock(self, key: str) -> Future[Any]:
        """POST /ips/:id/lock: when the future is done this host holds the IP. Raises Refused."""
        managed = self.find(key)
        if managed.state is State.FAILING:
            raise Refused("failing", detail=f"this host cannot take {managed.vip.ip}: {self._healthy(managed)}")
        if any(probe.fails for probe in managed.probes) and not self._bound(managed):
            raise Refused("failing", detail="a check has just failed here; ask again when it passes")
        contenders = self._queue_now(managed)
        foreign = [c.host for c in contenders if c.host not in self._peers and not self._mine(c)]
        if foreign:
            raise Refused("foreign lock", detail=f"{foreign[0]}, which is no LinK host, holds or waits for the lock")
        if self.config.at_most_one and contenders and not self._mine(contenders[0]):
            raise Refused("at-most-one", detail=f"the holder must let go first: POST failover on {contenders[0].host}")
        managed.taking = not (contenders and self._mine(contenders[0]))
        return self._when(
            managed,
            lambda: self._lock(managed) is Lock.MINE and self._bound(managed),
            self.config.handover_timeout + 2,
        )

    def failover(self, key: str) -> Future[Any]:
        """POST /ips/:id/failover on the holder: the next contender gets the IP. Raises Refused."""
        managed = self.find(key)
        contenders = self._queue_now(managed)
        if not contenders or not self._mine(contenders[0]):
            holder = contenders[0].host if contenders else "nobody"
            detail = f"{holder} holds the lock of {managed.vip.ip}"
            if self._bound(managed):
                detail += "; it stays bound here until another host has it"
            raise Refused("not the holder", detail=detail)
        if all(self._mine(contender) for contender in contenders):
            raise Refused("nobody can take it", detail=f"no other host waits for {managed.vip.ip}")
        managed.intent = Intent.HAND_OVER
        return self._when(managed, lambda: not self._bound(managed), self.config.handover_timeout + 2)

    def show(self, managed: Managed) -> dict[str, Any]:
        """The IP as the API shows it."""
        contenders, wire, hearing = self._contenders(managed), self._wire(managed), managed.hearing
        holder = contenders[0].host if contenders else None
        if not contenders and self._bound(managed):
            holder = self.config.hostname
        return {
            **managed.vip.to_json(),
            "status": managed.state.value,
            "bound": self._bound(managed),
            "holder": holder,
            "hosts": [contender.host for contender in contenders],
            "since": managed.since,
            "reason": managed.reason,
            "wire": {
                "state": wire.value,
                "mac": _mac_text(hearing.mac) if wire is Wire.ANSWERED else None,
                "since": (hearing.since or None) if wire is Wire.ANSWERED else None,
            },
            "conflicts": {"count": managed.conflicts, "mac": managed.conflict_mac or None},
        }

    def get_ip(self, key: str) -> dict[str, Any]:
        """GET /ips/:id."""
        return {"ip": self.show(self.find(key))}

    def list_ips(self) -> dict[str, Any]:
        """GET /ips."""
        return {"ips": [self.show(managed) for managed in self.vips.values()]}

    def health(self) -> dict[str, Any]:
        """GET /health: that it is answered proves that the loop goes round."""
        c = self.coordinator
        counts = {state.value: sum(m.state is state for m in self.vips.values()) for state in State}
        lost = c is not None and self.clock.now() - c.confirmed_at > c.timeout
        state = "none" if c is None else "lost" if lost else "connected" if c.connected else "connecting"
        return {
            "healthy": not lost and not self._link.trouble,
            "hostname": self.config.hostname,
            "since": self.since,
            "interface": self._link.trouble or "up",
            "zookeeper": {"state": state, "session_timeout": c.timeout if c else None},
            "ips": counts,
        }

    # -- stopping --------------------------------------------------------------

    def stop(self) -> None:
        """SIGTERM: hand every IP over, all at the same time."""
        if self.stopping is None:
            log.info("stopping: IPs to hand over: %d", sum(self._bound(m) for m in self.vips.values()))
            notify("STOPPING=1")
            self.stopping = self.clock.now() + self.config.stop_timeout
            self.at(self.stopping, lambda: None)
            for managed in self.vips.values():
                managed.intent = managed.intent if managed.intent is Intent.DELETE else Intent.STOP
            self._dirty.update(self.vips)

    def _stopped(self, now: float) -> bool:
        if self.execute is not None:
            return True
        if self.stopping is None:
            return False
        left = (m for m in self.vips.values() if self._bound(m))
        connected = self.coordinator is not None and self.coordinator.connected
        patience = 0.0 if connected else self.config.stop_timeout - 1.0  # a lost connection may be back in a second
        if now < self.stopping - patience and any(self._may_be_relieved(m) for m in left):
            return False
        for managed in filter(self._bound, self.vips.values()):
            why = "no other host can take it" if self.coordinator else "without ZooKeeper no other host can be asked"
            log.warning("vip=%s stays bound here: %s", managed.vip.ip, why)
        self._save_session(now=True)
        if self.coordinator:
            self.coordinator.stop(max(0.1, min(2.0, self.stopping - now)))
        log.info("stopped")
        return True

    def _may_be_relieved(self, managed: Managed) -> bool:
        """Somebody can take it, or has it already: of hosts that stop at the same time one keeps it, not all."""
        return self._lock(managed) is Lock.MINE or self._successor(managed) or managed.hearing.fresh(self.clock.now())

    def _successor(self, managed: Managed) -> bool:
        c = self.coordinator
        known = c is not None and c.connected and self._lock(managed) is not Lock.UNKNOWN
        return known and any(not self._mine(contender) for contender in self._contenders(managed))


################################################################################
# HTTP
################################################################################

MAX_BODY = 65536
REQUEST_TIME = 10.0  # seconds that one request may take from its first byte to its last
MAX_REQUESTS = 64  # at the same time

Route = tuple[str, str, int, Callable[..., Any]]


def routes(agent: Agent) -> list[Route]:
    """Method, path ({} is an id or an address), status of success, what the loop does."""
    return [
        ("GET", "/ips", 200, agent.list_ips),
        ("POST", "/ips", 201, agent.add_ip),
        ("GET", "/ips/{}", 200, agent.get_ip),
        ("PATCH", "/ips/{}", 200, agent.update_ip),
        ("PUT", "/ips/{}", 200, agent.update_ip),
        ("DELETE", "/ips/{}", 204, agent.delete_ip),
        ("POST", "/ips/{}/lock", 204, agent.take_lock),
        ("POST", "/ips/{}/failover", 204, agent.failover),
        ("GET", "/version", 200, lambda: {"version": VERSION}),
        ("GET", "/health", 200, agent.health),
    ]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; runs in a thread of its own, asks the loop and waits with a deadline."""

    protocol_version = "HTTP/1.1"
    server_version = f"LinK/{VERSION}"
    sys_version = ""
    timeout = REQUEST_TIME
    server: Server

    def handle(self) -> None:
        """The whole connection has a deadline: a byte every second must not hold a thread for ever."""
        timer = threading.Timer(REQUEST_TIME + self.server.agent.config.handover_timeout, self._expire)
        timer.daemon = True
        timer.start()
        try:
            super().handle()
        except (OSError, ValueError):
            log.debug("%s went away", self.client_address[0])
        finally:
            timer.cancel()

    def _expire(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def __getattr__(self, name: str) -> Any:
        """All methods come here, known or not."""
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        self.close_connection = True
        try:
            status, body = self._route()
        except LinkError as error:
            status, body = error.status, error.body
        except OSError:
            raise  # the client went away
        except Exception:
            log.exception("%s %s", self.command, self.path)
            status, body = 500, {"error": "internal error", "detail": "see the agent's log"}
        if self.command not in ("GET", "HEAD"):  # why an IP moved may be that somebody asked for it
            log.info("API: %s %a from %s: %d", self.command, self.path, self.client_address[0], status)
        self._reply(status, body)

    def _route(self) -> tuple[int, Any]:
        self._authenticate()
        path = self.path.partition("?")[0].rstrip("/") or "/"
        allowed = []
        for method, pattern, status, function in self.server.routes:
            found = re.fullmatch(pattern.replace("{}", r"([^/]+(?:/\d+)?)"), path)
            if not found:
                continue
            allowed.append(method)
            if method == self.command:
                args = [_unquote(group) for group in found.groups()]
                takes_body = method in ("POST", "PATCH", "PUT") and not pattern.endswith(("/lock", "/failover"))
                body = self._body(required=takes_body)
                if takes_body:
                    args.append(body)
                result = self.server.agent.call(function, *args, timeout=REQUEST_TIME / 2)
                return (503 if isinstance(result, dict) and result.get("healthy") is False else status), result
        if allowed:
            raise _http_error(405, "method not allowed", allow=sorted(allowed))
        raise NotFound("not found", resource="path")

    def _authenticate(self) -> None:
        config = self.server.agent.config
        if config.password:
            wanted = base64.b64encode(f"{config.user}:{config.password}".encode()).decode()
            given = self.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given[2].strip().encode(), wanted.encode())
            if given[0].lower() != "basic" or not right:
                raise _http_error(401, "unauthorized")

    def _body(self, required: bool) -> Any:
        """The JSON body, at most 64 KiB. curl's own content type is accepted: people forget the header."""
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") or (required and length is None):
            raise _http_error(411, "length required")
        many = len(set(self.headers.get_all("Content-Length", []))) > 1
        if many or (length is not None and not re.fullmatch(r"\d{1,18}", length)):
            raise Invalid("invalid Content-Length")
        size = int(length or 0)
        if size > MAX_BODY:
            raise _http_error(413, "body too large", detail=f"at most {MAX_BODY} bytes")
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else "application/json"
        if required and kind not in ("application/json", "application/x-www-form-urlencoded"):
            raise _http_error(415, "unsupported media type", detail="send application/json")
        data = self.rfile.read(size)
        if not required:
            return None
        if len(data) < size:
            raise Invalid("invalid json", detail="the body is shorter than its Content-Length")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Invalid("invalid json", detail=str(error)) from None

    def _reply(self, status: int, body: Any) -> None:
        data = b"" if status == 204 else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="LinK"')
        if status == 405:
            self.send_header("Allow", ", ".join(body["allow"]))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses (a malformed request line), as JSON, too."""
        self.close_connection, self.request_version = True, self.protocol_version
        self.command = self.command or "GET"
        self._reply(code, {"error": (message or http.HTTPStatus(code).phrase).lower()})

    def log_message(self, format: str, *args: Any) -> None:
        """The access log is for debugging."""
        log.debug("http %s " + format, self.client_address[0], *args)


def _unquote(text: str) -> str:
    return re.sub("%([0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), text)


def _http_error(status: int, message: str, **more: Any) -> LinkError:
    error = LinkError(message, **more)
    error.status = status
    return error


class Server(http.server.ThreadingHTTPServer):
    """Bounded: past MAX_REQUESTS at once a connection is answered 503 and closed."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, agent: Agent) -> None:
        self.agent, self.routes = agent, routes(agent)
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        host, port = agent.config.listen_address
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._tls = tls_context(agent.config)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"listen: cannot listen on {agent.config.listen}: {error.strerror}") from None

    def server_bind(self) -> None:
        """Without http.server's reverse DNS look-up, which can take half a minute."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a new thread, if one is free."""
        if not self._free.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.send(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                    b'Content-Length: 18\r\nConnection: close\r\n\r\n{"error": "busy"}\n'
                )
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The TLS handshake is the thread's, not the acceptor's."""
        try:
            if self._tls:
                request.settimeout(REQUEST_TIME)
                request = self._tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError as error:
            log.debug("http %s: %s", client_address[0], error)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback for a client that went away."""
        log.debug("http %s: %s", client_address[0], sys.exc_info()[1])


################################################################################
# Main
################################################################################


def notify(message: str) -> None:
    """sd_notify(3); does nothing where no supervisor listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log.debug("sd_notify: %s", error)


class JsonFormatter(logging.Formatter):
    """One object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in UTC, level, message, and the traceback if there is one."""
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": stamp, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(config: Config) -> None:
    """To stderr; no time of our own where the journal adds it."""
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s.%(msecs)03d "
    text = logging.Formatter(stamp + "%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    logging.basicConfig(level=logging.CRITICAL, handlers=[handler], force=True)  # the libraries: not a word
    log.setLevel(config.log_level)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; one flag per option that may be seen in a process list."""
    parser = argparse.ArgumentParser(prog="link.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: /etc/link/link.yml if it exists)")
    parser.add_argument("--check", action="store_true", help="validate the configuration and exit: 0 right, 2 wrong")
    parser.add_argument("--version", action="version", version=f"LinK {VERSION}")
    group = parser.add_argument_group(
        "configuration", "also keys of the file, and LINK_<KEY> in the environment; file < environment < flags"
    )
    for opt in OPTIONS:
        default = default_of(opt)
        text = opt.metadata["help"] + (f" (default: {default})" if default not in ("", []) else "")
        if opt.metadata["flag"]:
            group.add_argument("--" + opt.name.replace("_", "-"), metavar="VALUE", help=text.replace("%", "%%"))
    group.description = f"{group.description}\nin the file and the environment only: " + ", ".join(
        opt.name for opt in OPTIONS if not opt.metadata["flag"]
    )
    return parser.parse_args(argv)


def load(argv: Sequence[str]) -> tuple[Config, bool]:
    """The configuration, and whether only to check it. Raises ConfigError."""
    args = arguments(argv)
    path = args.config or ("/etc/link/link.yml" if Path("/etc/link/link.yml").exists() else "")
    return make_config(read_config(path) if path else {}, os.environ, vars(args)), args.check


def check_installation() -> None:
    """Raises ConfigError where a library is missing."""
    for name in ("kazoo.client", "pyroute2", "scapy.layers.l2", "scapy.layers.inet6", "yaml"):
        try:
            __import__(name)
        except ImportError as error:
            raise ConfigError(f"cannot import {name} ({error}): pip install -r requirements.txt") from None


def lock_state_dir(config: Config) -> Any:
    """Held until the process ends. Raises BlockingIOError where another agent has it."""
    directory = Path(config.state_dir)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(directory / "lock", "w", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        log.warning("%s cannot be written (%s): a restart will not remember", config.state_dir, error.strerror)
        return None
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def lock_interface(config: Config) -> Any:
    """Held until the process ends: a name in the network namespace (unix(7)). Raises OSError where it is taken."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(f"\0link on {config.interface}")
    return sock


def upgrade(agent: Agent, argv: Sequence[str]) -> None:
    """SIGHUP: prove the new file and configuration in a child process, then execute it in place of this one."""
    command = [sys.executable, os.path.abspath(__file__), *argv]

    def prove() -> None:
        status = 127
        with contextlib.suppress(OSError):
            child = os.posix_spawn(sys.executable, [*command, "--check"], os.environ)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        agent.post(proven, status)

    def proven(status: int) -> None:
        if status:
            log.error("reload: the new program or configuration is wrong (exit code %d): going on as before", status)
            notify("READY=1")
        elif agent.stopping is None:
            log.info("reload: executing %s", command[1])
            agent._save_session(now=True)
            agent.execute = lambda: os.execv(sys.executable, command)

    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    threading.Thread(target=prove, daemon=True).start()


def build(config: Config) -> Agent:
    """The agent with its real ports."""
    network = Network(config.interface)

    def connect(agent: Agent) -> Coordinator:
        return Coordinator(config, agent.clock.now, agent.post, agent.coordinator_changed)

    return Agent(config, network, connect if config.zookeeper else None)


def serve(config: Config, argv: Sequence[str]) -> None:
    """Run until stopped. Raises OSError."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    agent = build(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.post(agent.stop))
    signal.signal(signal.SIGHUP, lambda *_: agent.post(upgrade, agent, argv))
    server = Server(agent)
    agent.start()
    threading.Thread(target=server.serve_forever, daemon=True, name="http").start()
    log.info("LinK %s on %s: interface %s, API on %s", VERSION, config.hostname, config.interface, config.listen)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    if not agent.vips:  # else scapy was read for their frames: 0.3 s that the loop must not lose later
        build_frames(ipaddress.IPv6Address("::"), bytes(6), {})
    gc.freeze()  # the libraries: to look through them all now and then would halt the loop for 50 ms
    notify("READY=1")
    agent.run()
    if agent.execute:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        logging.shutdown()
        agent.execute()


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        config, check = load(argv)
        if check:
            check_installation()
            print("configuration OK")
            return 0
    except ConfigError as error:
        print(f"link.py: {error}", file=sys.stderr)
        return 2
    set_up_logging(config)
    sys.setswitchinterval(0.0005)  # the loop must not wait 5 ms for each of kazoo's turns
    try:
        locks = lock_state_dir(config), lock_interface(config)
    except OSError:
        taken = f"interface {config.interface} or with state_dir {config.state_dir}"
        log.error("another agent runs on %s: stop it, or give this one its own", taken)
        return 3
    try:
        serve(config, argv)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except Exception:
        log.exception("the agent has failed")
        return 1
    del locks
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # taking the libraries apart would last longer than handing over an IP
