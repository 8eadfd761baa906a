"""Make a project folder: settings, and copies of the data with their hashes. Never overwrites one.

my-project/
  lora/lora.yaml          every setting with its meaning
  dataset/train.json      copies of the given files, byte for byte
          test.json
          MANIFEST.json   their sizes and hashes
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import UserError
from phinetune.base.files import committed_dir, require_free_space, write_atomically
from phinetune.data.changing.splitting import AUTOMATIC_TEST_SHARE, split_file
from phinetune.data.formats.recognise import SUFFIXES as NAMED
from phinetune.data.formats.recognise import data_suffix
from phinetune.data.reading import SUFFIXES, sound_examples
from phinetune.training.lora_yaml import lora_yaml
from phinetune.training.settings import TrainingSettings

SETTINGS_FILE = Path("lora") / "lora.yaml"
DATASET = "dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A new project: where it is and what its data holds."""

    folder: Path
    num_train: int
    num_test: int
    train: Path


def create_project(folder: Path, settings: TrainingSettings, *, train: Path, test: Path | None) -> Project:
    """Check both files, then write the whole project or nothing.

    Without a test file a fifth of the training file becomes one, by the seed of the settings; rows that are
    alike stay together, and `dataset/recipe.json` says how it was done.

    Raises `DataError` with every finding when a file cannot be trained on, and `UserError` when the
    folder already holds something.
    """
    if is_taken(folder):
        raise UserError(
            f"'{folder}' already holds something",
            where=str(folder),
            why="a project is never written over another one",
            do="choose another folder, or train the project that is there: phinetune train " + str(folder),
        )
    sources = {"train": train} | ({"test": test} if test is not None else {})
    num_examples = {part: _checked(part, source) for part, source in sources.items()}
    size_bytes = sum(source.stat().st_size for source in sources.values())
    require_free_space(folder, size_bytes + 1_000_000, "the project's copies of the data")
    was_there = folder.is_dir()
    try:
        if test is None:
            shares = {"test": AUTOMATIC_TEST_SHARE}
            num_examples = dict(split_file(train, folder / DATASET, shares, seed=settings.seed).rows)
        else:
            with committed_dir(folder / DATASET) as dataset:
                for part, source in sources.items():
                    shutil.copyfile(source, dataset / f"{part}{data_suffix(source)}")
        # Last: a folder with settings is a whole project.
        (folder / SETTINGS_FILE).parent.mkdir()
        write_atomically(folder / SETTINGS_FILE, lora_yaml(settings))
    except BaseException:
        _remove(folder, and_itself=not was_there)
        raise
    name = "train.jsonl" if test is None else f"train{data_suffix(train)}"
    return Project(
        folder=folder,
        num_train=num_examples["train"],
        num_test=num_examples["test"],
        train=folder / DATASET / name,
    )


def is_taken(folder: Path) -> bool:
    """Whether there is a file of that name, or a folder that is not empty."""
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def is_project(folder: Path) -> bool:
    """Whether the folder holds a project's settings."""
    return (folder / SETTINGS_FILE).is_file()


def _checked(part: str, source: Path) -> int:
    if not source.is_file():
        raise UserError(
            f"there is no {part} file '{source}'", where=str(source), do=f"check the path after --{part}"
        )
    if data_suffix(source) not in SUFFIXES:
        raise UserError(
            f"the {part} file has an unknown kind of name",
            where=str(source),
            why=f"files end in {', '.join(NAMED)}, and in .gz, .xz or .zst after that when packed",
            do="rename it after what it holds, or: phinetune data convert FILE --to train.jsonl",
        )
    return sum(1 for _ in sound_examples(source))


def _remove(folder: Path, *, and_itself: bool) -> None:
    """Take back a half-made project; the folder was empty or missing before."""
    for made in (folder / DATASET, folder / SETTINGS_FILE.parent):
        shutil.rmtree(made, ignore_errors=True)
    if and_itself and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
