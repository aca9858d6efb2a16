"""What people are told, on real hosts: history, metrics, notices, the page in a real browser, `link.py status`.

LINK_PICTURES=docs/ writes the README's pictures of the page there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from lab import CLIENT, PROGRAM, Host, Lab, connect, wait_until
from scenarios import QUICK, Cluster, mend
from test_real import ProxyArp

HOOK = "#!/bin/sh\ncat >>{file} && echo >>{file}\n"


@pytest.fixture(scope="module")
def c() -> Iterator[Cluster]:
    with Lab() as lab:
        cluster = Cluster(lab).reset(1, {**QUICK, "session_timeout": 4})
        for host in cluster.hosts:
            hook, file = host.directory / "hook", host.directory / "notices"
            hook.write_text(HOOK.format(file=file))
            hook.chmod(0o755)
            cluster.start_afresh(host, on_change=str(hook))
        cluster.all_serve(10)
        yield cluster


@pytest.fixture(autouse=True)
def told(c: Cluster) -> Iterator[None]:
    """For pytest's report, if the test fails."""
    c.mark()
    yield
    for host in c.hosts:
        print(f"---- {host.name}\n{c.news(host)[-6000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", "window-size=1280,560"):
        options.add_argument(f"--{word}")
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def reachable(host: Host) -> Iterator[str]:
    """The address, on this machine's own loopback, of the API that listens on the host's."""

    def pump(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)

    def relay(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), connect(host.namespace, "127.0.0.1", 1313, 10) as agent:
            back = threading.Thread(target=pump, args=(agent, client))
            back.start()
            pump(client, agent)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=relay, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def notices(host: Host, vip: str) -> list[dict[str, Any]]:
    """What the host's program was told of an IP."""
    file = host.directory / "notices"
    told = [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []
    return [each for each in told if each["ip"] == vip]


def metrics(host: Host) -> dict[tuple[str, str], float]:
    """By name and labels' values."""
    with reachable(host) as address:
        text = subprocess.check_output(["curl", "-sf", f"http://{address}/metrics"], text=True)
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {(each.name, ",".join(each.labels.values())): each.value for each in samples}


def status(host: Host) -> tuple[int, str]:
    with reachable(host) as address:
        command = [sys.executable, str(PROGRAM), "status", "--url", f"http://{address}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def button(browser: Any, text: str) -> Any:
    return next(each for each in browser.find_elements(By.TAG_NAME, "button") if each.text == text)


def text_of(browser: Any, key: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, key).text)


@contextlib.contextmanager
def shown(browser: Any, host: Host, vip: str) -> Iterator[Callable[[], str]]:
    """The page of a host's agent, with the IP's history opened; what it says of its IPs."""
    with reachable(host) as address:
        browser.get(f"http://{address}/")
        lines = partial(text_of, browser, "#ips")
        wait_until(lambda: f"{vip}/32" in lines(), 15, "the IP")
        button(browser, f"{vip}/32").send_keys(Keys.ENTER)  # as who has no mouse
        yield lines


def met(c: Cluster, vip: str) -> None:
    """Wait until every standby has heard the holder: only then its silence means something."""
    holder, others = c.settled(vip, 15)
    heard = [partial(lambda host: c.show(host, vip)["wire"]["state"] == "answered", host) for host in others]
    wait_until(lambda: all(each() for each in heard), 15, f"{holder.name} is heard")


def noted(c: Cluster, host: Host, vip: str, **change: str) -> dict[str, Any]:
    """Wait for this in the history of the IP (or, as "", of the host), and in the notice with the same words."""

    def look() -> dict[str, Any] | None:
        story = c.show(host, vip) if vip else host.api("GET", "/health")[1]
        last = dict(next(reversed(story.get("history", [])), {}))
        return last if change.items() <= last.items() else None

    last = wait_until(look, 15, f"{change} on {host.name}")
    wait_until(lambda: notices(host, vip)[-1:] == [{"host": host.name, "ip": vip, **last}], 10, "the notice")
    return last


def told_the_same(c: Cluster, host: Host, vip: str, **change: str) -> dict[str, Any]:
    """Wait for the change; it is in the history, in the notice, in the log, and counted, with the same words."""
    last = noted(c, host, vip, **change)
    assert f"vip={vip}/32 {last['from']} -> {last['to']} ({last['event']}: {last['reason']})" in c.news(host)
    assert metrics(host)["link_ip_transitions_total", f"{vip},{last['event']}"] >= 1
    assert c.show(host, vip)["since"] == last["time"][:19] + "Z"
    return last


def test_moves_a_death_and_a_restart_are_told_everywhere_with_the_same_words(c: Cluster) -> None:
    vip, holder, (first, _) = c.held()
    c.mark()
    assert first.api("POST", f"/ips/{vip}/lock")[0] == 204
    taken = told_the_same(c, first, vip, to="ACTIVATED", event="elected", by="lock from 127.0.0.1")
    given = told_the_same(c, holder, vip, to="STANDBY", event="demoted")
    assert taken["time"] < given["time"] and given["by"] is None
    assert first.api("POST", f"/ips/{vip}/failover")[0] == 204
    told_the_same(c, first, vip, to="STANDBY", event="demoted", by="failover from 127.0.0.1")
    holder, others = c.settled(vip)
    known = {host: c.show(host, vip)["history"] for host in c.hosts}
    for host in c.hosts:  # restarts and crashes tell nobody anything
        if host is first:
            host.kill(signal.SIGHUP)
            wait_until(lambda: "reload: executing" in c.news(first), 10)
        else:
            host.stop(signal.SIGKILL)
            c.start(host)
        c.all_serve(20)
    assert c.settled(vip)[0] is holder
    assert {host: c.show(host, vip)["history"] for host in c.hosts} == known
    assert [len(notices(host, vip)) for host in c.hosts] == [len(history) for history in known.values()]
    c.mark()
    met(c, vip)
    holder.power_off()
    holder, _ = c.settled(vip, 15, among=others)
    told_the_same(c, holder, vip, to="ACTIVATED")
    numbers = metrics(holder)
    assert numbers["link_ip_takeovers_total", vip] == 1 and 0 < numbers["link_ip_gap_seconds", f"{vip},unplanned"] < 1
    code, table = status(holder)
    assert code == 0 and f"{vip}/32" in table and holder.name in table
    mend(c, holder)
    c.all_serve(20)


def test_a_flap_a_conflict_and_a_lost_zookeeper_are_told_everywhere_with_the_same_words(
    c: Cluster, browser: Any
) -> None:
    health = partial(text_of, browser, "#health")
    for host in c.hosts:
        c.start_afresh(host, on_change=host.config["on_change"])
    c.all_serve(10)
    healthy = [partial(lambda host: host.api("GET", "/health")[1]["healthy"], host) for host in c.hosts]
    wait_until(lambda: all(each() for each in healthy), 15, "the sessions of the agents before have ended")
    vip, holder, _ = c.held()
    c.mark()
    met(c, vip)
    holder.unplug()
    failing = told_the_same(c, holder, vip, to="FAILING", event="health_check_fail")
    trouble = noted(c, holder, "", event="trouble", to="unhealthy")["reason"].partition(";")[0]
    assert "no carrier" in trouble and trouble in failing["reason"]
    code, table = status(holder)
    assert code == 1 and f"{vip}/32 is FAILING here" in table and trouble in table
    assert metrics(holder)["link_ip_status", f"{vip},FAILING"] == 1 and metrics(holder)["link_healthy", ""] == 0
    with shown(browser, holder, vip) as page:
        wait_until(lambda: "STANDBY" in page() and failing["reason"] in page() and trouble in health(), 15, "a flap")
    c.elsewhere(vip, holder, 15)
    holder.mend()
    told_the_same(c, holder, vip, to="STANDBY", event="health_check_success")
    noted(c, holder, "", event="recovered", to="healthy")
    holder, _ = c.settled(vip)
    with ProxyArp(c.lab, vip) as rival:  # a stranger has it, too
        wait_until(lambda: rival.claim() or metrics(holder)["link_ip_conflicts_total", vip], 20, "a conflict")
    assert c.show(holder, vip)["conflicts"] == {"count": 1, "mac": c.lab.mac(CLIENT)}
    conflict = noted(c, holder, vip, event="conflict")["reason"]
    assert f"also answered for by {c.lab.mac(CLIENT)}" in conflict and f"vip={vip}/32 {conflict}" in c.news(holder)
    with shown(browser, holder, vip) as page:
        wait_until(lambda: f"1, last: {c.lab.mac(CLIENT)}" in page() and conflict in page(), 15, "a conflict")
    c.settled(vip, 15)
    c.zk.stop()
    wait_until(lambda: holder.api("GET", "/health")[0] == 503, 15, "ZooKeeper is known to be lost")
    assert metrics(holder)["link_zookeeper_state", "lost"] == 1
    assert noted(c, holder, "", event="trouble")["reason"].startswith("ZooKeeper is lost: Connection")
    with shown(browser, holder, vip):
        wait_until(lambda: "ZooKeeper is lost" in health(), 15, "a lost ZooKeeper")
    code, table = status(holder)
    assert code == 0 and f"{holder.name}: ZooKeeper is lost" in table  # the IP is held all the same
    mend(c, holder)
    c.all_serve(20)


def test_the_page_shows_a_failover_as_it_happens_moves_the_ip_and_says_when_the_agent_is_gone(
    c: Cluster, browser: Any
) -> None:
    vip, holder, (first, second) = c.held()
    with reachable(first) as address:
        browser.get(f"http://{address}/")
        lines = partial(text_of, browser, "#ips")
        wait_until(lambda: f"{vip}/32 {holder.name} " in lines(), 15, "who has it")
        wait_until(lambda: text_of(browser, "#health").endswith(" UTC. This host is well."), 15)
        assert text_of(browser, "#health").startswith(f"As {first.name} knows it at 20")
        name = button(browser, f"{vip}/32")
        name.send_keys(Keys.ENTER)  # as who has no mouse
        wait_until(lambda: "FAILING → STANDBY" in lines(), 10, "its history")
        assert name.get_attribute("aria-expanded") == "true"
        met(c, vip)
        holder.power_off()
        wait_until(
            lambda: f"{vip}/32 {first.name} " in lines() and "STANDBY → ACTIVATED" in lines(), 15, "the failover"
        )
        assert f"; nobody answers for the IP; {holder.name} had it before" in lines()
        for number, scheme in enumerate(("light", "dark")):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            colour = browser.find_element(By.TAG_NAME, "th").value_of_css_property("color")
            assert colour == ("rgba(91, 98, 112, 1)", "rgba(163, 171, 184, 1)")[number]
            if directory := os.environ.get("LINK_PICTURES"):
                browser.save_screenshot(str(Path(directory, f"page-{scheme}.png")))
        label = f"button[aria-label='hand over to {second.name}: {vip}/32']"
        move = wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, label), 10, "who is next in line")[0]
        move.click()
        browser.switch_to.alert.dismiss()
        assert c.show(first, vip)["bound"]
        move.click()
        assert browser.switch_to.alert.text == f"{vip}/32: hand over to {second.name}?"
        browser.switch_to.alert.accept()
        wait_until(lambda: c.show(second, vip)["bound"] and not c.show(first, vip)["bound"], 15, "given away")
        wait_until(lambda: text_of(browser, "#news") == f"{vip}/32: failover: done", 10)
        wait_until(lambda: "failover from 127.0.0.1" in lines(), 10, "who has ordered it")
        foreign = (
            f"<form method=post action='http://{address}/ips/{vip}/lock'></form><script>document.forms[0].submit()"
        )
        browser.get(f"data:text/html,{foreign}</script>")
        wait_until(lambda: "no foreign pages" in browser.page_source, 10, "another page's order is refused")
        assert c.show(second, vip)["bound"]
        browser.get(f"http://{address}/")
        wait_until(lambda: f"{vip}/32 {second.name} " in lines(), 15)
        first.stop()
        wait_until(lambda: "No answer from the agent" in text_of(browser, "#news"), 15, "the agent is gone")
        c.start(first)
        wait_until(lambda: text_of(browser, "#news") == "The agent answers again", 20)
        assert [entry for entry in browser.get_log("browser") if "Security" in str(entry)] == []
    mend(c, holder)
    c.all_serve(20)


def test_status_knows_its_own_agent_whoever_has_signed_its_certificate(c: Cluster) -> None:
    host, key = c.hosts[0], "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for line in (
        f"req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=authority -days 1",
        f"req {key} -keyout api.key -out api.csr -subj /CN=elsewhere",
        "x509 -req -in api.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out api.pem -days 1",
    ):
        subprocess.run(["openssl", *line.split()], cwd=host.directory, check=True, capture_output=True)
    c.start_afresh(host, tls_cert=str(host.directory / "api.pem"), tls_key=str(host.directory / "api.key"))
    ask = ["ip", "netns", "exec", host.namespace, sys.executable, str(PROGRAM), "status", "--config"]
    answer = partial(subprocess.run, [*ask, str(host.config_path)], capture_output=True, text=True, check=False)
    wait_until(lambda: answer().returncode == 0 and "all is well" in answer().stdout, 20, "status over HTTPS")
    c.start_afresh(host)
    c.all_serve(20)
