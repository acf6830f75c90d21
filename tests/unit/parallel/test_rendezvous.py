"""The store of a launch listens where it must, and nowhere else."""

import datetime as dt
import os
import socket

import pytest

from megaswitch.parallel.rendezvous import _listen, keep_to_loopback, own_store

SECONDS = dt.timedelta(seconds=20)


@pytest.fixture
def variables(monkeypatch):
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "GLOO_SOCKET_IFNAME",
        "TORCHELASTIC_USE_AGENT_STORE",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def addresses_listening_at(port: int) -> set[str]:
    """As the kernel lists them, in hexadecimal."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            for line in file.readlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, number = local.partition(":")
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_loopback_listens_there_alone(variables, host):
    port = free_port()
    variables("MASTER_ADDR", host)
    variables("MASTER_PORT", str(port))
    store = own_store(0, 1, SECONDS)
    assert addresses_listening_at(port) <= {"0100007F", "00000000000000000000000001000000"}
    store.set("key", "value")
    other = own_store(1, 1, SECONDS)
    assert other.get("key") == b"value"


def test_a_name_that_leads_to_loopback_by_accident_is_listened_for_everywhere(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 4000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert _listen("node1", 4000) is None


def test_torchrun_keeps_its_own_store(variables):
    variables("MASTER_ADDR", "127.0.0.1")
    variables("MASTER_PORT", "4000")
    variables("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert own_store(0, 2, SECONDS) is None


def test_gloo_keeps_to_loopback_where_the_ranks_meet_there(variables):
    variables("MASTER_ADDR", "10.0.0.7")
    keep_to_loopback()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    variables("MASTER_ADDR", "127.0.0.1")
    variables("GLOO_SOCKET_IFNAME", "eth7")
    keep_to_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
