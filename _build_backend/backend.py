"""PEP 517 build backend: setuptools' own, which also asks for torch if the environment has none to build against."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  hooks passed on as they are
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from target import OLDEST_TORCH, find_torch


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever an earlier build left here, even modules that have been deleted since.
    for leftover in Path("build").glob("lib*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def _torch_requirement() -> list[str]:
    torch = find_torch()
    if torch is not None and torch.is_new_enough:
        return []
    return [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]
