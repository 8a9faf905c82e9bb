"""`mnemon generate`: the right text, reuse of saved caches, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_models import CONTEXT, run, run_json, save_tiny

PROMPT = "def parse(text):\n    lines = text.split()\n    for line in lines:\n        "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("generate") / "tiny")


def expected(model: Path, prompt: str, **options: object) -> list[int]:
    """What transformers itself generates, with its own cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(model).eval()
    inputs = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = llm.generate(**inputs, max_new_tokens=20, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [[], ["--cache", "static(512)"], ["--exact"]])
def test_tokens_are_those_of_transformers(model: Path, options: list[str]) -> None:
    found = run_json("generate", model, "--prompt", PROMPT, "-n", "20", *options)
    assert found["tokens"] == expected(model, PROMPT)
    assert found["num_reused"] == 0
    assert found["cache"]["num_tokens"] == found["num_prompt"] + 19
    assert found["first_token_s"] > 0
    assert found["tokens_per_s"] > 0


def test_beams_are_those_of_transformers(model: Path) -> None:
    found = run_json("generate", model, "--prompt", PROMPT, "-n", "20", "--num-beams", "3")
    assert found["tokens"] == expected(model, PROMPT, num_beams=3)


def test_streamed_text_is_the_text(model: Path) -> None:
    found = run_json("generate", model, "--prompt", PROMPT, "-n", "20")
    for option in ("--stream", "--no-stream"):
        result = run("generate", model, "--prompt", PROMPT, "-n", "20", option)
        assert result.exit_code == 0
        assert result.stdout == found["text"] + "\n"
        assert "20 tokens" in result.stderr
        assert f"reused 0 of {found['num_prompt']}" in result.stderr


