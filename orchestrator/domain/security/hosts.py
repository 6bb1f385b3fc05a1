"""The entries of `network.allow`, and the hosts and addresses that they match. Pure.

Strict: a text that two programs could read as two different hosts is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

Address = IPv4Address | IPv6Address

#: The ports of an entry that names none: HTTP and HTTPS.
DEFAULT_PORTS: Final = (80, 443)
LOCALHOST: Final = "localhost"
#: The addresses that `localhost` has, whatever a resolver says.
LOOPBACK: Final[tuple[Address, ...]] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

_LONGEST_NAME: Final = 253
_LONGEST_SHOWN: Final = 60
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT: Final = re.compile(r"[0-9]{1,5}")
# Other programs read these as numbers: 127.1, 2130706433 and 0x7f.1 are IPv4 addresses to a resolver.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
# IDNA 2003, which Python has, makes another name of these than IDNA 2008, which browsers have.
_AMBIGUOUS: Final = frozenset("ßς\u200c\u200d")
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052; the last 32 bits are an IPv4 address


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """An entry of `network.allow`: a host in canonical form, as `canonical_host` returns it.

    Without a `port` it is for `DEFAULT_PORTS`. With `subdomains` it is for each name that ends with it, and not for
    the name itself.
    """

    host: str
    port: int | None = None
    subdomains: bool = False

    def allows(self, host: str, port: int) -> bool:
        """Return whether the entry names this canonical host and this port."""
        if port != self.port if self.port is not None else port not in DEFAULT_PORTS:
            return False
        return host.endswith(f".{self.host}") if self.subdomains else host == self.host

    def __str__(self) -> str:
        """Return the entry as a file has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'*.' if self.subdomains else ''}{host}{'' if self.port is None else f':{self.port}'}"


def parse_allowed_host(text: str) -> AllowedHost:
    """Return the entry that a file has; ValueError with the mistake and its fix otherwise."""
    shown = repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
    if "/" in text:
        raise ValueError(f"{shown} is a URL, a path or a range: write the host only, as in api.example.com")
    subdomains = text.startswith("*.")
    try:
        host, port = split_authority(text.removeprefix("*."))
    except ValueError as error:
        raise ValueError(
            f"{shown} can't be a host, {error}: write api.example.com, *.example.com or host:8443"
        ) from None
    if subdomains and (_is_address(host) or "." not in host):
        raise ValueError(f"{shown} covers too much or nothing: name a domain after `*.`, as in *.example.com")
    if (host == LOCALHOST or host.endswith(f".{LOCALHOST}")) and (port is None or host != LOCALHOST):
        raise ValueError(f"{shown} does not say which server of this machine: write {LOCALHOST}:PORT")
    return AllowedHost(host, port, subdomains)


def split_authority(text: str) -> tuple[str, int | None]:
    """Return the canonical host and the port of `host`, `host:port`, `[address]` or `[address]:port`.

    ValueError says what is wrong with it, in a few words.
    """
    if "@" in text:
        raise ValueError("it has a user")
    if text.count(":") > 1 and "[" not in text:
        return canonical_host(f"[{text}]"), None
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host = text
    elif not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
        raise ValueError("its port is none")
    return canonical_host(host), int(port) if colon else None


def canonical_host(text: str) -> str:
    """Return a host's one form: a name in lower case, ASCII (IDNA) and without a dot at its end, or an address.

    ValueError says what is wrong with it, in a few words.
    """
    if text.startswith("[") and text.endswith("]"):
        if "%" in text:
            raise ValueError("its IPv6 address is one of a single interface")
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("it has colons, and no IPv6 address") from None
    name = text.lower().removesuffix(".")
    if not name.isascii():
        if _AMBIGUOUS.intersection(name):
            raise ValueError("it has a letter that programs read in two ways (write its xn-- form)")
        try:
            name = name.encode("idna").decode("ascii").lower()
        except UnicodeError:
            raise ValueError("it has letters that no name has") from None
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(name))
        except ValueError:
            raise ValueError("it ends with a number, and is no IPv4 address") from None
    if not name or len(name) > _LONGEST_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("it is empty, too long, or has characters that no name has")
    return name


def is_allowed(entries: Iterable[AllowedHost], host: str, port: int) -> bool:
    """Return whether an entry names this canonical host and this port."""
    return any(entry.allows(host, port) for entry in entries)


def addresses_to_try(
    entries: Sequence[AllowedHost], host: str, port: int, resolved: Sequence[Address]
) -> tuple[Address, ...]:
    """Return the addresses at which an allowed host may be reached, of those that its name was `resolved` to.

    The owner of a name can have it resolve to any address, such as one of this machine or its local network. So an
    address that is not public must be named by an entry itself. With one address that is not, none is returned.
    """
    if host == LOCALHOST:
        return LOOPBACK
    known = [is_public(one) or is_allowed(entries, str(one), port) for one in resolved]
    return tuple(resolved) if all(known) else ()


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet, and so is an IPv4 address embedded in it."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    inner = (address.sixtofour, *(address.teredo or ()))
    return address in _GLOBAL_UNICAST and address.is_global and all(is_public(one) for one in inner if one is not None)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
