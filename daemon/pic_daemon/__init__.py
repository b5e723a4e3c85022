"""The service that classifies new images in drop folders and logs every match.

Data flows one way: `folders` and `watch` find files, `settle` says when one is
complete, `images` turns it into pixels, `model` scores it, `match_log` records
the outcome; `service` is the loop that joins them. Nothing here imports torch.
"""

import os

# onnxruntime, from 1.29 on, tells its makers of each model that is loaded; not from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
