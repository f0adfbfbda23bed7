from __future__ import annotations

from pathlib import Path

import pytest
import torch

TYPES = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter uses what NumPy will not have for ever."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def exact_rounding(monkeypatch):
    """Round as a device does.

    Triton's interpreter rounds to 8 bits and to bfloat16 without the carry into the exponent: what
    should become the next power of 2 becomes half of it; and what is too small is cut off. It takes
    the bits of bfloat16 for integers where it multiplies matrices.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = interpreter.tl
    converted = interpreter._convert_float
    multiplied = interpreter.InterpreterBuilder.create_dot

    def convert(values, given, wanted, rounding_mode):
        if str(given) != "fp32" or str(wanted) not in TYPES:
            return converted(values, given, wanted, rounding_mode)
        dtype, bits = TYPES[str(wanted)]
        wide = torch.from_numpy(values.view("float32").copy())
        made = wide.to(dtype).view(bits).numpy()
        return made.view("uint16") if bits is torch.int16 else made

    def multiply(builder, a, b, *others):
        return multiplied(builder, widened(a), widened(b), *others)

    def widened(x):
        if str(x.dtype) != "bf16":
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
