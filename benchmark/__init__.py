"""Judges of attribution and of speed: every figure in the README is printed by a module of this package."""
