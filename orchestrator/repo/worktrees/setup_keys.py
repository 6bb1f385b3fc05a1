"""What the setup of a checkout depends on, as keys: where they are the same, its result can be used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

from orchestrator.config.model import SetupStep
from orchestrator.repo.git.command import Git

#: Part of each key: another number where what is hashed, or what steps find around them, changes its meaning.
_SCHEME: Final = 1


async def read_setup_keys(
    git: Git, commit: str, steps: Sequence[SetupStep], *, sparse: Sequence[str] = (), env: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the key (hex) of each step at a commit, as `compute_setup_keys` does; `git` runs in the trusted repository."""
    there = await git.entries(commit, {path for step in steps for path in step.inputs})
    return compute_setup_keys(steps, there, sparse=sparse, env=env)


def compute_setup_keys(
    steps: Sequence[SetupStep], there: Mapping[str, str], *, sparse: Sequence[str], env: Sequence[str]
) -> tuple[str, ...]:
    """Return a key (hex) for each step, which holds those of the steps before it.

    `there` has what git says of those inputs that exist: mode, kind and id. `sparse` are the folders that are checked
    out, `env` the names of the variables that are given. What a step may take of time is not part of its result.
    """
    keys: list[str] = []
    before = _digest([_SCHEME, sorted(sparse), sorted(env)])
    for step in steps:
        inputs = [[path, there.get(path)] for path in sorted(set(step.inputs))]
        before = _digest([before, step.run, inputs])
        keys.append(before)
    return tuple(keys)


def first_step_to_run(done: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the index of the first step that must run where `done` are the keys of those that have run."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(done, wanted, strict=False))))


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
