"""The examples learn what they say they learn."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_loop_in_one_file_learns_to_count() -> None:
    source = (EXAMPLES / "ppo_loop.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    assert "tieback.pipeline" not in source
    scores = runpy.run_path(str(EXAMPLES / "ppo_loop.py"))["main"](iterations=25)
    assert scores[0] < 0.1  # one token in eleven is right by chance
    assert scores[-1] > 0.85


@pytest.mark.slow
def test_the_trainer_learns_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "ppo_trainer.py"))["main"]
    before, after = main(output_dir=str(tmp_path))
    assert before < 0.15
    assert after > 0.8
    assert f"reward: from {before:.2f} to {after:.2f}" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()
