"""The version of this package, where importing it brings nothing else."""

__version__ = "0.1.0"
