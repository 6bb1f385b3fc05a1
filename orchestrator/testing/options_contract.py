"""What the options of every plugin promise; the contracts of adapters, sinks and trackers build on it."""

# ruff: noqa: S101  assert is what a test suite is made of, also one that is shipped

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError


class OptionsContract(ABC):
    """The suite for `Options`: what stands in a file is judged once, stored as JSON, and read again on `resume`."""

    own_keys: ClassVar[frozenset[str]]
    """The keys that every entry of the section has, which no options can have."""
    options: ClassVar[Mapping[str, Any]] = {}
    """A valid mapping of options as in the YAML file."""

    @abstractmethod
    def options_type(self) -> type[BaseModel]:
        """Return the `Options` of what is tested."""

    def given(self, folder: Path) -> Mapping[str, Any]:  # noqa: ARG002  for those who need files
        """Return a valid mapping of options as in the YAML file, `options` unless overridden; may write in `folder`."""
        return self.options

    def validated(self, folder: Path = Path()) -> Any:
        """Return the options as the plugin gets them."""
        return self.options_type().model_validate(dict(self.given(folder)))

    def test_options_survive_json(self, tmp_path: Path) -> None:
        """Options that were stored as JSON and read again are equal."""
        options = self.validated(tmp_path)
        stored = json.loads(json.dumps(options.model_dump(mode="json"), allow_nan=False))
        assert self.options_type().model_validate(stored) == options

    def test_unknown_options_are_refused(self, tmp_path: Path) -> None:
        """An option that is not known is an error, not ignored."""
        with pytest.raises(ValidationError):
            self.options_type().model_validate({**self.given(tmp_path), "no_such_option": 1})

    def test_the_files_own_keys_are_no_options(self) -> None:
        """The keys that every entry has belong to the file's own shape, options can't have them."""
        taken = self.own_keys & self.options_type().model_fields.keys()
        assert not taken, f"rename the options {taken}"

    def test_options_do_not_change(self) -> None:
        """Options are frozen: what was made from them may serve many at once."""
        assert self.options_type().model_config.get("frozen"), "set frozen=True in model_config"
