"""Libraries that cannot be imported without a GPU, held to their sources: every call of ours names arguments that are there.

tests/data/signatures.json has the signatures of the pinned releases. To make it anew from what `pip download --no-deps` gives:

    python -m tests.unit.test_libraries flash_attn-*.tar.gz flash_attn_4-*.whl transformer_engine-*.whl
"""

import ast
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import megasora

ROOT = Path(__file__).parents[2]
SIGNATURES = Path(__file__).parents[1] / "data/signatures.json"
PINNED = {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b36", "transformer_engine": "2.20.2"}
CALLERS = [ROOT / "megasora" / name for name in ("models/flash.py", "parallel/fp8.py", "engines/fused.py")]
# What is imported from where -> the file that defines it, by the end of its path.
SOURCES = {
    "flash_attn": "flash_attn/flash_attn_interface.py",
    "flash_attn.flash_attn_interface": "flash_attn/flash_attn_interface.py",
    "flash_attn_interface": "hopper/flash_attn_interface.py",
    "flash_attn.cute.interface": "flash_attn/cute/interface.py",
    "transformer_engine.pytorch:DotProductAttention": "dot_product_attention/dot_product_attention.py",
    "transformer_engine.pytorch:Linear": "pytorch/module/linear.py",
    "transformer_engine.pytorch:RMSNorm": "pytorch/module/rmsnorm.py",
    "transformer_engine.pytorch:LayerNorm": "pytorch/module/layernorm.py",
    "transformer_engine.pytorch:autocast": "pytorch/quantization.py",
    "transformer_engine.pytorch.optimizers": "pytorch/optimizers/fused_adam.py",
    "transformer_engine.common.recipe": "common/recipe/__init__.py",
}
FOREIGN = ("flash_attn", "flash_attn_interface", "transformer_engine")


def signatures() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(SIGNATURES.read_text())
    return found


def problems(source: str, known: dict[str, dict[str, Any]]) -> list[str]:
    """Calls of imported functions and classes that name an argument which is not there, or leave out one that must be."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOREIGN:
            for alias in node.names:
                file = SOURCES.get(f"{node.module}:{alias.name}") or SOURCES.get(node.module, "?")
                if alias.name not in known.get(file, {}):
                    wrong.append(f"{node.module} has no {alias.name}")
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        imported = {}
        spread: dict[str, list[str]] = {}  # names of a dict.fromkeys([...])
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOREIGN:
                for alias in node.names:
                    file = SOURCES.get(f"{node.module}:{alias.name}") or SOURCES.get(node.module, "?")
                    imported[alias.asname or alias.name] = f"{file}:{alias.name}"
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Call) and node.value.args:  # type: ignore[attr-defined]
                first = node.value.args[0]  # type: ignore[attr-defined]
                if isinstance(first, ast.List):
                    spread[target.id] = [ast.literal_eval(item) for item in first.elts]
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
                file, _, name = imported[node.func.id].rpartition(":")
                if name in known.get(file, {}):
                    wrong += misfits(node, name, known[file][name], spread)
    return wrong


def misfits(call: ast.Call, name: str, signature: dict[str, Any], spread: dict[str, list[str]]) -> list[str]:
    arguments, required = signature["arguments"], signature["required"]
    given = arguments[: len(call.args)]
    for keyword in call.keywords:
        if keyword.arg is not None:
            given.append(keyword.arg)
        elif isinstance(keyword.value, ast.Name):
            given += spread[keyword.value.id]
    wrong = [f"{name} has no argument {argument}" for argument in given if argument not in arguments]
    wrong += [f"{name} wants {argument}" for argument in required if argument not in given]
    return wrong + [f"{name} is given {argument} twice" for argument in set(given) if given.count(argument) > 1]


@pytest.mark.parametrize("caller", CALLERS, ids=lambda path: path.name)
def test_every_call_fits_its_library(caller: Path) -> None:
    assert problems(caller.read_text(), signatures()) == []


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("qkv_format=", "layout=", "DotProductAttention has no argument layout"),
        ("cu_seqlens_q=queries.cu_seqlens", "cu_q=queries.cu_seqlens", "flash_attn_varlen_func has no argument cu_q"),
        ('"k_new", ', "", "_flash_attn_forward wants k_new"),
        (
            "import _flash_attn_bwd",
            "import _flash_attn_backwards",
            "flash_attn.cute.interface has no _flash_attn_backwards",
        ),
        ("return_softmax=False", "softmax=False", "_flash_attn_forward wants return_softmax"),
    ],
)
def test_a_wrong_call_is_caught(right: str, wrong: str, message: str) -> None:
    source = CALLERS[0].read_text()
    assert right in source
    assert any(message in found for found in problems(source.replace(right, wrong), signatures()))


def test_delayed_scalings_state_is_where_we_look() -> None:
    state = signatures()["pytorch/quantization.py"]["DelayedScalingRecipeState"]
    assert {"amax_history", "scale"} <= set(state["attributes"])


def test_the_recipes_are_made() -> None:
    """TransformerEngine's recipes import on a CPU where it is installed for building only; here their source is what we have."""
    recipes = signatures()["common/recipe/__init__.py"]
    assert {"fp8_format", "amax_history_len", "amax_compute_algo"} <= set(recipes["DelayedScaling"]["arguments"])
    assert "Float8BlockScaling" in recipes


def test_releases_are_the_pinned_ones() -> None:
    assert signatures()["releases"] == PINNED
    assert megasora.__version__


# Making the table


def described(source: str) -> dict[str, Any]:
    """Of functions, classes (their `__init__`, or the fields of a dataclass): names of arguments, and those without a default."""
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, of_function(node))
        if isinstance(node, ast.ClassDef):
            inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            entry = of_function(inits[0]) if inits else {
                "arguments": [n.target.id for n in fields], "required": [n.target.id for n in fields if n.value is None]
            }  # fmt: skip
            attributes = {
                n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            } | {n.target.id for n in fields}
            found[node.name] = entry | {"attributes": sorted(attributes)}
    return found


def of_function(node: ast.FunctionDef) -> dict[str, list[str]]:
    names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg != "self"]
    required = names[: len(names) - len(node.args.defaults)]
    only = [a.arg for a in node.args.kwonlyargs]
    wanted = [a.arg for a, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value is None]
    return {"arguments": names + only, "required": required + wanted}


def files(archive: str) -> dict[str, str]:
    data = Path(archive).read_bytes()
    if archive.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return {n: wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".py")}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith("flash_attn_interface.py")]
        return {m.name: tar.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]


if __name__ == "__main__":
    used = {"DelayedScalingRecipeState"}
    for caller in CALLERS:
        for item in ast.walk(ast.parse(caller.read_text())):
            if isinstance(item, ast.ImportFrom) and item.module and item.module.partition(".")[0] in FOREIGN:
                used |= {alias.name for alias in item.names}
    table: dict[str, Any] = {"releases": {}}
    for archive in sys.argv[1:]:
        name, version = Path(archive).name.removesuffix(".tar.gz").split("-")[:2]
        table["releases"][name] = version
        for path, text in files(archive).items():
            for ending in set(SOURCES.values()):
                if path.endswith(ending) and not (ending.startswith("flash_attn/flash") and "hopper" in path):
                    table[ending] = {n: d for n, d in described(text).items() if n in used}
    SIGNATURES.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
