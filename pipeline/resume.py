"""Which checkpoint a stage goes on from."""

from pathlib import Path

from tieback.cli.errors import UsageError


def checkpoint_to_resume(output_dir: str | Path, resume: str | None) -> str | None:
    """Folder that `--resume_from_checkpoint` means: the one named, or for "true" the newest whole one.

    The Trainer writes `trainer_state.json` last, so a checkpoint without it was torn by a kill.

    Args:
        output_dir: where the stage keeps its `checkpoint-<step>` folders.
        resume: as given on the command line; None or "false" starts afresh.

    Returns:
        The folder; None to start afresh, also where "true" finds no whole checkpoint.

    Raises:
        UsageError: the folder named is missing or torn.
    """
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() == "true":
        whole = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
        return str(max(whole, key=lambda folder: int(folder.name.split("-")[-1]))) if whole else None
    if not (Path(resume) / "trainer_state.json").is_file():
        raise UsageError(
            f"--resume_from_checkpoint {resume}: no whole checkpoint there (trainer_state.json is missing)."
        )
    return resume
