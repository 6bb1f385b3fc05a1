"""The contract of the options of every adapter, sink and tracker."""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError


class OptionsContract(ABC):
    """The suite for `Options`: validated once, stored as JSON, restored on `resume`."""

    own_keys: ClassVar[frozenset[str]]
    """The reserved keys of the section's entries, which options can't use."""
    options: ClassVar[Mapping[str, Any]] = {}
    """A valid mapping of options, as in the YAML file."""

    @abstractmethod
    def options_type(self) -> type[BaseModel]:
        """Return the `Options` of the tested plugin."""

    def make_options(self, folder: Path) -> Mapping[str, Any]:  # noqa: ARG002  for overrides that need files
        """Return a valid mapping of options as in YAML; may write to `folder`."""
        return self.options

    def validated(self, folder: Path = Path()) -> Any:
        """Return the validated options, as passed to the plugin."""
        return self.options_type().model_validate(dict(self.make_options(folder)))

    def test_options_restored_from_json_are_equal(self, tmp_path: Path) -> None:
        """Options are stored as JSON and restored."""
        options = self.validated(tmp_path)
        stored = json.loads(json.dumps(options.model_dump(mode="json"), allow_nan=False))
        assert self.options_type().model_validate(stored) == options

    def test_unknown_option_is_refused(self, tmp_path: Path) -> None:
        """An unknown option is an error and not ignored."""
        with pytest.raises(ValidationError):
            self.options_type().model_validate({**self.make_options(tmp_path), "no_such_option": 1})

    def test_reserved_keys_are_not_options(self) -> None:
        """Options can't use the keys that every entry of the section has."""
        taken = self.own_keys & self.options_type().model_fields.keys()
        assert not taken, f"rename the options {taken}"

    def test_options_are_frozen(self) -> None:
        """Several sessions may use the same options concurrently."""
        assert self.options_type().model_config.get("frozen"), "set frozen=True in model_config"
