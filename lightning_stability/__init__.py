"""Callbacks that keep a PyTorch Lightning run alive and honest when numbers go bad, and say why they went bad."""

__version__ = "0.1.0"

__all__ = ["__version__"]
