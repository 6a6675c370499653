"""flash-attn 4's own kernels, compiled for sm_90a without a GPU, where it is installed (pip install --no-deps flash-attn-4 and
what it asks for but torch: nvidia-cutlass-dsl with its libs-base, libs-core and libs-cu13, quack-kernels, apache-tvm-ffi,
torch-c-dlpack-ext, cuda-bindings)."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("cutlass") is None,
        reason="flash-attn-4 is not installed: its kernels were not compiled",
    ),
]
CODE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megasora.models.flash import FLASH
with FakeTensorMode():
    q, k, v, grad = (torch.empty(1, 256, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    out, lse = FLASH["flash4"].forward(q, k, v)
    dq, dk, dv = FLASH["flash4"].backward(grad, q, k, v, out, lse)
assert (out.shape, lse.shape, dk.shape) == (q.shape, q.shape[:3], k.shape)
"""


def test_flash_attn_4_compiles() -> None:
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    done = subprocess.run([sys.executable, "-c", CODE], env=os.environ | target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
