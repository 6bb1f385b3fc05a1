"""Compute keys of setup steps: results are reusable if the keys are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

from orchestrator.domain.settings.run_settings import SetupStep
from orchestrator.repo.git.command import Git

#: Part of each key. Increase it when the meaning of the hashed data or the steps' environment changes.
_VERSION: Final = 1


async def read_setup_keys(
    git: Git, commit: str, steps: Sequence[SetupStep], *, sparse: Sequence[str] = (), env: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the key (hex) of each step at a commit of the trusted repository."""
    entries = await git.entries(commit, {path for step in steps for path in step.inputs})
    return compute_setup_keys(steps, entries, sparse=sparse, env=env)


def compute_setup_keys(
    steps: Sequence[SetupStep], entries: Mapping[str, str], *, sparse: Sequence[str], env: Sequence[str]
) -> tuple[str, ...]:
    """Return a key (hex) per step, which depends on the keys of earlier steps.

    `entries` has git's entry (mode, kind and id) for each existing input, `sparse` the folders that are checked out,
    `env` the names of the variables passed to steps. A step's timeout is not part of its key.
    """
    keys: list[str] = []
    previous = _digest([_VERSION, sorted(sparse), sorted(env)])
    for step in steps:
        inputs = [[path, entries.get(path)] for path in sorted(set(step.inputs))]
        previous = _digest([previous, step.run, inputs])
        keys.append(previous)
    return tuple(keys)


def first_step_to_run(done: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the index of the first step to run, given the keys of the steps run."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(done, wanted, strict=False))))


def _digest(inputs: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
