"""FP8, which nothing here uses."""

from __future__ import annotations

import contextlib

fp8_autocast = fp8_model_init = contextlib.nullcontext


class FP8GlobalStateManager:
    """Its state is that FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False
