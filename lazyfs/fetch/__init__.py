"""
The fetch engine of the worker: chunks from a source into the cache, each one once, and exact reads out of it.

Layer: above lazyfs.cache and lazyfs.registry, below lazyfs.fs. How the tasks and threads share state, and which
invariants they keep: docs/concurrency.md.
"""
