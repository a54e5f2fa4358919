"""lazyfs: containers start before their image is there. See docs/design.md."""

__version__ = "0.1.0"
