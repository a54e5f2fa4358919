"""
The pull mirror for ordinary images, the HTTP proxy, `lazyfs get`, preheat.

Layer: mirror, above node; a process of its own.
"""
