"""Features of a text: `neuroscope inspect`, and its page."""
