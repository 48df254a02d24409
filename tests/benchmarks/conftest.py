"""The benchmarks are programs beside each other, not a package: they find each other on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
