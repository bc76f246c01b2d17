"""The command line, and what its commands are made of."""

from .main import main

__all__ = ["main"]
