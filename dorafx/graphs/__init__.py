"""Analyses and changes of any FX graph; nothing here knows DoRA."""
