"""The API reference: every public name has a docstring, and the check would notice one that has none."""

import runpy
from pathlib import Path
from types import ModuleType

import pytest

REFERENCE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "build_reference.py"))

SOURCE = '''
"""A module."""
import dataclasses, functools, json, typing

__all__ = ["Documented", "Plain", "Tuple", "described", "bare", "json"]

def described():
    """Do something."""

def bare(): ...
def left_out_of_all(): ...

class Documented:
    """A class."""
    size: int = 0
    def __len__(self): return 0
    def _private(self): ...
    def method(self): ...
    def described(self):
        """Do something."""
    @property
    def width(self): return 0
    @functools.cached_property
    def height(self): return 0
    @staticmethod
    def make(): ...
    @classmethod
    def load(cls): ...
    class Inner: ...

@dataclasses.dataclass
class Plain:
    number: int

class Tuple(typing.NamedTuple):
    number: int
'''


def made_up(source: str) -> ModuleType:
    module = ModuleType("made_up")
    exec(source, module.__dict__)
    return module


def test_every_public_name_has_a_docstring() -> None:
    modules = REFERENCE["modules"]()
    assert {"tieback", "tieback.ppo_core.advantages", "tieback.cli.main"} <= {m.__name__ for m in modules}
    assert [name for module in modules for name in REFERENCE["undocumented"](module)] == []


def test_a_public_name_without_a_docstring_is_found() -> None:
    inside = ["method", "width", "height", "make", "load", "Inner"]
    expected = [f"Documented.{name}" for name in inside] + ["Plain", "Tuple", "bare"]
    assert REFERENCE["undocumented"](made_up(SOURCE)) == [f"made_up.{name}" for name in expected]


def test_without_all_what_the_module_defines_is_public() -> None:
    source = "from json import dumps\ndef _private(): ...\ndef bare(): ...\nclass Plain: ..."
    assert REFERENCE["undocumented"](made_up(source)) == ["made_up", "made_up.bare", "made_up.Plain"]


def test_the_build_fails_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    main = REFERENCE["main"]
    monkeypatch.setitem(main.__globals__, "modules", lambda: [made_up('"""Doc."""\ndef bare(): ...')])
    with pytest.raises(SystemExit, match=r"made_up\.bare"):
        main()
