"""Where ranks meet, on no more network interfaces than they need.

torch's own store listens on every interface of rank 0's host, and anybody who reaches it may write
there. Ours listens on the address that MASTER_ADDR names. torchrun brings a store of its own.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import socket
import sys
from typing import Any

import torch.distributed as dist


def keep_to_loopback() -> None:
    """Where all ranks meet on the loopback interface, let gloo talk over it alone.

    An interface that the user named stays.
    """
    if _is_loopback(os.environ.get("MASTER_ADDR", "")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")


def own_store(rank: int, size: int, timeout: dt.timedelta) -> dist.Store | None:
    """The store at MASTER_ADDR:MASTER_PORT, held by rank 0; None under torchrun, which has one.

    Raises:
        OSError: rank 0 cannot listen there.
        RuntimeError: another rank does not reach it in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port or not port.isdecimal():
        return None  # torch says what is missing
    listening = _listen(host, int(port)) if rank == 0 else None
    heard: dict[str, Any] = {}
    if listening is not None:
        heard["master_listen_fd"] = listening.detach()
    return dist.TCPStore(
        host,
        int(port),
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        **heard,
    )


def _listen(host: str, port: int) -> socket.socket | None:
    """A socket at `host`'s address; None for all addresses, as torch does it.

    Debian gives a host's own name a loopback address, at which nobody else would find it.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if _is_loopback(str(address[0])) and not _is_loopback(host):
        return None
    return socket.create_server(address[:2], family=family, backlog=1024)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
