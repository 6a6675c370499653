"""Imports go down only: a layer may import the layers below it and itself."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the top. A module belongs to the first prefix that it starts with.
LAYERS = [
    ("megasora.__main__",),
    ("megasora.cli",),
    ("megasora.verbs",),
    ("megasora.trainer", "megasora.bench", "megasora.parity", "megasora.replay"),
    ("megasora.planner",),
    ("megasora.evaluation",),
    ("megasora.rendering",),
    (
        "megasora.build",
        "megasora.resume",
        "megasora.export",
        "megasora.init_from",
        "megasora.segments",
        "megasora.sampling",
        "megasora.training_data",
        "megasora.encoders",
    ),
    ("megasora.config", "megasora.keys"),
    ("megasora.schema",),
    ("megasora.microbatch",),
    ("megasora.vae_training",),
    ("megasora.engines", "megasora.checkpoint", "megasora.observe", "megasora.cluster"),
    ("megasora.parallel", "megasora.diffusion"),
    ("megasora.models",),
    ("megasora.seeding", "megasora.device"),
    ("megasora.errors",),
    ("megasora",),  # the version
    ("data_pipelines.prepare", "data_pipelines.encode", "data_pipelines.batches", "megasora_kernels"),
    ("data_pipelines.samples",),
    ("data_pipelines.shards",),
    ("data_pipelines.video",),
    ("data_pipelines",),
]
# A verb declares its arguments with the CLI's helpers, and `launch` asks the CLI whether a command is sound.
UPWARD = {("megasora.verbs", "megasora.cli")}
SIDEWAYS_FORBIDDEN = [
    ("data_pipelines.prepare", "data_pipelines.encode"),
    ("data_pipelines.prepare", "data_pipelines.batches"),
    ("data_pipelines.encode", "data_pipelines.batches"),
    ("data_pipelines.batches", "megasora_kernels"),
    ("megasora.diffusion", "megasora.parallel"),
]


def layer(module: str) -> tuple[int, str] | None:
    for depth, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return depth, name
    return None


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[tuple[str, Path]]:
    files = []
    for top in (ROOT, ROOT / "kernels"):
        for package in ("megasora", "data_pipelines", "megasora_kernels"):
            for file in sorted((top / package).rglob("*.py")):
                name = ".".join(file.relative_to(top).with_suffix("").parts)
                files.append((name.removesuffix(".__init__"), file))
    return files


def test_imports_go_down() -> None:
    wrong = []
    for module, file in sources():
        place = layer(module)
        assert place is not None, f"{module} has no layer"
        for target in imports(file):
            other = layer(target)
            if other is None:
                continue  # a library
            upward = other[0] < place[0] and (place[1], other[1]) not in UPWARD
            sideways = {place[1], other[1]} in [set(pair) for pair in SIDEWAYS_FORBIDDEN]
            if upward or sideways or (place[1] != "megasora" and other[1] == "megasora" and "." in target[9:]):
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_outside() -> None:
    outside = ("launch", "benchmarks", "tests", "configs")
    wrong = [
        f"{module} imports {target}"
        for module, file in sources()
        for target in imports(file)
        if target.split(".")[0] in outside
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_house_is_there() -> None:
    packages = ("megasora", "data_pipelines", "kernels", "launch", "configs", "tests", "benchmarks")
    for name in ("pyproject.toml", "Dockerfile", *packages):
        assert (ROOT / name).exists(), name
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package"
