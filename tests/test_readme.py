"""The map of files and the README's commands are those of the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _mapped_files() -> set[str]:
    """Paths in docs/files.md, `folder/` lines giving the folder of the lines under them."""
    block = (ROOT / "docs" / "files.md").read_text().split("```")[1]
    files: set[str] = set()
    folder = ""
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            if not folder:
                files.add(name)
        else:
            files.add(folder + name)
    return files


def test_every_file_of_the_map_exists() -> None:
    missing = [name for name in sorted(_mapped_files()) if not (ROOT / name).exists()]
    assert missing == []


def test_every_source_file_and_config_is_in_the_map() -> None:
    present = {
        str(path.relative_to(ROOT))
        for folder, pattern in (
            ("jobs", "*.py"), ("pipeline", "*.py"), ("model", "*.py"), ("configs", "*.yaml"), ("benchmarks", "*.py"),
        )
        for path in (ROOT / folder).glob(pattern)
        if path.name != "__init__.py"
    }  # fmt: skip
    assert len(present) > 30
    assert sorted(present - _mapped_files()) == []


def test_every_make_entry_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)", README))
    assert "train" in named
    assert [entry for entry in sorted(named) if not re.search(rf"^{entry}:", makefile, flags=re.MULTILINE)] == []
