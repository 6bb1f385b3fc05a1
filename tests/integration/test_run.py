"""A YAML file runs on a real repository: each task once on the target, everything else as it was."""

from __future__ import annotations

from tests.conftest import Repository


async def test_a_chain_and_neighbours_land_once_each(repository: Repository) -> None:
    """Tasks side by side and in a chain land on the checked-out target, each from where its needs landed."""
    config = repository.configure(
        [
            {"id": "models", "prompt": "write src/models.py class User: pass"},
            {"id": "docs", "prompt": "append README.md More words."},
            {"id": "api", "prompt": "append src/models.py # used by the api", "needs": ["models"]},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert ended.states == {"models": "landed", "docs": "landed", "api": "landed"}
    assert (repository.top / "src/models.py").read_text() == "class User: pass\n# used by the api\n"
    assert (repository.top / "README.md").read_text() == "# Project\nMore words.\n"
    await repository.assert_invariants()
