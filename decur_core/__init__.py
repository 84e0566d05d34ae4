"""DeCUR: decoupling common and unique representations for multimodal self-supervision."""

__version__ = "0.1.0"
