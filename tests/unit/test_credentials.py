"""The search for CLI credentials."""

from __future__ import annotations

from pathlib import Path

from orchestrator.sandbox.credentials import find_credentials


def make_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("secret")
    return path


def test_credentials_are_found_at_home_and_by_variables(tmp_path: Path) -> None:
    """Only existing ones; relative and empty values are ignored."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    found = [make_file(home / name) for name in (".netrc", ".aws/credentials", ".config/sops/age/keys.txt")]
    elsewhere = [make_file(moved / name) for name in ("gh/hosts.yml", "kube", "more", "gnupg/key")]
    environ = {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(moved),
        "KUBECONFIG": f"{moved}/kube:{moved}/more::relative",
        "GNUPGHOME": str(moved / "gnupg"),
        "NETRC": "",
    }
    hidden = find_credentials(environ)
    for path in (*found, *elsewhere):
        assert any(path.is_relative_to(one) for one in hidden), path
    assert all(one.exists() for one in hidden)
    assert find_credentials({}) == find_credentials({"HOME": "relative"}) == ()
