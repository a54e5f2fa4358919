"""`python -m benchmarks.imagekit NAME FOLDER`: build one of the images, or find it built."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.imagekit.build import build
from benchmarks.imagekit.recipe import ML, NGINX, REDIS, WEB

if __name__ == "__main__":
    recipes = {recipe.name: recipe for recipe in (WEB, ML, NGINX, REDIS)}
    print(build(recipes[sys.argv[1]], Path(sys.argv[2])))
