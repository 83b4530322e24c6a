"""Checks that settings of several stages share."""

from collections.abc import Sequence

from featcache.errors import ConfigError


def check_dropout(value: float, option: str = "token-dropout") -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"--{option}", expected="a number from 0 and below 1", found=value, remedy="correct it")


def refuse_given(unread: Sequence[str], wanted: str, found: str) -> None:
    if unread:
        option = unread[0].replace("_", "-")
        raise ConfigError(
            f"--{option}", expected=f"{wanted} with it", found=found, remedy="add that, or leave this out"
        )
