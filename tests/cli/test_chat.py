"""`mnemon chat`: turns share one cache, sessions resume, commands and Ctrl-C work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_models import CONTEXT, run, save_tiny
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from mnemon.cli import app
from mnemon.cli.answer import interruptible
from mnemon.cli.conversation import Conversation, cache_path, load_conversation, turn_marker
from mnemon.zoo import bundled_model_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat") / "tiny")


def chat(model: Path, *lines: str, options: list[Any] | None = None) -> Result:
    text = "".join(line + "\n" for line in lines)
    fixed = ["-n", "12", "--temperature", "0"]
    return run("chat", model, *fixed, *(options or []), text=text)


def answers(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_each_turn_computes_only_what_is_new(model: Path) -> None:
    first, second, third = answers(chat(model, "one", "two", "three", options=["--json"]))
    assert first["num_reused"] == 0
    for before, after in ((first, second), (second, third)):
        # The question's turn is reused whole; of the answer at least its beginning.
        assert before["num_prompt"] <= after["num_reused"] <= before["cache"]["num_tokens"]
        assert after["cache"]["num_tokens"] > before["cache"]["num_tokens"]


def test_answers_are_those_without_a_kept_cache(model: Path) -> None:
    found = answers(chat(model, "one", "two", options=["--json"]))
    tokenizer = AutoTokenizer.from_pretrained(model)
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(model).eval()
    marker = turn_marker(tokenizer)
    assert marker is not None
    conversation = Conversation()
    for question, answer in zip(("one", "two"), found, strict=True):
        import torch

        conversation.add("user", question)
        ids = torch.tensor([conversation.prompt_ids(tokenizer)])
        out = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["content"] == text.split(marker)[0].strip()
        conversation.add("assistant", answer["content"])


def test_streams_text_and_shows_reuse(model: Path) -> None:
    wanted = answers(chat(model, "one", "two", options=["--json"]))
    result = chat(model, "one", "two")
    assert result.exit_code == 0
    for answer in wanted:
        assert answer["content"] in result.stdout
        shown = f"reused {answer['num_reused']} of {answer['num_prompt']} tokens"
        assert shown in result.stderr


def test_session_resumes_with_its_cache(model: Path, tmp_path: Path) -> None:
    session = tmp_path / "new" / "talk.json"
    session.parent.mkdir()
    options = ["--json", "--session", session]
    whole = answers(chat(model, "one", "two", "three", options=["--json"]))
    (first,) = answers(chat(model, "one", options=options))
    assert sorted(path.name for path in session.parent.iterdir()) == [
        "talk.json",
        "talk.json.cache",
    ]
    resumed = chat(model, "two", "three", "/stats", options=options)
    rest = answers(resumed)
    assert [each["content"] for each in (first, *rest)] == [each["content"] for each in whole]
    assert rest[0]["num_reused"] == whole[1]["num_reused"] > 0
    assert "resumed" in resumed.stderr
    conversation, recipe = load_conversation(session)
    assert conversation.num_turns == 3
    assert recipe == "dense"


@pytest.mark.parametrize("damage", ["missing", "cut", "other model"])
def test_a_cache_that_cannot_be_used_costs_time_not_the_talk(
    model: Path, tmp_path: Path, damage: str
) -> None:
    session = tmp_path / "talk.json"
    options = ["--json", "--session", session]
    whole = answers(chat(model, "one", "two", options=["--json"]))
    answers(chat(model, "one", options=options))
    path = cache_path(session)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        other = save_tiny(tmp_path / "other", seed=3)
        other_session = tmp_path / "other.json"
        answers(chat(other, "one", options=["--json", "--session", other_session]))
        os.replace(cache_path(other_session), path)
    result = chat(model, "two", options=options)
    (second,) = answers(result)
    assert "computes them again" in result.stderr
    assert second["num_reused"] == 0
    assert second["content"] == whole[1]["content"]


def test_another_recipe_starts_another_cache(model: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.json"
    answers(chat(model, "one", options=["--json", "--session", session]))
    options = ["--json", "--session", session, "--cache", "static(400)"]
    result = chat(model, "two", options=options)
    (second,) = answers(result)
    assert second["num_reused"] == 0
    assert "another recipe" in result.stderr
    assert load_conversation(session)[1] == "static(400)"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "mnemon-chat", "version": 2}',
        '{"format": "mnemon-chat", "version": 1, "recipe": 3, "messages": []}',
        '{"format": "mnemon-chat", "version": 1, "recipe": "", "messages": [{"role": "x"}]}',
        '{"format": "mnemon-chat", "version": 1, "recipe": "", "messages": {"role": "user"}}',
    ],
)
def test_a_file_that_is_no_session_is_refused_and_kept(
    model: Path, tmp_path: Path, content: str
) -> None:
    session = tmp_path / "talk.json"
    session.write_text(content)
    result = chat(model, "one", options=["--session", session])
    assert result.exit_code == 1
    assert "session" in result.stderr
    assert session.read_text() == content


def test_commands(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    lines = ["one", "/stats", "/help", "/nonsense", "/save", f"/save {copy}", "/reset", "/stats"]
    result = chat(model, *lines, "/exit", "never answered")
    assert result.exit_code == 0
    assert "1 turns" in result.stderr
    assert "/help          this list" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert "name a file" in result.stderr
    assert load_conversation(copy)[0].num_turns == 1
    assert re.search(r"forgotten\n0 turns · cache dense: 0 tokens", result.stderr)
    assert "never answered" not in result.output


def test_reset_begins_again_and_keeps_the_system_message(model: Path) -> None:
    options = ["--json", "--system", "be brief"]
    first, second = answers(chat(model, "one", "/reset", "one", options=options))
    assert second["num_reused"] == 0
    assert (second["content"], second["num_prompt"]) == (first["content"], first["num_prompt"])
    (without,) = answers(chat(model, "one", options=["--json"]))
    assert without["num_prompt"] < first["num_prompt"]


def test_a_session_that_cannot_be_saved_is_said_before_the_talk(model: Path) -> None:
    result = run("chat", model, "--session", "nowhere/talk", "--json", text="hello\n")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "FileError"


def test_input_that_is_no_text_is_an_error(model: Path) -> None:
    result = CliRunner().invoke(app.build("chat"), ["chat", str(model)], input=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr


def test_a_full_conversation_says_so_and_goes_on(model: Path) -> None:
    result = chat(model, "word " * CONTEXT, "one", options=["--json"])
    (only,) = answers(result)
    assert "the conversation is full" in result.stderr
    assert only == {**only, "num_reused": 0}
    assert only["num_prompt"] < 50  # the question that did not fit was taken back


def test_a_static_cache_that_is_full_says_so_and_goes_on(model: Path) -> None:
    result = chat(model, "word " * 100, "one", options=["--json", "--cache", "static(64)"])
    (only,) = answers(result)
    assert "error:" in result.stderr
    assert "64" in result.stderr
    assert only["num_prompt"] < 50


def test_model_without_template_gets_plain_turns(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "plain", chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversation = Conversation([{"role": "system", "content": "s"}])
    conversation.add("user", "u")
    text = tokenizer.decode(conversation.prompt_ids(tokenizer))
    assert text == "System: s\nUser: u\nAssistant:"
    assert turn_marker(tokenizer) == "\nUser:"
    result = chat(folder, "one")
    assert result.exit_code == 0
    assert "no chat template" in result.stderr


def test_the_bundled_model_says_that_it_is_no_assistant() -> None:
    result = run("chat", "--seed", "1", "-n", "2", text="hello\n")
    assert result.exit_code == 0
    assert "no assistant" in result.stderr


def test_the_marker_ends_an_answer_and_is_not_shown() -> None:
    import torch

    from mnemon.cli.answer import _Stream

    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    shown: list[str] = []
    stream = _Stream(tokenizer, shown.append, "\n# user:")
    stream.put(torch.tensor([[5, 6]]))
    for token in tokenizer("yes \N{SNOWMAN}, it is\n# us\n# user: more")["input_ids"]:
        stream.put(torch.tensor([token]))
        assert "\ufffd" not in "".join(shown)
    stream.end()
    assert stream.found_marker
    assert "".join(shown) == stream.text() == "yes \N{SNOWMAN}, it is\n# us"


def test_templates_with_end_tokens_need_no_marker() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    assert turn_marker(tokenizer) == "\n# user:"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    )
    assert turn_marker(tokenizer) is None


def test_first_interrupt_raises_the_sign_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as sign:
        assert not sign.is_up
        signal.raise_signal(signal.SIGINT)
        assert sign.is_up
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_interrupt_stops_the_answer_not_the_program(model: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.json"
    # One token takes about a millisecond: 400 leave time for the signal.
    options = ["-n", "400", "--temperature", "0", "--session", str(session)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemon", "chat", str(model), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(b"/stats\n/exit\n")
    finally:
        watchdog.cancel()
    assert process.returncode == 0, err.decode()
    assert "stopped" in err.decode()
    assert "1 turns" in err.decode()
    assert load_conversation(session)[0].num_turns == 1
