"""The command line, run in this process on the bundled model."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_decode import EngineConfig
from elastic_decode.assets import tiny_model_path
from elastic_decode.cli import main, options
from elastic_decode.kernels import registry
from elastic_decode.kernels.registry import OPS

FAST = ["--dtype", "float32", "--max-model-len", "128", "--kv-memory", "16MiB"]


@pytest.fixture
def run(capsys):
    """`run(*arguments)` -> (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_streams_text_and_sums_up(run):
    code, out, _ = run(
        "generate", "tiny", "--chat", "-p", "3 5 2 = 16", "--think", 5, "--solve", 4, "--seed", 1, *FAST
    )
    assert code == 0
    assert "</think>" in out
    assert "5 thinking" in out
    assert "1 forced" in out


def test_generate_shows_samples_in_order(run):
    code, out, _ = run(
        "generate",
        "tiny",
        "--chat",
        "-p",
        "3 5 2 = 16",
        "-p",
        "1 1 1 = 3",
        "-n",
        2,
        "--think",
        5,
        "--solve",
        4,
        *FAST,
    )
    assert code == 0
    heads = [line.strip("─ ") for line in out.splitlines() if "sample" in line]
    assert heads == [f"prompt {p}, sample {s}" for p in (0, 1) for s in (0, 1)]


def test_jsonl_in_and_out_with_overrides(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"id": "a", "prompt": "3 5 2 = 16", "think": 0},
        {"id": "b", "messages": [{"role": "user", "content": "3 5 2 = 16"}], "seed": 4},
        {"prompt": [5, 6, 7], "solve": 1},
    ]
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    code, _, _ = run(
        "generate",
        "tiny",
        "-i",
        source,
        "-o",
        target,
        "--think",
        5,
        "--solve",
        3,
        "-n",
        2,
        "--seed",
        9,
        "--tokens",
        *FAST,
    )
    assert code == 0
    found = {record["id"]: record for record in records(target.read_text())}
    assert set(found) == {"a", "b", 2}
    for record in found.values():
        assert len(record["completions"]) == 2
    first = found["a"]["completions"][0]
    assert (first["think_tokens"], first["think_end"], first["forced"][0], first["phases"][0]) == (
        0,
        "forced",
        True,
        "think",
    )
    assert {c["seed"] for c in found["b"]["completions"]} == {4}
    assert all(c["solve_tokens"] <= 1 for c in found[2]["completions"])
    code, _, err = run("generate", "tiny", "-i", source, "-o", target, *FAST)
    assert code == 1
    assert "--overwrite" in err
    assert {record["id"] for record in records(target.read_text())} == {"a", "b", 2}, "nothing was lost"


def test_jsonl_from_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "1 1 1 = 3"}\n'))
    code, out, _ = run("generate", "tiny", "-i", "-", "--jsonl", "--think", 5, "--solve", 3, *FAST)
    assert code == 0
    (record,) = records(out)
    assert record["prompt"] == "1 1 1 = 3"


