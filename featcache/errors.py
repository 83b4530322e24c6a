"""Mistakes that the user can put right.

Every message is one line: what was expected, what was found (and in which file), what to do next.
`cli.main` prints it on stderr and leaves with exit code 1; nothing else catches these.
"""


class FeatcacheError(Exception):
    """Base of every error that the user, and not the program, can put right."""


class ConfigError(FeatcacheError):
    """An option or a combination of options that cannot work."""


class ChallengeError(FeatcacheError):
    """A challenge tree that breaks the published layout."""


class BackboneError(FeatcacheError):
    """A backbone, or its weights, that cannot be loaded."""


class StoreError(FeatcacheError):
    """A store that is missing, incomplete, damaged, or of another format."""


class LeakError(FeatcacheError):
    """One image on both sides of a split."""


class CheckpointError(FeatcacheError):
    """A checkpoint that is missing, damaged, diverged, or of another architecture or tree."""
