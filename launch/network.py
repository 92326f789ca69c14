"""Several machines: where they meet, and by which address and interface each is reached."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from data.errors import UserError

JOIN_SECONDS = 900
"""How long machines wait for each other: clusters start them minutes apart, and a lost one must come back."""
STORE_SECONDS = 300
"""How long the place where they meet may take to appear."""


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
            settings.append(f"is_host={int(address in _addresses(self.main, self.port))}")
        words = ["--rdzv_conf", ",".join(settings)]
        # The rendezvous deals the ranks out, whatever is said here; but of rank 0 accelerate wants the port to be
        # free, where another launcher on this machine may already keep the store.
        words += ["--num_machines", str(self.count), "--machine_rank", "1", "--rdzv_backend", "c10d"]
        words += ["--num_processes", str(self.count * processes)]
        return [*words, "--main_process_ip", self.main, "--main_process_port", str(self.port)]

    def environment(self) -> dict[str, str]:
        """What the launcher and gloo need to be told of this machine.

        Raises:
            UserError: the main machine cannot be reached from here.
        """
        address = local_address(self.main, self.port)
        found = {"PET_LOCAL_ADDR": address}
        found["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it tells at length of a store that has left before us
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
