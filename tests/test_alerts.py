"""The alerts and the dashboard: with promtool on series that are made up, and in a real Prometheus on real agents."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import link
from fakes import METRICS
from lab import PROGRAM, Host, Lab, Service, connect, wait_until
from scenarios import CHECK, CHECKED, QUICK, Cluster, together

RULES = PROGRAM.parent / "ansible" / "files" / "link-alerts.yml"
ALERTS = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
DASHBOARD = json.loads(RULES.with_name("link-dashboard.json").read_text())
PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
needs_prometheus = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("promtool"), reason="needs root and Debian's prometheus: ./start.sh test"
)

# ------------------------------------------------------------------------------------------------ what is made up

VIP, STEP, END = "10.0.0.100", 5, 1500  # the address of all stories; seconds
HOSTS = dict(enumerate(("10.0.0.1:1313", "10.0.0.2:1313", "10.0.0.3:1313"), 1))


def series(name: str, host: int, **labels: str) -> str:
    """A series of one host, as PromQL has it."""
    named = {"job": "link", "instance": HOSTS[host], **labels}
    return f"{name}{{{','.join(f'{label}={json.dumps(word)}' for label, word in named.items())}}}"


def of_ip(name: str, host: int, **labels: str) -> str:
    return series(f"link_ip_{name}", host, ip=VIP, **labels)


def then(*course: float | str) -> str:
    """A value, until when (in s), the next value, until when, ... the last value; "stale": the series has ended."""
    values: list[str] = []
    for value, until in zip(course[::2], (*course[1::2], END), strict=True):
        values += [str(value)] * (int(until) // STEP - len(values))
    return " ".join(values)


def quiet() -> dict[str, str]:
    """Three hosts, the first one has the IP, and nothing happens."""
    found = {'up{job="node",instance="10.0.0.1:9100"}': then(0)}
    for host in HOSTS:
        state = "ACTIVATED" if host == 1 else "STANDBY"
        found |= {
            **{series(name, host): then(1) for name in ("up", "link_healthy", "link_quick")},
            **{series("link_zookeeper_state", host, state=s): then(int(s == "connected")) for s in link.ZOOKEEPER},
            series("link_zookeeper_refused", host): then(0),
            series("link_notices_total", host, result="sent"): then(0, 450, 2),
            series("link_notices_total", host, result="lost"): then(0),
            of_ip("bound", host): then(int(host == 1)),
            **{of_ip("status", host, status=s): then(int(s == state)) for s in link.State},
            **{of_ip("transitions_total", host, event=event): then(3) for event in link.Event},
            of_ip("conflicts_total", host): then(2),
        }
    return found


def gone(host: int, at: int) -> dict[str, str]:
    """Its agent answers no more: all it has told ends, as in Prometheus."""
    ended = {name: then(*values.split()[:1], at, "stale") for name, values in quiet().items() if HOSTS[host] in name}
    return {**ended, series("up", host): then(1, at, 0)}


class Story(NamedTuple):
    """What differs from quiet(), and which alerts fire at which second: a name, and the labels' values."""

    name: str
    differs: Mapping[str, str]
    fires: Mapping[int, set[str]]


