"""Runs spyder-ai-chat's FIM worker against a server with each of its backends.

Prints the completions, or the errors, as one JSON object.
"""

import json
import sys

from qtpy.QtCore import QCoreApplication
from spyder_ai_chat.fim.client import FimWorker
from spyder_ai_chat.fim.config import BACKEND_TYPES

url, model, prefix, suffix = sys.argv[1:]
app = QCoreApplication([])
results = {}
for backend in BACKEND_TYPES:
    worker = FimWorker(backend, prefix, suffix, url, "", model, backend, max_tokens=8)
    worker.sig_result.connect(results.__setitem__)
    worker.sig_error.connect(results.__setitem__)
    worker.finished.connect(app.quit)
    worker.start()
    app.exec_()
    worker.wait()
print(json.dumps(results))
