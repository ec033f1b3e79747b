"""Build the API reference from docstrings into build/reference/; a public name without a docstring is an error.

    make docs

A package with an `__all__` is shown by the names that stand there, on one page; any other by a page for each module.
"""

import functools
import importlib
import inspect
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pdoc

import tieback

OUTPUT = Path(__file__).parents[1] / "build" / "reference"


def modules() -> list[ModuleType]:
    """All modules of Tieback."""
    found = pkgutil.walk_packages(tieback.__path__, "tieback.")
    return [tieback, *(importlib.import_module(m.name) for m in found if not m.name.endswith("__main__"))]


def undocumented(module: ModuleType) -> list[str]:
    """Full names of the module's public functions, classes and methods (and of the module itself) without a docstring.

    Public is what stands in `__all__`; without one, what the module defines under a name without an underscore.
    """
    name = module.__name__
    missing = [] if module.__doc__ else [name]
    if hasattr(module, "__all__"):
        package = name.split(".")[0]
        named = {member: getattr(module, member) for member in module.__all__}
        # What a module hands on from another library is documented there.
        members = {k: v for k, v in named.items() if _library(v) == package}
    else:
        members = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == name}
    return missing + [f"{name}.{member}" for member in _undocumented_members(members)]


def _library(member: object) -> str:
    return (getattr(member, "__module__", None) or "").split(".")[0]


def _undocumented_members(members: dict[str, object]) -> Iterator[str]:
    for name, member in members.items():
        if name.startswith("_"):
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if inspect.isclass(member):
            # Python gives a dataclass or a named tuple without a docstring its signature for one.
            if not member.__doc__ or member.__doc__.startswith(f"{member.__name__}("):
                yield name
            for inner in _undocumented_members(dict(vars(member))):
                yield f"{name}.{inner}"
        elif _is_documented_by_docstring(member) and not member.__doc__:
            yield name


def _is_documented_by_docstring(member: object) -> bool:
    return inspect.isroutine(member) or isinstance(member, property | functools.cached_property)


def main() -> None:
    """Check, then build.

    Raises:
        SystemExit: names without a docstring, one a line.
    """
    found = modules()
    missing = [name for module in found for name in undocumented(module)]
    if missing:
        sys.exit("\n".join(["public names without a docstring:", *missing]))
    # pdoc reads a module's dictionary, where a name that is imported when it is first asked for does not stand yet.
    for module in found:
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    pdoc.render.configure(docformat="google")
    packages = [p.name for p in pkgutil.iter_modules(tieback.__path__, "tieback.") if p.ispkg]
    # What that module hands on is TRL's, whose annotations need libraries that are not installed.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pdoc's of a name that it leaves out
        pdoc.pdoc("tieback", *packages, "!tieback.pipeline.trl_internals", output_directory=OUTPUT)
    print(f"The reference: {OUTPUT / 'index.html'}")


if __name__ == "__main__":
    main()