@pytest.mark.parametrize(
    ("flags", "check"),
    [
        (["--policy", "truncate", "--total", "6"], lambda c: c["think_tokens"] + c["solve_tokens"] <= 6),
        (["--policy", "no-thinking", "--solve", "3"], lambda c: c["think_tokens"] == 0),
        (
            [
                "--policy",
                "budget-forcing",
                "--think",
                "9",
                "--solve",
                "3",
                "--wait",
                "check",
                "--newline=",
                "--final",
                "",
            ],
            lambda c: c["think_tokens"] <= 9,
        ),
        (
            ["--policy", "soft-landing", "--think", "4", "--grace", "2", "--solve", "3"],
            lambda c: c["think_tokens"] <= 6,
        ),
        (
            ["--policy", "wrap-up", "--think", "4", "--text", "ok", "--solve", "3"],
            lambda c: c["think_tokens"] <= 4,
        ),
    ],
)
def test_every_policy_by_name(run, flags, check):
    code, out, err = run("generate", "tiny", "--chat", "-p", "3 5 2 = 16", "--jsonl", *flags, *FAST)
    assert code == 0, err
    assert check(records(out)[0]["completions"][0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "no/such/folder/here", "-p", "x"], 1, "no/such/folder"),
        (["generate", "tiny"], 1, "nothing to do"),
        (["generate", "tiny", "-i", "missing.jsonl"], 1, "missing.jsonl"),
        (["generate", "tiny", "-p", "x", "--think", "-3"], 2, "--think"),
        (["generate", "tiny", "-p", "x", "--think", "many"], 2, "none"),
        (["generate", "tiny", "-p", "x", "--temperature", "-1"], 1, "temperature"),
        (["generate", "tiny", "-p", "x", "--policy", "truncate", "--think", "4"], 1, "--total"),
        (["generate", "tiny", "-p", "x", "--policy", "wrap-up"], 1, "--text"),
        (["generate", "tiny", "-p", "x", "--wait", "hm"], 1, "--wait belongs to --policy budget-forcing"),
        (["generate", "tiny", "-p", "x", "--device", "cuda:7"], 1, "device 'cuda:7'"),
        (["generate", "tiny", "-p", "x", "--backend", "flashinfer"], 1, "'flashinfer'"),
        (["generate", "tiny", "-p", "x", "--top-k", "9999999999999"], 1, "top_k"),
        (["generate", "tiny", "-p", "x", "--jsonl", "-o", "."], 1, "folder"),
        (["generate", "tiny", "-p", "x", "--frobnicate"], 2, "frobnicate"),
        (["generate", "tiny", "-p", "x", "--kv-memory", "lots"], 1, "kv_memory"),
        (["generate", "tiny", "-p", "x", "--backend", "quantum"], 1, "quantum"),
        (["generate", "tiny", "-p", "x", "--backend", "linear=quantum"], 1, "quantum"),
        (["generate", "tiny", "-p", "x", "--backend", "rope=cpu,liner=cpu"], 1, "unknown op 'liner'"),
        (["generate", "tiny", "-p", "x", "--kv-dtype", "float8_e4m3fn"], 1, "float8_e4m3fn"),
        (["generate", "tiny", "-p", "x", "--think", "100000", "--solve", "5"], 1, "100000"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_usage_says_what_is_wrong(run, arguments, code, message):
    got, _, err = run(*arguments)
    assert (got, message in err) == (code, True), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2: not a JSON object"),
        ("[1]", "expected an object"),
        ('{"prompt": "x", "thinks": 4}', "unknown field 'thinks'"),
        ('{"id": 4}', "either 'prompt' or 'messages'"),
        ('{"prompt": "x", "think": -4}', "in.jsonl:2: Budget.think"),
        ('{"prompt": "x", "seed": "one"}', "in.jsonl:2: SamplingParams.seed"),
        ('{"messages": "x"}', "'messages' must be a list"),
    ],
)
def test_bad_lines_are_named(run, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "1 1 1 = 3"}\n' + line + "\n")
    code, _, err = run("generate", "tiny", "-i", source, "-o", tmp_path / "out.jsonl", *FAST)
    assert code == 1
    assert message in err
    assert not (tmp_path / "out.jsonl").exists(), "nothing is written before the input is known to be good"


def test_info_tells_backends_and_reasons(run):
    code, out, _ = run("info", "--json", "--model", "tiny")
    found = json.loads(out)
    assert code == 0
    assert found["backends"]["paged_attention"]["cpu"] is None
    assert "no cuda implementation" in found["backends"]["linear"]["cuda"]
    assert set(found["auto"]["cpu"].values()) == {"cpu"}
    assert set(found["auto"]["cuda"].values()) == {"triton"}
    assert found["model"]["think_close"]["text"] == "</think>"
    code, out, _ = run("info")
    assert code == 0
    assert "Kernels" in out
    assert "backend auto: on cpu cpu, on cuda triton" in " ".join(out.split())


def test_info_shows_a_reason_as_it_is(run, monkeypatch):
    """Brackets too, as in the name of an extra: they are no markup."""
    monkeypatch.setattr(registry, "available", lambda op: {"flashinfer": "pip install 'a[b]'"})
    code, out, _ = run("info")
    assert code == 0
    assert "no: pip install 'a[b]'" in out


