"""Frozen encoders, dataset builders and readers: everything that turns images and captions into arrays."""
