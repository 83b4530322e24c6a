"""Checks that settings of several stages share."""

from collections.abc import Sequence

from featcache.errors import ConfigError


def check_dropout(value: float, option: str = "token-dropout") -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"--{option}", expected="a number from 0 and below 1", found=value, remedy="correct it")


def refuse_given(unread: Sequence[str], wanted: str, found: str) -> None:
    """Raise ConfigError for the first of the options that were given and are read only beside what is `wanted`."""
    if unread:
        option = f"--{unread[0].replace('_', '-')}"
        remedy = f"leave {option} out, or use {wanted}"
        raise ConfigError(option, expected=f"{wanted} with it", found=found, remedy=remedy)
