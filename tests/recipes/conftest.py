import sys
from pathlib import Path

# `measure`, `report` and `run` are imported as `make reproduce` does it.
sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes" / "reproduce"))
