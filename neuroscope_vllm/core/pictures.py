"""Whether pictures can be drawn here."""

from __future__ import annotations

from neuroscope_vllm.core.errors import ConfigError


def check_pictures() -> None:
    """Raises ConfigError: matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "pictures need matplotlib, which is not installed; pip install"
            " 'neuroscope-vllm[plots]', or write .html or .json."
        ) from None
