"""`python -m lazyfs` is the `lazyfs` command."""

from __future__ import annotations

from lazyfs.cli.entry import main

if __name__ == "__main__":
    main()
