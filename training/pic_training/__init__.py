"""Builds the model that the daemon serves, from a catalog and other images.

Data flows one way: `sources` lists and decodes the pictures, `augmentation`
alters them, `samples` draws balanced batches, `networks` holds the
architectures, `training` runs the epochs, `report` says what came of it and
`export` writes the ONNX file.
"""

import pic_daemon as pic_daemon  # first of all: it ends the telemetry of onnxruntime
