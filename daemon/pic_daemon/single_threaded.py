"""Imported before NumPy and OpenCV by what starts worker processes: each of the two brings
an OpenBLAS, which would start a thread and map 90 MB for each core, for nothing."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
