"""Makes the helpers in tests/ importable, also if only this folder is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