SILENT: dict[int, set[str]] = {second: set() for second in range(STEP, END, 15)}
ELECTED, DEMOTED = {"event": "elected"}, {"event": "demoted"}
STORIES = (
    Story("nothing happens", {}, SILENT),
    Story(
        "a planned move, two hosts have it for one scrape, and back, nobody has it for one scrape",
        {
            of_ip("bound", 1): then(1, 305, 0, 605, 1),
            of_ip("bound", 2): then(0, 300, 1, 600, 0),
            of_ip("transitions_total", 1, **DEMOTED): then(3, 305, 4),
            of_ip("transitions_total", 1, **ELECTED): then(3, 605, 4),
            of_ip("transitions_total", 2, **DEMOTED): then(3, 600, 4),
            of_ip("transitions_total", 2, **ELECTED): then(3, 300, 4),
        },
        SILENT,
    ),
    Story(
        "an agent starts anew: no answer for two scrapes, counters from 0, its checks have not run yet",
        {
            series("up", 1): then(1, 300, 0, 310, 1),
            of_ip("bound", 1): then(1, 300, "stale", 310, 1),
            **{of_ip("transitions_total", 1, event=e): then(3, 300, "stale", 310, 0, 320, 1) for e in link.Event},
            of_ip("status", 1, status="FAILING"): then(0, 300, "stale", 310, 1, 320, 0),
            of_ip("conflicts_total", 1): then(2, 300, "stale", 310, 0),
        },
        SILENT,
    ),
    Story("the checks of one host fail", {of_ip("status", 2, status="FAILING"): then(0, 300, 1)}, SILENT),
    Story(
        "the last host that reports it says that it has it no more",
        {**gone(2, 60), **gone(3, 60), of_ip("bound", 1): then(1, 300, 0, 600, 1)},
        {
            295: {f"LinkAgentDown {HOSTS[2]}", f"LinkAgentDown {HOSTS[3]}"},
            310: {f"LinkAgentDown {HOSTS[2]}", f"LinkAgentDown {HOSTS[3]}"},
            315: {f"LinkAgentDown {HOSTS[2]}", f"LinkAgentDown {HOSTS[3]}", f"LinkIPNowhere {VIP}"},
            600: {f"LinkAgentDown {HOSTS[2]}", f"LinkAgentDown {HOSTS[3]}"},
        },
    ),
    Story(
        "the holder's host dies and nobody takes it",
        gone(1, 300),
        {310: set(), 315: {f"LinkIPNowhere {VIP}"}, 330: {f"LinkIPNowhere {VIP}", f"LinkAgentDown {HOSTS[1]}"}},
    ),
    Story(
        "the holder's host dies and another takes it",
        {**gone(1, 300), of_ip("bound", 2): then(0, 305, 1)},
        {325: set(), 330: {f"LinkAgentDown {HOSTS[1]}"}},
    ),
    Story(
        "all agents are gone",
        {**gone(1, 300), **gone(2, 300), **gone(3, 300)},
        {second: {f"LinkAgentDown {host}" for host in HOSTS.values()} for second in (330, 600, 1200)},
    ),
    Story(
        "two have it for a minute",
        {of_ip("bound", 3): then(0, 300, 1, 360, 0)},
        {310: set(), 315: {f"LinkIPTwice {VIP}"}, 355: {f"LinkIPTwice {VIP}"}, 360: set()},
    ),
    Story(
        "the checks of all hosts that are left fail, and the IP stays where it is",
        {**gone(3, 60), **{of_ip("status", host, status="FAILING"): then(0, 300, 1) for host in (1, 2)}},
        {
            310: {f"LinkAgentDown {HOSTS[3]}"},
            315: {f"LinkAgentDown {HOSTS[3]}", f"LinkIPFailingEverywhere {VIP}"},
        },
    ),
    Story(
        "two hosts take it from each other",
        {
            of_ip("transitions_total", 1, **ELECTED): then(3, 300, 4, 320, 5, 340, 6),
            of_ip("transitions_total", 1, **DEMOTED): then(3, 310, 4, 330, 5, 350, 6),
            of_ip("transitions_total", 2, **ELECTED): then(3, 310, 4, 330, 5, 350, 6),
            of_ip("transitions_total", 2, **DEMOTED): then(3, 320, 4, 340, 5, 360, 6),
        },
        {310: set(), 365: {f"LinkIPFlaps {VIP}"}, 800: {f"LinkIPFlaps {VIP}"}, 1000: set()},
    ),
    Story(
        "a stranger has it, too",
        {of_ip("conflicts_total", 1): then(2, 300, 3)},
        {295: set(), 300: {f"LinkIPConflict {VIP} {HOSTS[1]}"}, 1450: {f"LinkIPConflict {VIP} {HOSTS[1]}"}},
    ),
    Story(
        "a host's interface is lost for a minute",
        {series("link_healthy", 2): then(1, 300, 0, 360, 1)},
        {325: set(), 330: {f"LinkUnhealthy {HOSTS[2]}"}, 360: set()},
    ),
    Story(
        "ZooKeeper is lost on one host and refuses another, whose session goes on; a third connects anew",
        {
            series("link_zookeeper_state", 1, state="connected"): then(1, 300, 0),
            series("link_zookeeper_state", 1, state="lost"): then(0, 300, 1, 400, 0),
            series("link_zookeeper_refused", 2): then(0, 300, 1),
            series("link_zookeeper_state", 3, state="connected"): then(1, 300, 0, 340, 1),
            series("link_zookeeper_state", 3, state="connecting"): then(0, 300, 1, 340, 0),
        },
        {
            325: set(),
            330: {f"LinkZooKeeper {HOSTS[1]}", f"LinkZooKeeper {HOSTS[2]}"},
            400: {f"LinkZooKeeper {HOSTS[2]}"},
        },
    ),
    Story(
        "a host has no witness",
        {series("link_quick", 3): then(1, 300, 0)},
        {595: set(), 600: {f"LinkSlow {HOSTS[3]}"}},
    ),
    Story(
        "nobody takes the notices of a host",
        {series("link_notices_total", 2, result="lost"): then(0, 300, 2)},
        {295: set(), 300: {f"LinkNoticesLost {HOSTS[2]}"}, 890: {f"LinkNoticesLost {HOSTS[2]}"}, 905: set()},
    ),
)


