"""Kernels with a bug put in on purpose, to see that the tests catch it."""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def with_bug(module: ModuleType, *change: str) -> ModuleType:
    """The module again, from a copy of its source: `change` is what stands there, what shall, and so on in turn."""
    assert module.__file__
    source = Path(module.__file__).read_text()
    for right, wrong in zip(change[::2], change[1::2], strict=True):
        assert right in source, f"{right!r} is not in {module.__file__}"
        source = source.replace(right, wrong)
    folder = Path(tempfile.mkdtemp(prefix="seeded"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = f"seeded_{module.__name__.rpartition('.')[2]}_{folder.name}"
    file = folder / f"{name}.py"  # stays until the end: Triton reads a kernel's source when it is first called
    file.write_text(source.replace('"megasora_kernels::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    sys.modules[name] = copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
