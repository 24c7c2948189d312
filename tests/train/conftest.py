"""Makes `tiny_run` (a model, data and run folder of a few hundred numbers) importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