def test_sampling_repeats_with_its_seed_and_not_with_another(model: Path) -> None:
    def tokens(seed: int) -> list[int]:
        options = ["-n", "20", "--temperature", "1", "--top-p", "0.9", "--seed", str(seed)]
        return run_json("generate", model, "--prompt", PROMPT, *options)["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_prompt_from_file_and_stdin_and_both(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    wanted = run_json("generate", model, "--prompt", PROMPT + "x", "-n", "5")["tokens"]
    both = run_json("generate", model, "--prompt-file", file, "--prompt", "x", "-n", "5")
    assert both["tokens"] == wanted
    assert run_json("generate", model, "-n", "5", text=PROMPT + "x")["tokens"] == wanted
    piped = run_json("generate", model, "--prompt-file", "-", "-n", "5", text=PROMPT + "x")
    assert piped["tokens"] == wanted


def test_saved_cache_is_reused_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prompt.cache"
    first = run_json("generate", model, "--prompt", PROMPT, "-n", "8", "--save-cache", saved)
    assert first["cache"]["saved"] == str(saved)
    longer = PROMPT + "print(line)\n"
    fresh = run_json("generate", model, "--prompt", longer, "-n", "8")
    again = run_json("generate", model, "--prompt", longer, "-n", "8", "--load-cache", saved)
    assert again["tokens"] == fresh["tokens"]
    assert again["num_loaded"] == first["cache"]["num_tokens"]
    # The prompt's last token may join with what follows; all before it is the same.
    assert first["num_prompt"] - 2 <= again["num_reused"] < again["num_prompt"]
    assert "the rest was left out" in again["notes"][0]


def test_loaded_cache_alone_continues_its_text(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prompt.cache"
    first = run_json("generate", model, "--prompt", PROMPT, "-n", "8", "--save-cache", saved)
    more = run_json("generate", model, "--load-cache", saved, "-n", "5")
    whole = run_json("generate", model, "--prompt", PROMPT, "-n", "12")
    # The last token of the first run was never fed, so the second begins with it.
    assert first["tokens"][:7] + more["tokens"] == whole["tokens"]
    assert more["num_reused"] == more["num_prompt"] - 1


def test_unrelated_prompt_reuses_nothing_and_says_so(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prompt.cache"
    run_json("generate", model, "--prompt", PROMPT, "-n", "4", "--save-cache", saved)
    other = "import os\n"
    found = run_json("generate", model, "--prompt", other, "-n", "8", "--load-cache", saved)
    assert found["num_reused"] == 0
    assert "begins with 0" in found["notes"][0]
    assert found["tokens"] == run_json("generate", model, "--prompt", other, "-n", "8")["tokens"]


def test_cache_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    saved = tmp_path / "prompt.cache"
    run_json("generate", other, "--prompt", PROMPT, "-n", "4", "--save-cache", saved)
    result = run("generate", model, "--prompt", PROMPT, "--load-cache", saved)
    assert result.exit_code == 1
    assert "another model" in result.stderr
    assert "Traceback" not in result.output


def test_new_tokens_are_cut_to_the_context(model: Path) -> None:
    found = run_json("generate", model, "--prompt", "a " * (CONTEXT - 20), "-n", "100")
    assert found["num_prompt"] + len(found["tokens"]) <= CONTEXT
    assert f"context is {CONTEXT}" in found["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt", "  "], 1, "is empty"),
        (["--prompt-file", "nowhere.txt"], 1, "cannot read nowhere.txt"),
        (["--prompt-file", "."], 1, "cannot read"),
        (["--prompt", "a " * 600], 1, f"context is {CONTEXT}"),
        (["--prompt", "a", "--cache", "int3"], 1, "Valid terms"),
        (["--prompt", "a", "--cache", "static(4)", "-n", "9"], 1, "4"),
        (["--prompt", "a", "--load-cache", "nowhere"], 1, "nowhere"),
        (["--prompt", "a", "--load-cache", "x", "--cache", "dense"], 2, "recipe"),
        (["--prompt", "a", "--save-cache", "x", "--num-beams", "2"], 2, "beam"),
        (["--prompt", "a", "-n", "0"], 2, "max-new"),
        (["--prompt", "a", "--dtype", "int8"], 1, "dtype"),
        (["--prompt", "a", "--save-cache", "nowhere/x"], 1, "its folder is not there"),
        (["--prompt", "a", "--device", "meta"], 1, "unknown device"),
        (["--prompt", "a", "--cache", "static(1000000000000)"], 1, "out of memory"),
        (["--prompt", "a", "--seed", "9" * 30], 2, "seed"),
    ],
)
def test_errors_are_short_and_have_their_code(
    model: Path, arguments: list[str], code: int, words: str
) -> None:
    result = run("generate", model, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_no_prompt_at_all_and_empty_stdin(model: Path) -> None:
    result = run("generate", model, text="")
    assert result.exit_code == 1
    assert "standard input is empty" in result.stderr


def test_bytes_that_are_no_text(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bytes.bin"
    file.write_bytes(b"abc\xff\xfe")
    result = run("generate", model, "--prompt-file", file)
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr


def test_unknown_model_and_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = run("generate", "./no-such-folder", "--prompt", "a")
    assert missing.exit_code == 1
    assert "no-such-folder" in missing.stderr
    # The client reads this once, at import: an address that refuses connections stands in.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = run("generate", "nobody/no-such-model", "--prompt", "a")
    assert hub.exit_code == 1
    assert "nobody/no-such-model" in hub.stderr
    assert "network" in hub.stderr


def test_a_temperature_next_to_nothing_is_none(model: Path) -> None:
    found = run_json("generate", model, "--prompt", PROMPT, "-n", "20", "--temperature", "1e-300")
    assert found["tokens"] == expected(model, PROMPT)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"junk", "cannot be loaded"),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": "two"}', "cannot be loaded"),
        ("tokenizer.json", None, "tokenizer.save_pretrained"),
        ("tokenizer.json", b"junk", "tokenizer.save_pretrained"),
    ],
)
def test_a_damaged_model_folder_is_an_error(
    tmp_path: Path, file: str, content: bytes | None, words: str
) -> None:
    folder = save_tiny(tmp_path / "damaged")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    result = run("generate", folder, "--prompt", "a")
    assert result.exit_code == 1
    assert words in result.stderr


def test_an_encoder_decoder_cache_has_no_text_to_continue(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    folder, file = save_tiny(tmp_path / "bart"), tmp_path / "bart.cache"
    config = BartConfig(
        vocab_size=4096,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    run_json("generate", folder, "--prompt", "a b", "-n", "4", "--save-cache", file)
    result = run("generate", folder, "--load-cache", file, "-n", "4")
    assert result.exit_code == 1
    assert "not the prompt's text" in result.stderr.replace("\n", " ")


def test_errors_are_json_when_asked_for(model: Path) -> None:
    result = run("generate", model, "--prompt", "a", "--cache", "int3", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "RecipeError"
