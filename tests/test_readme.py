"""Every command in the README and the guides exists and is understood: targets, scripts, recipes and flags.

What the commands do is run at the recipe `smoke` by tests/test_stage_*.py and by `.ci/run`.
"""

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from test_recipes import read_by_stage

from tieback.cli.arguments import parse_flags
from tieback.cli.main import PROGRAMS
from tieback.pipeline.arguments import RECIPES, recipe_path
from tieback.pipeline.label import LabelArguments
from tieback.pipeline.rlhf import RlhfArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    ROOT / name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "benchmarks/RESULTS.md",
        "docs/glossary.md",
        "docs/human_feedback.md",
        "docs/index.md",
        "docs/migrating_from_trl.md",
        "docs/pong.md",
        "docs/pretrained.md",
        "docs/samplers.md",
        "docs/tieback.md",
    )
}


def commands_of(page: str) -> list[str]:
    """Commands in a page's shell blocks, and those between backticks in its text."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in blocks.splitlines()]
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    inline = re.findall(r"`((?:make|accelerate|python|pip|tensorboard|tieback) [^`]+)`", text)
    # What stands between bars is a choice of commands, and none.
    return sorted({" ".join(line.split()) for line in [*lines, *inline] if line and "|" not in line})


def what_make_runs(command: str) -> list[str]:
    """The commands behind a `make` command."""
    printed = subprocess.run(
        [*shlex.split(command), "--dry-run", "--no-print-directory"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        line
        for line in printed.splitlines()
        if re.search(
            r"pipeline/\w+\.py|-m pipeline\.|-m benchmarks\.|benchmarks/peers|-vllm-cpu|tieback rlhf|tieback preflight|classic_rl|pytest|ruff|mypy|lint-imports|tensorboard|docs/|jupyter execute",
            line,
        )
    ]


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command names a script, module, recipe or flag that is not there."""
    words = shlex.split(command)
    words[0] = words[0].removeprefix(".venv/bin/") if words[0].endswith("/tieback") else words[0]
    if words[0] == "tieback" and words[1] in PROGRAMS and words[1] != "rlhf":
        module = PROGRAMS[words[1]][0].removeprefix("tieback.")
        by_script = module.startswith("pipeline.") and words[1] not in ("label", "report", "replay")
        words[:2] = [module.replace(".", "/") + ".py"] if by_script else ["-m", module]
    script = next((word for word in words if re.fullmatch(r"pipeline/\w+\.py", word)), None)
    if script:
        stage, flags = Path(script).stem, words[words.index(script) + 1 :]
        stage = "ppo" if stage in ("memory", "preflight") else stage  # whose settings it takes
        config = RECIPES / "helpdesk" / f"{stage}.yaml"
        if "--config" in flags:
            at = flags.index("--config")
            config, flags = recipe_path(flags[at + 1], stage), flags[:at] + flags[at + 2 :]
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        read_by_stage(config, monkeypatch, *flags)
    elif "-m" in words and words[words.index("-m") + 1].startswith("classic_rl."):
        module = importlib.import_module("tieback." + words[words.index("-m") + 1])
        flags = words[words.index("-m") + 2 :]
        # There is no run to resume here.
        module.parse([flag for flag in flags if flag != "--resume"])
    elif "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
        importlib.import_module(words[words.index("-m") + 1]).parse(words[words.index("-m") + 2 :])
    elif "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    elif "pytest" in words:
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    elif "pipeline.label" in words:
        parse_flags(LabelArguments, "label", words[words.index("pipeline.label") + 1 :])
    elif {"pipeline.report", "pipeline.replay"} & set(words):
        known = (
            "-m",
            "--output",
            *(("--log", "--iteration", "--rows") if "pipeline.replay" in words else ()),
        )
        assert not [word for word in words if word.startswith("-") and word not in known]
    elif "rlhf" in words:
        flags = words[words.index("rlhf") + 1 :]
        parse_flags(RlhfArguments, "tieback rlhf", flags[: flags.index("--")] if "--" in flags else flags)
    elif re.fullmatch(r"\S*python (examples|docs)/\w+\.py( [\w/]+)?", command):
        assert (ROOT / words[1]).is_file()
    elif ".venv/bin/jupyter" in words:
        assert list(ROOT.glob(words[-1]))
    elif words[:2] == ["pip", "install"]:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    elif words[0] == "tieback":
        assert words[1:] == ["--help"]
    else:
        known = (
            "tensorboard",
            ".venv/bin/tensorboard",
            ".venv/bin/ruff",
            ".venv/bin/mypy",
            ".venv/bin/lint-imports",
            ".venv/bin/python",
            ".venv/bin/lint-imports",
        )
        assert words[0] in known, f"nobody knows how to check {command!r}"


def test_each_picture_of_the_documents_has_its_command() -> None:
    text = PAGES[ROOT / "CONTRIBUTING.md"]
    pictures = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert set(re.findall(r"`(\w+\.png)`", text)) == pictures


def test_the_readme_names_its_commands() -> None:
    commands = commands_of(README)
    assert "make rlhf" in commands
    assert "make test" in commands
    assert len(commands) > 10


@pytest.mark.parametrize("command", sorted({c for page in PAGES.values() for c in commands_of(page)}))
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not command.startswith("make"):
        check(command, monkeypatch)
        return
    behind = what_make_runs(command)
    if command not in ("make help", "make clean", "make setup"):
        assert behind, command
    for line in behind:
        check(line, monkeypatch)


def test_what_runs_before_a_commit_is_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert sorted(entries) == sorted(what_make_runs("make lint"))


def test_the_python_of_the_readme_compiles_and_names_what_there_is() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")
        for module, names in re.findall(r"from ([\w.]+) import (.+)", block):
            assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))


def test_every_file_that_a_page_links_to_is_there() -> None:
    for path, page in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
            assert (path.parent / link).exists(), f"{path}: {link}"


CODE_LINES = re.compile(r"`([^`]+)` in \[`([\w.]+)`\]\(([^)#]+\.py)\)")


def source_of(path: Path, symbol: str) -> list[str]:
    """Lines of a class or function, `Class.method` say."""
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for name in symbol.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next(n for n in ast.iter_child_nodes(node) if isinstance(n, kinds) and n.name == name)
    return [line.strip() for line in (ast.get_source_segment(text, node) or "").splitlines()]


def test_every_line_of_code_that_a_page_shows_stands_in_the_symbol_that_it_links_to() -> None:
    found = 0
    for path, page in PAGES.items():
        assert "#L" not in page, f"{path.name}: a link to a line goes stale; name the symbol"
        for snippet, symbol, link in CODE_LINES.findall(page):
            assert snippet in source_of(path.parent / link, symbol), f"{path.name}: {snippet!r} in {symbol}"
            found += 1
    assert found >= 28  # seven concepts, four programs
