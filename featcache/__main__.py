"""The command line: `python -m featcache`, and the command `featcache` that an installation brings."""

from featcache import load_module


def main() -> None:
    """Run the command line of this process, and exit."""
    load_module("heads.commands.app").main()


if __name__ == "__main__":
    main()