def labels_of(fired: str) -> dict[str, str]:
    alert, *values = fired.split()
    return {"alertname": alert, **{"instance" if value in HOSTS.values() else "ip": value for value in values}}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_finds_the_rules_well_formed() -> None:
    promtool("check", "rules", RULES)


@needs_prometheus
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_alerts_fire_when_they_should_and_only_then(story: Story, tmp_path: Path) -> None:
    told = {**quiet(), **story.differs}
    assert len(told) == len(quiet()), "a story's series are spelled as quiet() has them"
    expected = [
        {
            "expr": 'count by (alertname, ip, instance) (ALERTS{alertstate="firing"})',
            "eval_time": f"{second}s",
            "exp_samples": [
                {"labels": f"{{{','.join(f'{k}={json.dumps(v)}' for k, v in labels_of(each).items())}}}", "value": 1}
                for each in fired
            ],
        }
        for second, fired in story.fires.items()
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": f"{STEP}s",
        "tests": [
            {
                "interval": f"{STEP}s",
                "input_series": [{"series": name, "values": values} for name, values in told.items()],
                "promql_expr_test": expected,
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))  # JSON is YAML
    promtool("test", "rules", tmp_path / "test.yml")


def test_every_alert_has_a_story_in_which_it_fires_with_the_labels_that_its_words_use() -> None:
    seen = {
        labels["alertname"]: labels for story in STORIES for f in story.fires.values() for labels in map(labels_of, f)
    }
    assert seen.keys() == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert used and used <= seen[rule["alert"]].keys(), rule["alert"]


def test_every_metric_that_the_alerts_and_the_dashboard_use_is_one_of_links() -> None:
    text = json.dumps([ALERTS, DASHBOARD])
    used = set(re.findall(r"\blink_\w+", text))
    assert used - METRICS == set()
    assert {"link_ip_bound", "link_zookeeper_state"} <= used


# --------------------------------------------------------------------------------------------------- what is real

USER, PASSWORD = "link", "secret"


def ask(
    namespace: str, address: str, path: str, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, str]:
    """An HTTP request from inside a namespace: status and body."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port))
    with contextlib.closing(connection):
        connection.sock = connect(namespace, host, int(port), 5)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


class Guarded(Host):
    """A host whose agent is asked from other hosts, too: with a password."""

    def base(self) -> dict[str, Any]:
        return {**super().base(), "listen": f"{self.address}:1313", "user": USER, "password": PASSWORD}

    def ask(self, path: str, method: str = "GET", body: Any = None) -> tuple[int, str]:
        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        return ask(self.namespace, f"{self.address}:1313", path, method, body, Authorization=f"Basic {basic}")

    def api(self, method: str, path: str, body: Any = None, timeout: float = 5.0) -> tuple[int, Any]:
        status, text = self.ask(path, method, body)
        return status, json.loads(text) if text.strip() else None


class Prometheus:
    """In the lab's client, configured as the rule file's first lines say."""

    def __init__(self, lab: Lab) -> None:
        self._namespace, directory = lab.client, lab.directory / "prometheus"
        directory.mkdir()
        config = yaml.safe_load("\n".join(re.findall("^#   (.*)", RULES.read_text(), re.M)))
        job = config["scrape_configs"][0]
        (directory / "password").write_text(PASSWORD)
        assert job["static_configs"][0]["targets"] and job["basic_auth"].pop("password_file")
        job["basic_auth"]["password_file"] = str(directory / "password")
        job["static_configs"][0]["targets"] = [f"{host.address}:1313" for host in lab.hosts]
        job["scrape_interval"] = "500ms"
        assert Path(config["rule_files"][0]).name == RULES.name
        config["rule_files"] = [str(directory / RULES.name)]
        (directory / RULES.name).write_text(RULES.read_text().replace(" interval: 5s", " interval: 500ms"))
        (directory / "prometheus.yml").write_text(json.dumps(config))
        command = ["ip", "netns", "exec", lab.client, "prometheus", "--web.listen-address=127.0.0.1:9090"]
        command += [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        lab.spawn(command, directory / "log")
        wait_until(self.ready, 20, f"Prometheus ready: {directory}/log")

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return ask(self._namespace, "127.0.0.1:9090", "/-/ready")[0] == 200
        return False

    def get(self, path: str, **parameters: str) -> Any:
        path = f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        status, text = ask(self._namespace, "127.0.0.1:9090", path)
        assert status == 200, text
        return json.loads(text)["data"]

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])

    def alerts(self) -> dict[str, Any]:
        """Those that fire or are about to: as in the stories, and the words of each."""
        found = self.get("alerts")["alerts"]
        names = ("alertname", "ip", "instance")
        return {" ".join(a["labels"][n] for n in names if n in a["labels"]): a["annotations"] for a in found}

    def raises(self, *expected: str, within: float) -> None:
        """Wait for exactly these alerts."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.alerts().keys() == {*expected}, within)
        assert self.alerts().keys() == {*expected}


class World(NamedTuple):
    """Three agents, a Prometheus, an IP, and another one that has a check."""

    c: Cluster
    prometheus: Prometheus
    vip: str
    checked: str


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if not Path("/usr/share/java/zookeeper.jar").exists():
        pytest.skip("needs Debian's zookeeper: ./start.sh test")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr("lab.Host", Guarded)
        lab = stack.enter_context(Lab())
        c = Cluster(lab)
        prometheus, _ = together(partial(Prometheus, lab), partial(c.reset, 1, QUICK))
        c.services = {host: Service(host) for host in c.hosts}
        world = World(c, prometheus, c.add(), c.add(**CHECKED))
        c.settled(world.checked)
        _, others = c.settled(world.vip)
        assert others[0].api("POST", f"/ips/{world.vip}/lock")[0] == 204
        c.settled(world.vip)
        yield world


def families(host: Guarded) -> dict[str, Metric]:
    """What an agent tells, as Prometheus' own client library reads it."""
    status, text = host.ask("/metrics")
    assert status == 200
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


@needs_prometheus
def test_what_an_agent_tells_is_well_formed_and_complete(world: World) -> None:
    told = set()
    for host in world.c.hosts:
        samples = []
        for family in families(host).values():
            assert family.documentation and family.type in ("gauge", "counter"), family.name
            for sample in family.samples:
                assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
                samples.append((sample.name, *sorted(sample.labels.items())))
        assert len(set(samples)) == len(samples)
        told |= {name for name, *_ in samples}
    assert told == METRICS


@needs_prometheus
def test_two_checks_that_differ_in_their_paths_only_are_two_series(world: World) -> None:
    host, checks = world.c.hosts[0], [{**CHECK, "type": "HTTP", "path": path} for path in ("/up", "/ready")]
    vip = world.c.add(host, checks=checks)
    try:
        told = [s.labels["check"] for s in families(host)["link_ip_check_ok"].samples if s.labels["ip"] == vip]
    finally:
        assert host.api("DELETE", f"/ips/{vip}")[0] == 204
    assert len(set(told)) == 2, told


@needs_prometheus
@pytest.mark.parametrize("title", PANELS)
def test_each_expression_of_a_panel_finds_something(world: World, title: str) -> None:
    for expression in PANELS[title]:
        asked = expression.replace("$__rate_interval", "10s").replace("$ip", ".*")
        assert "$" not in asked
        wait_until(partial(world.prometheus.query, asked), 5, asked)


@needs_prometheus
def test_the_dashboards_list_of_ips_is_there(world: World) -> None:
    (asked,) = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["name"] == "ip"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked).groups()
    wait_until(lambda: {world.vip, world.checked} <= {*world.prometheus.get(f"label/{label}/values")}, 5)
    assert metric == "link_ip_bound"


