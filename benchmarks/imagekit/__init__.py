"""
Build real OCI images out of Debian packages (and one PyPI wheel set), with this machine's own apt and pip.

`recipe.py` says what is in an image, `build.py` makes it, `layer.py` turns an overlayfs upper directory into an OCI
layer tar, `layout.py` writes the OCI image layout, `apt.py` reads this machine's apt configuration. No mirror's name
is written anywhere here.
"""
