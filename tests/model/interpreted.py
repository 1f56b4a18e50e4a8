"""Triton kernels on a CPU, through Triton's interpreter."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def interpreted(name: str) -> ModuleType:
    """A copy of model/NAME.py whose kernels are interpreted: Triton decides it when they are defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location(f"interpreted_{name}", ROOT / "model" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
