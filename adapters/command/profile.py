"""Adapters of CLIs that are described by YAML files: `profiles/*.yaml` and the user's own.

A profile has the keys of `use: command` and facts about its program. An entry with `use: NAME` also has the keys of
`command`, whose values replace those of the profile; its `env` and its `failures` are added to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, Field, create_model, field_validator

from adapters.acp import Agent, AgentChoice
from adapters.command.adapter import CommandAdapter, list_arguments, placeholder_values
from adapters.command.home_files import check_text
from adapters.command.options import CommandOptions
from adapters.command.placeholders import fill_placeholders, placeholder_names
from adapters.failures import make_failure
from adapters.options import AgentOptions, Arguments, CommandLine, EnvName, ProgramName, own_home_variables
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterProfiles
from orchestrator.protocols import (
    AdapterType,
    ProfileFormat,
    Program,
    SessionCommand,
    SessionEnd,
    SessionRequest,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

#: The keys of a profile that are not options of its adapter.
_FACTS: Final = (
    "env",
    "docs",
    "install",
    "version",
    "supported",
    "verified",
    "ready",
    "keys",
    "log_in",
    "edits",
    "acp",
)


def _check_url(url: str) -> str:
    if not re.fullmatch(r"https?://\S+", url):
        raise ValueError(f"{url[:60]!r} is not an address: write one such as https://example.com/docs")
    return url


def _check_supported(versions: str) -> str:
    try:
        SpecifierSet(versions)
    except InvalidSpecifier:
        raise ValueError(f"{versions[:60]!r} is not a range of versions: write one such as >=1.2,<2") from None
    return versions


def _check_version(version: str) -> str:
    try:
        Version(version)
    except InvalidVersion:
        raise ValueError(f"{version[:60]!r} is not a version: write it as printed, such as 1.2.3") from None
    return version


class Profile(CommandOptions):
    """A file of a profile."""

    docs: Annotated[str, AfterValidator(_check_url)]
    """The address of the program's documentation."""
    install: str = Field(min_length=1)
    """How to install the program."""
    version: Arguments = ("--version",)
    """The arguments that print the version."""
    supported: Annotated[str, AfterValidator(_check_supported)] = ""
    """The range of versions that the profile is for, such as `>=1.2,<2`."""
    verified: Annotated[tuple[Annotated[str, AfterValidator(_check_version)], ...], Field(strict=False)] = ()
    """The versions that the profile was run with; without any, it is unverified."""
    ready: Arguments = ()
    """The arguments of a quick command that succeeds if the program is logged in."""
    keys: Annotated[tuple[EnvName, ...], Field(strict=False)] = ()
    """Variables with a key, passed on, of which one replaces the login."""
    log_in: str = ""
    """How to log in."""
    acp: CommandLine | None = None
    """The command line that runs the program as an agent of the Agent Client Protocol, if it can."""
    edits: bool = True
    """Whether the program can change files; one that only answers is never chosen by default."""

    @field_validator("argv")
    @classmethod
    def _check_program(cls, argv: tuple[str, ...]) -> tuple[str, ...]:
        # A relative path would be a file of the repository, which agents write.
        if "/" in argv[0] or placeholder_names(argv[:1]):
            raise ValueError(f"{argv[0][:60]!r} is not a program: write a name to look up on PATH")
        return argv

    @field_validator("env")
    @classmethod
    def _check_env(cls, env: Any) -> Any:
        for value in env.values() if isinstance(env, dict) else env:
            check_text(value)
        return env


class ProfileOptions(CommandOptions, AgentOptions):
    """Options of an adapter with `use: NAME`, where NAME is a profile."""

    bin: ProgramName | None = None
    """The program, by default that of the profile."""
    args: Arguments = ()
    """Additional arguments, such as `[--verbose]`."""


