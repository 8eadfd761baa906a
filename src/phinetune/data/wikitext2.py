"""WikiText-2 by its name: from a folder of the user's, else from the Hugging Face hub.

It is the data set that the documented defaults name. Knows nothing of how its text is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from phinetune.base.errors import DataError
from phinetune.base.files import write_atomically

WIKITEXT2 = "wikitext2"
PLAIN_SUFFIXES = (".txt", ".tokens", ".raw")
HUB_NAME = "Salesforce/wikitext"
_FOLDERS = ("wikitext-2", "wikitext2", "wikitext-2-raw", "wikitext-2-raw-v1")
_OFFLINE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads HF_HUB_OFFLINE


def find_wikitext2() -> tuple[Path, Path | None]:
    """Training and test file: from `$PHINETUNE_DATA/wikitext-2`, or fetched once from the hub.

    Raises `DataError` naming the folder to fill when neither is possible.
    """
    data = os.environ.get("PHINETUNE_DATA", "")
    if data:
        folders = [Path(data) / name for name in _FOLDERS if (Path(data) / name).is_dir()]
        if folders:
            return _in_folder(folders[0])
    fetched = Path.home() / ".cache" / "phinetune" / "wikitext-2"
    files = fetched / "train.txt", fetched / "test.txt"
    if not all(file.is_file() for file in files):
        _fetch(fetched, wanted=Path(data) / _FOLDERS[0] if data else None)
    return files


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    train = _part(folder, "train")
    if train is None:
        raise DataError(
            "wikitext2 has no training file on this machine",
            where=str(folder),
            do="put train.txt (or wiki.train.tokens, wiki.train.raw) and test.txt of WikiText-2 there",
        )
    return train, _part(folder, "test") or _part(folder, "valid")


def _part(folder: Path, part: str) -> Path | None:
    names = [f"{prefix}{part}{suffix}" for prefix in ("", "wiki.") for suffix in PLAIN_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _fetch(folder: Path, *, wanted: Path | None) -> None:
    """Write train.txt and test.txt into `folder`; `wanted` is the folder to name when that fails."""
    where = str(wanted) if wanted else ""
    do = (
        f"put train.txt and test.txt of WikiText-2 into {wanted}"
        if wanted
        else "set PHINETUNE_DATA to a folder, and put train.txt and test.txt of WikiText-2 into its folder "
        "wikitext-2"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE:
        raise DataError(
            "wikitext2 is not on this machine",
            where=where,
            why="HF_HUB_OFFLINE forbids fetching it",
            do=do,
        )
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            "wikitext2 is not on this machine",
            where=where,
            why="fetching it needs pyarrow, which is not installed",
            do=f"pip install pyarrow; or {do}",
        ) from None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for part in ("train", "test"):
        name = f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet"
        try:
            path = hf_hub_download(HUB_NAME, name, repo_type="dataset")
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise DataError(
                "wikitext2 is not on this machine and could not be fetched",
                where=where,
                why=str(error).splitlines()[0],
                do=do,
            ) from None
        lines = parquet.read_table(path, columns=["text"])["text"].to_pylist()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{part}.txt", "".join(lines))
