"""What pyproject.toml cannot say: an installation has heads/ inside featcache/, where it is in nobody's way.

At the top an installation has two names, `featcache` and its alias `heads` (see featcache/alias.py). An editable one
has the repository's own folders.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ALIAS = '''"""An alias: `heads` is `featcache.heads`."""

from importlib import import_module

ALIAS_OF = "featcache.heads"
import_module(ALIAS_OF)  # which takes this name
'''


class BuildInside(build_py):
    def get_module_outfile(self, build_dir, package, module):
        parts = package.split(".") if isinstance(package, str) else list(package)
        inside = parts[:1] == ["heads"] and not self.editable_mode
        return super().get_module_outfile(build_dir, ["featcache", *parts] if inside else parts, module)

    def run(self):
        super().run()
        if not self.editable_mode:
            path = Path(self.build_lib, "heads", "__init__.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(ALIAS)


setup(cmdclass={"build_py": BuildInside})
