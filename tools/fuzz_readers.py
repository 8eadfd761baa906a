"""Feed made-up bytes to the readers of data files and of lora.yaml, guided by the code they reach.

Usage: python tools/fuzz_readers.py json|yaml [--seconds N] [--corpus FOLDER] [--found FOLDER]

Needs atheris (pip install atheris). A crash, a hang over a minute or 1 GB of memory ends it; the bytes lie
in FOLDER/crash-…, and belong into tests/data/fuzz_cases once the fault is mended. What raised new coverage
is kept in the corpus folder, from which the next time goes on.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".md")


def fuzz_json(folder: Path) -> Callable[[bytes], None]:
    """The target for data files: the first byte chooses the name and the options."""
    from phinetune.data.formats.recognise import recognise
    from phinetune.data.formats.row_forms import ReadOptions
    from phinetune.data.reading import read_examples

    def once(data: bytes) -> None:
        choice = data[0] if data else 0
        path = folder / f"case{SUFFIXES[choice % len(SUFFIXES)] if choice < 50 else '.jsonl'}"
        path.write_bytes(data[1:])
        options = ReadOptions(keep_preferred=bool(choice & 64), tools_as_text=bool(choice & 128))
        recognise(path, options)
        for _ in read_examples(path, options):
            pass

    return once


def fuzz_yaml(folder: Path) -> Callable[[bytes], None]:
    """The target for settings: they are read, or refused in the one form for errors."""
    from phinetune.base.errors import SettingsError
    from phinetune.training.lora_yaml import load_settings

    path = folder / "lora.yaml"

    def once(data: bytes) -> None:
        path.write_bytes(data)
        try:
            load_settings(path)
        except SettingsError as error:
            str(error)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=("json", "yaml"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--hang-seconds", type=int, default=60, help="what counts as a hang")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--found", type=Path, default=Path("."))
    options = parser.parse_args()
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        sys.exit("fuzzing needs atheris: pip install atheris")
    with atheris.instrument_imports(include=["phinetune.data", "phinetune.training", "ruamel", "json"]):
        # The loader imports ruamel only when it is called: too late to be watched.
        for name in ("phinetune.data.reading", "phinetune.training.lora_yaml", "ruamel.yaml.main"):
            importlib.import_module(name)
    options.corpus.mkdir(parents=True, exist_ok=True)
    options.found.mkdir(parents=True, exist_ok=True)
    limits = [
        f"-max_total_time={options.seconds}",
        f"-timeout={options.hang_seconds}",
        "-rss_limit_mb=1024",
        "-max_len=4096",
    ]
    place = f"-artifact_prefix={options.found}/"
    with tempfile.TemporaryDirectory() as folder:
        target = (fuzz_json if options.target == "json" else fuzz_yaml)(Path(folder))
        atheris.Setup([sys.argv[0], *limits, place, str(options.corpus)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
