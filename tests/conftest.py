import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # networks are tiny here, and the tests share the cores
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # built-in data are cached here, not in the user's folder
sys.path.insert(0, str(Path(__file__).parents[1]))
