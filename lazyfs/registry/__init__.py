"""
Images in registries, image-layout directories and archives.

    source = open_source("docker://localhost:5000/app:1", RegistryOptions())
    manifest = source.root()

Contracts: place.py. Cheap to import: transports are loaded when they are used.
"""

from lazyfs.registry.opening import check_apart, open_destination, open_source, own_name
from lazyfs.registry.options import RegistryOptions, Secret
from lazyfs.registry.reference import FileReference, Reference, RegistryReference, parse_reference

__all__ = [
    "FileReference",
    "Reference",
    "RegistryOptions",
    "RegistryReference",
    "Secret",
    "check_apart",
    "open_destination",
    "open_source",
    "own_name",
    "parse_reference",
]
