"""What a stage puts on the hub, faked here, and the model card that stands beside the model."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig

from tieback.cli.errors import UsageError
from tieback.pipeline import ppo
from tieback.pipeline.model_card import write_card
from tieback.reward_model.architectures import classifier_class

PUSH = ("--push_to_hub", "--hub_model_id", "me/polite", "--hub_token", "hf_secret")
METRICS = {"reward/mean": 0.75, "train/steps": 12}


class Hub:
    """In the place of the hub: what was asked of it."""

    def __init__(self) -> None:
        self.tokens: set[str] = set()
        self.repositories: dict[str, bool | None] = {}
        self.uploads: list[set[str]] = []
        self.down: str | None = None

    def create_repo(
        self, api: HfApi, name: str, private: bool | None, exist_ok: bool, token: Any = None
    ) -> Any:
        if self.down == "create":
            raise OSError("no network\nand more")
        self.tokens.add(token or api.token)
        self.repositories[name] = private
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, api: HfApi, **settings: Any) -> Any:
        if self.down == "upload":
            raise OSError("no network\nand more")
        folder = Path(settings["folder_path"])
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        patterns = {name: settings[name] for name in ("allow_patterns", "ignore_patterns")}
        self.uploads.append(set(filter_repo_objects(files, **patterns)))
        return SimpleNamespace(repo_url=f"https://hub/{settings['repo_id']}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    fake = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kw: fake.create_repo(api, *args, **kw))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kw: fake.upload_folder(api, **kw))
    return fake


def test_a_finished_run_is_uploaded_whole_without_pickles_and_without_the_token(
    tmp_path: Path, hub: Hub
) -> None:
    toy.write_ppo_home(tmp_path, max_steps=2, save_steps=1)
    toy.run_ppo(tmp_path, "--run_dir", str(tmp_path / "run"), *PUSH, "--hub_private_repo", "true")
    folder = tmp_path / "run" / "ppo"
    (uploaded,) = hub.uploads
    assert hub.repositories == {"me/polite": True}
    assert hub.tokens == {"hf_secret"}
    assert uploaded >= {
        *("model.safetensors", "config.json", "generation_config.json", "README.md", "metrics.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json"),
        *("value_model/model.safetensors", "value_model/config.json"),
    }
    assert {Path(name).suffix for name in uploaded} <= {".safetensors", ".json", ".jinja", ".md"}
    assert any(folder.glob("checkpoint-*/*.pt")), "there was no pickle to leave out: this proves too little"
    assert not any(name.startswith("checkpoint") or "settings" in name for name in uploaded)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_secret" in path.read_bytes()]
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert "me/polite" in (folder / "README.md").read_text()


def test_an_upload_that_fails_loses_nothing_and_is_made_up_for_without_training(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_ppo_home(tmp_path, max_steps=1)
    hub.down = "upload"
    command = ("--run_dir", str(tmp_path / "run"), *PUSH)
    with pytest.raises(
        UsageError, match=r"lies in .*ppo, but could not be uploaded to me/polite \(no network\)"
    ):
        toy.run_ppo(tmp_path, *command)
    assert hub.uploads == []
    hub.down = None
    # What a person has added to the card stays.
    card = tmp_path / "run" / "ppo" / "README.md"
    card.write_text(card.read_text() + "\nMind the dog.\n")
    monkeypatch.setattr(ppo.PPOTrainer, "train", lambda *_, **__: pytest.fail("it trained anew"))
    toy.run_ppo(tmp_path, *command)
    assert "model.safetensors" in hub.uploads[0]
    assert card.read_text().endswith("Mind the dog.\n")
    assert 'from_pretrained("me/polite")' in code_of(card.read_text())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"repository me/polite cannot be made \(no network\).*--hub_model_id"),
        (("--hub_strategy", "every_save"), "uploaded once, when it has come to its end"),
        (("--hub_always_push",), "uploaded once, when it has come to its end"),
    ],
)
def test_what_cannot_be_uploaded_is_said_before_a_model_is_loaded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    toy.write_ppo_home(tmp_path, max_steps=1)
    hub.down = "create"
    monkeypatch.setattr(ppo, "load_start", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        toy.run_ppo(tmp_path, "--run_dir", str(tmp_path / "run"), *PUSH, *more)


def test_the_trainer_itself_uploads_the_same_at_the_end_alone(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "whoami", lambda _: {})
    trainer = toy.ppo_trainer(
        tmp_path,
        push_to_hub=True,
        hub_model_id="me/polite",
        hub_token="hf_secret",
        save_strategy="steps",
        save_steps=1,
        kl_coef=0.07,
    )
    trainer.train()
    assert hub.uploads == []
    trainer.push_to_hub()
    (uploaded,) = hub.uploads
    assert uploaded >= {
        "model.safetensors",
        "value_model/model.safetensors",
        "README.md",
        "trainer_state.json",
    }
    assert {Path(name).suffix for name in uploaded} <= {".safetensors", ".json", ".jinja", ".md"}
    assert not any(b"hf_secret" in (tmp_path / name).read_bytes() for name in uploaded)
    card = (tmp_path / "README.md").read_text()
    shown = settings_of(card)
    assert (shown["kl_coef"], shown["num_ppo_epochs"], shown["save_steps"]) == (0.07, 2, 1)
    assert "gamma" not in shown  # as it is by default
    assert "| `reward/mean` |" in card


# The card.


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]


def settings_of(card: str) -> dict[str, Any]:
    found = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_the_lines_that_load_a_model_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, adapted: bool
) -> None:
    tok = toy.tokenizer()
    base = tmp_path / "base"
    model: Any = toy.reward_model(tok) if stage == "reward" else toy.policy(tok)
    model.save_pretrained(base)
    folder = tmp_path / "run" / stage
    if adapted:
        loaded: Any = type(model).from_pretrained(base)
        task = "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"
        model = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    write_card(stage, folder, METRICS, {"dataset_name": "helpdesk"}, str(base))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_of((folder / "README.md").read_text()), names)
    assert len(names["tokenizer"]) == len(tok)
    own = {name: p for name, p in model.named_parameters() if "lora" in name or not adapted}
    theirs = dict(names["model"].named_parameters())
    assert own
    assert all((theirs[name] == p).all() for name, p in own.items())
    head = metadata_load(folder / "README.md")
    assert head["library_name"] == ("peft" if adapted else "transformers")
    assert head["pipeline_tag"] == ("text-classification" if stage == "reward" else "text-generation")


def test_a_reward_model_that_transformers_has_no_class_for_is_loaded_by_tieback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier_class(MambaConfig())(
        MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=64, num_labels=1)
    )
    model.save_pretrained(tmp_path / "run" / "reward")
    toy.tokenizer().save_pretrained(tmp_path / "run" / "reward")
    write_card("reward", tmp_path / "run" / "reward", METRICS, {}, None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_of((tmp_path / "run" / "reward" / "README.md").read_text()), names)
    assert (names["model"].score.weight == model.score.weight).all()


def test_licence_base_and_data_go_from_card_to_card(tmp_path: Path) -> None:
    start = tmp_path / "sft"
    start.mkdir()
    (start / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: owner/base\ndatasets:\n- owner/demos\n---\n\n# SFT\n"
    )
    folder = tmp_path / "ppo"
    folder.mkdir()
    settings = {
        "dataset_name": "owner/prompts",
        "kl_coef": 0.05,
        "reward_funcs": [str(tmp_path / "reward"), "a:b"],
    }
    write_card("ppo", folder, METRICS, settings, str(start))
    head, card = metadata_load(folder / "README.md"), (folder / "README.md").read_text()
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "owner/base"
    assert head["datasets"] == ["owner/demos", "owner/prompts"]
    assert head["tags"] == ["tieback", "rlhf", "ppo"]
    assert "| `reward/mean` | 0.75 |" in card
    assert settings_of(card) == settings | {"reward_funcs": [f"{tmp_path.name}/reward", "a:b"]}
    assert str(tmp_path) not in card


def test_a_start_without_a_card_or_with_a_torn_one_gives_none_of_them(tmp_path: Path) -> None:
    start = tmp_path / "base"
    start.mkdir()
    for text in (None, "---\nlicense: [\n---\n", "no head at all"):
        if text is not None:
            (start / "README.md").write_text(text)
        write_card("sft", tmp_path, METRICS, {"dataset_name": None}, str(start))
        head = metadata_load(tmp_path / "README.md")
        assert "license" not in head
        assert "base_model" not in head
        assert "see the model that it started from" in (tmp_path / "README.md").read_text()
