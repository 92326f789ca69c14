"""Several machines: where they meet, and by which address and interface each is reached."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import psutil

from data.errors import UserError
from pretrain.exits import PEER_LOST

JOIN_SECONDS = 900
"""How long machines wait for each other: clusters start them minutes apart, and a lost one must come back."""
APPEAR_SECONDS = 600
"""How long the place where they meet may take to appear."""
STORE_SECONDS = 60
"""How long it may take to answer."""
LOST_SECONDS = 60.0
"""How long it may be silent until the run is given up here."""


@dataclass(frozen=True)
class Nodes:
    """The machines of one run."""

    count: int
    main: str
    """Name or address of the machine where they meet."""
    port: int

    def words(self, processes: int) -> list[str]:
        """For `accelerate launch`, with `processes` on each machine."""
        address = local_address(self.main, self.port)
        settings = [f"join_timeout={JOIN_SECONDS}", f"read_timeout={STORE_SECONDS}"]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            # Torchrun would find out by the machine's name alone which one keeps the store.
            settings.append(f"is_host={int(self._here(address))}")
        words = ["--rdzv_conf", ",".join(settings)]
        # The rendezvous deals the ranks out, whatever is said here; but of rank 0 accelerate wants the port to be
        # free, where another launcher on this machine may already keep the store.
        words += ["--num_machines", str(self.count), "--machine_rank", "1", "--rdzv_backend", "c10d"]
        words += ["--num_processes", str(self.count * processes)]
        return [*words, "--main_process_ip", self.main, "--main_process_port", str(self.port)]

    def wait(self) -> None:
        """Wait for the place where all meet, unless it is here.

        Raises:
            UserError: it has not appeared within `APPEAR_SECONDS`.
        """
        if self._here(local_address(self.main, self.port)):
            return
        end = time.monotonic() + APPEAR_SECONDS
        while True:
            try:
                socket.create_connection((self.main, self.port), timeout=STORE_SECONDS).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    where = f"{self.main}:{self.port}"
                    raise UserError(f"nothing answers at {where} ({error}); is the command running there?") from None
            time.sleep(1.0)

    def watch(self) -> None:
        """From now on, end this launcher, and its workers with it, once the meeting place has gone for good.

        Torchrun itself would wait for the answer to a message over a cut link as long as TCP does, which is a
        quarter of an hour.
        """
        if not self._here(local_address(self.main, self.port)):
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        last = time.monotonic()
        while time.monotonic() - last < LOST_SECONDS:
            time.sleep(LOST_SECONDS / 6)
            try:
                socket.create_connection((self.main, self.port), timeout=LOST_SECONDS / 6).close()
                last = time.monotonic()
            except OSError:
                continue
        lost = f"{self.main}:{self.port} has not answered for {LOST_SECONDS:.0f} seconds"
        print(f"headwater: {lost}; start the same command again", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)

    def _here(self, address: str) -> bool:
        """Whether they meet on this machine, of this `address`."""
        return address in _addresses(self.main, self.port)

    def environment(self) -> dict[str, str]:
        """What the launcher and gloo need to be told of this machine.

        Raises:
            UserError: the main machine cannot be reached from here.
        """
        address = local_address(self.main, self.port)
        found = {"PET_LOCAL_ADDR": address}
        name = interface(address)
        # gloo would take the interface that the host's own name leads to, which often is the loopback.
        return found | ({"GLOO_SOCKET_IFNAME": name} if name else {})


def nodes_for(count: int, main: str | None, port: int) -> Nodes | None:
    """The machines as asked for on the command line; None for a single one.

    Raises:
        UserError: fewer than one, or several without a place to meet.
    """
    if count < 1:
        raise UserError(f"--nodes {count}: at least one is needed")
    if count == 1:
        return None
    if main is None:
        raise UserError(f"--nodes {count}: give every machine the address of one of them (--main-address)")
    return Nodes(count, main, port)


def local_address(main: str, port: int) -> str:
    """This machine's own address on the way to `main`; nothing is sent.

    Raises:
        UserError: `main` is no name or address that this machine knows a way to.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(main, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # of a datagram socket: only chooses a route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--main-address {main} cannot be reached from here ({error.strerror or error})") from None


def _addresses(name: str, port: int) -> set[str]:
    """All addresses that a name stands for."""
    return {str(found[4][0]) for found in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}


def interface(address: str) -> str | None:
    """The name of the network interface that has `address`; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
