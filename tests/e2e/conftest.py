"""Makes what the tests beside this folder share importable, also where this folder is run alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
