"""Detect and redact secrets: variable names, values, key formats, file names.

Only text is inspected. Every pattern starts with a literal and repeats only character classes, so that searching takes
linear time, and is fast if the literal does not occur.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final
from urllib.parse import quote

REDACTED: Final = "[redacted]"
MIN_VALUE_CHARS: Final = 8  # characters: anything shorter would be found inside ordinary words

_SECRET_WORD: Final = re.compile(
    r"(?:API|ACCESS|SECRET|PRIVATE|AUTH)?KEYS?|[A-Z]*(?:TOKEN|SECRET|PASSWORD|CREDENTIAL)S?|[A-Z]*(?:PASSWD|PASSPHRASE)"
    r"|PASS|PWD|PAT|CREDS|AUTH|AUTHORIZATION|COOKIE"
)
# Last words of names that describe a location, label or property of a secret.
_ABOUT: Final = re.compile(
    r"(?:FILE|PATH|ID|NAME|BIT|LIMIT|BINDING)S?|DIR|DIRECTORY|SOCK|SOCKET|URL|URI|ENDPOINT|HOST|PORT|TYPE|MODE|METHOD"
    r"|PROVIDER|SCHEME|REALM|HEADER|HELPER|COMMAND|CMD|PROGRAM|TTL|EXPIRY|EXPIRES|EXPIRATION|TIMEOUT|INTERVAL|COUNT"
    r"|LENGTH|SIZE|BUDGET|ENABLED|DISABLED|REQUIRED|ALGORITHM|FINGERPRINT|VERSION|REPEAT"
)
_HARMLESS: Final = frozenset({"PUBLIC", "PUB", "MAX", "MIN", "NO"})  # PUBLIC_KEY, MAX_OUTPUT_TOKENS, NO_AUTH
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+|[0-9]+")


def is_secret_name(name: str) -> bool:
    """Return whether a variable name, such as `GITHUB_TOKEN`, denotes a secret.

    `SSH_AUTH_SOCK` does not.
    """
    words = [word.upper() for word in _WORD.findall(name)]
    while words and words[-1].isdigit():  # API_KEY_2
        words.pop()
    if len(words) < 2 and words in (["PWD"], ["PASS"], ["PAT"], []):  # PWD is the working directory
        return False
    if _ABOUT.fullmatch(words[-1]) or _HARMLESS.intersection(words):
        return False
    return any(_SECRET_WORD.fullmatch(word) for word in words)


_PLAIN_VALUE: Final = re.compile(
    r"""
      disabled | required | optional | anonymous | password | changeme | undefined
    | [+-]? [0-9]+ (?: [.][0-9]+ )?                                           # a number
    | (?: ~ | [.]{1,2} | [A-Za-z]: )? (?: [/\\] [\w .@+-]* )+                 # a path
    """,
    re.VERBOSE | re.IGNORECASE,
)
_RANDOM_SEGMENT: Final = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=[^0-9]*[0-9])[\w+=-]{20,}")


def secret_values(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the values of secret variables that are safe to redact.

    Excluded are values of fewer than `MIN_VALUE_CHARS` characters, numbers, paths and words such as `disabled`.
    """
    stripped = (value.strip() for name, value in environ.items() if is_secret_name(name))
    return frozenset(value for value in stripped if len(value) >= MIN_VALUE_CHARS and not _is_plain(value))


def _is_plain(value: str) -> bool:
    if _PLAIN_VALUE.fullmatch(value) is None:
        return False
    # Base64 contains slashes, so a key may look like a path, but folders have no names like wJalrXUtnFEMIK7MDENG.
    return not any(_RANDOM_SEGMENT.fullmatch(segment) for segment in re.split(r"[/\\]", value))


def _starts(literal: str, rest: str, inside: str = "0-9A-Za-z") -> tuple[str, str]:
    """Return a literal and its pattern, which must not continue a word.

    JSON string escapes are not words.
    """
    start = re.escape(literal)
    boundary = rf"(?:(?<![{inside}]{start})|(?<=\\[bfnrt]{start})|(?<=\\u[0-9a-fA-F]{{4}}{start}))"
    return literal, start + boundary + rest


