"""`python -m lazyfs` is the `lazyfs` command."""

from __future__ import annotations

from lazyfs.cli.main import main

if __name__ == "__main__":
    main()
