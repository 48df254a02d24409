"""Tests against the libraries themselves run in an environment of their own: `make test-integrations`."""

import os

collect_ignore_glob = [] if os.environ.get("ELASTIC_DECODE_INTEGRATIONS") else ["test_real_*.py"]
