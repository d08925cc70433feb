"""What a benchmark is measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["machine", "processor"]

_NAME_CHARACTERS = 200


def machine() -> dict[str, Any]:
    """The document's `machine`; a package that is not installed has the version null."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": _version("onnxruntime"),
        "shrink": _version("shrink"),
    }


def processor() -> str | None:
    """The name of the processor, as Linux has it or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()[:_NAME_CHARACTERS]
    return platform.processor() or platform.machine() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
