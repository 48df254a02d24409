"""Adapters whose library is not there say so, and cost nothing until they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

OPTIONAL = ("trl", "lm_eval", "vllm")


def test_lm_eval_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "elastic_decode.integrations.lm_eval_model", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'elastic-decode\[lm-eval\]'"):
        importlib.import_module("elastic_decode.integrations.lm_eval_model")


def test_importing_the_others_imports_no_optional_library():
    code = (
        "import sys\n"
        "from elastic_decode.integrations import transformers_budget, trl_rollout\n"
        f"print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
