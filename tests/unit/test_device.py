"""One module names the device. A literal elsewhere would be code that no CPU test runs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "megasora" / "device.py"


def literals(source: str) -> list[int]:
    """The lines that name a CUDA device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda"
    ]


def test_one_module_names_the_device() -> None:
    files = [file for top in ("megasora", "data_pipelines") for file in sorted((ROOT / top).rglob("*.py"))]
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in files if file != HOME for line in literals(file.read_text())
    ]
    assert not found, f"ask megasora.device instead: {', '.join(found)}"


def test_what_counts_as_naming_it() -> None:
    assert literals(HOME.read_text())
    assert literals("x.to('cuda:0')") == [1]
    assert literals("torch.cuda.synchronize()  # 'cuda'") == []
