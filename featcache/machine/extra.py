"""Libraries that only some of the work needs, and that an extra of the installation brings."""

from importlib import import_module
from types import ModuleType

from featcache.errors import ConfigError, first_line


def needed(module: str, for_what: str, extra: str = "formats") -> ModuleType:
    """The module of that name, imported.

    for_what : what needs it, as a message names it: 'HDF5 files'
    extra : of the installation, which brings it

    Raises ConfigError where it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        raise ConfigError(
            for_what,
            expected=f"the library {library}, which they need",
            found="it is not installed" if missing else f"one that cannot be imported ({first_line(error)})",
            remedy=f"pip install 'featcache[{extra}]'",
        ) from None
