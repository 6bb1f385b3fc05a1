"""Entries of `network.allow` and the hosts they match."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from orchestrator.domain.security.hosts import (
    addresses_to_try,
    canonical_host,
    is_allowed,
    is_public,
    parse_allowed_host,
)


def allows(entry: str, host: str, port: int = 443) -> bool:
    return is_allowed([parse_allowed_host(entry)], canonical_host(host), port)


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("api.example.com", "api.example.com", 443),
        ("api.example.com", "api.example.com", 80),
        ("API.Example.COM.", "api.example.com", 443),
        ("api.example.com", "API.EXAMPLE.COM.", 443),
        ("*.example.com", "api.example.com", 443),
        ("*.example.com", "a.b.example.com", 443),
        ("*.example.com:8443", "a.example.com", 8443),
        ("example.com:8443", "example.com", 8443),
        ("bücher.example", "xn--bcher-kva.example", 443),
        ("127.0.0.1:8000", "127.0.0.1", 8000),
        ("::1", "[0:0::1]", 443),
        ("[::1]:8000", "[::1]", 8000),
        ("localhost:8000", "LocalHost", 8000),
    ],
)
def test_entry_matches_a_host(entry: str, host: str, port: int) -> None:
    """In any case, with a trailing dot, and for any notation of an address."""
    assert allows(entry, host, port)


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("api.example.com", "api.example.com", 8443),
        ("api.example.com", "api.example.com", 22),
        ("api.example.com", "www.api.example.com", 443),
        ("api.example.com", "api.example.com.evil.example", 443),
        ("example.com", "evilexample.com", 443),
        ("*.example.com", "example.com", 443),
        ("*.example.com", "evilexample.com", 443),
        ("*.example.com", "example.com.evil.example", 443),
        ("example.com:8443", "example.com", 443),
        ("127.0.0.1:8000", "localhost", 8000),
        ("127.0.0.1:8000", "127.0.0.2", 8000),
        ("localhost:8000", "127.0.0.1", 8000),
        ("localhost:8000", "x.localhost", 8000),
    ],
)
def test_entry_does_not_match_a_host(entry: str, host: str, port: int) -> None:
    """Another port, a similar name, another name of the same machine."""
    assert not allows(entry, host, port)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("https://api.example.com/", "use only the host"),
        ("10.0.0.0/8", "use only the host"),
        ("user@example.com", "it has a user"),
        ("", "it is empty"),
        ("*", "has invalid characters"),
        ("*.com", "use a domain after"),
        ("*.10.0.0.1", "use a domain after"),
        ("api.*.example.com", "has invalid characters"),
        ("exa mple.com", "has invalid characters"),
        ("example.com\r\nx", "has invalid characters"),
        ("example.com\x00", "has invalid characters"),
        ("a..example.com", "has invalid characters"),
        ("-a.example.com", "has invalid characters"),
        (f"{'a' * 64}.example.com", "has invalid characters"),
        (".".join(["a" * 60] * 5), "too long"),
        ("example.com:0", "its port is invalid"),
        ("example.com:65536", "its port is invalid"),
        ("example.com:", "its port is invalid"),
        ("example.com:https", "its port is invalid"),
        ("127.1", "not an IPv4 address"),
        ("2130706433", "not an IPv4 address"),
        ("0x7f.0x1", "not an IPv4 address"),
        ("0177.0.0.1", "not an IPv4 address"),
        ("fe80::1%eth0", "has a zone"),
        ("[example.com]:80", "not an IPv6 address"),
        ("straße.example", "ambiguous letter"),
        ("localhost", "localhost:PORT"),
        ("*.localhost:80", "use a domain after"),
        ("x.localhost:80", "localhost:PORT"),
    ],
)
def test_invalid_entry_is_rejected(text: str, fix: str) -> None:
    """One line with the mistake and its fix."""
    with pytest.raises(ValueError, match=fix) as rejected:
        parse_allowed_host(text)
    assert ": " in str(rejected.value)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    "entry", ["api.example.com", "*.example.com:8443", "[::1]:80", "127.0.0.1", "localhost:80", "[::1]"]
)
def test_entry_is_shown_as_written(entry: str) -> None:
    """The recorded form parses to the same entry."""
    assert str(parse_allowed_host(entry)) == entry


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.1.1", "255.255.255.255", "240.0.0.1", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "fec0::1"),
        *("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_private_addresses_are_recognized(text: str) -> None:
    """Loopback, private networks, cloud metadata services, and IPv6 addresses that embed them."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_recognized(text: str) -> None:
    """IPv4 and IPv6."""
    assert is_public(ip_address(text))


def test_private_address_needs_an_entry() -> None:
    """One private address rejects the name; an entry for the name does not cover it."""
    public, private = ip_address("8.8.8.8"), ip_address("10.0.0.1")
    name, both = parse_allowed_host("git.example.com"), [public, private]
    assert addresses_to_try([name], "git.example.com", 443, [public]) == (public,)
    assert addresses_to_try([name], "git.example.com", 443, both) == ()
    assert addresses_to_try([name], "git.example.com", 443, []) == ()
    entries = [name, parse_allowed_host("10.0.0.1")]
    assert addresses_to_try(entries, "git.example.com", 443, both) == (public, private)
    assert addresses_to_try(entries, "git.example.com", 8443, both) == ()


def test_localhost_is_loopback() -> None:
    """Regardless of the resolver."""
    found = addresses_to_try([parse_allowed_host("localhost:80")], "localhost", 80, [ip_address("8.8.8.8")])
    assert list(map(str, found)) == ["127.0.0.1", "::1"]
