"""Datasets: what is read, what is refused, and an order that one int resumes."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_decode.errors import ConfigError
from elastic_decode.rl.config import RewardOptions
from elastic_decode.rl.data import Dataset, from_records, load
from elastic_decode.rl.options import DataOptions
from elastic_decode.rl.reward_names import resolve
from elastic_decode.rl.rollout import Row
from elastic_decode.tasks import countdown


def options(source="x.jsonl", **values):
    return DataOptions(source=str(source), **values)


def numbered(count):
    return [{"prompt": f"p{i}", "answer": i} for i in range(count)]


@given(
    count=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    seed=st.integers(0, 3),
    cut=st.integers(0, 7),
)
def test_no_row_is_skipped_or_repeated_and_a_resumed_run_goes_on_alike(count, sizes, seed, cut):
    rows = [Row(i, str(i), {}) for i in range(count)]
    dataset, taken, position = Dataset(rows, seed=seed), [], 0
    for number, size in enumerate(sizes):
        if number == cut:
            dataset = Dataset(rows, seed=seed)  # another process
        batch, position = dataset.batch(position, size)
        assert len(batch) == size
        taken += [row.index for row in batch]
    assert position == len(taken) == sum(sizes)
    for start in range(0, len(taken), count):
        epoch = taken[start : start + count]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == count:
            assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    dataset = from_records(numbered(50), options())
    first, second = ([row.index for row in dataset.batch(start, 50)[0]] for start in (0, 50))
    assert first != second
    assert [row.index for row in from_records(numbered(50), options(), seed=1).batch(0, 50)[0]] != first
    plain = from_records(numbered(50), options(shuffle=False))
    assert [row.index for row in plain.batch(48, 4)[0]] == [48, 49, 0, 1]
    assert dataset.epoch(75) == 1.5
    with pytest.raises(ValueError, match="position must be >= 0"):
        dataset.batch(-1, 2)


def test_the_order_is_the_same_in_every_version():
    order = [row.index for row in from_records(numbered(8), options(), seed=3).batch(0, 8)[0]]
    assert order == [0, 1, 7, 3, 6, 4, 2, 5]


def test_files(tmp_path):
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    rows = [{"prompt": "a\u2028b", "answer": [1, {"deep": None}]}, {"prompt": "c", "answer": []}]
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    whole.write_text(json.dumps(rows))
    for path in (lines, whole):
        dataset = load(options(path))
        assert [row.prompt for row in dataset.rows] == ["a\u2028b", "c"]
        assert dataset.rows[0].columns == {"answer": [1, {"deep": None}]}
    assert load(options(lines)).fingerprint() == load(options(whole)).fingerprint()
    assert load(options(lines, limit=1)).fingerprint() != load(options(lines)).fingerprint()


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(numbered(3)), tmp_path / "rows.parquet")
    assert load(options(tmp_path / "rows.parquet")).rows[2] == Row(2, "p2", {"answer": 2})


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, source, package):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        load(options(source))


def test_columns_are_renamed_and_prompts_dressed():
    records = [{"problem": "1+1?", "prompt": "old", "answer": "2", "extra": 1}]
    with pytest.raises(ConfigError, match="a column 'prompt', and there is one already"):
        from_records(records, options(columns={"prompt": "problem"}))
    del records[0]["prompt"]
    chosen = options(
        columns={"prompt": "problem", "gold": "answer"},
        prefix="Q: ",
        suffix=" A:",
        chat=True,
        system="be brief",
    )
    (row,) = from_records(records, chosen).rows
    assert row.prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Q: 1+1? A:"},
    ]
    assert row.columns == {"gold": "2", "extra": 1}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no rows"),
        ([{"question": "?", "answer": 1}], "no column 'prompt' .*there are: question, answer"),
        ([{}], "there are: none"),
        (["a"], "row 0: expected an object with a prompt, got str"),
        ([{"prompt": 3}], "a prompt is a string or a chat, got 3"),
        ([{"prompt": " "}], "the prompt is empty"),
        ([{"prompt": []}], "a prompt is a string or a chat"),
        ([{"prompt": [{"role": "user"}]}], "have 'role' and 'content'"),
        ([{"prompt": ["a"]}], "have 'role' and 'content'"),
        ([{"prompt": "a"}, {"prompt": "b", "x": 1}], "row 1: column 'x' is in some rows and not in others"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], "1 of 3 rows repeat .*row 2 is row 0"),
    ],
)
def test_what_is_no_dataset(records, message):
    with pytest.raises(ConfigError, match=message):
        from_records(records, options())


def test_duplicates_on_request():
    records = [*numbered(2), *numbered(2)]
    assert [row.index for row in from_records(records, options(duplicates="keep")).rows] == [0, 1, 2, 3]
    assert [row.index for row in from_records(records, options(duplicates="drop")).rows] == [0, 1]


def test_a_chat_is_not_dressed():
    with pytest.raises(ConfigError, match="for prompts that are strings"):
        from_records([{"prompt": [{"role": "user", "content": "a"}]}], options(suffix="!"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{', r"a.jsonl:2: not JSON"),
        ("a.json", '{"prompt": "a"}', "must hold a list of objects, got dict"),
        ("a.json", "[", "is not JSON"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "", r"must be a file that ends in .jsonl, .json, .parquet"),
        ("absent.jsonl", None, "there is no file"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(options(tmp_path / name))


def test_countdown_and_its_reward():
    train, test = (load(options("countdown", split=split)) for split in ("train", "test"))
    assert len(train) == len(countdown.problems("train"))
    assert not {row.prompt[0]["content"] for row in train.rows} & {
        row.prompt[0]["content"] for row in test.rows
    }
    (reward,) = resolve([RewardOptions(function="countdown")]).values()
    columns = {name: [value, value] for name, value in test.rows[0].columns.items()}
    problem = countdown.problems("test")[0]
    right = " ".join(problem.solutions()[0])
    assert reward(prompts=[], completions=[], completion_ids=[], solution=[right, ""], **columns) == [
        1.0,
        0.0,
    ]
    with pytest.raises(ConfigError, match="must be train or test"):
        load(options("countdown", split="dev"))


def test_rewards_by_name():
    made = resolve(
        [
            RewardOptions(function="l1_max", options={"correct": "countdown", "target": 9}),
            RewardOptions(function="math:exp", name="e"),
        ]
    )
    assert list(made) == ["l1_max", "e"]
    assert made["e"](0) == 1
    for reward, message in [
        (RewardOptions(function="no_such:f"), "rewards.0: no_such:f cannot be imported"),
        (RewardOptions(function="math:no"), "has no attribute 'no'"),
        (RewardOptions(function="math:pi"), "no function"),
        (RewardOptions(function="l1_exact", options={"corect": "countdown"}), "unexpected keyword"),
        (RewardOptions(function="l1_exact", options={"correct": "l2"}), "rewards.0.options.correct: 'l2'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve([reward])
    with pytest.raises(ConfigError, match="already; give this one a name"):
        resolve([RewardOptions(function="countdown")] * 2)
