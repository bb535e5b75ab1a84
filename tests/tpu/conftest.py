"""The TPU compiler on a machine without a TPU: what its library looks at when it is loaded."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server which machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # takes no lock: no device is opened
