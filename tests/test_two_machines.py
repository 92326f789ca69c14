"""Two machines over a real network path: namespaces of the kernel's network, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apt_kit
import pytest
from pretrain_kit import ENVIRONMENT, write_recipe
from safetensors.torch import load_file

from data.errors import UserError
from launch.network import interface, local_address, nodes_for
from pretrain.metrics import read_metrics, read_starts

MACHINES = {"hw-test-a": "10.77.13.1", "hw-test-b": "10.77.13.2"}
MAIN = MACHINES["hw-test-a"]


def ip(*words: str, check: bool = True) -> str:
    """What `ip WORDS` prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cable() -> Iterator[None]:
    """Two machines with a cable between them."""
    reason = "network namespaces need root" if os.geteuid() else apt_kit.missing(["ip"], ["iproute2"])
    if reason:
        pytest.skip(reason)
    remove_machines()
    made = subprocess.run(["ip", "netns", "add", "hw-test-a"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    ip("netns", "add", "hw-test-b")
    ip("link", "add", "hwcable0", "type", "veth", "peer", "name", "hwcable1")
    for number, (name, address) in enumerate(MACHINES.items()):
        ip("link", "set", f"hwcable{number}", "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", f"hwcable{number}")
        ip("-n", name, "link", "set", f"hwcable{number}", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield
    remove_machines()


def remove_machines() -> None:
    for name in MACHINES:
        kill_machine(name)
        ip("netns", "del", name, check=False)


def kill_machine(name: str) -> None:
    """SIGKILL to all that runs there."""
    for number in ip("netns", "pids", name, check=False).split():
        subprocess.run(["kill", "-9", number], capture_output=True)


def start(name: str, recipe: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    """`headwater pretrain` with one process on one of the two machines."""
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "launch.cli", "pretrain", str(recipe)]
    command += ["--output", str(run), "--processes", "1", "--nodes", "2", "--main-address", MAIN, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.05)


def logged(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run))


def status(run: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((run / "status.json").read_text())
    return said


@pytest.mark.slow
def test_a_machine_that_dies_and_comes_back(cable: None, digits: Path, tmp_path: Path) -> None:
    """The other one waits for it, both go on from the checkpoint, and the weights are the undisturbed run's."""
    settings = {"train.steps": 300, "watch.checkpoint_every": 20, "watch.log_every": 5}
    recipe = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", settings)
    straight, run = tmp_path / "straight", tmp_path / "run"
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(recipe), "--output", str(straight)]
    subprocess.run([*command, "--processes", "2"], env=ENVIRONMENT, check=True, capture_output=True, timeout=200)
    first = start("hw-test-a", recipe, run, "--max-restarts", "2")
    second = start("hw-test-b", recipe, run, "--max-restarts", "2")
    until(lambda: logged(run, 30), 120)
    kill_machine("hw-test-b")
    second.wait()
    second = start("hw-test-b", recipe, run, "--max-restarts", "2")
    for process in (second, first):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    starts = [line["step"] for line in read_starts(run)]
    assert len(starts) == 2
    assert starts[1] >= 20
    found, wanted = (load_file(each / "export" / "model.safetensors") for each in (run, straight))
    assert all(found[name].equal(wanted[name]) for name in wanted)


FAULTS = {
    "cut": "ip -n hw-test-a link set hwcable0 down",
    "slow": "ip netns exec hw-test-a tc qdisc add dev hwcable0 root tbf rate 1kbit burst 2kb latency 600s",
}
"""What happens to the cable: a gradient of the tiny run would take many minutes through the slow one."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_cut_or_slow_cable_is_an_error_not_a_hang(fault: str, cable: None, digits: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 100_000, "watch.hang_seconds": 5.0, "watch.checkpoint_every": 1000}
    recipe, run = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", settings), tmp_path / "run"
    processes = [start(name, recipe, run) for name in MACHINES]
    until(lambda: logged(run, 20), 120)
    done = subprocess.run(FAULTS[fault].split(), capture_output=True, text=True)
    if done.returncode:
        for name in MACHINES:
            kill_machine(name)
        pytest.skip(f"this kernel cannot make a cable {fault}: {done.stderr.strip()}")
    cut = time.monotonic()
    codes = [process.wait(timeout=150) for process in processes]
    assert time.monotonic() - cut < 120
    assert set(codes) <= {69, 70}
    assert 70 in codes
    assert status(run)["state"] == "hung"
    assert list((run / "stacks").glob("*/process-*.txt"))


def test_machines_need_a_place_to_meet() -> None:
    assert nodes_for(1, None, 29400) is None
    with pytest.raises(UserError, match="--main-address"):
        nodes_for(2, None, 29400)
    with pytest.raises(UserError, match="--nodes 0"):
        nodes_for(0, None, 29400)
    with pytest.raises(UserError, match="cannot be reached"):
        local_address("no-such-host.invalid", 29400)


def test_this_machine_knows_its_own_address() -> None:
    assert local_address("127.0.0.1", 29400) == "127.0.0.1"
    assert interface("127.0.0.1") == "lo"
    assert interface("203.0.113.7") is None
