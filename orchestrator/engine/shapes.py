"""What a document must be for its run to be read: for values that come from people and from other programs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import orjson
from pydantic import BaseModel, ValidationError

from orchestrator.config.model import TaskSpec
from orchestrator.domain.model import RunDocument, TaskDocument
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject, Key

_SHAPES: Final[Mapping[str, type[BaseModel]]] = {"run": RunDocument, "spec": TaskSpec, "task": TaskDocument}


def check_document(key: Key, value: JsonObject | None, runs: Collection[str]) -> None:
    """Refuse (RefusedError) what would keep one of the `runs` that are there from being read; None deletes."""
    model = _SHAPES.get(key.kind)
    if model is None:
        return
    if value is None:
        run, _, task = key.id.partition("/")
        if task and run in runs:
            raise RefusedError(f"{key} is part of run {run}", "`council clean --runs` forgets runs, as a whole")
        return
    try:
        model.model_validate_json(orjson.dumps(value))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, wrong["loc"])) or "the value"
        what = f"what is to be {key} is none of its kind: {place}: {wrong['msg'][:1].lower()}{wrong['msg'][1:]}"
        raise RefusedError(what, f"begin with what `council state at now {key}` shows") from None
