"""The command line from the repository: `python cli.py --help`. Commands are listed in heads/commands/app.py."""

from heads.commands.app import app, main, run

__all__ = ["app", "main", "run"]

if __name__ == "__main__":
    main()
