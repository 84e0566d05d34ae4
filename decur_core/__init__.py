"""DeCUR: decoupling common and unique representations for multimodal self-supervision."""

try:
    import fcntl  # noqa: F401  # locks on files
except ImportError:
    raise ImportError("decur_core runs on Linux and macOS; on Windows, use it inside WSL 2") from None

__version__ = "0.1.0"
