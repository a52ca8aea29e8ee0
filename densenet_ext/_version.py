"""The version of the package, for pyproject.toml and everything else."""

__version__ = "0.1.0"