@needs_prometheus
def test_whatever_the_alerts_look_at_is_there_and_none_is_raised_without_need(world: World) -> None:
    for selector in {s for rule in ALERTS for s in re.findall(r"(?:link_\w+|up\b)(?:{[^}]*})?", rule["expr"])}:
        wait_until(partial(world.prometheus.query, selector), 5, selector)
    assert [rule["name"] for rule in world.prometheus.get("rules")["groups"][0]["rules"]] == [
        a["alert"] for a in ALERTS
    ]
    world.prometheus.raises(within=5)


@needs_prometheus
def test_what_breaks_is_told(world: World) -> None:
    """First the service on all hosts, then ZooKeeper and the agent of the holder, whose kernel goes on answering."""
    c, prometheus = world.c, world.prometheus
    (serving,) = c.bound(world.checked)
    for host in sorted(c.hosts, key=lambda host: host is serving):  # the holder last: nothing moves
        c.services[host].stop()
        wait_until(lambda: c.status(host, world.checked) == "FAILING", 5)  # noqa: B023
    failing = f"LinkIPFailingEverywhere {world.checked}"
    prometheus.raises(failing, within=10)
    where = f"It stays on {serving.address}:1313 so"
    wait_until(lambda: where in prometheus.alerts()[failing]["description"], 3, where)
    c.zk.stop()
    (holder,) = c.bound(world.vip)
    holder.kill(signal.SIGKILL)
    nowhere = [f"LinkIPNowhere {ip}" for ip in (world.vip, world.checked) if c.bound(ip) == [holder]]
    others = [f"{host.address}:1313" for host in c.hosts if host is not holder]
    troubled = [f"{alert} {other}" for other in others for alert in ("LinkZooKeeper", "LinkUnhealthy")]
    prometheus.raises(failing, f"LinkAgentDown {holder.address}:1313", *nowhere, *troubled, within=15)
    words = json.dumps(prometheus.alerts())
    assert "no value" not in words and "error" not in words
