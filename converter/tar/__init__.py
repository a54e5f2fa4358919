"""
The strict tar reader: a layer's archive in, entries and data out. Called by converter and by `lazyfs check`.

Whatever the bytes: a correct entry, or FormatError naming the layer and the entry. Memory and time are bounded by
lazyfs.limits and by the archive's own size. Nothing is ever extracted: paths are data here.
"""

from converter.tar.reader import TarMember, TarReader

__all__ = ["TarMember", "TarReader"]
