import sys
from pathlib import Path

# The suites share helpers; tests are imported without packages (importmode importlib).
sys.path.insert(0, str(Path(__file__).parent))
