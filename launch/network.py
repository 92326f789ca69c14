"""By which address, and which interface, this machine is reached from the run's main one."""

from __future__ import annotations

import socket

import psutil

from data.errors import UserError


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


def interface(address: str) -> str | None:
    """The name of the network interface that has `address`; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
