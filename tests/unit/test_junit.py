"""Failed tests of JUnit XML reports, which untrusted programs write."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sessions.output.junit import (
    MAX_NAME_CHARS,
    MAX_REPORT_BYTES,
    MAX_TESTS,
    parse_failed_tests,
    read_failed_tests,
    stamp_report,
)

CASE = '<testcase classname="{}" name="{}"><failure message="x">text</failure></testcase>'


def report(*names: str, head: str = "") -> bytes:
    cases = "".join(CASE.format("tests.test_a", name) for name in names)
    return f'<?xml version="1.0"?>{head}<testsuites><testsuite>{cases}</testsuite></testsuites>'.encode()


def test_parse_failed_tests_with_failure_and_error_names_both() -> None:
    text = (
        '<testsuite><testcase name="passes"/><testcase classname="a" name="fails"><failure/></testcase>'
        '<testcase name="skipped"><skipped/></testcase><testcase name="breaks"><error/></testcase><error/></testsuite>'
    )
    assert parse_failed_tests(text.encode()) == ("a.fails", "breaks")


def test_parse_failed_tests_with_cut_report_returns_its_beginning() -> None:
    assert parse_failed_tests(report("one", "two")[:-60]) == ("tests.test_a.one",)


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>',
        '<!DOCTYPE x [<!ENTITY c SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE x SYSTEM "http://127.0.0.1/x.dtd">',
    ],
)
def test_parse_failed_tests_with_document_type_returns_nothing(head: str) -> None:
    """Entities are neither expanded nor loaded."""
    assert parse_failed_tests(report("one", "&c;" if "ENTITY" in head else "two", head=head)) == ()


def test_parse_failed_tests_with_deep_elements_stops() -> None:
    assert parse_failed_tests(b"<a>" * 1_000_000 + CASE.format("a", "b").encode()) == ()


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"<a", b"no xml", "<\ud800>".encode(errors="surrogatepass")])
def test_parse_failed_tests_with_invalid_report_returns_nothing(data: bytes) -> None:
    assert parse_failed_tests(data) == ()


def test_parse_failed_tests_limits_number_length_and_characters() -> None:
    names = parse_failed_tests(report("x" * 10_000, "a&#10;b\u202e\u009bc", *(f"test_{n}" for n in range(1000))))
    assert len(names) == MAX_TESTS
    assert len(names[0]) == MAX_NAME_CHARS
    assert names[1] == "tests.test_a.a b c"


def test_read_failed_tests_does_not_follow_links(tmp_path: Path) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir()
    top.mkdir()
    (outside / "junit.xml").write_bytes(report("secret"))
    (top / "link.xml").symlink_to(outside / "junit.xml")
    (top / "folder").symlink_to(outside)
    for path in ("link.xml", "folder/junit.xml", "missing.xml"):
        assert read_failed_tests(top, path) == ()
        assert stamp_report(top, path) is None


def test_read_failed_tests_with_large_report_returns_nothing(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_bytes(report("one").ljust(MAX_REPORT_BYTES + 1))
    assert read_failed_tests(tmp_path, "junit.xml") == ()
    (tmp_path / "junit.xml").write_bytes(report("one").ljust(MAX_REPORT_BYTES))
    assert read_failed_tests(tmp_path, "junit.xml") == ("tests.test_a.one",)
