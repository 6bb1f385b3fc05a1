"""Find credentials in a user's home.

They are hidden from sessions and checks unless the config exposes them. The logins of the CLIs themselves are not
included: adapters specify these (`SessionCommand.home`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = (
    # Keys and passwords.
    *(".ssh", ".gnupg", ".password-store", ".vault-token", ".netrc", ".git-credentials", ".config/git/credentials"),
    *(".local/share/keyrings", ".local/share/kwalletd", ".config/1Password", ".config/op", ".config/Bitwarden"),
    # Clouds and code hosts.
    *(".aws", ".azure", ".config/gcloud", ".config/gh", ".config/glab-cli", ".config/hub", ".config/doctl", ".kube"),
    *(".docker/config.json", ".config/containers/auth.json", ".config/rclone", ".terraform.d", ".oci", ".boto"),
    *(
        ".s3cfg",
        ".pulumi",
        ".fly",
        ".config/stripe",
        ".config/heroku",
        ".cloudflared",
        ".databrickscfg",
        ".tsh",
    ),
    *(
        ".config/sops",
        ".kaggle",
        ".cache/huggingface/token",
        ".config/solana",
        ".bitcoin",
        ".pki",
        ".Xauthority",
        ".subversion/auth",
    ),
    # Package registries and databases.
    *(".npmrc", ".yarnrc.yml", ".pypirc", ".cargo/credentials", ".cargo/credentials.toml", ".gem/credentials"),
    *(".m2/settings.xml", ".gradle/gradle.properties", ".composer/auth.json", ".pgpass", ".my.cnf"),
    *(".config/composer/auth.json", ".config/pypoetry/auth.toml", ".msmtprc"),
    # Browsers and mail.
    *(".mozilla", ".config/google-chrome", ".config/chromium", ".config/BraveSoftware", ".config/microsoft-edge"),
    *(".config/vivaldi", ".config/opera", ".thunderbird", "snap/firefox", "snap/chromium", ".var/app"),
    # Histories of typed input.
    *(".bash_history", ".zsh_history", ".local/share/fish/fish_history", ".python_history", ".psql_history"),
    *(".node_repl_history", ".mysql_history", ".sqlite_history", ".lesshst", ".viminfo"),
)
_CONFIG: Final = ".config/"
#: Variables with the paths of such files and folders; some contain several, separated by colons.
_PATH_VARIABLES: Final = (
    *("GNUPGHOME", "KUBECONFIG", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "DOCKER_CONFIG", "NETRC"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CONFIG_DIR", "CLOUDSDK_CONFIG", "GH_CONFIG_DIR", "GLAB_CONFIG_DIR"),
    *("NPM_CONFIG_USERCONFIG", "HISTFILE", "SOPS_AGE_KEY_FILE", "XAUTHORITY", "PASSWORD_STORE_DIR"),
    *("REGISTRY_AUTH_FILE", "PGPASSFILE"),
)


def find_credentials(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the existing files and folders with credentials. Blocks.

    These are in the home, and at paths from variables. Files created later are not included.
    """
    names = [part for name in _PATH_VARIABLES for part in environ.get(name, "").split(":")]
    if home := environ.get("HOME"):
        names += [f"{home}/{name}" for name in _CREDENTIALS]
    if folder := environ.get("XDG_CONFIG_HOME"):
        names += [f"{folder}/{name.removeprefix(_CONFIG)}" for name in _CREDENTIALS if name.startswith(_CONFIG)]
    paths = (Path(name) for name in names if name.startswith("/"))
    return tuple(dict.fromkeys(path for path in paths if path.exists()))
