"""pytest -p other_engine: the tests run on the build of the native engine that OTHER_ENGINE names, a file."""

import importlib.util
import os
import sys

NAME = "codegemma.native._native"
spec = importlib.util.spec_from_file_location(NAME, os.environ["OTHER_ENGINE"])
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
