"""Which addresses a process and what it started listen at, from /proc."""

import contextlib
import ipaddress
import os
import socket
import struct
from pathlib import Path

LISTENING = "0A"


def descendants(root: int) -> set[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
    found, grown = {root}, True
    while grown:
        more = {process for process, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def listening(processes: set[int]) -> dict[str, str]:
    """`address:port` of every TCP socket that waits for connections, with the command that holds it."""
    holders = {}
    for process in processes:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:300]
            for entry in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    holders[os.readlink(entry)] = command
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            holder = holders.get(f"socket:[{fields[9]}]")
            if fields[3] == LISTENING and holder is not None:
                address, port = fields[1].split(":")
                found[f"{_readable(address)}:{int(port, 16)}"] = holder
    return found


def _readable(address: str) -> str:
    """The kernel writes addresses as 32 bit words of the machine's own order."""
    words = [struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def beyond_loopback(found: dict[str, str]) -> dict[str, str]:
    """Those that another machine might reach."""

    def is_loopback(name: str) -> bool:
        address = ipaddress.ip_address(name.rpartition(":")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback

    return {name: holder for name, holder in found.items() if not is_loopback(name)}
