"""What the documents tell a contributor to run or to read is there."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "launch/README.md",
    "kernels/README.md",
    "benchmarks/README.md",
    "benchmarks/reports/figures.md",
]
PLACES = r"(?:megasora|data_pipelines|kernels|launch|configs|benchmarks|tests|docs)/[\w./-]+"


def code_of(document: str) -> list[str]:
    """All that stands in `backticks` or in blocks."""
    text = (ROOT / document).read_text()
    return [
        *re.findall(r"```.*?\n(.*?)```", text, re.S),
        *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)),
    ]


def targets() -> dict[str, str]:
    """Of the Makefile, with what `make help` says of each."""
    return dict(re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_has_what_is_to_be_made(document: str) -> None:
    wanted = {target for code in code_of(document) for target in re.findall(r"(?:^|#|`|\n) *make ([a-z-]+)", code)}
    assert wanted <= targets().keys()
    assert wanted or document not in ("README.md", "CONTRIBUTING.md")


def test_every_target_is_explained_and_can_be_planned() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony
    assert set(phony[1].split()) == targets().keys()
    done = subprocess.run(["make", "-n", *targets()], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_are_to_be_run_can_be(document: str) -> None:
    for module in {name for code in code_of(document) for name in re.findall(r"python -m ([\w.]+)", code)} - {"pip"}:
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        main = ROOT / module.replace(".", "/") / "__main__.py"
        assert main.exists() or '__name__ == "__main__"' in Path(spec.origin).read_text(), module


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    named = {path for code in code_of(document) for path in re.findall(rf"(?<![\w/.-]){PLACES}", code)}
    linked = set(re.findall(r"\]\(([\w./-]+)\)", (ROOT / document).read_text()))
    assert [path for path in sorted(named | linked) if not (ROOT / path.rstrip("./")).exists()] == []
