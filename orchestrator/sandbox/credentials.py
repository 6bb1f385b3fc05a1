"""Where people's credentials lie in their home: hidden from sessions and checks unless the config shows them.

What the CLIs themselves log in with is not among them: adapters name that (`Command.home`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = (
    # Keys and passwords.
    *(".ssh", ".gnupg", ".password-store", ".vault-token", ".netrc", ".git-credentials", ".config/git/credentials"),
    *(".local/share/keyrings", ".local/share/kwalletd", ".config/1Password", ".config/op", ".config/Bitwarden"),
    # Clouds and hosts of code.
    *(".aws", ".azure", ".config/gcloud", ".config/gh", ".config/glab-cli", ".config/hub", ".config/doctl", ".kube"),
    *(".docker/config.json", ".config/containers/auth.json", ".config/rclone", ".terraform.d", ".oci", ".boto"),
    # Package registries and databases.
    *(".npmrc", ".yarnrc.yml", ".pypirc", ".cargo/credentials", ".cargo/credentials.toml", ".gem/credentials"),
    *(".m2/settings.xml", ".gradle/gradle.properties", ".composer/auth.json", ".pgpass", ".my.cnf"),
    # Browsers and mail.
    *(".mozilla", ".config/google-chrome", ".config/chromium", ".config/BraveSoftware", ".config/microsoft-edge"),
    *(".config/vivaldi", ".config/opera", ".thunderbird", "snap/firefox", "snap/chromium", ".var/app"),
    # What was typed.
    *(".bash_history", ".zsh_history", ".local/share/fish/fish_history", ".python_history", ".psql_history"),
)


def credentials_of(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files and folders with credentials that there are in the user's home. Blocks."""
    home = environ.get("HOME")
    if not home or not Path(home).is_absolute():
        return ()
    return tuple(path for name in _CREDENTIALS if (path := Path(home, name)).exists())
