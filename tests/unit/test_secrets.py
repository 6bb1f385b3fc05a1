"""Secret detection: what is a secret, what is not, and its cost."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from orchestrator.cli.render.output import Output
from orchestrator.domain.security.secrets import (
    Redactor,
    has_secret_key,
    is_secret_file,
    is_secret_name,
    redact_urls,
    secret_values,
)

ALNUM = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0fX" * 4

# Concatenated, so that no secret scanner reports this file.
KEYS = {
    "anthropic": "sk-" + "ant-api03-" + ALNUM[:80],
    "openai": "sk-" + ALNUM[:48],
    "openai project": "sk-" + "proj-" + ALNUM[:40] + "_-" + ALNUM[:20],
    "openrouter": "sk-" + "or-v1-" + "0123456789abcdef" * 4,
    "github": "gh" + "p_" + ALNUM[:36],
    "github app": "gh" + "s_" + ALNUM[:36],
    "github fine": "github" + "_pat_" + ALNUM[:22] + "_" + ALNUM[:59],
    "gitlab": "gl" + "pat-" + ALNUM[:20],
    "aws": "AK" + "IA2E4GH6JK7MN3PQ5S",
    "aws temporary": "AS" + "IA2E4GH6JK7MN3PQ5S",
    "google": "AI" + "za" + ALNUM[:35],
    "slack": "xo" + "xb-123456789012-123456789012-" + ALNUM[:24],
    "stripe": "sk" + "_live_" + ALNUM[:24],
    "stripe restricted": "rk" + "_live_" + ALNUM[:24],
    "npm": "npm" + "_" + ALNUM[:36],
    "pypi": "py" + "pi-AgEIcHlwaS5vcmc" + ALNUM[:80],
    "hugging face": "h" + "f_" + ALNUM[:34],
    "jwt": "ey" + "JhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + ALNUM[:43],
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----\n"
    + (ALNUM[:70] + "\n") * 5 + "-----END OPENSSH PRIVATE KEY-----",
    "pkcs8": "-----BEGIN " + "PRIVATE KEY-----\n" + ALNUM[:64] + "\n-----END PRIVATE KEY-----",
    "encrypted": "-----BEGIN " + "RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,7B2\n\n"
    + ALNUM[:64] + "\n-----END RSA PRIVATE KEY-----",
    "pgp": "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2 (GNU/Linux)\n\n" + ALNUM[:64]
    + "\n=abcd\n-----END PGP PRIVATE KEY BLOCK-----",
    "url": "https://" + "deploy:" + "x7Kq9" + "Lm2Pz@git.example.org/a.git",
    "bearer": "Authorization: " + "Bearer " + ALNUM[:40],
}  # fmt: skip

NO_KEYS = (
    "task-" + ALNUM[:48],
    "the risk-free disk-backed task-runner with sk-folding-cube-and-other-loading-animations",
    "sk-learn",
    "AKIAIOSFODNN7" + "EXAMPLE",
    "x" + KEYS["aws"],
    KEYS["aws"] + "ABCDEF",
    "ghp_short",
    "0f3a" * 10,
    "npm_config_registry=https://registry.example.org npm_package_dependencies_left_pad_version",
    "hf_hub_download(repo_id='a/b')",
    "if line.startswith('-----BEGIN " + "PRIVATE KEY-----'):\n    return read(line)\n",
    "-----BEGIN CERTIFICATE-----\n" + ALNUM[:64] + "\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----\n" + ALNUM[:64] + "\n-----END PUBLIC KEY-----",
    "postgres://user:password@localhost/db and https://user:$TOKEN@host and redis://:${PASSWORD1}@host",
    "http://localhost:8080/users/a1@example.org",
    "Authorization: Bearer $TOKEN",
    "bearer authentication is used",
    "data:image/png;base64,iVBORw0KGgo" + ALNUM,
    "eyJhbGciOiJIUzI1NiJ9",
)


@pytest.mark.parametrize("name", [
    "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "DB_PASSWORD", "DB_PASS", "DB_PWD", "PGPASSWORD", "MYSQL_PASSWD", "SSH_PASSPHRASE", "GOOGLE_CREDENTIALS",
    "NPM_AUTH",
    "CLIENT_SECRET", "clientSecret", "apiKey", "APIKEY", "API_KEY_2", "STRIPE_KEY", "TOKEN", "PASSWORD", "AUTH_TOKEN",
    "AUTHTOKEN", "github-token", "GITHUB_PAT", "CLAUDE_CODE_OAUTH_TOKEN", "NPM_TOKEN", "SECRET_KEY_BASE",
])  # fmt: skip
def test_secret_names_are_recognized(name: str) -> None:
    """By the words of variable names."""
    assert is_secret_name(name)


@pytest.mark.parametrize("name", [
    "", "_", "1", "PATH", "HOME", "MONKEY", "MONKEY_BARS", "KEYBOARD_LAYOUT", "KEYMAP", "SSH_AUTH_SOCK", "GPG_KEY_ID",
    "GIT_AUTHOR_NAME", "AUTHOR", "XAUTHORITY", "PWD", "OLDPWD", "COMPASS", "GIT_ASKPASS", "SSH_ASKPASS",
    "TOKENIZERS_PARALLELISM",
    "MAX_OUTPUT_TOKENS", "PUBLIC_KEY", "SSL_KEY_FILE", "TOKEN_URL", "AUTH_TYPE", "TOKEN_TTL", "SECRETARY", "PASSENGER",
    "AWS_ACCESS_KEY_ID", "PATTERN", "KEYS_DIR", "BYPASS",
])  # fmt: skip
def test_harmless_names_are_recognized(name: str) -> None:
    """A word inside another does not count, nor does a path, a label or a limit."""
    assert not is_secret_name(name)


def test_values_are_chosen_by_their_text() -> None:
    """Only values that can be replaced without damage to other text."""
    kept = {
        "A_TOKEN": "abcdefgh",
        "B_KEY": "  padded-secret\n",
        "AWS_SECRET_ACCESS_KEY": "/wJalrXUtnFEMIK7MDENG/bPxRfiCYzEXKEYabcd",
    }
    plain = {
        "A_KEY": "short", "I_KEY": "disabled", "C_KEY": "12345678901", "D_KEY": "/home/me/.ssh/id_rsa",
        "E_KEY": "~/keys/a.pem",
        "F_KEY": "C:\\keys\\a.pem", "G_KEY": "../secrets/key", "H_TOKEN": "", "HOME": "/home/someone",
        "EDITOR": "a-long-editor",
    }  # fmt: skip
    assert secret_values({**kept, **plain}) == {value.strip() for value in kept.values()}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_are_found_anywhere(kind: str) -> None:
    """In quotes, after an operator, at either end, and after an escaped newline in JSON."""
    key, redactor = KEYS[kind], Redactor()
    for text in (key, f"a = '{key}'", f"KEY={key}\n", f"first\n{key}\nlast", f"({key})", json.dumps(f"a\n{key}\tb")):
        assert has_secret_key(text), text
        assert redactor.find_secrets(text.encode()), text
        middle = ALNUM[10:34] if ALNUM[10:34] in key else key[-24:-12]
        assert middle not in redactor.text(text)
        assert middle.encode() not in re.sub(redactor.bytes_pattern.encode(), b"[redacted]", text.encode())


@pytest.mark.parametrize("text", NO_KEYS)
def test_non_keys_are_not_found(text: str) -> None:
    """Words, hashes, certificates, variables and examples."""
    assert not has_secret_key(text)
    assert Redactor().find_secrets(text.encode()) == set()


@pytest.mark.parametrize("text", [
    "nothing to hide here", "The bearer of this letter", "https://example.org:8080/a@b", "see //comment: with@sign",
    "a\nb\n",
])  # fmt: skip
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert Redactor(["a-secret-value"]).text(text) == text
    assert not re.search(Redactor(["a-secret-value"]).bytes_pattern.encode(), text.encode())


def test_url_passwords_are_hidden_without_the_host() -> None:
    """Even a weak password in a URL, where text is displayed."""
    assert Redactor().text("git clone https://me:pw@host/x") == "git clone https:[redacted]@host/x"


def test_values_are_hidden_in_each_spelling() -> None:
    """Including the escaped spellings of JSON and URLs."""
    value = 'p"ä\\ss/word wörd'
    redactor = Redactor([value, "longer-" + value])
    for text in (
        value,
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        "https://h/?q=p%22%C3%A4%5Css%2Fword%20w%C3%B6rd",
    ):
        assert "word" not in redactor.text(f"<{text}>")
        assert b"word" not in re.sub(redactor.bytes_pattern.encode(), b"", f"<{text}>".encode())
        assert redactor.find_secrets(text.encode())
    assert redactor.text(f"longer-{value}") == "[redacted]"
    assert redactor.bytes_pattern.isascii()


def test_lines_of_a_long_value_are_hidden() -> None:
    """Even if only some lines of a multi-line key appear."""
    redactor = Redactor(["-----BEGIN X-----\nline-one-is-secret\nline-two-is-secret\n-----END X-----"])
    assert redactor.text("> line-two-is-secret\n") == "> [redacted]\n"
    assert redactor.text("-----BEGIN X-----") == "-----BEGIN X-----"


def test_json_keeps_its_structure() -> None:
    """All strings including keys are redacted; values without secrets are returned unchanged."""
    redactor = Redactor(["s3cret-value", "s3cret-other"])
    clean = {"a": [1, None, True, {"b": "c"}], "d": 1.5}
    assert redactor.json(clean) is clean
    value: dict[str, Any] = {"a": ["x s3cret-value", clean], "s3cret-value": 1, "s3cret-other": 2, "[redacted]": 3}
    made = redactor.json(value)
    assert made["a"] == ["x [redacted]", clean]
    assert made["a"][1] is clean
    assert sorted(v for k, v in made.items() if k != "a") == [1, 2, 3]
    assert "s3cret" not in json.dumps(made)
    assert value["a"][0] == "x s3cret-value"


@pytest.mark.extended_variants
@pytest.mark.parametrize("text", [
    "sk-" * 400_000, "eyJ" * 400_000, "-eyJaaaaaaaa." * 90_000, "-----BEGIN PRIVATE KEY-----" * 40_000,
    "://a:" * 250_000,
    "-----BEGIN A A PRIVATE KEY-----\n" + "- " * 500_000, "Bearer " * 150_000, "AKIA" * 250_000, "a" * 1_000_000,
    "-" * 1_000_000,
    "eyJaaaaaaaa.eyJaaaaaaaa." * 40_000, "\\neyJaaaaaaaa" * 90_000,
])  # fmt: skip
def test_any_text_is_searched_quickly(text: str) -> None:
    """Adversarial text takes moments, not minutes."""
    redactor = Redactor(["a-secret-value"])
    before = time.process_time()
    has_secret_key(text)
    redactor.text(text)
    redactor.find_secrets(text.encode())
    assert time.process_time() - before < 5


@pytest.mark.parametrize("path", [
    ".env", "a/.env", "a/.ENV", ".env.local", ".env.production", ".netrc", "x/_netrc", ".git-credentials", "id_rsa",
    ".ssh/id_ed25519",
    "id_ecdsa", "a/server.pem", "server.KEY", "b.p12", "b.pfx", "b.jks", "release.keystore", ".pypirc",
    "credentials.json",
    ".aws/credentials", "home/.aws/credentials", "a\nb/.env", "line\nbreak.pem", ".pgpass",
])  # fmt: skip
def test_secret_files_are_recognized(path: str) -> None:
    """By their names, in any folder."""
    assert is_secret_file(path)


@pytest.mark.parametrize("path", [
    ".env.example", ".env.local.example", "a/.env.sample", ".env.template", ".env.dist", "env", "environment.py",
    ".env/lib/a.py",
    "id_rsa.pub", "keys.py", "monkey", "a.pem.md", "key", "docs/credentials.md", "aws/credentials", ".npmrc",
    ".envrc", "package.json",
])  # fmt: skip
def test_harmless_files_are_recognized(path: str) -> None:
    """Examples, public keys, and programs that handle keys."""
    assert not is_secret_file(path)


URLS = [
    ("postgresql://council:s3cret@db/state", "postgresql://council:[redacted]@db/state"),
    ("postgresql://council:p@ss/w:ord@db:5432/state", "postgresql://council:[redacted]@db:5432/state"),
    ("postgresql://council:123456@db/state", "postgresql://council:[redacted]@db/state"),
    ("redis://:s3cret@db:6379/0", "redis://[redacted]@db:6379/0"),
    ("https://ghp_abc@github.com/a/b.git", "https://[redacted]@github.com/a/b.git"),
    ("https://x-access-token:abc@github.com/a/b", "https://[redacted]@github.com/a/b"),
    ("s3://bucket/x?secret_key=abc&region=eu", "s3://bucket/x?secret_key=[redacted]&region=eu"),
    ("postgresql://db/x?user=me&password=abc", "postgresql://db/x?user=me&password=[redacted]"),
    ("POSTGRESQL://me:abc@db", "POSTGRESQL://me:[redacted]@db"),
    ('{"url":"postgresql://me:abc@db","at":"a@b"}', '{"url":"postgresql://me:[redacted]@db","at":"a@b"}'),
    ("ssh://git@github.com/a/b.git", None),
    ("postgresql://council@db/state", None),
    ("http://127.0.0.1:8080/a@b", None),
    ("git@github.com:a/b.git", None),
    ("file:///home/me/state", None),
    ("see https://example.org/x?key and mail me@example.org", None),
]


@pytest.mark.parametrize(("text", "shown"), URLS)
def test_shown_url_has_no_password(text: str, shown: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The URL of a store, a remote or a server, alone or in a sentence, in all output."""
    assert redact_urls(text) == (shown or text)
    assert redact_urls(f"error: can't open {text} now") == f"error: can't open {shown or text} now"
    for as_json in (False, True):
        output = Output(as_json=as_json)
        output.text(text)
        output.notice(text)
        output.json({"state": text})
        output.failure({"error": text}, text)
        said = "".join(capsys.readouterr())
        assert shown is None or (text not in said and json.dumps(text)[1:-1] not in said)


def test_password_search_is_linear() -> None:
    """For any repository name."""
    many = ("://" * 30_000, "://a:" * 20_000, "http://" + "a" * 90_000, "?" + "key" * 30_000, "://a:" + "@" * 90_000)
    for text in many:
        start = time.process_time()
        redact_urls(text + "://")
        assert time.process_time() - start < 1
