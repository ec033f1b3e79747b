"""The examples learn what they say they learn."""

import runpy
import threading
from pathlib import Path

import pytest
import toy

from tieback.pipeline.async_calls import run_together
from tieback.pipeline.remote_scorer import RemoteScorer
from tieback.pipeline.scorers import load_reward_scorer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_loop_in_one_file_learns_to_count() -> None:
    source = (EXAMPLES / "ppo_loop.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    assert "tieback.pipeline" not in source
    scores = runpy.run_path(str(EXAMPLES / "ppo_loop.py"))["main"](iterations=25)
    assert scores[0] < 0.1  # one token in eleven is right by chance
    assert scores[-1] > 0.85


def test_a_reward_model_scores_the_same_behind_the_server(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    toy.reward_model(tok).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    texts = {
        "prompts": [[{"role": "user", "content": "cat"}]] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in ("up", "red dog", "")],
    }
    server = runpy.run_path(str(EXAMPLES / "reward_server.py"))["make_server"](str(tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        scorer = RemoteScorer(f"http://127.0.0.1:{server.server_port}", batch_size=2)
        (rewards,) = run_together([scorer(**texts)])
        with pytest.raises(ConnectionError, match="answered with status 400"):
            run_together([scorer(prompts=["cat"])])
    finally:
        server.shutdown()
        server.server_close()
    expected = load_reward_scorer(str(tmp_path), 2, "model").score(**texts)
    assert rewards == pytest.approx(expected, abs=1e-6)
    assert len({round(score, 4) for score in rewards}) == 3


@pytest.mark.slow
def test_the_policy_learns_to_ask_for_the_middle_of_what_is_left(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "multi_turn.py"))["main"]
    before, after = main(output_dir=str(tmp_path))
    assert before < 0.3
    # Without a plan three guesses find one of seven numbers in 3/7 of the games.
    assert after > 0.97


@pytest.mark.slow
def test_the_trainer_learns_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "ppo_trainer.py"))["main"]
    before, after = main(output_dir=str(tmp_path))
    assert before < 0.15
    assert after > 0.8
    assert f"reward: from {before:.2f} to {after:.2f}" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()
