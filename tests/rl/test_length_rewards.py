"""Length rewards on numbers worked out by hand."""

import pickle

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl.length_rewards import (
    L1Exact,
    L1Max,
    Long2Short,
    SoftOverlong,
    l1_suffix,
    with_l1_suffix,
)


def graded(grade, **_):
    """A reward function that finds its scores in a column."""
    return grade


def called(reward, lengths, grade=None, prompts=None, **columns):
    return reward(
        prompts=prompts or ["p"] * len(lengths),
        completions=["words"] * len(lengths),
        completion_ids=[list(range(length)) for length in lengths],
        grade=grade if grade is not None else [1.0] * len(lengths),
        **columns,
    )


def test_l1_exact():
    found = called(
        L1Exact(correct=graded),
        [100, 120, 80, 100, 100],
        [1.0, 1.0, 0.0, None, 0.0],
        target_tokens=[100, 100, 100, 100, 1100],
    )
    # 1; 1 - 0.0003 · 20; 0 - 0.0003 · 20; unscorable; 0 - 0.0003 · 1000
    assert found == [1.0, pytest.approx(0.994), pytest.approx(-0.006), None, pytest.approx(-0.3)]


def test_l1_max():
    reward = L1Max(correct=graded, target=100, alpha=0.01, delta=0.5)
    found = called(reward, [100, 80, 120, 10, 200, 80, 80], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, None])
    # 0.5; + 0.01 · 20; - 0.01 · 20; clipped at 1; clipped at 0; wrong; unscorable
    assert found == [0.5, pytest.approx(0.7), pytest.approx(0.3), 1.0, 0.0, 0.0, None]
    # The paper's numbers: 100 tokens over is 0.03 less
    assert called(L1Max(correct=graded, target=100), [200]) == [pytest.approx(0.47)]


def test_correct_is_above_the_threshold():
    reward = L1Exact(correct=graded, target=4, threshold=0.9)
    assert called(reward, [4, 4, 4], [0.9, 0.95, -1.0]) == [0.0, 1.0, 0.0]


def test_long2short_within_each_prompt():
    lengths = [10, 20, 30, 10, 30, 5, 5, 1]
    grade = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, None]
    prompts = ["a", "a", "a", "a", "a", [{"role": "user", "content": "b"}]] + [
        [{"role": "user", "content": "b"}]
    ] * 2
    # lambda of "a": 0.5 at 10, 0 at 20, -0.5 at 30; wrong ones at most 0. "b" has one length: the unscorable
    # 1 does not count.
    assert called(Long2Short(correct=graded), lengths, grade, prompts) == [
        0.5,
        0.0,
        -0.5,
        0.0,
        -0.5,
        0.0,
        0.0,
        None,
    ]


def test_soft_overlong():
    reward = SoftOverlong(longest=20, margin=4)
    assert called(reward, [0, 16, 17, 19, 20, 25]) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    for margin in (0, 21):
        with pytest.raises(ConfigError, match="margin"):
            SoftOverlong(longest=20, margin=margin)


def test_length_may_be_a_column():
    by_column = SoftOverlong(longest=20, margin=4, length="think_tokens")
    assert called(by_column, [99, 99], think_tokens=[18, 3]) == [-0.5, 0.0]
    exact = L1Exact(correct=graded, target=4, length="think_tokens", alpha=0.1)
    assert called(exact, [99], think_tokens=[5]) == [pytest.approx(0.9)]


def test_bad_columns_raise():
    with pytest.raises(ConfigError, match=r"'target_tokens'.*there are prompts, completions"):
        called(L1Exact(correct=graded), [1])
    with pytest.raises(ConfigError, match="numbers of tokens, got None"):
        called(L1Exact(correct=graded), [1], target_tokens=[None])
    with pytest.raises(ConfigError, match="1 scores for 2 completions"):
        called(L1Max(correct=graded, target=1), [1, 2], [1.0])


ANY = SoftOverlong(longest=9, margin=3)
NAMED = {
    "l1_exact": L1Exact(correct=ANY),
    "l1_max": L1Max(correct=ANY),
    "long2short": Long2Short(correct=ANY),
    "soft_overlong": ANY,
}


@pytest.mark.parametrize("name", NAMED)
def test_they_are_named_and_go_to_worker_processes(name: str):
    reward = NAMED[name]
    assert reward.__name__ == name
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward
    assert called(copy, [7, 9], target_tokens=[3, 3]) == called(reward, [7, 9], target_tokens=[3, 3])


def test_the_prompt_says_the_budget():
    assert l1_suffix(512) == " Think for 512 tokens."
    assert l1_suffix(512, exact=False) == " Think for maximum 512 tokens."
    assert with_l1_suffix("2 + 2?", 8) == "2 + 2? Think for 8 tokens."
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "sure?", "name": "x"},
        {"role": "system", "content": "be short"},
    ]
    said = with_l1_suffix(chat, 8, exact=False)
    assert said[2] == {"role": "user", "content": "sure? Think for maximum 8 tokens.", "name": "x"}
    assert (said[:2], said[3:]) == (chat[:2], chat[3:])
    assert chat[2]["content"] == "sure?"  # not changed in place
    for prompt in ([1, 2, 3], [], [{"role": "system", "content": "no user"}]):
        with pytest.raises(ConfigError, match="L1's budget"):
            with_l1_suffix(prompt, 8)
    for tokens in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="number of tokens"):
            l1_suffix(tokens)
