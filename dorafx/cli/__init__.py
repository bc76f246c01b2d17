"""The command line and its commands."""

from .main import main

__all__ = ["main"]