class ProfileAdapter(CommandAdapter):
    """Runs the program of a profile."""

    profile: ClassVar[Profile]
    _options: ProfileOptions

    def programs(self) -> Sequence[Program]:
        """Return the program, with the facts in the profile."""
        profile = self.profile
        return (
            Program(
                self._program,
                install=f"install it ({profile.install}), or correct `bin`",
                version=profile.version,
                supported=profile.supported,
                ready=profile.ready,
                keys=profile.keys,
                log_in=profile.log_in or f"log in to {profile.argv[0]}: see {profile.docs}",
                verified=profile.verified,
                edits=profile.edits,
            ),
        )

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure; a missing login has the remedy."""
        failed = super().verdict(end)
        if failed is None or failed.failure is not FailureClass.AUTH:
            return failed
        return make_failure(failed.failure, failed.reason, self.programs()[0].log_in)

    def agent(self) -> Agent:
        """See `AgentCli`."""
        own = self.programs()[0]
        name = self._agent_argv[0]
        chosen = own if name == own.name else Program(name, own.install, keys=own.keys, log_in=own.log_in)
        return Agent(chosen, resumes=self._options.has_own_home)

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`. Model and additional arguments follow those of the profile."""
        options = self._options
        chosen = options.model_args if options.model is not None and options.model_args is not None else ()
        values = placeholder_values(options, request)
        more = fill_placeholders((*chosen, *options.args), values)
        own = self.command(replace(request, prompt="", pre_edit=(), stop_gate=()))
        return replace(own, argv=(*self._agent_argv, *more))

    @property
    def _agent_argv(self) -> tuple[str, ...]:
        program, *arguments = self._options.agent_argv(*(self.profile.acp or ()))
        is_own = program == self.profile.argv[0] and self._options.bin is not None
        return (self._program if is_own else program, *arguments)

    @property
    def _program(self) -> str:
        return self._options.bin or self._options.argv[0]

    def _arguments(self, request: SessionRequest) -> Iterator[str]:
        _, *arguments = list_arguments(self._options, request, self._options.args)
        return iter((self._program, *arguments))

    def _variables(
        self, request: SessionRequest, values: Mapping[str, str]
    ) -> tuple[Mapping[str, str], tuple[str, ...]]:
        preset, passed = self.profile.variables(("HOME", *self.profile.keys))
        given = {name: fill_placeholders([text], values)[0] for name, text in preset.items() if text}
        return self._options.variables(passed, **given, **own_home_variables(self._options, request))

    def _uses_home(self, arguments: Sequence[str]) -> bool:
        preset, _ = self.profile.variables()
        return super()._uses_home([*arguments, *preset.values()])


def make_adapter_type(name: str, profile: Profile) -> AdapterType:
    """Return the adapter type of a profile, whose values are the defaults of the options."""
    fields: dict[str, Any] = {}
    for key in profile.model_fields_set.difference(_FACTS):
        field = copy(ProfileOptions.model_fields[key])
        field.default, field.default_factory = getattr(profile, key), None
        fields[key] = (field.annotation, field)

    def add_failures(failures: dict[str, str]) -> dict[str, str]:
        """Return the patterns of an entry, followed by those of the profile."""
        return {**failures, **{one: text for one, text in profile.failures.items() if one not in failures}}

    def check_acp(chosen: Any) -> Any:
        """Reject `acp: true` without a command line."""
        if chosen is True and profile.acp is None:
            raise ValueError(f"{name} is not known to run as an agent: remove `acp`, or write the agent's command line")
        return chosen

    options = create_model(
        "ProfileOptions",
        __base__=ProfileOptions,
        __module__=__name__,
        __cls_kwargs__={"use_attribute_docstrings": False},  # inherited; searching for them is slow
        __doc__=f"Options of an adapter with `use: {name}`.",
        __validators__={
            "_add_failures": field_validator("failures")(add_failures),
            "_check_acp": field_validator("acp")(check_acp),
        },
        **fields,
    )
    made: type[ProfileAdapter] = type("ProfileAdapter", (ProfileAdapter,), {"Options": options, "profile": profile})
    return AgentChoice(made, options)


@hookimpl
def council_register_profiles(register: RegisterProfiles) -> None:
    """Register the format, and the profiles in this package."""
    register("profiles", ProfileFormat(Profile, make_adapter_type, Path(__file__).parents[1] / "profiles"))
