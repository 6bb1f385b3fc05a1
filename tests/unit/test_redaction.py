"""Redaction of byte streams: secrets are found across chunks, and nothing else is lost."""

from __future__ import annotations

import random

import pytest

from orchestrator.sessions.supervision.capture import (
    MAX_HELD_BYTES,
    MAX_KEY_BYTES,
    StreamRedactor,
    unsafe_prefix_length,
)

PATTERN = rb"sk-[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{36}|(?<=token=)[a-f0-9]{16}".decode()
TOKEN = b"sk-" + b"Ab3" * 10
KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + b"b3BlbnNzaC1rZXktdjEA\n" * 30 + b"-----END OPENSSH PRIVATE KEY-----"


def redacted(*chunks: bytes, pattern: str = PATTERN) -> bytes:
    redactor = StreamRedactor(pattern)
    return b"".join(map(redactor.feed, chunks)) + redactor.flush()


def in_chunks(data: bytes, size: int) -> list[bytes]:
    return [data[place : place + size] for place in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 65536])
def test_chunk_size_makes_no_difference(size: int) -> None:
    """Tokens, values of secret names, and keys are replaced; other bytes are kept."""
    text = b"a %s b\xff\n\r%s\n{%s}\ntoken=0123456789abcdef!\nsk-short %s" % (TOKEN, KEY, TOKEN, TOKEN)
    expected = b"a [redacted] b\xff\n\r[redacted]\n{[redacted]}\ntoken=[redacted]!\nsk-short [redacted]"
    assert redacted(*in_chunks(text, size)) == expected


@pytest.mark.parametrize("shift", range(-40, 41, 5))
@pytest.mark.parametrize("size", [1000, 4096, 65536])
def test_secret_in_an_endless_line_is_found_at_any_cut(shift: int, size: int) -> None:
    """Even if the line is longer than the buffer."""
    lead, trail = b" " * (3 * MAX_HELD_BYTES + shift), b" " * (2 * MAX_HELD_BYTES)
    for secret in (TOKEN, KEY):
        assert redacted(*in_chunks(lead + secret + trail, size)) == lead + b"[redacted]" + trail
    lead = lead + b"token="
    assert redacted(*in_chunks(lead + b"0" * 16 + trail, size)) == lead + b"[redacted]" + trail


def test_long_secret_is_replaced_to_its_end() -> None:
    """It is replaced once, and no part of it follows."""
    secret = b"sk-" + b"x" * (20 * MAX_HELD_BYTES)
    assert redacted(*in_chunks(b"a " + secret + b" b", 1000)) == b"a [redacted] b"


def test_at_most_an_unfinished_line_is_held_back() -> None:
    """Complete lines pass at once; of a long line all but the last bytes."""
    redactor = StreamRedactor(PATTERN)
    assert redactor.feed(b"one\ntwo") == b"one\n"
    assert redactor.feed(b"\nthree") == b"two\n"
    assert len(redactor.feed(b" " * (10 * MAX_HELD_BYTES))) == 9 * MAX_HELD_BYTES + 5
    assert redactor.drop() == MAX_HELD_BYTES
    assert redactor.flush() == b""


@pytest.mark.parametrize("size", [1, 100, 5000, 65536])
def test_endless_key_removes_a_bounded_part(size: int) -> None:
    """A mentioned key header does not silence a program for ever."""
    text = b"if x == '-----BEGIN PRIVATE KEY-----':\n" + b"code\n" * MAX_KEY_BYTES
    given = redacted(*in_chunks(text, size))
    assert given.startswith(b"if x == '[redacted]")
    assert given.endswith(b"code\n")
    assert abs(len(text) - len(given) - MAX_KEY_BYTES) < 100


def test_key_on_one_line_of_json_is_found() -> None:
    """With escaped line ends."""
    line = b'{"key": "' + KEY.replace(b"\n", b"\\n") + b'"}\n'
    assert redacted(line) == b'{"key": "[redacted]"}\n'


def test_random_chunks_lose_nothing() -> None:
    """The output equals a redaction of the whole input, for any mixture of words, lines and tokens."""
    dice = random.Random(1)
    for _ in range(200):
        words = [dice.choice([b"word ", b"\n", b"sk-", TOKEN + b"\n", b"token=", b"x" * 500, KEY]) for _ in range(60)]
        text = b"".join(words)
        chunks, place = [], 0
        while place < len(text):
            size = dice.choice([1, 10, 100, 3000])
            chunks.append(text[place : place + size])
            place += size
        given = redacted(*chunks)
        assert given == redacted(text)
        assert TOKEN not in given
        assert b"b3Blbn" not in given


def test_half_a_secret_after_a_gap_is_removed() -> None:
    """Up to the first complete line, to the end of a key that began in the gap, or a bounded amount."""
    assert unsafe_prefix_length(b"3Ab3\nnext\n") == 5
    assert unsafe_prefix_length(b"x" * 10 * MAX_HELD_BYTES) == MAX_HELD_BYTES
    assert unsafe_prefix_length(b"abc") == 3
    half = KEY[100:]
    assert unsafe_prefix_length(half + b"\nnext\n") == len(half)
    assert unsafe_prefix_length(b"rest\n" + KEY + b"\n") == 5
