"""python -m decal.cli: the same as `decal`, for installations without scripts."""

import sys

from decal.cli import main

sys.exit(main())