_KEYS: Final = (
    ("sk-ant-", r"sk-ant-[A-Za-z0-9_-]{16,}"),  # Anthropic
    _starts("sk-", r"(?:(?:proj|svcacct|admin|None|or-v1)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})"),  # OpenAI and similar
    ("gh", r"gh[pousr]_[A-Za-z0-9]{36,}"),  # GitHub
    ("github_pat_", r"github_pat_[A-Za-z0-9_]{36,}"),
    ("glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),  # GitLab
    _starts(
        "AKIA", r"(?![0-9A-Z]{9}EXAMPLE)[0-9A-Z]{16}(?![0-9A-Za-z])"
    ),  # AWS; the example of their manual is not a key
    _starts("ASIA", r"(?![0-9A-Z]{9}EXAMPLE)[0-9A-Z]{16}(?![0-9A-Za-z])"),
    _starts("AIza", r"[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),  # Google
    ("GOCSPX-", r"GOCSPX-[0-9A-Za-z_-]{28}"),
    ("xox", r"xox[abeoprs]-[0-9A-Za-z-]{20,}"),  # Slack
    ("sk_live_", r"sk_live_[0-9A-Za-z]{16,}"),  # Stripe
    ("rk_live_", r"rk_live_[0-9A-Za-z]{16,}"),
    _starts("npm_", r"[0-9A-Za-z]{36}(?![0-9A-Za-z])"),
    ("pypi-Ag", r"pypi-Ag[0-9A-Za-z_-]{50,}"),
    _starts("hf_", r"[A-Za-z0-9]{34,40}(?![0-9A-Za-z])"),  # Hugging Face
    # JSON Web Tokens (RFC 7519): two objects and a signature, in base64url.
    _starts("eyJ", r"[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}", inside=r"\w.-"),
    # A whole key, not just its first line, which also occurs in programs that read keys.
    (
        "-----BEGIN ",
        (
            r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?=[\s\S]{0,300}?[A-Za-z0-9+/]{40})"
            r"(?:[^-]|-(?!----)){0,16384}(?:-----END [A-Z0-9 ]{0,50}-----)?"
        ),
    ),
)
_URL_PART: Final = r"""[^\s/:@"'<>\\${}*%]"""
#: Certain secrets: passwords in URLs and tokens in headers only if they look generated.
_CERTAIN: Final = (
    *_KEYS,
    ("//", rf"//(?<=://){_URL_PART}{{0,64}}:(?=[^\s@0-9]{{0,64}}[0-9])(?=[^\s@A-Za-z]{{0,64}}[A-Za-z]){_URL_PART}{{8,256}}(?=@)"),
    ("earer ", r"[Bb]earer (?=[A-Za-z._~+/=-]{0,64}[0-9])[0-9A-Za-z._~+/=-]{20,}"),
)  # fmt: skip
#: Likely secrets, which are redacted.
_LIKELY: Final = (
    *_KEYS,
    ("//", r"""//(?<=://)[^\s/:@"'<>\\]{0,64}:[^\s/@"'<>\\]{1,256}(?=@)"""),
    # A token in place of a user name, as accepted by git hosts.
    ("://", r"""://(?:(?<=http://)|(?<=https://))[^\s/:@"'<>\\?#]{8,256}(?=@)"""),
    ("Bearer ", r"Bearer [0-9A-Za-z._~+/=-]{16,}"),
    ("bearer ", r"bearer [0-9A-Za-z._~+/=-]{16,}"),
)


# Lazy, because compiling takes longer than most commands that never search for secrets.
@cache
def _in_text(sources: tuple[tuple[str, str], ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((hint, re.compile(source, re.ASCII)) for hint, source in sources)


@cache
def _in_bytes(sources: tuple[tuple[str, str], ...]) -> tuple[tuple[bytes, re.Pattern[bytes]], ...]:
    return tuple((hint.encode(), re.compile(source.encode())) for hint, source in sources)


_USER: Final = re.compile(
    r"""
      (?<=://) (?P<user> [^\s/:@"'<>\\]{0,256} ) : (?! [0-9]+ (?: [/?#] | $ ) ) [^\s"'<>\\]{0,256} @  # a password
    | (?: (?<=http://) | (?<=https://) ) [^\s/:@"'<>\\?#]{1,512} @  # a token alone
    | (?<= [?&] ) (?P<name> [\w.-]{0,32} (?: password | passwd | passphrase | secret | token | key ) ) = [^\s&#"'<>\\]+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def redact_urls(text: str) -> str:
    """Redact passwords and tokens in URLs of stores, remotes and servers.

    User names remain, except in HTTP URLs, where they may be tokens.
    """
    return _USER.sub(_without_password, text) if "://" in text else text


def _without_password(match: re.Match[str]) -> str:
    if (name := match["name"]) is not None:
        return f"{name}={REDACTED}"
    start = match.string[max(0, match.start() - 8) : match.start()].lower()
    user = match["user"]
    return f"{REDACTED}@" if not user or start.endswith(("http://", "https://")) else f"{user}:{REDACTED}@"


def has_secret_key(text: str) -> bool:
    """Return whether the text contains a key in a well-known format.

    Examples: a private key or a GitHub token. Passwords in URLs and bearer tokens count only if they look generated,
    because documentation contains many others.
    """
    return any(hint in text and pattern.search(text) for hint, pattern in _in_text(_CERTAIN))


class Redactor:
    """Redacts values in plain, JSON and URL encoding, and keys in known formats."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """Create a redactor of `values` that don't occur in ordinary text.

        See `secret_values`.
        """
        self._plain = sorted({spelling for value in values for spelling in _spellings(value)}, key=_longest_first)
        self._bytes = [value.encode(errors="surrogateescape") for value in self._plain]

    @property
    def bytes_pattern(self) -> str:
        """The ASCII source of a bytes regex that matches everything that `text` redacts."""
        values = ["".join(f"\\x{byte:02x}" for byte in value) for value in self._bytes]
        return "|".join((*values, *(source for _, source in _LIKELY)))

    def text(self, text: str) -> str:
        """Replace each secret in the text with `[redacted]`."""
        for value in self._plain:
            if value in text:
                text = text.replace(value, REDACTED)
        for hint, pattern in _in_text(_LIKELY):
            if hint in text:
                text = pattern.sub(REDACTED, text)
        return text

    def json(self, value: Any) -> Any:
        """Redact all strings of plain JSON, including keys.

        Returns the same object if nothing changed.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            items = [self.json(item) for item in value]
            return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
        if isinstance(value, dict):
            return self._members(value)
        return value

    def _members(self, members: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        changed = False
        for name, value in members.items():
            key, item = self.text(name), self.json(value)
            changed = changed or key is not name or item is not value
            if key in made or (key != name and key in members):  # keys must stay unique
                key = f"{key} {len(made) + 1}"
            made[key] = item
        return made if changed else members

    def find_secrets(self, data: bytes) -> set[bytes]:
        """Return the secret values and certain keys (see `has_secret_key`) in the data."""
        found = {value for value in self._bytes if value in data}
        for hint, pattern in _in_bytes(_CERTAIN):
            if hint in data:
                found.update(match.group() for match in pattern.finditer(data))
        return found


def _spellings(value: str) -> set[str]:
    """Return the encodings of a value: plain, JSON, URL, and each of its long lines."""
    lines = [line.strip() for line in value.splitlines()]
    long_lines = [line for line in lines if len(line) >= 2 * MIN_VALUE_CHARS and not line.startswith("-----")]
    parts = [value, *(long_lines if len(lines) > 1 else ())]
    escaped = [json.dumps(part, ensure_ascii=ascii_only)[1:-1] for part in parts for ascii_only in (True, False)]
    return {part for part in (*parts, *escaped, quote(value, safe="", errors="surrogateescape")) if part}


def _longest_first(value: str) -> tuple[int, str]:
    return -len(value), value


_EXAMPLES: Final = ("example", "examples", "sample", "template", "tmpl", "dist", "default", "defaults", "schema")
_SECRET_FILES: Final = re.compile(
    r"""
      [.]env (?: [.] .+ )?
    | [._]netrc | [.]git-credentials | [.]pypirc | [.]pgpass | [.]my[.]cnf | [.]htpasswd | [.]vault[_-]?pass(?:word)?
    | id_ (?: rsa | dsa | ecdsa | ed25519 ) (?: _sk )?
    | .* [.] (?: pem | key | p12 | pfx | jks | keystore | ppk | kdbx )
    | credentials[.] (?: json | ya?ml | csv ) | client_secrets?[.]json | application_default_credentials[.]json
    | service[_-]?account (?: [_-]?key )? [.]json
    """,
    re.VERBOSE | re.DOTALL,
)
_SECRET_PATHS: Final = (".aws/credentials", ".docker/config.json", ".kube/config")


def is_secret_file(path: str) -> bool:
    """Return whether a file name, such as `.env` or `id_ed25519`, denotes secrets."""
    lower = path.lower()
    name = lower.rpartition("/")[2]
    if name.startswith(".env.") and name.endswith(_EXAMPLES):
        return False
    return _SECRET_FILES.fullmatch(name) is not None or f"/{lower}".endswith(tuple(f"/{end}" for end in _SECRET_PATHS))