def test_info_checks_the_ops(run):
    code, out, err = run(
        "info", "--check", "--device", "cpu", "--model", "tiny", "--backend", "rope=reference", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["ok"]
    assert {(each["op"], each["backend"]) for each in found["checks"]} == {
        (op, "reference" if op == "rope" else "cpu") for op in OPS
    }
    for each in found["checks"]:
        assert each["ok"]
        assert each["worst"]["error"] <= each["worst"]["bound"]
        assert each["milliseconds"] > 0
    code, out, _ = run("info", "--check", "--model", "tiny", "--device", "cpu", "--dtype", "bfloat16")
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["ok"] * (len(OPS) + ("torch" in out))
    assert "paged_attention" in out


def test_info_check_finds_a_wrong_op(run, monkeypatch):

    real = registry.implementation

    def wrong(op, backend, name=None):
        if op != "silu_mul":
            return real(op, backend, name)
        return lambda gate_up, *, out: out.zero_()

    monkeypatch.setattr(registry, "implementation", wrong)
    code, out, _ = run("info", "--check", "--device", "cpu", "--model", "tiny", "--backend", "cpu", "--json")
    assert code == 1
    found = json.loads(out)
    assert [each["op"] for each in found["checks"] if not each["ok"]] == ["silu_mul"]
    assert not found["ok"]
    code, out, _ = run("info", "--check", "--device", "cpu", "--model", "tiny", "--backend", "cpu")
    assert code == 1
    said = {line.split()[0]: line.split()[2] for line in out.splitlines()}
    assert said == dict.fromkeys(OPS, "ok") | {"silu_mul": "ERROR"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "quantum"], "--backend: unknown backend 'quantum'"),
        (["--device", "cpu", "--backend", "linear=cuda"], "linear cannot run on 'cuda' here: linear has no"),
        (["--device", "tpu"], "EngineConfig.device"),
        (["--device", "cuda:77"], "device 'cuda:77'"),
        (["--page-size", "0"], "page_size"),
        (["--model", "no/such/folder/here"], "no/such/folder"),
    ],
)
def test_info_check_says_what_it_cannot(run, arguments, message):
    code, _, err = run("info", "--check", *arguments)
    assert (code, message in err) == (1, True), err


def test_help_teaches(run):
    for arguments in (["--help"], ["generate", "--help"], ["demo", "--help"], ["info", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "usage: elastic-decode" in out
    assert "examples:\n  elastic-decode generate tiny" in run("generate", "--help")[1]


def test_jsonl_may_hold_any_unicode(run, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes('\ufeff{"prompt": "1 1 1 = 3 \u2028"}\n'.encode())
    code, out, err = run("generate", "tiny", "-i", source, "--jsonl", "--think", 2, "--solve", 2, *FAST)
    assert code == 0, err
    assert json.loads(out)["prompt"] == "1 1 1 = 3 \u2028"
    source.write_bytes(b"\xff\xfe{}")
    code, _, err = run("generate", "tiny", "-i", source, *FAST)
    assert code == 1
    assert "UTF-8" in err


def test_help_is_quick_because_torch_is_not_imported():
    code = "import sys, elastic_decode.cli as c; c.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_demo_runs(run):
    code, out, _ = run("demo", "--problems", 8, "--shown", 1)
    assert code == 0
    assert "unlimited" in out
    assert "tokens/s" in out


def test_the_console_script_ends_with_the_exit_code():
    script = Path(sys.executable).parent / "elastic-decode"
    if not script.exists():
        pytest.skip("the package is not installed as a script in this environment")
    done = subprocess.run(
        [script, "generate", str(tiny_model_path())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "nothing to do" in done.stderr


def test_engine_flags_reach_the_configuration():
    parser = argparse.ArgumentParser()
    options.add_engine(parser)
    flags = ["--horizon", "8", "--no-cuda-graphs", "--no-batch-invariant", "--backend", "linear=torch"]
    expected = EngineConfig(horizon=8, cuda_graphs=False, batch_invariant=False, backend={"linear": "torch"})
    assert options.engine_of(parser.parse_args(flags)) == expected
    assert options.engine_of(parser.parse_args([])) == EngineConfig()
