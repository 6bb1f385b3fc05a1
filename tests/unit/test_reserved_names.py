"""Names that commits of agents must not contain."""

from __future__ import annotations

import pytest

from orchestrator.repo.intake.inspection import find_reserved_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (".git/hooks/pre-commit", ".git"),
        ("sub/.GIT/config", ".git"),
        (".g\u200cit/config", ".git"),
        (".gi\u200ft", ".git"),
        (".git\ufeff/x", ".git"),
        ("git~1/config", ".git"),
        ("GIT~2", ".git"),
        (".git. . /config", ".git"),
        (".git::$INDEX_ALLOCATION/config", ".git"),
        ("a\\.git\\hooks\\x", ".git"),
        (".council/state/x.jsonl", ".council"),
        (".council", ".council"),
        ("deep/er/.Council/x", ".council"),
        (".counc\u200dil/store", ".council"),
        ("COUNCI~1/store", ".council"),
        (".worktrees/.state/x", ".worktrees"),
        (".wor\u212atrees/x", ".worktrees"),
    ],
)
def test_reserved_name_in_any_form_is_found(path: str, name: str) -> None:
    """In any case, with characters that HFS+ ignores, and in the forms that NTFS treats as equal."""
    assert find_reserved_name(path) == name


@pytest.mark.parametrize(
    "path",
    [".gitignore", ".github/x", "git", "a.git/x", "council/x", ".council.yaml", "x/.git-blame", "git~", "~1", "a:b"],
)
def test_similar_names_are_accepted(path: str) -> None:
    assert find_reserved_name(path) is None
