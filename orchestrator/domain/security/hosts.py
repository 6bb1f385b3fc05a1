"""Parse entries of `network.allow`, and match hosts and addresses.

Parsing is strict: text that two programs could interpret as different hosts is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

from orchestrator.errors import InvalidValue

Address = IPv4Address | IPv6Address

#: The ports of an entry without a port: HTTP and HTTPS.
DEFAULT_PORTS: Final = (80, 443)
LOCALHOST: Final = "localhost"
#: The addresses of `localhost`, regardless of the resolver.
LOOPBACK: Final[tuple[Address, ...]] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

_LONGEST_NAME: Final = 253
_LONGEST_SHOWN: Final = 60
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT: Final = re.compile(r"[0-9]{1,5}")
# Resolvers interpret numbers such as 127.1, 2130706433 and 0x7f.1 as IPv4 addresses.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
# IDNA 2003 (Python) and IDNA 2008 (browsers) encode these differently.
_AMBIGUOUS: Final = frozenset("ßς\u200c\u200d")
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052; the last 32 bits are an IPv4 address


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """An entry of `network.allow`: a host as `canonical_host` returns it.

    Without a `port` it matches `DEFAULT_PORTS`. With `subdomains` it matches all subdomains, but not the host itself.
    """

    host: str
    port: int | None = None
    subdomains: bool = False

    def allows(self, host: str, port: int) -> bool:
        """Return whether the entry matches a canonical host and a port."""
        if port != self.port if self.port is not None else port not in DEFAULT_PORTS:
            return False
        return host.endswith(f".{self.host}") if self.subdomains else host == self.host

    def __str__(self) -> str:
        """Return the entry as written in a config file."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'*.' if self.subdomains else ''}{host}{'' if self.port is None else f':{self.port}'}"


def parse_allowed_host(text: str) -> AllowedHost:
    """Parse an entry; raise ValueError with the problem and its remedy."""
    shown = repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
    if "/" in text:
        raise InvalidValue(f"{shown} is a URL, a path or a range", "use only the host, such as api.example.com")
    subdomains = text.startswith("*.")
    try:
        host, port = split_authority(text.removeprefix("*."))
    except ValueError as error:
        raise InvalidValue(
            f"{shown} is not a valid host: {error}", "use the form api.example.com, *.example.com or host:8443"
        ) from None
    if subdomains and (_is_address(host) or "." not in host):
        raise InvalidValue(f"{shown} matches too much or nothing", "use a domain after `*.`, such as *.example.com")
    if (host == LOCALHOST or host.endswith(f".{LOCALHOST}")) and (port is None or host != LOCALHOST):
        raise InvalidValue(f"{shown} has no port for a server on this machine", f"use {LOCALHOST}:PORT")
    return AllowedHost(host, port, subdomains)


def split_authority(text: str) -> tuple[str, int | None]:
    """Return the canonical host and the port of a host, with or without a port.

    Formats: `host`, `host:port`, `[address]` and `[address]:port`. Raises ValueError with a short reason.
    """
    if "@" in text:
        raise ValueError("it has a user name")
    if text.count(":") > 1 and "[" not in text:
        return canonical_host(f"[{text}]"), None
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host = text
    elif not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
        raise ValueError("its port is invalid")
    return canonical_host(host), int(port) if colon else None


def canonical_host(text: str) -> str:
    """Return a host's canonical form: lower-case ASCII (IDNA), or an address.

    A trailing dot is removed. Raises ValueError with a short reason.
    """
    if text.startswith("[") and text.endswith("]"):
        if "%" in text:
            raise ValueError("its IPv6 address has a zone")
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("it has colons but is not an IPv6 address") from None
    name = text.lower().removesuffix(".")
    if not name.isascii():
        if _AMBIGUOUS.intersection(name):
            raise ValueError("it has an ambiguous letter (write its xn-- form)")
        try:
            name = name.encode("idna").decode("ascii").lower()
        except UnicodeError:
            raise ValueError("it has characters that are not allowed in host names") from None
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(name))
        except ValueError:
            raise ValueError("it ends with a number but is not an IPv4 address") from None
    if not name or len(name) > _LONGEST_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("it is empty, too long, or has invalid characters")
    return name


def is_allowed(entries: Iterable[AllowedHost], host: str, port: int) -> bool:
    """Return whether any entry matches a canonical host and a port."""
    return any(entry.allows(host, port) for entry in entries)


def addresses_to_try(
    entries: Sequence[AllowedHost], host: str, port: int, resolved: Sequence[Address]
) -> tuple[Address, ...]:
    """Return the `resolved` addresses of an allowed host if safe, else none.

    The owner of a name can let it resolve to any address, even one of this machine or its local network. So each
    non-public address needs its own entry; otherwise no address is returned.
    """
    if host == LOCALHOST:
        return LOOPBACK
    is_reachable = (is_public(address) or is_allowed(entries, str(address), port) for address in resolved)
    return tuple(resolved) if all(is_reachable) else ()


def is_public(address: Address) -> bool:
    """Return whether an address, and any embedded IPv4 address, is public."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    inner = (address.sixtofour, *(address.teredo or ()))
    return (
        address in _GLOBAL_UNICAST and address.is_global and all(is_public(each) for each in inner if each is not None)
    )


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
